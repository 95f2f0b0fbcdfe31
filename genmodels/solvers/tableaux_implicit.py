"""Butcher tableaux of diagonally implicit Runge-Kutta methods, as published; used in float64."""

from fractions import Fraction

from .tableaux import ButcherTableau, row

IMPLICIT_MIDPOINT = ButcherTableau(2, row("1/2"), ((),), row(1), gamma=row("1/2"))

TRAPEZOID = ButcherTableau(2, row(0, 1), ((), row("1/2")), row("1/2", "1/2"), gamma=row(0, "1/2"))


def _kvaerno3(g: Fraction) -> ButcherTableau:
    """Every g gives order 3; the root of g³ - 3g² + 3g/2 - 1/6 makes the method L-stable."""
    rows = (
        (),
        (g,),
        ((-4 * g**2 + 6 * g - 1) / (4 * g), (1 - 2 * g) / (4 * g)),
        ((6 * g - 1) / (12 * g), -1 / (12 * g * (2 * g - 1)), (-6 * g**2 + 6 * g - 1) / (6 * g - 3)),
    )
    return ButcherTableau(
        3, (*row(0), 2 * g, *row(1, 1)), rows, (*rows[3], g), (*rows[2], g, Fraction(0)), gamma=(Fraction(0), g, g, g)
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
    rows = ((), (g,), *(row(line[0], *line) for line in below))
    return ButcherTableau(
        5,
        row(0, "46/125", "7121331996143/11335814405378", "49/353", "3706679970760/5295570149437", "347/382", 1),
        rows,
        (*rows[-1], g),
        row(
            "-582099335757/7214068459310",
            "-582099335757/7214068459310",
            "615023338567/3362626566945",
            "3192122436311/6174152374399",
            "6156034052041/14430468657929",
            "-1011318518279/9693750372484",
            "1914490192573/13754262428401",
        ),
        gamma=(Fraction(0), *[g] * 6),
    )


ESDIRK54 = _esdirk54()
