"""The Gaussian free field on a torus: everything about it is known exactly."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..rng import generator
from ..transforms import Transform
from .dataset import Dataset, Split
from .simulated_fields import SimulatedFields, frequencies, sides, stationary


def free_spectrum(shape: tuple[int, int], mass_squared: float, stiffness: float) -> Tensor:
    """[H, W] float64 P(k) = 1/(m² + κ (4 - 2 cos k₁ - 2 cos k₂)), k = 2π n/L, in the order of the FFT."""
    cosines = [(2 * math.pi / n * k).cos() for n, k in zip(shape, frequencies(shape), strict=True)]
    return 1 / (mass_squared + stiffness * (4 - 2 * cosines[0] - 2 * cosines[1]))


@register(Dataset, "gaussian_field")
class GaussianField(SimulatedFields):
    """The Gaussian free field [1, H, W] on a torus: density ∝ exp(-(m² Σ_i φ_i² + κ Σ_⟨ij⟩ (φ_i - φ_j)²)/2).

    Its precision is m² + κ (-Δ), its spectrum P(k) = 1/(m² + κ (4 - 2 cos k₁ - 2 cos k₂)), and neighbours are
    correlated over √(κ/m²) sites. Density, entropy and every moment are exact.

    Args:
        size: sites along a side, or [height, width].
        mass_squared: m² > 0.
        stiffness: κ >= 0; 0 is white noise.
        count: training items; a fifth as many validate.
        reference: test items.
        seed: of the draws.
        transform: instead of standardisation.
    Raises:
        ConfigError: if the precision is not positive, or nothing is left to draw.
    """

    def __init__(
        self,
        size: int | tuple[int, int] = 32,
        mass_squared: float = 0.5,
        stiffness: float = 1.0,
        count: int = 5000,
        reference: int = 5000,
        seed: int = 0,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        if not (0 < mass_squared < math.inf and 0 <= stiffness < math.inf):
            raise ConfigError(
                "data 'gaussian_field': mass_squared must be > 0 (at 0 the mean of the field has no law) and stiffness "
                f"at least 0, found {mass_squared:g} and {stiffness:g}."
            )
        self.plan(sides(size, "data 'gaussian_field'"), count, reference, transform)
        self.spectrum = free_spectrum(self.shape[1:], mass_squared, stiffness)
        self.mass_squared, self.stiffness, self.seed = float(mass_squared), float(stiffness), seed

    @property
    def recipe(self) -> dict[str, Any]:
        return {"mass_squared": self.mass_squared, "stiffness": self.stiffness, "seed": self.seed}

    def draw(self, split: Split) -> Tensor:
        return stationary(self.spectrum, self.counts[split], generator("gaussian_field", split, self.seed))

    def log_prob(self, x: Tensor) -> Tensor:
        """[B] float64: -½ Σ_k (|x̂_k|²/(N P_k) + log 2πP_k), N = H W."""
        spectrum = self.spectrum.to(x.device)
        power = torch.fft.fft2(x.double()).abs().square().flatten(1) / spectrum.numel()
        return -(power / spectrum.flatten() + (2 * math.pi * spectrum.flatten()).log()).sum(1) / 2

    def entropy(self) -> float:
        """-E[log p(x)] in nats of a whole field: ½ Σ_k log 2πe P_k."""
        return float((2 * math.pi * math.e * self.spectrum).log().sum()) / 2

    def checks(self) -> list[str]:
        variance = self.all("test").x.double().square().flatten(1).mean(1)
        error = float(variance.std()) / math.sqrt(len(variance))
        return [
            f"variance of a site {float(self.spectrum.mean()):.4f}; of the test items {float(variance.mean()):.4f} ± "
            f"{error:.4f}",
            f"entropy {self.entropy() / self.spectrum.numel():.4f} nats/site: no model's likelihood costs less",
        ]
