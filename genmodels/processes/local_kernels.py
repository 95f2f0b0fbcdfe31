"""Gaussian kernels of a diffusion over a short increment, from a Taylor expansion of its force.

With D the increment, J = ∂F/∂y and F at its start, and c = ∂F/∂u (+ the Itô term ½ Σ Q_kl ∂²F/∂y_k ∂y_l), the force is
taken for F + J (y - y_s) + c (u - s); the state is then Gaussian with

    m = y_s + φ₁(JD) D F + φ₂(JD) D² c,   P = ∫₀ᴰ e^{Jr} Q e^{Jᵀr} dr,   φ₁(z) = (eᶻ - 1)/z,   φ₂(z) = (eᶻ - 1 - z)/z².

Order 0 (J = c = 0) is Euler and Maruyama's step. Drawn from these kernels, the law of the state is wrong by O(D²),
O(D²) with a smaller constant, and O(D³) for an increment, at orders 0, 1 and "ito".
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ..rng import Noise
from ..types import expand_like
from .gaussian_kernels import DenseKernel, DiagonalKernel, Kernel
from .process import Process, checked

Order = Literal[0, 1, "ito"]
SERIES = tuple(1 / math.factorial(k + 2) for k in range(14))  # of φ₂; at |z| <= 1/2 the next term is below 1e-17


def phi1(z: Tensor) -> Tensor:
    """(eᶻ - 1)/z, 1 at z = 0."""
    return torch.where(z == 0, 1.0, torch.expm1(z) / torch.where(z == 0, 1.0, z))


def phi2(z: Tensor) -> Tensor:
    """(eᶻ - 1 - z)/z², by its series up to |z| = 1/2, where the difference cancels."""
    near, total = z.clamp(-0.5, 0.5), torch.full_like(z, SERIES[-1])
    for coefficient in reversed(SERIES[:-1]):
        total = total * near + coefficient
    far = torch.where(z.abs() <= 0.5, 1.0, z)
    return torch.where(z.abs() <= 0.5, total, (torch.expm1(far) - far) / far.square())


def phis(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """φ₁(z), φ₂(z) and φ₁(2z), from one exponential where z is narrower than float64."""
    if z.dtype == torch.float64:
        return phi1(z), phi2(z), phi1(2 * z)
    # in float64 (φ₁(z) - 1)/z keeps the digits of a float32 down to |z| = 1e-8, below which it is 1/2 to them all
    wide = z.double()
    wide = wide.masked_fill(wide.abs() < 1e-8, 1e-8)
    grown = torch.expm1(wide)
    first = grown / wide
    twice = first * (0.5 * grown + 1)  # e²ᶻ - 1 = (eᶻ - 1)(eᶻ + 1)
    return first.to(z.dtype), ((first - 1) / wide).to(z.dtype), twice.to(z.dtype)


def elementwise_kernel(
    y: Tensor, force: Tensor, slope: Tensor | None, rate: Tensor | None, q: Tensor, span: Tensor
) -> DiagonalKernel:
    """The kernel of dy_i = (F_i + J_i (y_i - y_s,i) + c_i r) dr + √q dW_i after a span D.

    Args:
        y, force: [B, *shape] state and F.
        slope, rate: [B, *shape] J and c; None for 0.
        q, span: which broadcast to the state.
    """
    if slope is None:
        mean = y + span * force
        return DiagonalKernel(mean if rate is None else mean + 0.5 * span.square() * rate, q * span)
    first, second, twice = phis(slope * span)
    mean = torch.addcmul(y, span * first, force)
    if rate is not None:
        mean = torch.addcmul(mean, span.square() * second, rate)
    return DiagonalKernel(mean, q * span * twice)


def dense_kernel(
    y: Tensor, force: Tensor, slope: Tensor | None, rate: Tensor | None, q: Tensor, span: Tensor
) -> DenseKernel:
    """The same for a full J [B, n, n] and Q [n, n] or [B, n, n], by exponentials of matrices in float64.

    The mean is the last column of exp([[J, c, F], [0, 0, 1], [0, 0, 0]] D), and with E = exp([[-J, Q], [0, Jᵀ]] D) the
    covariance is P = E₂₂ᵀ E₁₂: no inverse of J is taken, and no 1/D.

    Args:
        span: [B] D.
    Source: van Loan 1978 (Computing integrals involving the matrix exponential).
    """
    rows, n = len(y), y[0].numel()
    f, d = force.reshape(rows, n).double(), span.double().reshape(-1, 1, 1)
    j = f.new_zeros(rows, n, n) if slope is None else slope.double()
    q = q.double().expand(rows, n, n)
    block = f.new_zeros(rows, n + 2, n + 2)
    block[:, :n, :n], block[:, :n, n + 1], block[:, n, n + 1] = j, f, 1.0
    if rate is not None:
        block[:, :n, n] = rate.reshape(rows, n).double()
    moved = torch.linalg.matrix_exp(block * d)[:, :n, n + 1]
    if slope is None:
        covariance = q * d
    else:
        loan = torch.cat((torch.cat((-j, q), 2), torch.cat((torch.zeros_like(j), j.mT), 2)), 1)
        e = torch.linalg.matrix_exp(loan * d)
        covariance = e[:, n:, n:].mT @ e[:, :n, n:]
        covariance = 0.5 * (covariance + covariance.mT)
    return DenseKernel(y + moved.reshape(y.shape).to(y.dtype), covariance)


def local_kernel(process: Process, start: Tensor, end: Tensor, y: Tensor, order: Order = "ito") -> Kernel:
    """The Gaussian kernel of the state at u = end given y at u = start; the exact one where the process knows it.

    Args:
        start, end: [] or [B] float64, in the process's own time; end > start in every row.
        y: [B, *shape] state at `start`.
        order: of the expansion; noise that depends on u is taken at the middle.
    Raises:
        ValueError: if the force has not the state's shape or is not finite, or if noise does not reach every coordinate
            at this order.
    Source: Singhal, Goldstein & Ranganath 2024 (Automated denoising score matching for nonlinear diffusions).
    """
    exact = process.transition(start, end, y)
    if exact is not None:
        return exact
    return kernel_of(process, y, *expansion(process, start, y, order), 0.5 * (start + end), end - start)


def expansion(process: Process, u: Tensor, y: Tensor, order: Order) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """F, J and c at u in states y, each [B, *shape] or J [B, n, n]; None where the order takes it for 0.

    Raises:
        ValueError: if the force has not the shape of the state, or is not finite.
    """
    if order != "ito":
        force = checked(process, u, y, process.force(u, y))
        slope = None if order == 0 else process.jacobian(u, y)
        return force, slope, None if order == 0 or process.autonomous else process.force_rate(u, y)
    force, slope, bend = process.taylor(u, y)
    rate = bend if process.autonomous else process.force_rate(u, y) + bend
    return checked(process, u, y, force), slope, rate


def kernel_of(
    process: Process, y: Tensor, force: Tensor, slope: Tensor | None, rate: Tensor | None, middle: Tensor, span: Tensor
) -> Kernel:
    """The kernel of a linearised force with the noise of the process at u = middle, over a span [] or [B]."""
    q = process.covariance_rate(middle)
    if process.structure == "elementwise":
        return elementwise_kernel(y, force, slope, rate, *(expand_like(v, y).to(y.dtype) for v in (q, span)))
    if q.ndim < 2:
        q = q.reshape(-1, 1, 1) * torch.eye(process.size, dtype=torch.float64, device=y.device)
    return dense_kernel(y, force, slope, rate, q, span.expand(len(y)))


def simulate(process: Process, y: Tensor, start: Tensor, end: Tensor, steps: int, noise: Noise, order: Order) -> Tensor:
    """[B, *shape] a draw of the state at u = end given y at u = start, by equal steps of the local kernel.

    A process whose kernel is exact takes one step. Rows with end = start stay.

    Args:
        start, end: [] or [B] float64.
        noise: one row per item.
    """
    rows = len(y)
    start, end = (v.double().expand(rows) for v in (start, end))
    moves = end > start
    steps = 1 if process.transition(start, torch.where(moves, end, start + 1.0), y) is not None else steps
    if steps > 1 and process.autonomous and process.structure == "elementwise":
        return _march(
            process, y, torch.where(moves, start, 0.0), (end - start).clamp(min=0.0) / steps, steps, noise, order
        )
    length = torch.where(moves, (end - start) / steps, 1.0)  # a row that stays is given a step that is not used
    wide = expand_like(moves, y)
    for k in range(steps):
        u = torch.where(moves, start + k * length, 0.0)
        z = noise.normal(*y.shape[1:], dtype=y.dtype)
        y = torch.where(wide, local_kernel(process, u, u + length, y, order).sample(z), y)
    return y


def _march(process: Process, y: Tensor, u: Tensor, length: Tensor, steps: int, noise: Noise, order: Order) -> Tensor:
    """`simulate` for components by themselves whose force and noise do not depend on u: no step asks for them anew.

    A kernel over a length of 0 is a point, so that rows which stay need no care.
    """
    q, span = (expand_like(v, y).to(y.dtype) for v in (process.covariance_rate(u), length))
    for _ in range(steps):
        z = noise.normal(*y.shape[1:], dtype=y.dtype)
        y = elementwise_kernel(y, *expansion(process, u, y, order), q, span).sample(z)
    return y
