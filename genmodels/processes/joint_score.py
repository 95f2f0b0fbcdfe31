"""A network as the score of an item with its auxiliary variables, in the directions that are noised."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..conditions import GuidedNetwork, check_interval
from ..networks.network import Network
from ..types import Condition
from .clocks import inside
from .linear import LinearDiffusion

Parametrization = Literal["mixed", "noise"]


class Coefficients(NamedTuple):
    """What turns states into inputs and answers into scores at a time, float64 [..., rows, columns].

    Args:
        mean, covariance: of u_t given the item, its auxiliary variables integrated out: N(mean x, covariance).
        mean is [..., n, 1].
        scale: [..., r, r] C with C Cᵀ = Gᵀ covariance⁻¹ G: Gᵀ score = C n, where the target n has unit variance.
        skip: [..., r, n] and out: [..., r, r]: n̂ = skip u + out F with the network's answer F.
        into: [..., n, n] diagonal; the network sees into u.
    """

    mean: Tensor
    covariance: Tensor
    scale: Tensor
    skip: Tensor
    out: Tensor
    into: Tensor


class JointScore(nn.Module):
    """Gᵀ ∇ log p_t(u) = C(t) n̂(t, u) of a linear diffusion, with n̂ from a network.

    Given the item, -C⁻¹ Gᵀ Σ⁻¹ (u - mean) is N(0, I) at every time and in as many components as there are noises: the
    variables without noise of their own need no score. "noise": n̂ = F. "mixed": n̂ = skip u + out F, where skip u is
    exact for data N(0, s² I) and out makes the target of F unit variance, so that F = 0 is the best Gaussian model.

    Args:
        network: from [B, n c, …] to [B, r c, …] for items [c, …]: variables lie along the first axis of items.
        sigma_data: s, root mean square of the data in model space.
    Source: Dockhorn et al. 2022 (Critically-damped Langevin diffusion), section 3 (mixed score);
        Karras et al. 2022 (EDM), equation 7.
    """

    def __init__(
        self, network: Network, diffusion: LinearDiffusion, prediction: Parametrization, sigma_data: float
    ) -> None:
        super().__init__()
        self.network, self.diffusion, self.prediction = network, diffusion, prediction
        self.register_buffer("sigma_data", torch.tensor(sigma_data, dtype=torch.float64))

    def coefficients(self, t: Tensor) -> Coefficients:
        """At times [] or [B] above 0.

        Raises:
            ValueError: if they are integers or not in (0, 1].
        """
        d = self.diffusion
        t = inside(t, 1.0, "t")
        if t.device.type == "cpu" and bool((t <= 0).any()):
            raise ValueError(
                "multivariate_diffusion: times > 0 are needed, found t = 0, where u has no density given the item. The "
                "model's own times begin at t_min."
            )
        factor = d.factor.to(t)
        mean, noise = d.transition(torch.zeros_like(t), t)
        spread = mean[..., :, 1:] @ mean[..., :, 1:].mT * d.spread
        covariance, column = noise + spread, mean[..., :, :1]
        root = torch.linalg.cholesky(factor.mT @ _inverse(covariance, factor))
        whole = covariance + self.sigma_data**2 * column @ column.mT
        skip = -torch.linalg.solve_triangular(root, _inverse(whole, factor).mT, upper=False)
        # Var n of Gaussian data is what skip u explains, W <= I as whole >= covariance, and the rest
        explained = -torch.linalg.solve_triangular(root, (skip @ factor).mT, upper=False)
        rest, axes = torch.linalg.eigh(torch.eye(d.noises).to(explained) - (explained + explained.mT) / 2)
        out = axes @ (rest.clamp(min=0).sqrt()[..., None] * axes.mT)
        if self.prediction == "noise":
            skip, out = torch.zeros_like(skip), torch.eye(d.noises).to(out)
        into = torch.diag_embed(whole.diagonal(dim1=-2, dim2=-1).rsqrt())
        return Coefficients(column, covariance, root, skip, out, into)

    def answer(self, t: Tensor, u: Tensor, condition: Condition | None, c: Coefficients) -> Tensor:
        """[B, r, *shape] n̂ at u [B, n, *shape]."""
        f = self.network(t, apply(c.into, u).flatten(1, 2), condition)
        f = f.reshape(len(u), self.diffusion.noises, *u.shape[2:])
        return apply(c.skip, u) + apply(c.out, f)

    def pull(self, t: Tensor, u: Tensor, condition: Condition | None = None) -> Tensor:
        """[B, n, *shape] G Gᵀ ∇ log p_t(u), per unit of the clock: all of the score that dynamics need."""
        c = self.coefficients(t)
        return apply(self.diffusion.factor.to(c.scale) @ c.scale, self.answer(t, u, condition, c))

    def score(self, t: Tensor, u: Tensor, condition: Condition | None = None) -> Tensor:
        """[B, r, *shape] Gᵀ ∇ log p_t(u)."""
        c = self.coefficients(t)
        return apply(c.scale, self.answer(t, u, condition, c))

    def velocity(self, t: Tensor, u: Tensor, condition: Condition | None = None) -> Tensor:
        """[B, n, *shape] du/dt = β (A u - ½ G Gᵀ ∇ log p_t) of the probability-flow ODE, per unit time."""
        rate = self.diffusion.clock.rate(t)[..., None, None]
        change = apply(self.diffusion.matrix.to(rate) * rate, u)
        return change - 0.5 * apply(rate, self.pull(t, u, condition))

    def forward(self, t: Tensor, u: Tensor, condition: Condition | None = None) -> Tensor:
        return self.velocity(t, u, condition)

    def guided(self, scale: float, null: Tensor, interval: tuple[float, float] | None = None) -> "JointScore":
        """s_null + w (s - s_null), which is s with F guided so: at fixed t and u it is an affine function of F.

        Args:
            scale: w; 1 is off.
            null: [*] the label or embedding that stands for "no condition".
            interval: noise levels (low, high) of the item within which guidance acts.
        Raises:
            ValueError: unless 0 <= low < high.
        Source: Kynkäänniemi et al. 2024 (Applying guidance in a limited interval).
        """
        if interval is not None:
            check_interval(interval)

        def acts(t: Tensor) -> Tensor:
            level = self.noise_level(t)
            return (interval[0] <= level) & (level <= interval[1])

        network = GuidedNetwork(self.network, scale, null, None if interval is None else acts)
        made = JointScore(network, self.diffusion, self.prediction, float(self.sigma_data))
        return made.to(self.sigma_data.device)

    def noise_level(self, t: Tensor) -> Tensor:
        """[] or [B] float64 σ/|α| of the item in u_t, σ the standard deviation of its noise, at times > 0."""
        noise = self.diffusion.marginal(t.double(), 0.0)
        scale = self.diffusion.transition(torch.zeros_like(t.double()), t.double())[0][..., 0, 0]
        return noise[..., 0, 0].sqrt() / scale.abs()

    # ---- the frame in which the law at rest stands still -------------------------------------------------------------

    def _turning(self) -> Tensor:
        """[n, n] R = A + ½ G Gᵀ Σ∞⁻¹: what the ODE still does at rest, where it turns u and changes no law; or 0.

        As A Σ∞ + Σ∞ Aᵀ + G Gᵀ = 0 its trace is 0, so that the frame has no volume of its own.
        """
        d = self.diffusion
        if d.stationary is None:
            return torch.zeros_like(d.matrix)
        return d.matrix + 0.5 * d.rate @ torch.linalg.inv(d.stationary)

    def frame(self, t: Tensor) -> Tensor:
        """[..., n, n] e^{R B(t)}, from the turning frame to the variables."""
        clock = self.diffusion.clock(t)[..., None, None]
        return torch.matrix_exp(self._turning().to(clock) * clock)

    def turned_velocity(self, log_time: Tensor, w: Tensor, condition: Condition | None = None) -> Tensor:
        """[B, n, *shape] dw/d(log t) of w = e^{-R B(t)} u: 0 at rest, where `velocity` turns u as fast as ever.

        A solver then spends its steps on the law that changes: the rotation of critically damped dynamics would bind
        them to its period, and Heun's method would make it grow. Near the data the divergence goes as 1/t while states
        hardly move, which step control by states would miss; in log t it is even.
        """
        t = log_time.exp()
        clock = self.diffusion.clock(t)[..., None, None]
        turning = self._turning().to(clock)
        u = apply(torch.matrix_exp(turning * clock), w)
        rate = self.diffusion.clock.rate(t)[..., None, None]
        still = self.velocity(t, u, condition) - apply(rate * turning, u)
        return apply(t[..., None, None] * torch.matrix_exp(-turning * clock), still)


def apply(matrix: Tensor, u: Tensor) -> Tensor:
    """[B, rows, *shape] of a matrix [rows, n] or [B, rows, n] on the variables of u [B, n, *shape]; or a number."""
    matrix = matrix.to(u.dtype)
    if matrix.shape[-2:] == (1, 1):
        return matrix.reshape(matrix.shape[:-2] + (1,) * (u.ndim - matrix.ndim + 2)) * u
    # a product of [B] tiny matrices, written as a sum: batched products spend their time on calls
    out = (matrix[..., None] * u.flatten(2)[:, None]).sum(2)
    return out.reshape(*out.shape[:2], *u.shape[2:])


def _inverse(covariance: Tensor, right: Tensor) -> Tensor:
    """covariance⁻¹ right, for a positive definite covariance [..., n, n]."""
    root = torch.linalg.cholesky(covariance)
    return torch.cholesky_solve(right.expand(*covariance.shape[:-2], *right.shape), root)
