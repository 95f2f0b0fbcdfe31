"""Butcher tableaux of explicit and diagonally implicit Runge-Kutta methods, as published; used in float64."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property


def row(*entries: str | int) -> tuple[Fraction, ...]:
    """Exact numbers."""
    return tuple(Fraction(entry) for entry in entries)


@dataclass(frozen=True)
class ButcherTableau:
    """A method k_i = f(t + c_i h, x + h Σ_{j≤i} a_ij k_j), x⁺ = x + h Σ b_i k_i.

    Entries are exact: fractions, or decimal numbers as published.

    Args:
        order: order of x⁺.
        c: nodes.
        a: rows of the matrix below its diagonal; the first row is empty.
        b: weights.
        b_hat: weights of the embedded method of order `order` - 1; b - b_hat gives the error estimate.
        stability: h |λ| on the negative real axis up to which y' = λ y does not grow.
        interpolation: [stages] coefficients of θ, θ², … in the weight b_i(θ) of each stage.
        gamma: entries a_ii of the diagonal, empty for an explicit method.
    """

    order: int
    c: tuple[Fraction, ...]
    a: tuple[tuple[Fraction, ...], ...]
    b: tuple[Fraction, ...]
    b_hat: tuple[Fraction, ...] | None = None
    stability: float | None = None
    interpolation: tuple[tuple[Fraction, ...], ...] | None = None
    gamma: tuple[Fraction, ...] = ()

    def __post_init__(self) -> None:
        stages = len(self.b)
        widths = [len(row) for row in self.a]
        others = (self.c, self.b_hat or self.b, self.gamma or self.b)
        if widths != list(range(stages)) or any(len(each) != stages for each in others):
            raise ValueError(
                f"ButcherTableau: {stages} weights need {stages} nodes, rows of 0 … {stages - 1} entries and as many "
                f"embedded weights and entries of the diagonal; found {len(self.c)} nodes and rows of {widths}."
            )

    @cached_property
    def rows(self) -> tuple[tuple[Fraction, ...], ...]:
        """The rows of a up to the diagonal."""
        return tuple((*row, g) for row, g in zip(self.a, self.gamma or [Fraction(0)] * len(self.b), strict=True))

    @cached_property
    def fsal(self) -> bool:
        """Whether the last stage of a step is the first one of the next (first same as last)."""
        return len(self.b) > 1 and self.c[-1] == 1 and self.rows[0] == (0,) and self.rows[-1] == self.b

    @property
    def new_stages(self) -> int:
        """Evaluations per step, without the one that FSAL methods take over from the step before."""
        return len(self.b) - self.fsal

    @cached_property
    def paired(self) -> bool:
        """Whether the last two stages share a time, as the stiffness estimate needs."""
        return len(self.b) > 1 and self.c[-1] == self.c[-2]

    @cached_property
    def nodes(self) -> tuple[float, ...]:
        """c in float64."""
        return tuple(map(float, self.c))

    @cached_property
    def matrix(self) -> tuple[tuple[float, ...], ...]:
        """The rows of a in float64."""
        return tuple(tuple(map(float, row)) for row in self.a)

    @cached_property
    def diagonal(self) -> tuple[float, ...]:
        """The diagonal of a in float64."""
        return tuple(float(row[-1]) for row in self.rows)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """b in float64."""
        return tuple(map(float, self.b))

    @cached_property
    def error_weights(self) -> tuple[float, ...] | None:
        """b - b_hat in float64."""
        return self.b_hat and tuple(float(b - h) for b, h in zip(self.b, self.b_hat, strict=True))

    @cached_property
    def dense(self) -> tuple[tuple[float, ...], ...] | None:
        """For each power θ, θ², … the weights of the stages in x(t + θ h), in float64."""
        columns = self.interpolation and tuple(zip(*self.interpolation, strict=True))
        return columns and tuple(tuple(map(float, column)) for column in columns)

    @cached_property
    def pair_weights(self) -> tuple[float, ...]:
        """a_s - a_{s-1} in float64: h times this combination is the difference of the states of the last two stages."""
        *_, before, last = self.rows
        return tuple(float(x - y) for x, y in zip(last, (*before, Fraction(0)), strict=True))


def _through_middle(b: tuple[Fraction, ...], twice_middle: tuple[Fraction, ...]) -> tuple[tuple[Fraction, ...], ...]:
    """Weights of the quartic through both states and slopes of a step and its middle x + h/2 Σ twice_middle_i k_i.

    Source: Shampine 1986, Some practical Runge-Kutta formulas.
    """
    rows = []
    for i, (weight, twice) in enumerate(zip(b, twice_middle, strict=True)):
        first, last, middle = Fraction(i == 0), Fraction(i == len(b) - 1), twice / 2
        square = last - 4 * first - 5 * weight + 16 * middle
        cube = 5 * first - 3 * last + 14 * weight - 32 * middle
        rows.append((first, square, cube, 2 * (last - first) - 8 * weight + 16 * middle))
    return tuple(rows)


EULER = ButcherTableau(1, row(0), ((),), row(1), stability=2.0)

MIDPOINT = ButcherTableau(2, row(0, "1/2"), ((), row("1/2")), row(0, 1), stability=2.0)

# the embedded method is Euler's
HEUN = ButcherTableau(2, row(0, 1), ((), row(1)), row("1/2", "1/2"), row(1, 0), stability=2.0)

RALSTON = ButcherTableau(2, row(0, "2/3"), ((), row("2/3")), row("1/4", "3/4"), row(1, 0), stability=2.0)

BOSH3 = ButcherTableau(
    3,
    row(0, "1/2", "3/4", 1),
    ((), row("1/2"), row(0, "3/4"), row("2/9", "1/3", "4/9")),
    row("2/9", "1/3", "4/9", 0),
    row("7/24", "1/4", "1/3", "1/8"),
    stability=2.512745,
)

HEUN3 = ButcherTableau(
    3, row(0, "1/3", "2/3"), ((), row("1/3"), row(0, "2/3")), row("1/4", 0, "3/4"), stability=2.512745
)

RK4 = ButcherTableau(
    4,
    row(0, "1/2", "1/2", 1),
    ((), row("1/2"), row(0, "1/2"), row(0, 0, 1)),
    row("1/6", "1/3", "1/3", "1/6"),
    stability=2.785294,
)

RK38 = ButcherTableau(
    4,
    row(0, "1/3", "2/3", 1),
    ((), row("1/3"), row("-1/3", 1), row(1, -1, 1)),
    row("1/8", "3/8", "3/8", "1/8"),
    stability=2.785294,
)

DOPRI5 = ButcherTableau(
    5,
    row(0, "1/5", "3/10", "4/5", "8/9", 1, 1),
    (
        (),
        row("1/5"),
        row("3/40", "9/40"),
        row("44/45", "-56/15", "32/9"),
        row("19372/6561", "-25360/2187", "64448/6561", "-212/729"),
        row("9017/3168", "-355/33", "46732/5247", "49/176", "-5103/18656"),
        row("35/384", 0, "500/1113", "125/192", "-2187/6784", "11/84"),
    ),
    row("35/384", 0, "500/1113", "125/192", "-2187/6784", "11/84", 0),
    row("5179/57600", 0, "7571/16695", "393/640", "-92097/339200", "187/2100", "1/40"),
    stability=3.306568,
    interpolation=_through_middle(
        row("35/384", 0, "500/1113", "125/192", "-2187/6784", "11/84", 0),
        row(
            "6025192743/30085553152",
            0,
            "51252292925/65400821598",
            "-2691868925/45128329728",
            "187940372067/1594534317056",
            "-1776094331/19743644256",
            "11237099/235043384",
        ),
    ),
)

# published as decimal numbers: its order conditions hold to their 15 digits
TSIT5 = ButcherTableau(
    5,
    row(0, "0.161", "0.327", "0.9", "0.9800255409045097", 1, 1),
    (
        (),
        row("0.161"),
        row("-0.008480655492356989", "0.335480655492357"),
        row("2.8971530571054935", "-6.359448489975075", "4.3622954328695815"),
        row("5.325864828439257", "-11.748883564062828", "7.4955393428898365", "-0.09249506636175525"),
        row(
            "5.86145544294642", "-12.92096931784711", "8.159367898576159", "-0.071584973281401", "-0.028269050394068383"
        ),
        row(
            "0.09646076681806523",
            "0.01",
            "0.4798896504144996",
            "1.379008574103742",
            "-3.290069515436081",
            "2.324710524099774",
        ),
    ),
    row(
        "0.09646076681806523",
        "0.01",
        "0.4798896504144996",
        "1.379008574103742",
        "-3.290069515436081",
        "2.324710524099774",
        0,
    ),
    row(
        "0.09468075576583945",
        "0.009183565540343254",
        "0.4877705284247616",
        "1.234297566930479",
        "-2.7077123499835256",
        "1.866628418170587",
        "0.015151515151515152",
    ),
    stability=3.506847,
    interpolation=(
        row("1", "-2.763706197274826", "2.9132554618219126", "-1.0530884977290216"),
        row(0, "0.1317", "-0.2234", "0.1017"),
        row(0, "3.9302962368947516", "-5.941033872131505", "2.490627285651253"),
        row(0, "-12.411077166933676", "30.33818863028232", "-16.548102889244902"),
        row(0, "37.50931341651104", "-88.1789048947664", "47.37952196281928"),
        row(0, "-27.896526289197286", "65.09189467479366", "-34.87065786149661"),
        row(0, "1.5", "-4", "2.5"),
    ),
)
