"""Two-dimensional laws with known densities, each in its own units, drawn afresh from a seed."""

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Generator, Tensor

from ..distributions import GaussianMixture
from ..registry import register
from ..rng import generator
from ..transforms import Transform
from ..types import Batch
from .dataset import Dataset, Split, proposal
from .memory import InMemory

TWO_PI = 2 * math.pi


class Toy(InMemory):
    """A planar law; the splits are independent draws, and the proposed transform standardises.

    Subclasses set what their density needs and then call this constructor.

    Args:
        classes: number of labels.
        size: items of each split.
        seed: of the draws; the same seed gives the same items.
        conditional: give the labels as condition.
        transform: node of the transform instead of the proposed one.
    """

    shape = (2,)

    def __init__(
        self, classes: int, size: int, seed: int, conditional: bool, transform: Callable[..., Transform] | None
    ) -> None:
        if size < 1:
            raise ValueError(f"data '{self.registered_name}': size must be at least 1, found {size}.")
        self.num_classes = classes if conditional else None
        self.transform = proposal(transform, {"name": "standardize"})
        splits: tuple[Split, ...] = ("train", "val", "test")
        for split in splits:
            x, labels = self.draw(size, generator(self.registered_name, seed, split))
            self.hold(split, Batch(x.float(), condition=labels if conditional else None))

    @abstractmethod
    def draw(self, n: int, g: Generator) -> tuple[Tensor, Tensor]:
        """[n, 2] float64 items and their labels [n] int64."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """[B] float64 exact log density of the law over all labels, in nats."""

    @abstractmethod
    def entropy(self) -> float:
        """-E[log p(x)] in nats: the least mean negative log-likelihood that a model can reach, labels unknown."""


class SmoothToy(Toy):
    """A law that is a convolution with a Gaussian.

    Attributes:
        noise: standard deviation of that Gaussian.
        reach: the law before the convolution lies in [-reach, reach]².
    """

    noise: float
    reach: float

    def entropy(self) -> float:
        # The trapezoidal rule converges spectrally for smooth decaying functions; 9 widths away nothing is left.
        bound = self.reach + 9 * self.noise
        steps = math.ceil(4 * bound / self.noise)
        axis = torch.linspace(-bound, bound, steps + 1, dtype=torch.float64)
        log_p = torch.cat([self.log_prob(torch.cartesian_prod(part, axis)) for part in axis.split(16)])
        return float(-(log_p.exp() * log_p).sum() * (2 * bound / steps) ** 2)


def _positive(name: str, **values: float) -> None:
    for key, value in values.items():
        if not value > 0:
            raise ValueError(f"data '{name}': {key} must be > 0, found {value}.")


@register(Dataset, "eight_gaussians")
class EightGaussians(SmoothToy):
    """Eight round Gaussians on a circle: m_k = radius (cos 2πk/8, sin 2πk/8), covariance noise² I, equal weights.

    Args:
        size: items of each split.
        radius: of the circle.
        noise: standard deviation of each Gaussian.
        seed: of the draws.
        conditional: give the index of the Gaussian as condition.
        transform: instead of standardisation.
    """

    def __init__(
        self,
        size: int = 10_000,
        radius: float = 2.0,
        noise: float = 0.2,
        seed: int = 0,
        conditional: bool = False,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        _positive("eight_gaussians", radius=radius, noise=noise)
        self.noise, self.reach = noise, radius
        means = radius * _direction(torch.arange(8, dtype=torch.float64) * TWO_PI / 8)
        self.law = GaussianMixture.from_tensors(torch.ones(8), means, torch.full((8, 2), noise**2))
        super().__init__(8, size, seed, conditional, transform)

    def draw(self, n: int, g: Generator) -> tuple[Tensor, Tensor]:
        k = torch.randint(8, (n,), generator=g)
        return self.law.means[k] + self.noise * _normal(n, g), k

    def log_prob(self, x: Tensor) -> Tensor:
        return self.law.to(x.device).log_prob(x)


@register(Dataset, "checkerboard")
class Checkerboard(Toy):
    """Uniform on the dark squares (i + j even) of a board of cells x cells squares that covers [-width/2, width/2]².

    p(x) = 1/(number of dark squares · (width/cells)²) on the closed dark squares, 0 elsewhere. Labels are the
    columns i.

    Args:
        size: items of each split.
        cells: squares along one side.
        width: side of the board.
        seed: of the draws.
        conditional: give the column as condition.
        transform: instead of standardisation.
    """

    def __init__(
        self,
        size: int = 10_000,
        cells: int = 4,
        width: float = 4.0,
        seed: int = 0,
        conditional: bool = False,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        _positive("checkerboard", cells=cells, width=width)
        self.cells, self.width = cells, width
        board = torch.cartesian_prod(torch.arange(cells), torch.arange(cells)).reshape(-1, 2)
        self.dark = board[board.sum(1) % 2 == 0]
        super().__init__(cells, size, seed, conditional, transform)

    def draw(self, n: int, g: Generator) -> tuple[Tensor, Tensor]:
        square = self.dark[torch.randint(len(self.dark), (n,), generator=g)]
        place = square + torch.rand(n, 2, generator=g, dtype=torch.float64)
        return (place / self.cells - 0.5) * self.width, square[:, 0]

    def log_prob(self, x: Tensor) -> Tensor:
        place = (x.double() / self.width + 0.5) * self.cells
        # an item that float32 moved onto an edge belongs to the squares on both sides
        below, above = place.ceil() - 1, place.floor()
        inside = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for i in (below[:, 0], above[:, 0]):
            for j in (below[:, 1], above[:, 1]):
                on_board = (torch.minimum(i, j) >= 0) & (torch.maximum(i, j) < self.cells)
                inside |= on_board & ((i + j) % 2 == 0)
        return torch.full_like(place[:, 0], -self.entropy()).where(inside, -math.inf)

    def entropy(self) -> float:
        return math.log(len(self.dark)) + 2 * math.log(self.width / self.cells)


@register(Dataset, "rings")
class Rings(SmoothToy):
    """Concentric rings of radii R_k = k·radius/rings, k = 1 … rings, equally likely, blurred by a Gaussian.

    x = R_k (cos θ, sin θ) + noise z with θ uniform, z ~ N(0, I). With r = |x| and the modified Bessel function I₀,

        p(x) = 1/rings Σ_k exp(-(r² + R_k²)/(2 noise²)) I₀(r R_k/noise²)/(2π noise²)

    Args:
        size: items of each split.
        rings: number of rings.
        radius: of the outermost ring.
        noise: standard deviation of the Gaussian.
        seed: of the draws.
        conditional: give the index of the ring as condition.
        transform: instead of standardisation.
    Source: Rice 1944 (Mathematical analysis of random noise), section 3.10, for the law of r.
    """

    def __init__(
        self,
        size: int = 10_000,
        rings: int = 3,
        radius: float = 3.0,
        noise: float = 0.1,
        seed: int = 0,
        conditional: bool = False,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        _positive("rings", rings=rings, radius=radius, noise=noise)
        self.noise, self.reach = noise, radius
        self.radii = torch.arange(1, rings + 1, dtype=torch.float64) * radius / rings
        super().__init__(rings, size, seed, conditional, transform)

    def draw(self, n: int, g: Generator) -> tuple[Tensor, Tensor]:
        k = torch.randint(len(self.radii), (n,), generator=g)
        theta = TWO_PI * torch.rand(n, generator=g, dtype=torch.float64)
        return self.radii[k, None] * _direction(theta) + self.noise * _normal(n, g), k

    def log_prob(self, x: Tensor) -> Tensor:
        r, radii, s2 = x.double().norm(dim=1, keepdim=True), self.radii.to(x.device), self.noise**2
        # I₀(z) = e^z i0e(z) completes the square in the exponent
        rice = -((r - radii) ** 2) / (2 * s2) + torch.special.i0e(r * radii / s2).log()
        return rice.logsumexp(1) - math.log(len(radii) * TWO_PI * s2)


class Curves(SmoothToy):
    """Equally likely arms c_k(t), t in [0, 1] with density w(t), blurred by a Gaussian: x = c_k(t) + noise z.

    p(x) = 1/K Σ_k ∫ w(t) N(x; c_k(t), noise² I) dt, by Gauss-Legendre quadrature with nodes no further apart along the
    curve than 0.6 noise: accurate to rounding wherever the law has mass. Much further out than the curve's own radius,
    where the integrand is narrower than the noise, log p keeps a relative accuracy of 1e-4.

    Attributes:
        speed: the largest |dc_k/dt|.
    """

    speed: float

    @abstractmethod
    def arms(self, t: Tensor) -> Tensor:
        """[K, T, 2] points of every arm at t [T]."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """[T] density of t on [0, 1]."""

    @abstractmethod
    def inverse_cdf(self, u: Tensor) -> Tensor:
        """[T] the t below which a fraction u of an arm lies."""

    def draw(self, n: int, g: Generator) -> tuple[Tensor, Tensor]:
        t = self.inverse_cdf(torch.rand(n, generator=g, dtype=torch.float64))
        arms = self.arms(t)
        k = torch.randint(len(arms), (n,), generator=g)
        return arms[k, torch.arange(n)] + self.noise * _normal(n, g), k

    def log_prob(self, x: Tensor) -> Tensor:
        # Gauss-Legendre nodes on [0, 1] are at most π/(2n) apart
        t, mass = _gauss_legendre(math.ceil(self.speed * math.pi / (2 * 0.6 * self.noise)))
        arms = self.arms(t)
        log_mass = (mass * self.weight(t)).log().repeat(len(arms)) - math.log(len(arms) * TWO_PI * self.noise**2)
        points = arms.flatten(0, 1) / self.noise
        offset = (log_mass - points.square().sum(1) / 2).to(x.device)
        # -|x - c|²/2 = x·c - |c|²/2 - |x|²/2 makes the sum over nodes one matrix product; parts bound its memory
        parts = [self._log_prob(part, points.to(x.device), offset) for part in (x.double() / self.noise).split(256)]
        return torch.cat(parts)

    @staticmethod
    def _log_prob(x: Tensor, points: Tensor, offset: Tensor) -> Tensor:
        return torch.addmm(offset, x, points.T).logsumexp(1) - x.square().sum(1) / 2


@register(Dataset, "moons")
class Moons(Curves):
    """Two interleaved half circles of radius 1, blurred by a Gaussian.

    c_0 = (cos πt - 1/2, sin πt - 1/4), c_1 = (1/2 - cos πt, 1/4 - sin πt), t uniform: the familiar moons, centred. The
    density is accurate to rounding (`Curves`).

    Args:
        size: items of each split.
        noise: standard deviation of the Gaussian.
        seed: of the draws.
        conditional: give the index of the moon as condition.
        transform: instead of standardisation.
    """

    reach = 1.5
    speed = math.pi

    def __init__(
        self,
        size: int = 10_000,
        noise: float = 0.1,
        seed: int = 0,
        conditional: bool = False,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        _positive("moons", noise=noise)
        self.noise = noise
        super().__init__(2, size, seed, conditional, transform)

    def arms(self, t: Tensor) -> Tensor:
        upper = _direction(math.pi * t) - torch.tensor([0.5, 0.25], dtype=t.dtype)
        return torch.stack((upper, -upper))

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def inverse_cdf(self, u: Tensor) -> Tensor:
        return u


@register(Dataset, "spirals")
class Spirals(Curves):
    """Two spiral arms that wind out from the centre, blurred by a Gaussian.

    c_0 = radius t (cos 2π turns t, sin 2π turns t), c_1 = -c_0, with density 2t of t (t = √u), so that the outer
    windings are not thinner than the inner ones. The density is accurate to rounding (`Curves`).

    Args:
        size: items of each split.
        turns: full turns of each arm.
        radius: where the arms end.
        noise: standard deviation of the Gaussian.
        seed: of the draws.
        conditional: give the index of the arm as condition.
        transform: instead of standardisation.
    """

    def __init__(
        self,
        size: int = 10_000,
        turns: float = 1.5,
        radius: float = 3.0,
        noise: float = 0.1,
        seed: int = 0,
        conditional: bool = False,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        _positive("spirals", turns=turns, radius=radius, noise=noise)
        self.turns, self.noise, self.reach = turns, noise, radius
        self.speed = radius * math.hypot(1.0, TWO_PI * turns)
        super().__init__(2, size, seed, conditional, transform)

    def arms(self, t: Tensor) -> Tensor:
        out = self.reach * t[:, None] * _direction(TWO_PI * self.turns * t)
        return torch.stack((out, -out))

    def weight(self, t: Tensor) -> Tensor:
        return 2 * t

    def inverse_cdf(self, u: Tensor) -> Tensor:
        return u.sqrt()


def _direction(angle: Tensor) -> Tensor:
    return torch.stack((angle.cos(), angle.sin()), -1)


def _normal(n: int, g: Generator) -> Tensor:
    return torch.randn(n, 2, generator=g, dtype=torch.float64)


@lru_cache(maxsize=8)
def _gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1]: eigenvalues of the Jacobi matrix, and squares of the eigenvectors' first components.

    Source: Golub & Welsch 1969 (Calculation of Gauss quadrature rules), section 4.
    """
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2, vectors[0] ** 2
