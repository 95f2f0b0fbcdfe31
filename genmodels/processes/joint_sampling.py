"""Reverse-time stochastic samplers of linear diffusions, from N(0, Σ) at t = 1 to the first time."""

import itertools
from typing import Literal

import torch
from torch import Tensor

from ..rng import Noise
from ..types import Condition
from .joint_score import JointScore, apply
from .linear import moments

Rule = Literal["euler_maruyama", "splitting"]


def reverse(
    score: JointScore, u: Tensor, times: Tensor, rule: Rule, noise: Noise, condition: Condition | None = None
) -> Tensor:
    """[B, n, *shape] the reverse-time equation du = (-A u + G Gᵀ ∇ log p_t) dB + G dW solved along falling times.

    "euler_maruyama" takes steps of all of it. "splitting" (symmetric splitting CLD sampler) takes the part that keeps
    the law N(0, Σ∞) at rest exactly, half before and half after a step of the rest, G Gᵀ (∇ log p_t + Σ∞⁻¹ u), at the
    middle of the step: with few steps it stays stable where Euler's does not.

    Args:
        u: [B, n, *shape] at times[0].
        times: [L] float64, falling.
        noise: of each item.
    Raises:
        ValueError: if "splitting" meets a diffusion that does not come to rest.
    Source: Anderson 1982 (Reverse-time diffusion equation models); Dockhorn et al. 2022
        (Critically-damped Langevin diffusion), section 3 (SSCS).
    """
    clocks = score.diffusion.clock(times)
    if rule == "euler_maruyama":
        for t, h in zip(times[:-1], clocks[:-1] - clocks[1:], strict=True):
            u = _euler(score, u, t, h, noise, condition)
        return u
    if score.diffusion.stationary is None:
        raise ValueError(
            f"sample: 'splitting' needs a diffusion that comes to rest, and {score.diffusion.registered_name} with "
            "this matrix does not. Use method: ode or euler_maruyama."
        )
    for start, end in itertools.pairwise(clocks):
        u = _split(score, u, start, end, noise, condition)
    return u


def _euler(score: JointScore, u: Tensor, t: Tensor, h: Tensor, noise: Noise, condition: Condition | None) -> Tensor:
    d = score.diffusion
    matrix, factor = d.matrix.to(h), d.factor.to(h)
    z = noise.normal(d.noises, *u.shape[2:], dtype=u.dtype)
    moved = u - apply(h * matrix, u) + h.to(u.dtype) * score.pull(t, u, condition)
    return moved + apply(h.sqrt() * factor, z)


def _split(
    score: JointScore, u: Tensor, start: Tensor, end: Tensor, noise: Noise, condition: Condition | None
) -> Tensor:
    d = score.diffusion
    rate, precision = d.rate.to(start), torch.linalg.inv(d.stationary.to(start))
    kept = -d.matrix.to(start) - rate @ precision  # the reversed process at rest, which keeps N(0, Σ∞) too
    h = start - end
    step = moments(kept, rate, h / 2)
    root = torch.linalg.cholesky(step.covariance)

    def half(v: Tensor) -> Tensor:
        return apply(step.mean, v) + apply(root, noise.normal(d.size, *v.shape[2:], dtype=v.dtype))

    u = half(u)
    force = score.pull(d.clock.inverse((start + end) / 2), u, condition) + apply(rate @ precision, u)
    return half(u + h.to(u.dtype) * force)
