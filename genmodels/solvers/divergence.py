"""Divergence of a vector field, exact or estimated, and the transport of densities along its flow."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..rng import Noise
from ..types import Likelihood, LikelihoodKind, Shape
from .base import Controller, Fixed, Solver, integrate
from .fields import Selectable, VectorField, tensors_of
from .solution import Solution

ProbeLaw = Literal["rademacher", "gaussian"]
# Cotangents are pulled back side by side until this many numbers are in work: beyond it a CPU gains nothing from
# width, while an accelerator does and has the memory.
WIDTH = {"cpu": 2**13}
WIDTH_ELSEWHERE = 2**22


# tangents are carried forward if there are no more numbers in them; those inside a network may be many times more
PUSHED, PUSHED_ELSEWHERE = {"cpu": 2**18}, 2**21


@runtime_checkable
class Pushing(Protocol):
    """A field that differentiates itself forward: one pass, and one backward pass through it for gradients.

    Attributes:
        pushes: whether it can at present.
    """

    pushes: bool

    def push(self, t: Tensor, x: Tensor, tangents: Tensor) -> tuple[Tensor, Tensor]:
        """[B, *shape] velocity, and [P, B, *shape] its derivative along tangents [P, B or 1, *shape]."""


@runtime_checkable
class Sketched(Protocol):
    """A field of points and integrals that keeps what regularizers want to know of its latest evaluation.

    Attributes:
        field: velocity of the points alone.
        velocity: [B, *shape] dx/dt of the points.
        frobenius: [B] |∂v/∂x|² (squared Frobenius norm) there: exact, or the unbiased estimate |εᵀ ∂v/∂x|² or
            |∂v/∂x ε|² with the probes of the divergence, averaged over them.
    """

    field: VectorField
    velocity: Tensor
    frobenius: Tensor

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """[B, *shape] points, and the integrals of a state."""


class Differentiated(NamedTuple):
    """What is known of a field at one time and state.

    Args:
        v: [B, *shape] velocity.
        divergence: [B] float64 exact, or [P, B] estimates.
        frobenius: as in `Sketched`; None if not asked for.
    """

    v: Tensor
    divergence: Tensor
    frobenius: Tensor | None


def exact_divergence(field: VectorField, t: Tensor, x: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Velocity and its divergence Σ_i ∂v_i/∂x_i, by one vector-Jacobian product for each component of an item.

    The products of a chunk share one batched backward pass; a field that is `Pushing` makes them in its forward pass.
    The field must work row by row.

    Args:
        t: [] or [B] time.
        x: [B, *shape] state.
        chunk: components side by side; None for as many as fit a memory budget.
    Returns:
        [B, *shape] velocity and [B] float64 divergence, both with graph if gradients are enabled.
    Raises:
        ValueError: if the velocity has not the shape of x.
    """
    return _exact(field, t, x, chunk, False)[:2]


def _exact(field: VectorField, t: Tensor, x: Tensor, chunk: int | None, square: bool) -> Differentiated:
    graph, size = torch.is_grad_enabled(), math.prod(x.shape[1:])
    basis = torch.eye(size, dtype=x.dtype, device=x.device)
    if chunk is None and _pushes(field, x.numel() * size, x.device):
        v, columns = field.push(t, x, basis.reshape(size, 1, *x.shape[1:]))
        columns = columns.reshape(size, len(x), size)
        total = columns.diagonal(dim1=0, dim2=2).sum(1, dtype=torch.float64)
        return Differentiated(v, total, columns.square().sum((0, 2)) if square else None)
    with differentiable():
        x, v = _evaluate(field, t, x, graph)
        total, squares = x.new_zeros(len(x), dtype=torch.float64), x.new_zeros(len(x))
        width = _chunk(x) if chunk is None else chunk
        for start in range(0, size, width):
            units = basis[start : start + width].reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
            rows = _pull_back(v, x, units, graph).reshape(len(units), len(x), size)
            total = total + rows[:, :, start : start + width].diagonal(dim1=0, dim2=2).sum(1, dtype=torch.float64)
            squares = squares + rows.square().sum((0, 2)) if square else squares
    found = Differentiated(v, total, squares if square else None)
    return found if graph else _detached(found)


def hutchinson(field: VectorField, t: Tensor, x: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and unbiased estimates of its divergence.

    div ≈ probeᵀ (∂v/∂x) probe; with A the Jacobian the variance is Σ_{i<j} (A_ij + A_ji)² for Rademacher probes (so
    they are exact where A is diagonal) and ½ ‖A + Aᵀ‖² for Gaussian ones.

    Args:
        t: [] or [B] time.
        x: [B, *shape] state.
        probes: [P, B, *shape] zero mean, unit covariance; keep them fixed over one solve.
    Returns:
        [B, *shape] velocity and [P, B] float64 estimates, both with graph if gradients are enabled.
    Raises:
        ValueError: if the probes or the velocity do not fit x.
    Source: Grathwohl et al. 2019 (FFJORD), section 3.1; Hutchinson 1990.
    """
    if probes.shape[1:] != x.shape:
        raise ValueError(
            f"hutchinson: x has shape {list(x.shape)}, so probes must be [P, {', '.join(map(str, x.shape))}], found "
            f"{list(probes.shape)}."
        )
    return _estimated(field, t, x, probes, False)[:2]


def _estimated(field: VectorField, t: Tensor, x: Tensor, probes: Tensor, square: bool) -> Differentiated:
    graph, probes = torch.is_grad_enabled(), probes.to(x.dtype)
    if _pushes(field, probes.numel(), x.device):
        v, moved = field.push(t, x, probes)
        return Differentiated(v, *_contracted([moved], [probes], square))
    with differentiable():
        x, v = _evaluate(field, t, x, graph)
        parts = probes.split(_chunk(x))
        found = Differentiated(v, *_contracted([_pull_back(v, x, part, graph) for part in parts], parts, square))
    return found if graph else _detached(found)


def _contracted(products: Sequence[Tensor], probes: Sequence[Tensor], square: bool) -> tuple[Tensor, Tensor | None]:
    """[P, B] products · probes in float64, and [B] the mean of |products|²."""
    flat = [p.reshape(len(p), p.shape[1], -1 if p.shape[1] else 1) for p in products]
    pairs = zip(flat, probes, strict=True)
    estimates = torch.cat([(p * e.reshape(p.shape)).sum(2, dtype=torch.float64) for p, e in pairs])
    return estimates, torch.cat([p.square().sum(2) for p in flat]).mean(0) if square else None


def _detached(found: Differentiated) -> Differentiated:
    return Differentiated(*(None if part is None else part.detach() for part in found))


def _pushes(field: VectorField, numbers: int, device: torch.device) -> bool:
    return isinstance(field, Pushing) and field.pushes and numbers <= PUSHED.get(device.type, PUSHED_ELSEWHERE)


def draw_probes(
    noise: Noise, count: int, shape: Shape, *, law: ProbeLaw = "rademacher", dtype: torch.dtype = torch.float32
) -> Tensor:
    """[count, B, *shape] probes: ±1 with equal chances, or standard normal; item i's come from its own stream."""
    if law == "gaussian":
        return rearrange(noise.normal(count, *shape, dtype=dtype), "b p ... -> p b ...")
    signs = torch.where(noise.uniform(count, *shape) < 0.5, -1.0, 1.0)
    return rearrange(signs.to(dtype), "b p ... -> p b ...")


class Transport(NamedTuple):
    """Where a flow takes points, and how it changes volumes.

    Args:
        z: [B, *shape] the points at the last time.
        log_det: log|det ∂z/∂x|, float64: [B] exact, [P, B] one estimate for each probe.
        solution: cost and outcome of the solve.
    """

    z: Tensor
    log_det: Tensor
    solution: Solution


def transport(
    field: VectorField,
    x: Tensor,
    times: Tensor,
    *,
    solver: Solver,
    controller: Controller = Fixed(),
    divergence: Literal["exact", "hutchinson"] = "exact",
    probes: int | Tensor = 1,
    law: ProbeLaw = "rademacher",
    noise: Noise | None = None,
    max_steps: int = 10_000,
    on_failure: Literal["raise", "return"] = "raise",
) -> Transport:
    """The flow of dx/dt = v(t, x) from times[0] to times[-1], with its log-determinant.

    d/dt log|det ∂x_t/∂x| = div v(t, x_t); hence log p₀(x) = log p₁(z) + log_det for times from 0 to 1. State and
    log-determinant are stepped together in float64 by one solver; errors are controlled on the state. The field sees
    the state in the dtype of x.

    Args:
        x: [B, *shape] points at times[0].
        times: [L] as in `integrate`.
        divergence: costs a backward pass for each component of an item (exact) or each probe (hutchinson).
        probes: how many to draw, or the probes themselves [P, B, *shape]; fixed over the solve.
        noise: draws the probes.
    Raises:
        ValueError: if probes are to be drawn without noise, or as in `integrate`.
        SolverError: as in `integrate`.
    Source: Chen et al. 2018 (Neural ODE), theorem 1; Grathwohl et al. 2019 (FFJORD).
    """
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f"transport: divergence is 'exact' or 'hutchinson', found {divergence!r}.")
    drawn = None if divergence == "exact" else probes if isinstance(probes, Tensor) else _draw(noise, probes, x, law)
    field = joint(field, x, drawn)
    solution = integrate(
        field,
        field.start(x),
        times,
        solver=solver,
        controller=controller,
        max_steps=max_steps,
        on_failure=on_failure,
        seminorm=lambda y: y[:, : field.size],
    )
    z, log_det = field.split(solution.x)
    return Transport(z, log_det, replace(solution, x=z))


class Joint:
    """Velocity and divergence as one field on [B, D + P], and what it looks like at a `Sketched` one.

    The field of points sees them in their own dtype.

    Args:
        field: velocity of points.
        shape: of one point.
        dtype: of points.
        probes: [P, B, *shape] for estimates of the divergence; None for its exact value.
        wide: dtype in which points and log-determinants are stepped.
        sketch: keep `velocity` and `frobenius` of the latest evaluation.
    """

    velocity: Tensor | None = None
    frobenius: Tensor | None = None

    def __init__(
        self,
        field: VectorField,
        shape: Shape,
        dtype: torch.dtype,
        probes: Tensor | None,
        wide: torch.dtype = torch.float64,
        sketch: bool = False,
    ) -> None:
        self.field, self.shape, self.dtype, self.probes = field, tuple(shape), dtype, probes
        self.wide, self.sketch = wide, sketch
        self.size = math.prod(shape)

    def start(self, x: Tensor) -> Tensor:
        """[B, D + P] the points x [B, *shape] with zeros for their log-determinants."""
        columns = 1 if self.probes is None else len(self.probes)
        zeros = x.new_zeros(len(x), columns, dtype=self.wide)
        return torch.cat((x.reshape(len(x), self.size).to(self.wide), zeros), 1)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """[B, *shape] points and [B] or [P, B] float64 log-determinants of a state."""
        z, log_det = y[:, : self.size].reshape(len(y), *self.shape).to(self.dtype), y[:, self.size :].double()
        return z, log_det[:, 0] if self.probes is None else rearrange(log_det, "b p -> p b")

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        x = y[:, : self.size].reshape(len(y), *self.shape).to(self.dtype)
        if self.probes is None:
            found = _exact(self.field, t, x, None, self.sketch)
            rate = found.divergence[:, None]
        else:
            found = _estimated(self.field, t, x, self.probes, self.sketch)
            rate = rearrange(found.divergence, "p b -> b p")
        if self.sketch:
            self.velocity, self.frobenius = found.v, found.frobenius
        return torch.cat((found.v.reshape(len(y), self.size).to(self.wide), rate.to(self.wide)), 1)

    def tensors(self) -> tuple[Tensor, ...]:
        """What the field of points depends on."""
        return tensors_of(self.field)


class _SelectableJoint(Joint):
    """The same of a field that can be narrowed to some of its rows."""

    def select(self, rows: Tensor) -> "_SelectableJoint":
        probes = None if self.probes is None else self.probes[:, rows]
        return _SelectableJoint(self.field.select(rows), self.shape, self.dtype, probes, self.wide, self.sketch)


def joint(
    field: VectorField,
    x: Tensor,
    probes: Tensor | None,
    *,
    wide: torch.dtype = torch.float64,
    sketch: bool = False,
) -> Joint:
    """The field of points like x [B, *shape] and their log-determinants.

    Raises:
        ValueError: if probes do not fit x.
    """
    if probes is not None and probes.shape[1:] != x.shape:
        raise ValueError(
            f"joint: x has shape {list(x.shape)}, so probes must be [P, {', '.join(map(str, x.shape))}], found "
            f"{list(probes.shape)}."
        )
    make = _SelectableJoint if isinstance(field, Selectable) else Joint
    return make(field, tuple(x.shape[1:]), x.dtype, probes, wide, sketch)


def _draw(noise: Noise | None, count: int, x: Tensor, law: ProbeLaw) -> Tensor:
    if noise is None or noise.n != len(x) or count < 1:
        found = "none" if noise is None else f"that of {noise.n} items"
        raise ValueError(
            f"transport: hutchinson draws at least 1 probe for each of {len(x)} items from a `noise` of as many items, "
            f"found {count} probes and noise: {found}. Pass noise=SeedNoise(seeds) or BatchNoise(len(x)), the probes "
            'themselves, or divergence="exact".'
        )
    return draw_probes(noise, count, tuple(x.shape[1:]), law=law, dtype=x.dtype).to(x.device)


def by_probe(values: Tensor, rows: int) -> Tensor:
    """[P, B] of values for B = rows items, probe after probe; P = 1 without items."""
    return values.reshape(values.numel() // rows if rows else 1, rows)


def mean_over_probes(values: Tensor, divergence: str, exact: LikelihoodKind = "numerical") -> Likelihood:
    """The mean of log-likelihoods [draws, P, B]: of the kind `exact`, or with a standard error over the P probes."""
    draws, probes, _ = values.shape
    if divergence == "exact":
        return Likelihood(values.mean((0, 1)), exact)
    stderr = (values.var(1).sum(0) / probes).sqrt() / draws if probes > 1 else None
    return Likelihood(values.mean((0, 1)), "stochastic", stderr)


@contextmanager
def differentiable() -> Iterator[None]:
    """Gradients enabled, and attention by its formula: what differentiating a field twice needs."""
    # fused attention kernels have no second derivative, and no rule for several cotangents at once
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def _evaluate(field: VectorField, t: Tensor, x: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
    """x as a node of the graph, and the velocity there."""
    x = x if graph and x.requires_grad else x.detach().requires_grad_()
    v = field(t, x).to(x.dtype)
    if v.shape != x.shape:
        raise ValueError(
            f"divergence: the field turned a state of shape {list(x.shape)} into a velocity of shape {list(v.shape)}; "
            "both must have the same shape."
        )
    return x, v


def _chunk(x: Tensor) -> int:
    return max(1, WIDTH.get(x.device.type, WIDTH_ELSEWHERE) // max(1, x.numel()))


def _pull_back(v: Tensor, x: Tensor, cotangents: Tensor, graph: bool) -> Tensor:
    """[C, B, *shape] cotangentᵀ ∂v/∂x, row by row, for cotangents [C, B, *shape]."""
    if not v.requires_grad:
        return torch.zeros_like(cotangents)  # a constant field
    batched = len(cotangents) > 1
    (out,) = torch.autograd.grad(
        v,
        x,
        cotangents if batched else cotangents[0],
        retain_graph=True,
        create_graph=graph,
        is_grads_batched=batched,
        allow_unused=True,
        materialize_grads=True,
    )
    return out if batched else out[None]
