"""Butcher tableaux of explicit and diagonally implicit Runge-Kutta methods, as published; used in float64."""

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


EULER = ButcherTableau(1, _row(0), ((),), _row(1), stability=2.0)

MIDPOINT = ButcherTableau(2, _row(0, "1/2"), ((), _row("1/2")), _row(0, 1), stability=2.0)

# the embedded method is Euler's
HEUN = ButcherTableau(2, _row(0, 1), ((), _row(1)), _row("1/2", "1/2"), _row(1, 0), stability=2.0)

RALSTON = ButcherTableau(2, _row(0, "2/3"), ((), _row("2/3")), _row("1/4", "3/4"), _row(1, 0), stability=2.0)

BOSH3 = ButcherTableau(
    3,
    _row(0, "1/2", "3/4", 1),
    ((), _row("1/2"), _row(0, "3/4"), _row("2/9", "1/3", "4/9")),
    _row("2/9", "1/3", "4/9", 0),
    _row("7/24", "1/4", "1/3", "1/8"),
    stability=2.512745,
)

RK4 = ButcherTableau(
    4,
    _row(0, "1/2", "1/2", 1),
    ((), _row("1/2"), _row(0, "1/2"), _row(0, 0, 1)),
    _row("1/6", "1/3", "1/3", "1/6"),
    stability=2.785294,
)

RK38 = ButcherTableau(
    4,
    _row(0, "1/3", "2/3", 1),
    ((), _row("1/3"), _row("-1/3", 1), _row(1, -1, 1)),
    _row("1/8", "3/8", "3/8", "1/8"),
    stability=2.785294,
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
    stability=3.306568,
    interpolation=_through_middle(
        _row("35/384", 0, "500/1113", "125/192", "-2187/6784", "11/84", 0),
        _row(
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
    stability=3.506847,
    interpolation=(
        _row("1", "-2.763706197274826", "2.9132554618219126", "-1.0530884977290216"),
        _row(0, "0.1317", "-0.2234", "0.1017"),
        _row(0, "3.9302962368947516", "-5.941033872131505", "2.490627285651253"),
        _row(0, "-12.411077166933676", "30.33818863028232", "-16.548102889244902"),
        _row(0, "37.50931341651104", "-88.1789048947664", "47.37952196281928"),
        _row(0, "-27.896526289197286", "65.09189467479366", "-34.87065786149661"),
        _row(0, "1.5", "-4", "2.5"),
    ),
)

# published as fractions good to 18 digits; the last stage is added to have the slope at the end, and to hand it on
DOPRI8 = ButcherTableau(
    8,
    _row(
        0,
        "1/18",
        "1/12",
        "1/8",
        "5/16",
        "3/8",
        "59/400",
        "93/200",
        "5490023248/9719169821",
        "13/20",
        "1201146811/1299019798",
        1,
        1,
        1,
    ),
    (
        (),
        _row("1/18"),
        _row("1/48", "1/16"),
        _row("1/32", 0, "3/32"),
        _row("5/16", 0, "-75/64", "75/64"),
        _row("3/80", 0, 0, "3/16", "3/20"),
        _row("29443841/614563906", 0, 0, "77736538/692538347", "-28693883/1125000000", "23124283/1800000000"),
        _row(
            "16016141/946692911",
            0,
            0,
            "61564180/158732637",
            "22789713/633445777",
            "545815736/2771057229",
            "-180193667/1043307555",
        ),
        _row(
            "39632708/573591083",
            0,
            0,
            "-433636366/683701615",
            "-421739975/2616292301",
            "100302831/723423059",
            "790204164/839813087",
            "800635310/3783071287",
        ),
        _row(
            "246121993/1340847787",
            0,
            0,
            "-37695042795/15268766246",
            "-309121744/1061227803",
            "-12992083/490766935",
            "6005943493/2108947869",
            "393006217/1396673457",
            "123872331/1001029789",
        ),
        _row(
            "-1028468189/846180014",
            0,
            0,
            "8478235783/508512852",
            "1311729495/1432422823",
            "-10304129995/1701304382",
            "-48777925059/3047939560",
            "15336726248/1032824649",
            "-45442868181/3398467696",
            "3065993473/597172653",
        ),
        _row(
            "185892177/718116043",
            0,
            0,
            "-3185094517/667107341",
            "-477755414/1098053517",
            "-703635378/230739211",
            "5731566787/1027545527",
            "5232866602/850066563",
            "-4093664535/808688257",
            "3962137247/1805957418",
            "65686358/487910083",
        ),
        _row(
            "403863854/491063109",
            0,
            0,
            "-5068492393/434740067",
            "-411421997/543043805",
            "652783627/914296604",
            "11173962825/925320556",
            "-13158990841/6184727034",
            "3936647629/1978049680",
            "-160528059/685178525",
            "248638103/1413531060",
            0,
        ),
        _row(
            "14005451/335480064",
            0,
            0,
            0,
            0,
            "-59238493/1068277825",
            "181606767/758867731",
            "561292985/797845732",
            "-1041891430/1371343529",
            "760417239/1151165299",
            "118820643/751138087",
            "-528747749/2220607170",
            "1/4",
        ),
    ),
    _row(
        "14005451/335480064",
        0,
        0,
        0,
        0,
        "-59238493/1068277825",
        "181606767/758867731",
        "561292985/797845732",
        "-1041891430/1371343529",
        "760417239/1151165299",
        "118820643/751138087",
        "-528747749/2220607170",
        "1/4",
        0,
    ),
    _row(
        "13451932/455176623",
        0,
        0,
        0,
        0,
        "-808719846/976000145",
        "1757004468/5645159321",
        "656045339/265891186",
        "-3867574721/1518517206",
        "465885868/322736535",
        "53011238/667516719",
        "2/45",
        0,
        0,
    ),
    stability=5.166633,
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
    return ButcherTableau(
        3, (*_row(0), 2 * g, *_row(1, 1)), rows, (*rows[3], g), (*rows[2], g, Fraction(0)), (Fraction(0), g, g, g)
    )


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
