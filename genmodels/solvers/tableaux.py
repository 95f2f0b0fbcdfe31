"""Butcher tableaux of Runge-Kutta methods, explicit and diagonally implicit, written as they are published and used in float64."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property


def _row(*entries: str | int) -> tuple[Fraction, ...]:
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
        gamma: entries a_ii of the diagonal, empty for an explicit method.
    """

    order: int
    c: tuple[Fraction, ...]
    a: tuple[tuple[Fraction, ...], ...]
    b: tuple[Fraction, ...]
    b_hat: tuple[Fraction, ...] | None = None
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
    def pair_weights(self) -> tuple[float, ...]:
        """a_s - a_{s-1} in float64: h times this combination is the difference of the states of the last two stages."""
        *_, before, last = self.rows
        return tuple(float(x - y) for x, y in zip(last, (*before, Fraction(0)), strict=True))


EULER = ButcherTableau(1, _row(0), ((),), _row(1))

MIDPOINT = ButcherTableau(2, _row(0, "1/2"), ((), _row("1/2")), _row(0, 1))

# the embedded method is Euler's
HEUN = ButcherTableau(2, _row(0, 1), ((), _row(1)), _row("1/2", "1/2"), _row(1, 0))

RALSTON = ButcherTableau(2, _row(0, "2/3"), ((), _row("2/3")), _row("1/4", "3/4"), _row(1, 0))

BOSH3 = ButcherTableau(
    3,
    _row(0, "1/2", "3/4", 1),
    ((), _row("1/2"), _row(0, "3/4"), _row("2/9", "1/3", "4/9")),
    _row("2/9", "1/3", "4/9", 0),
    _row("7/24", "1/4", "1/3", "1/8"),
)

RK4 = ButcherTableau(
    4,
    _row(0, "1/2", "1/2", 1),
    ((), _row("1/2"), _row(0, "1/2"), _row(0, 0, 1)),
    _row("1/6", "1/3", "1/3", "1/6"),
)

RK38 = ButcherTableau(
    4,
    _row(0, "1/3", "2/3", 1),
    ((), _row("1/3"), _row("-1/3", 1), _row(1, -1, 1)),
    _row("1/8", "3/8", "3/8", "1/8"),
)

DOPRI5 = ButcherTableau(
    5,
    _row(0, "1/5", "3/10", "4/5", "8/9", 1, 1),
    (
        (),
        _row("1/5"),
        _row("3/40", "9/40"),
        _row("44/45", "-56/15", "32/9"),
        _row("19372/6561", "-25360/2187", "64448/6561", "-212/729"),
        _row("9017/3168", "-355/33", "46732/5247", "49/176", "-5103/18656"),
        _row("35/384", 0, "500/1113", "125/192", "-2187/6784", "11/84"),
    ),
    _row("35/384", 0, "500/1113", "125/192", "-2187/6784", "11/84", 0),
    _row("5179/57600", 0, "7571/16695", "393/640", "-92097/339200", "187/2100", "1/40"),
)

# published as decimal numbers: its order conditions hold to their 15 digits
TSIT5 = ButcherTableau(
    5,
    _row(0, "0.161", "0.327", "0.9", "0.9800255409045097", 1, 1),
    (
        (),
        _row("0.161"),
        _row("-0.008480655492356989", "0.335480655492357"),
        _row("2.8971530571054935", "-6.359448489975075", "4.3622954328695815"),
        _row("5.325864828439257", "-11.748883564062828", "7.4955393428898365", "-0.09249506636175525"),
        _row(
            "5.86145544294642", "-12.92096931784711", "8.159367898576159", "-0.071584973281401", "-0.028269050394068383"
        ),
        _row(
            "0.09646076681806523",
            "0.01",
            "0.4798896504144996",
            "1.379008574103742",
            "-3.290069515436081",
            "2.324710524099774",
        ),
    ),
    _row(
        "0.09646076681806523",
        "0.01",
        "0.4798896504144996",
        "1.379008574103742",
        "-3.290069515436081",
        "2.324710524099774",
        0,
    ),
    _row(
        "0.09468075576583945",
        "0.009183565540343254",
        "0.4877705284247616",
        "1.234297566930479",
        "-2.7077123499835256",
        "1.866628418170587",
        "0.015151515151515152",
    ),
)

IMPLICIT_MIDPOINT = ButcherTableau(2, _row("1/2"), ((),), _row(1), gamma=_row("1/2"))

TRAPEZOID = ButcherTableau(2, _row(0, 1), ((), _row("1/2")), _row("1/2", "1/2"), gamma=_row(0, "1/2"))


def _kvaerno3(g: Fraction) -> ButcherTableau:
    """Every g gives order 3; the root of g³ - 3g² + 3g/2 - 1/6 makes the method L-stable."""
    rows = (
        (),
        (g,),
        ((-4 * g**2 + 6 * g - 1) / (4 * g), (1 - 2 * g) / (4 * g)),
        ((6 * g - 1) / (12 * g), -1 / (12 * g * (2 * g - 1)), (-6 * g**2 + 6 * g - 1) / (6 * g - 3)),
    )
    return ButcherTableau(3, (*_row(0), 2 * g, *_row(1, 1)), rows, (*rows[3], g), (*rows[2], g, Fraction(0)), (Fraction(0), g, g, g))


KVAERNO3 = _kvaerno3(Fraction("0.43586652150845899942"))


def _esdirk54() -> ButcherTableau:
    """As published: fractions good to 25 digits, the first column of a equal to the second."""
    below = (
        ("791020047304/3561426431547",),
        ("-158159076358/11257294102345", "-85517644447/5003708988389"),
        ("-1653327111580/4048416487981", "1514767744496/9099671765375", "14283835447591/12247432691556"),
        (
            "-4540011970825/8418487046959",
            "-1790937573418/7393406387169",
            "10819093665085/7266595846747",
            "4109463131231/7386972500302",
        ),
        (
            "-188593204321/4778616380481",
            "2809310203510/10304234040467",
            "1021729336898/2364210264653",
            "870612361811/2470410392208",
            "-1307970675534/8059683598661",
        ),
    )
    g = Fraction(23, 125)
    rows = ((), (g,), *(_row(row[0], *row) for row in below))
    return ButcherTableau(
        5,
        _row(0, "46/125", "7121331996143/11335814405378", "49/353", "3706679970760/5295570149437", "347/382", 1),
        rows,
        (*rows[-1], g),
        _row(
            "-582099335757/7214068459310",
            "-582099335757/7214068459310",
            "615023338567/3362626566945",
            "3192122436311/6174152374399",
            "6156034052041/14430468657929",
            "-1011318518279/9693750372484",
            "1914490192573/13754262428401",
        ),
        (Fraction(0), *[g] * 6),
    )


ESDIRK54 = _esdirk54()
