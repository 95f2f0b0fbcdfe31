"""Brownian motion as a function of a seed: increments and space-time areas over any interval, in any order."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ..rng import Noise, fold
from ..types import Seeds, Shape, expand_like

# Steele, Lea & Flood 2014 (Fast splittable pseudorandom number generators): the increment and the mixing of SplitMix64
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
PURPOSE = fold("brownian")


class Increment(NamedTuple):
    """Brownian motion over an interval from t to s, [B, *shape] each.

    Args:
        w: W(s) - W(t), of law N(0, |s - t|).
        h: space-time area, the average of W over the interval less (W(t) + W(s))/2: N(0, |s - t|/12), independent of w.
    """

    w: Tensor
    h: Tensor


class Brownian(ABC):
    """A source of Brownian paths, one for each row: the same increments whenever they are asked for.

    Attributes:
        shape: of one item's noise, without the batch axis.
    """

    shape: Shape

    @abstractmethod
    def increment(self, t: Tensor, s: Tensor) -> Increment:
        """The path from time t to time s, [] or [B] float64 each and in either order; [B, *shape] each part.

        Over neighbouring intervals increments add up, and areas by Chen's relation: with lengths a and b that make
        c = a + b, c h = a h₁ + b h₂ + (b w₁ - a w₂)/2. Against the order of time w changes its sign and h does not.
        """

    @abstractmethod
    def select(self, rows: Tensor) -> "Brownian":
        """The paths of the given rows [n], int64."""

    @abstractmethod
    def another(self, noise: Noise) -> "Brownian":
        """Paths of the same law over the same times, drawn afresh from `noise`, one for each of its items."""


class BrownianTree(Brownian):
    """A virtual Brownian tree: nothing is stored, and the path of a row is a function of its seed.

    An interval of length h with increment w and area H is halved at its midpoint with the exact conditional law,
    w_left = w/2 + 3H/2 + Z and H_left, H_right = H/4 - Z/2 ± N/2, where Z ~ N(0, h/16) and N ~ N(0, h/12) come from a
    hash of (seed, node, component). Halving is linear, so W(t) and ∫W are sums over the tree's levels of Z and N, each
    times a polynomial of the place of t in its node: a query is one batch of hashes and one sum, without recursion.

    Below the last level the path is the parabola that is its conditional mean. Over a step of length h this lacks at
    most a share tolerance · (end - start)/(8 h) of the variance; steps to multiples of the last level's length lack
    nothing. Normals are made in float32, sums in float64: devices agree to float32 rounding.

    Args:
        seeds: [B] integers; row i depends on seeds[i] alone, whatever the other rows and whatever the steps.
        shape: of one item's noise.
        start, end: the times within which the path can be asked for, in either order; [B] for times of each row's own.
            Other ends are other paths.
        tolerance: length of the last level as a share of the whole; halving it costs one more level in every query.
        dtype: of the increments.
    Raises:
        ValueError: if the ends are not two different finite times, or the tolerance is not in (0, 1].
    Source: Foster et al. 2020 (An optimal polynomial approximation of Brownian motion), section 3 (the law of halves);
        Jelinčič et al. 2024 (Single-seed generation of Brownian paths), section 3 (trees with space-time areas).
    """

    def __init__(
        self,
        seeds: Seeds,
        shape: Shape,
        *,
        start: float | Tensor,
        end: float | Tensor,
        tolerance: float = 2**-14,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        ends = [torch.as_tensor(v, dtype=torch.float64, device=device) for v in (start, end)]
        if not bool(((ends[0] - ends[1]).isfinite() & (ends[0] != ends[1])).all()):
            raise ValueError(f"BrownianTree: two different finite times are needed, found start={start}, end={end}.")
        if not 0 < tolerance <= 1:
            raise ValueError(f"BrownianTree: 0 < tolerance <= 1 is needed, found {tolerance}.")
        seeds = torch.arange(seeds) if isinstance(seeds, int) else torch.as_tensor(seeds)
        self.seeds = seeds.to(device, torch.int64)
        self.start, self.end = torch.minimum(*ends), torch.maximum(*ends)
        self.shape, self.dtype = tuple(shape), dtype
        self.tolerance, self.depth = tolerance, max(1, math.ceil(-math.log2(tolerance)))
        self._keys = _mixed(self.seeds ^ PURPOSE)
        self._counts = 2.0 ** torch.arange(self.depth, dtype=torch.float64, device=device)  # nodes of each level
        self._recent: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def select(self, rows: Tensor) -> "BrownianTree":
        start, end = (v[rows] if v.ndim else v for v in (self.start, self.end))
        return self._with(self.seeds[rows], start, end)

    def another(self, noise: Noise) -> "BrownianTree":
        return self._with(path_seeds(noise), self.start, self.end)

    def _with(self, seeds: Tensor, start: Tensor, end: Tensor) -> "BrownianTree":
        kind = {"tolerance": self.tolerance, "dtype": self.dtype, "device": self.seeds.device}
        return BrownianTree(seeds, self.shape, start=start, end=end, **kind)

    @torch.no_grad()
    def increment(self, t: Tensor, s: Tensor) -> Increment:
        self._check(t, s)
        (w, integral), (w_end, integral_end) = self._known(t), self._known(s)
        change = w_end - w
        h = expand_like(s - t, w)
        average = (integral_end - integral - h * w) / torch.where(h == 0, 1.0, h)
        area = torch.where(h == 0, 0.0, average - 0.5 * change)
        return Increment(change.to(self.dtype), area.to(self.dtype))

    def _check(self, t: Tensor, s: Tensor) -> None:
        if t.device.type != "cpu" or self.start.device.type != "cpu":  # asking would wait for the device
            return
        asked, slack = (torch.minimum(t, s), torch.maximum(t, s)), 1e-9 * (self.end - self.start)
        outside = (asked[0] < self.start - slack) | (asked[1] > self.end + slack)
        if bool(outside.any()):
            row = int(outside.flatten().nonzero()[0])
            low, high, start, end = (v.expand_as(outside).flatten()[row] for v in (*asked, self.start, self.end))
            raise ValueError(
                f"BrownianTree: the path was asked for between {low:.9g} and {high:.9g}, but it was made for "
                f"[{start:.9g}, {end:.9g}]. Build it with the first and the last time of the solve."
            )

    def _known(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """[B, *shape] float64 W(t) and ∫W up to t; kept for the last two times, since steps follow each other."""
        for time, value in self._recent:
            if time is t or (t.device.type == "cpu" and time.shape == t.shape and torch.equal(time, t)):
                return value
        value = self._query(t)
        self._recent = [*self._recent[-1:], (t, value)]
        return value

    def _query(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(self.seeds.device, torch.float64)
        length = (self.end - self.start)[..., None]  # [1] or [B, 1], as everything of the whole
        place = ((t - self.start)[..., None] / length).clamp(0.0, 1.0)
        counts = self._counts
        node = torch.minimum((place * counts).floor(), counts - 1)
        inside, span = place * counts - node, length / counts  # [B or 1, depth]
        left, q = inside < 0.5, 1 - (2 * inside - 1).abs()
        sign = torch.where(left, 1.0, -1.0)
        z, n = (span / 16).sqrt(), (span / 12).sqrt()
        # rows: W and its integral; columns: the normals of W and H over the whole, then Z and N of each level
        whole, root = length * place.square(), length.sqrt()
        parts = (
            (root * place, z * q * (3 * q - 2), root * 12**-0.5 * 6 * place * (1 - place), n * sign * 3 * q * (1 - q)),
            (
                root * whole / 2,
                z * sign * span / 2 * q.square() * (q - 1),
                root * 12**-0.5 * whole * (3 - 2 * place),
                n * span / 2 * q.square() * (1.5 - q),
            ),
        )
        weights = torch.stack([torch.stack((torch.cat(p[:2], -1), torch.cat(p[2:], -1))) for p in parts])
        names = torch.cat((torch.zeros_like(node[..., :1]), node + counts), -1).to(torch.int64)  # 0: the whole
        first, second = self._normals(names)
        weights = weights if weights.ndim == 4 else weights[:, :, None]
        weights = weights.expand(2, 2, len(self.seeds), self.depth + 1)
        w, integral = (torch.einsum("bl,bld->bd", a, first) + torch.einsum("bl,bld->bd", b, second) for a, b in weights)
        return w.reshape(-1, *self.shape), integral.reshape(-1, *self.shape)

    def _normals(self, names: Tensor) -> tuple[Tensor, Tensor]:
        """Two [B, depth + 1, D] float64 standard normals of nodes [depth + 1] or [B, depth + 1] (Box and Muller)."""
        keys = _mixed(self._keys[:, None] + names * _signed(GOLDEN))
        components = torch.arange(1, math.prod(self.shape) + 1, device=keys.device) * _signed(GOLDEN)
        bits = _mixed(keys[..., None] + components)
        radius = ((_shifted(bits, 32).float() + 0.5) * 2.0**-32).log().mul_(-2).clamp_(min=0).sqrt_()
        angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
        return (radius * angle.cos()).double(), (radius * angle.sin()).double()


def path_seeds(noise: Noise, count: int | None = None) -> Tensor:
    """[n] or [n, count] int64 seeds of Brownian paths, drawn from `noise`."""
    draws = noise.uniform(*(() if count is None else (count,)), 2).mul(2**24).to(torch.int64)
    return draws[..., 0] << 24 | draws[..., 1]


def _signed(constant: int) -> int:
    """The 64 bits of a constant as int64."""
    return constant - (1 << 64) if constant >> 63 else constant


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits, filled with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64: a bijection of 64 bits in which every bit of the input moves every bit out."""
    x = (x ^ _shifted(x, 30)) * _signed(FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND)
    return x ^ _shifted(x, 31)
