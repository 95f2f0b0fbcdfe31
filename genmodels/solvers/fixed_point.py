"""Fixed points z = f(z), row by row, by plain and accelerated iteration."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..registry import kind, register
from ..types import Condition, expand_like
from .fields import Selectable, narrow
from .newton import flat
from .norms import rms
from .outcomes import Equilibrium, Outcome

Map = Callable[[Tensor], Tensor]
Array = np.ndarray
Memory = tuple[Tensor, ...]  # of an iteration; each tensor has the batch axis first
EXPLOSION = 1e6  # a residual that has grown by this factor will not come back


class RowMap:
    """f(z, *arguments), where each argument has a row for every item or is None.

    It can be narrowed to some of its rows, so that those that have converged are not evaluated any more.
    """

    def __init__(self, f: Callable[..., Tensor], *arguments: Condition | None) -> None:
        self.f, self.arguments = f, arguments

    def __call__(self, z: Tensor) -> Tensor:
        return self.f(z, *self.arguments)

    def select(self, rows: Tensor) -> "RowMap":
        return RowMap(self.f, *narrow(self.arguments, rows))


@kind
class FixedPoint(ABC):
    """Searches a fixed point of f for every row by itself, to rms(f(z) - z) <= atol + rtol rms(f(z)).

    A row's result depends on no other row, up to rounding. It is the best iterate that was evaluated, whether the row
    converged or not, and deterministic.

    Attributes:
        rtol, atol: as above.
    """

    rtol: float
    atol: float

    @abstractmethod
    def solve(self, f: Map, z: Tensor) -> Equilibrium:
        """The fixed points that the iteration finds from z [B, *shape]; in a graph if gradients are on."""

    @abstractmethod
    def limited(self, iterations: int) -> "FixedPoint":
        """The same with at most so many moves away from the start: a dial for what an answer costs."""

    def check_tolerances(self) -> None:
        """Raises ValueError if a tolerance is negative, or both are 0."""
        if self.rtol < 0 or self.atol < 0 or self.rtol + self.atol <= 0:
            raise ValueError(
                f"{self.title}: rtol >= 0 and atol >= 0, not both 0, are needed, found rtol={self.rtol:g}, "
                f"atol={self.atol:g}."
            )

    def check_start(self, z: Tensor) -> None:
        """Raises ValueError if z has no batch axis or is not of floating point, or has too few digits."""
        if not z.ndim or not z.is_floating_point():
            raise ValueError(
                f"{self.title}: the start must be of floating point and of shape [B, ...], found {z.dtype} of shape "
                f"{list(z.shape)}."
            )
        resolution = torch.finfo(z.dtype).eps
        if max(self.rtol, self.atol) < resolution:
            raise ValueError(
                f"{self.title}: rtol={self.rtol:g} and atol={self.atol:g} are below the resolution {resolution:.2g} of "
                f"{z.dtype}. Compute in float64, or raise one of them."
            )

    @property
    def title(self) -> str:
        """The registered name, or that of the class."""
        return getattr(self, "registered_name", type(self).__name__)


class Iteration(FixedPoint):
    """Methods that evaluate f once at each iterate, and make the next one of what they remember.

    A row ends when it has converged, when its residual has grown a millionfold or is not finite, or after
    `max_iterations` evaluations. Rows that have ended are not evaluated any more if f can be narrowed (`RowMap`).

    Args:
        rtol, atol: see `FixedPoint`.
        max_iterations: evaluations of f for each row, at most.
    Raises:
        ValueError: if max_iterations is not at least 1, or the tolerances are not positive.
    """

    def __init__(self, rtol: float = 1e-3, atol: float = 1e-6, max_iterations: int = 50) -> None:
        if max_iterations < 1:
            raise ValueError(f"{self.title}: max_iterations must be at least 1, found {max_iterations}.")
        self.rtol, self.atol, self.max_iterations = rtol, atol, max_iterations
        self.check_tolerances()

    def limited(self, iterations: int) -> "Iteration":
        solver = copy.copy(self)
        solver.max_iterations = min(iterations + 1, self.max_iterations)  # the last iterate is evaluated, too
        return solver

    @abstractmethod
    def begin(self, z: Tensor) -> Memory:
        """Memory before the first iterate."""

    @abstractmethod
    def propose(self, z: Tensor, r: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
        """The iterate after z [n, D], the k-th from 0, whose residual f(z) - z is r [n, D]."""

    def solve(self, f: Map, z: Tensor) -> Equilibrium:
        self.check_start(z)
        return _Search(self, f, z).run()


class _Search:
    """An iteration of the rows that have not ended. Books are kept on the host, states on their device.

    Attributes:
        open: [B] which rows have not ended.
    """

    def __init__(self, method: Iteration, f: Map, z: Tensor) -> None:
        self.method, self.f, self.whole, self.z, self.best = method, f, f, z, z
        n = len(z)
        self.least, self.first, self.lipschitz = np.full(n, np.inf), np.full(n, np.nan), np.full(n, np.nan)
        self.iterations, self.outcome = np.zeros(n, np.int64), np.full(n, int(Outcome.exhausted))
        self.open = np.ones(n, bool)
        self.history: list[Array] = []

    def run(self) -> Equilibrium:
        z, memory, before = self.z, self.method.begin(flat(self.z)), None
        index = np.arange(len(z))  # which rows z holds
        for k in range(self.method.max_iterations):
            if not len(index):
                break
            fz = evaluated(self.f, z)
            r = fz - z
            self._judge(index, z, fz, r, before)
            going = self.open[index]
            if not going.any():
                break
            before = (z, fz)
            if not going.all() and isinstance(self.whole, Selectable):
                kept = self._on_device(np.flatnonzero(going))
                z, r, before, memory = z[kept], r[kept], narrow(before, kept), narrow(memory, kept)
                index = index[going]
                going = self.open[index]
                self.f = self.whole.select(self._on_device(index))
            with torch.autocast(z.device.type, enabled=False):  # which is for what f computes
                new, memory = self.method.propose(flat(z), flat(r), memory, k)
            new = new.reshape(z.shape)
            z = new if going.all() else torch.where(expand_like(self._on_device(going), z), new, z)
        history = np.stack(self.history) if self.history else np.zeros((0, len(self.z)))
        counts = self._on_device(self.iterations)
        books = (self._on_device(each) for each in (self.outcome, self.lipschitz, history))
        return Equilibrium(self.best, self._on_device(self.least), counts, counts, *books)

    def _on_device(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(self.z.device)

    def _judge(self, index: Array, z: Tensor, fz: Tensor, r: Tensor, before: tuple[Tensor, Tensor] | None) -> None:
        """Which rows end here, and what is noted of them; the only wait for the device in an iteration."""
        method, rows = self.method, index[self.open[index]]
        with torch.no_grad():
            sizes = [rms(r), rms(fz)]
            sizes += [] if before is None else [rms(z - before[0]), rms(fz - before[1])]
            size, scale, *moves = torch.stack(sizes).cpu().numpy()[:, self.open[index]]
        with np.errstate(invalid="ignore", divide="ignore"):
            rests, finite = size <= method.atol + method.rtol * scale, np.isfinite(size) & np.isfinite(scale)
            if moves:
                slope = np.where(moves[0] > 0, moves[1] / moves[0], np.nan)
                self.lipschitz[rows] = np.fmax(self.lipschitz[rows], slope)
        self.first[rows] = np.where(np.isnan(self.first[rows]), size, self.first[rows])
        line = np.full(len(self.z), np.nan)
        line[rows] = size
        self.history.append(line)
        self.iterations[rows] += 1
        ended = np.where(size > EXPLOSION * self.first[rows], int(Outcome.diverged), int(Outcome.exhausted))
        rests &= finite
        self.outcome[rows] = np.where(rests, int(Outcome.converged), np.where(finite, ended, int(Outcome.non_finite)))
        # of a diverging row the residual grows, though beside the growing state it may not
        better = finite & ((size < self.least[rows]) | rests)
        self.least[rows] = np.where(better, size, self.least[rows])
        self.open[rows] = self.outcome[rows] == Outcome.exhausted
        self._keep(rows[better], index, z)

    def _keep(self, rows: Array, index: Array, z: Tensor) -> None:
        """z as the best iterate of some rows, where z holds the rows of `index`."""
        if len(rows) == len(self.z):
            self.best = z
        elif len(rows):
            places = self._on_device(np.searchsorted(index, rows))
            self.best = self.best.index_copy(0, self._on_device(rows), z[places])


def evaluated(f: Map, z: Tensor) -> Tensor:
    """f(z), of the shape and dtype of z.

    Raises:
        ValueError: if it is no tensor, or has another shape.
    """
    fz = f(z)
    if not isinstance(fz, Tensor) or fz.shape != z.shape:
        what = f"one of shape {list(fz.shape)}" if isinstance(fz, Tensor) else f"a {type(fz).__name__}"
        raise ValueError(
            f"fixed point: the map turned a state of shape {list(z.shape)} into {what}; it must keep the shape."
        )
    return fz.to(z.dtype)


def lengths(x: Tensor) -> Tensor:
    """[B, 1] at least float32, without graph: the norms of rows [B, D], 1 for rows of zeros."""
    size = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True, dtype=torch.float64)
    return torch.where(size > 0, size, 1.0).to(torch.promote_types(x.dtype, torch.float32))


@register(FixedPoint, "picard")
class Picard(Iteration):
    """z ← z + damping (f(z) - z): converges for every contraction, and for damping 1 as fast as it contracts.

    Args:
        damping: 1 for z ← f(z).
    """

    def __init__(self, rtol: float = 1e-3, atol: float = 1e-6, max_iterations: int = 50, damping: float = 1.0) -> None:
        super().__init__(rtol, atol, max_iterations)
        if not 0 < damping <= 1:
            raise ValueError(f"picard: 0 < damping <= 1 is needed, found {damping:g}.")
        self.damping = damping

    def begin(self, z: Tensor) -> Memory:
        return ()

    def propose(self, z: Tensor, r: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
        return z + self.damping * r, memory


@register(FixedPoint, "anderson")
class Anderson(Iteration):
    """z ← z + β r - (ΔZ + β ΔR) γ with r = f(z) - z, where γ makes |r - ΔR γ| least over the last differences ΔR, ΔZ.

    On a linear map this is GMRES in disguise. The least-squares problem has a ridge of `ridge` times the mean square of
    the differences, at least the resolution of the state's dtype.

    Args:
        memory: differences kept.
        mixing: β.
    Source: Walker & Ni 2011 (Anderson acceleration for fixed-point iterations), section 2.
    """

    def __init__(
        self,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        max_iterations: int = 50,
        memory: int = 5,
        mixing: float = 1.0,
        ridge: float = 1e-10,
    ) -> None:
        super().__init__(rtol, atol, max_iterations)
        if memory < 1 or not 0 < mixing <= 1 or ridge < 0:
            raise ValueError(
                f"anderson: memory >= 1, 0 < mixing <= 1 and ridge >= 0 are needed, found {memory}, {mixing:g} and "
                f"{ridge:g}."
            )
        self.memory, self.mixing, self.ridge = memory, mixing, ridge

    def begin(self, z: Tensor) -> Memory:
        none = z.new_zeros(len(z), 0, z.shape[1])
        return (none, none, z, z)  # ΔZ, ΔR, and the last z and r

    def propose(self, z: Tensor, r: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
        moves, changes, last_z, last_r = memory
        if k:
            moves = torch.cat((moves, (z - last_z)[:, None]), 1)[:, -self.memory :]
            changes = torch.cat((changes, (r - last_r)[:, None]), 1)[:, -self.memory :]
        new = z + self.mixing * r
        if k:
            gamma = self._weights(changes, r).to(z.dtype)
            new = new - torch.einsum("bm,bmd->bd", gamma, moves + self.mixing * changes)
        return new, (moves, changes, z, r)

    def _weights(self, changes: Tensor, r: Tensor) -> Tensor:
        """[B, m] float64 γ, which does not depend on the scale of both: squares shall not overflow."""
        resolution, scale = torch.finfo(r.dtype).eps, lengths(changes.flatten(1))
        changes, r = changes / scale[:, None], r / scale
        gram = torch.einsum("bmd,bnd->bmn", changes, changes).double()
        right = torch.einsum("bmd,bd->bm", changes, r).double()
        size = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None]
        ridge = max(self.ridge, resolution) * size + torch.finfo(torch.float64).tiny
        return torch.linalg.solve(gram + torch.diag_embed(ridge.expand_as(right)), right)


@register(FixedPoint, "broyden")
class Broyden(Iteration):
    """z ← z - H g with g = f(z) - z, where H, at first -I, becomes the inverse of the secant slope of g.

    Updates are of rank one: H ← H + (Δz - H Δg) vᵀ/(vᵀ Δg) with vᵀ = Δzᵀ H ("good" Broyden).

    Args:
        memory: updates kept; the oldest is dropped for the next one.
    Source: Broyden 1965 (A class of methods for solving nonlinear simultaneous equations); Bai et al. 2019 (Deep
        equilibrium models), section 3.2.
    """

    def __init__(self, rtol: float = 1e-3, atol: float = 1e-6, max_iterations: int = 50, memory: int = 30) -> None:
        super().__init__(rtol, atol, max_iterations)
        if memory < 1:
            raise ValueError(f"broyden: memory must be at least 1, found {memory}.")
        self.memory = memory

    def begin(self, z: Tensor) -> Memory:
        none = z.new_zeros(len(z), 0, z.shape[1])
        return (none, none, z, z)  # U and V of H = -I + Σ u vᵀ, the last z and g

    def propose(self, z: Tensor, r: Tensor, memory: Memory, k: int) -> tuple[Tensor, Memory]:
        u, v, last_z, last_g = memory
        if k:
            step, change = z - last_z, r - last_g
            left = -step + torch.einsum("bd,bmd,bme->be", step, u, v)  # Δzᵀ H
            rest, scale = step - self._applied(u, v, change), lengths(change)
            left, rest, change = left / lengths(left), rest / scale, change / scale
            pivot = torch.einsum("bd,bd->b", left, change)
            usable = pivot.abs() > torch.finfo(z.dtype).eps
            column = torch.where(usable, 1 / torch.where(usable, pivot, 1.0), 0.0)[:, None] * rest
            left, column = left.to(z.dtype), column.to(z.dtype)
            u = torch.cat((u, column[:, None]), 1)[:, -self.memory :]
            v = torch.cat((v, left[:, None]), 1)[:, -self.memory :]
        return z - self._applied(u, v, r), (u, v, z, r)

    @staticmethod
    def _applied(u: Tensor, v: Tensor, g: Tensor) -> Tensor:
        """H g."""
        return torch.einsum("bmd,bm->bd", u, torch.einsum("bmd,bd->bm", v, g)) - g
