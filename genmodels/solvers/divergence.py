"""Divergence of a vector field, exact or estimated, and the transport of densities along its flow."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..rng import Noise
from ..types import Shape
from .base import Controller, Fixed, Solver, integrate
from .fields import Selectable, VectorField
from .solution import Solution

ProbeLaw = Literal["rademacher", "gaussian"]
# Cotangents are pulled back side by side until this many numbers are in work: beyond it a CPU gains nothing from
# width, while an accelerator does and has the memory.
WIDTH = {"cpu": 2**13}
WIDTH_ELSEWHERE = 2**22


def exact_divergence(field: VectorField, t: Tensor, x: Tensor, *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Velocity and its divergence Σ_i ∂v_i/∂x_i, by one vector-Jacobian product for each component of an item.

    The products of a chunk share one batched backward pass. The field must work row by row.

    Args:
        t: [] or [B] time.
        x: [B, *shape] state.
        chunk: components side by side; None for as many as fit a memory budget.
    Returns:
        [B, *shape] velocity and [B] float64 divergence, both with graph if gradients are enabled.
    Raises:
        ValueError: if the velocity has not the shape of x.
    """
    graph, size = torch.is_grad_enabled(), math.prod(x.shape[1:])
    with _differentiable():
        x, v = _evaluate(field, t, x, graph)
        total = x.new_zeros(len(x), dtype=torch.float64)
        width = _chunk(x) if chunk is None else chunk
        basis = torch.eye(size, dtype=x.dtype, device=x.device)
        for start in range(0, size, width):
            units = basis[start : start + width].reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
            rows = _pull_back(v, x, units, graph).reshape(len(units), len(x), size)
            total = total + rows[:, :, start : start + width].diagonal(dim1=0, dim2=2).sum(1, dtype=torch.float64)
    return (v, total) if graph else (v.detach(), total.detach())


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
    graph = torch.is_grad_enabled()
    with _differentiable():
        x, v = _evaluate(field, t, x, graph)
        parts = [
            (_pull_back(v, x, part, graph) * part).reshape(len(part), len(x), -1 if len(x) else 1)
            for part in probes.to(x.dtype).split(_chunk(x))
        ]
        estimates = torch.cat([part.sum(2, dtype=torch.float64) for part in parts])
    return (v, estimates) if graph else (v.detach(), estimates.detach())


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
    size, columns = math.prod(x.shape[1:]), 1 if drawn is None else len(drawn)
    joint = torch.cat((x.reshape(len(x), size).double(), x.new_zeros(len(x), columns, dtype=torch.float64)), 1)
    solution = integrate(
        _joint(field, x.shape[1:], x.dtype, drawn),
        joint,
        times,
        solver=solver,
        controller=controller,
        max_steps=max_steps,
        on_failure=on_failure,
        seminorm=lambda y: y[:, :size],
    )
    z = solution.x[:, :size].reshape(x.shape).to(x.dtype)
    log_det = solution.x[:, size] if drawn is None else rearrange(solution.x[:, size:], "b p -> p b")
    return Transport(z, log_det, replace(solution, x=z))


class _Joint:
    """Velocity and divergence as one field on [B, D + P]."""

    def __init__(self, field: VectorField, shape: Shape, dtype: torch.dtype, probes: Tensor | None) -> None:
        self.field, self.shape, self.dtype, self.probes = field, shape, dtype, probes

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        size = math.prod(self.shape)
        x = y[:, :size].reshape(len(y), *self.shape).to(self.dtype)
        if self.probes is None:
            v, rate = exact_divergence(self.field, t, x)
            rate = rate[:, None]
        else:
            v, rate = hutchinson(self.field, t, x, self.probes)
            rate = rearrange(rate, "p b -> b p")
        return torch.cat((v.reshape(len(y), size).double(), rate), 1)


class _SelectableJoint(_Joint):
    """The same of a field that can be narrowed to some of its rows."""

    def select(self, rows: Tensor) -> "_SelectableJoint":
        probes = None if self.probes is None else self.probes[:, rows]
        return _SelectableJoint(self.field.select(rows), self.shape, self.dtype, probes)


def _joint(field: VectorField, shape: Shape, dtype: torch.dtype, probes: Tensor | None) -> _Joint:
    return (_SelectableJoint if isinstance(field, Selectable) else _Joint)(field, shape, dtype, probes)


def _draw(noise: Noise | None, count: int, x: Tensor, law: ProbeLaw) -> Tensor:
    if noise is None or noise.n != len(x) or count < 1:
        found = "none" if noise is None else f"that of {noise.n} items"
        raise ValueError(
            f"transport: hutchinson draws at least 1 probe for each of {len(x)} items from a `noise` of as many items, "
            f"found {count} probes and noise: {found}. Pass noise=SeedNoise(seeds) or BatchNoise(len(x)), the probes "
            'themselves, or divergence="exact".'
        )
    return draw_probes(noise, count, tuple(x.shape[1:]), law=law, dtype=x.dtype).to(x.device)


@contextmanager
def _differentiable() -> Iterator[None]:
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
