"""Maps of the convergence of weak gravitational lensing, with a shifted lognormal law of a given spectrum."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..rng import generator
from ..transforms import Transform
from .dataset import Dataset, Split
from .simulated_fields import SimulatedFields, frequencies, sides, stationary

Cosmology = Literal["omega_m_0.26", "omega_m_0.3"]
# log C_ℓ of sources at redshift 1 as a polynomial in log(ℓ/1000), the highest power first: Limber's integral over the
# non-linear spectrum of matter, to 1.5 % within MULTIPOLES
COEFFICIENTS: dict[Cosmology, tuple[float, ...]] = {
    # Ω_m = 0.26, σ₈ = 0.8, h = 0.72, n_s = 0.96, Ω_b = 0.046
    "omega_m_0.26": (0.00342206, -0.00252328, -0.0603876, -0.0543309, -1.234, -21.8817),
    # Ω_m = 0.3, σ₈ = 0.8, h = 0.7, n_s = 0.97, Ω_b = 0.05
    "omega_m_0.3": (0.00345751, -0.00271432, -0.0597511, -0.058732, -1.2251, -21.6629),
}
MULTIPOLES = (50.0, 20_000.0)
SHIFT = (0.008, 0.029, -0.0079, 0.00065)  # of z, z², z³, z⁴
REDSHIFTS = 3.0


def angular_spectrum(multipole: Tensor, cosmology: Cosmology = "omega_m_0.26") -> Tensor:
    """C_ℓ of the convergence of sources at redshift 1, in steradian; holds for 50 <= ℓ <= 20,000."""
    u, power = (multipole.double() / 1000).log(), torch.zeros(())
    for coefficient in COEFFICIENTS[cosmology]:
        power = power * u + coefficient
    return power.exp()


def convergence_spectrum(size: int, side: float, cosmology: Cosmology = "omega_m_0.26") -> Tensor:
    """[N, N] float64 target spectrum of a pixelised map, in the order of the FFT; its mean is the variance of a pixel.

    P(k) = C_ℓ (N/θ)² sinc²(k₁/N) sinc²(k₂/N) with ℓ = 2π|k|/θ and sinc x = sin(πx)/(πx), the mean over a pixel; P(0) =
    0.

    Args:
        size: N pixels along a side.
        side: of the map in degrees; θ is the same in radian.
    """
    theta, (rows, columns) = math.radians(side), frequencies((size, size))
    multipole = 2 * math.pi / theta * (rows.square() + columns.square()).sqrt()
    pixel = (torch.sinc(rows / size) * torch.sinc(columns / size)).square()
    power = (size / theta) ** 2 * pixel * angular_spectrum(multipole.clamp(min=1.0), cosmology)
    return torch.where(multipole > 0, power, 0.0)


def shift(redshift: float) -> float:
    """λ(z) = 0.008 z + 0.029 z² - 0.0079 z³ + 0.00065 z⁴: minus the convergence of an empty line of sight.

    Source: Hilbert et al. 2011 (Cosmic shear covariance: the log-normal approximation).
    """
    return sum(c * redshift**k for k, c in enumerate(SHIFT, 1))


def logarithm_spectrum(spectrum: Tensor, least: float) -> Tensor:
    """[H, W] the spectrum of g where κ = λ (exp(g - Var g/2) - 1) has the given one: ξ_g = log(1 + ξ_κ/λ²).

    What comes out negative is no spectrum and is set to 0; of convergence maps that is the mode k = 0 and little else.

    Args:
        least: λ, κ > -λ.
    """
    covariance = torch.fft.ifft2(spectrum).real
    return torch.fft.fft2((covariance / least**2).log1p()).real.clamp(min=0.0)


@register(Dataset, "lognormal_field")
class LognormalField(SimulatedFields):
    """Convergence maps [1, N, N] of weak lensing with a shifted lognormal law, on a torus.

    κ = λ (exp(g - Var g/2) - 1), g Gaussian with the spectrum that gives κ that of `convergence_spectrum`. The
    spectrum is that of sources at redshift 1; the redshift of the sources enters by λ alone (`shift`), the depth of
    empty lines of sight, and so by the skewness. One-point statistics are close to those of simulations, high peaks and
    the shapes of structures are not.

    Args:
        size: pixels along a side.
        side: of the map, in degrees.
        redshift: of the sources, for the shift λ.
        cosmology: of the spectrum.
        count: training items; a fifth as many validate.
        reference: test items.
        seed: of the draws.
        transform: instead of standardisation.
    Raises:
        ConfigError: if the map has waves for which the spectrum is not known, or nothing is left to draw.
    Source: Taruya et al. 2002 (Lognormal Property of Weak-Lensing Fields); Xavier et al. 2016 (Improving lognormal
        models for cosmological fields).
    """

    def __init__(
        self,
        size: int = 64,
        side: float = 3.5,
        redshift: float = 1.0,
        cosmology: Cosmology = "omega_m_0.26",
        count: int = 5000,
        reference: int = 5000,
        seed: int = 0,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        shape = sides(size, "data 'lognormal_field'")
        if not 0 < redshift <= REDSHIFTS:
            raise ConfigError(f"data 'lognormal_field': redshift must be in (0, {REDSHIFTS:g}], found {redshift:g}.")
        _check_multipoles(size, side)
        self.plan(shape, count, reference, transform)
        self.least, self.seed = shift(redshift), seed
        self.side, self.cosmology = float(side), cosmology
        self.spectrum = convergence_spectrum(size, side, cosmology)
        self.logarithm = logarithm_spectrum(self.spectrum, self.least)

    @property
    def recipe(self) -> dict[str, Any]:
        return {"side": self.side, "shift": self.least, "cosmology": self.cosmology, "seed": self.seed}

    def draw(self, split: Split) -> Tensor:
        g = stationary(self.logarithm, self.counts[split], generator("lognormal_field", split, self.seed))
        return self.least * torch.expm1(g - self.logarithm.mean() / 2)

    def checks(self) -> list[str]:
        x = self.all("test").x.double()
        centred = x - x.mean()
        sigma = float(centred.square().mean().sqrt())
        return [
            f"κ > -{self.least:.4f}; of the test items σ = {sigma:.5f} (of the target spectrum "
            f"{float(self.spectrum.mean().sqrt()):.5f}), skewness {float((centred / sigma).pow(3).mean()):.2f}, least "
            f"{float(x.min()):.4f}, largest {float(x.max()):.4f}"
        ]


def _check_multipoles(size: int, side: float) -> None:
    """Raises ConfigError if the lowest or the highest wave of the map lies beyond the fit of the spectrum."""
    if not side > 0:
        raise ConfigError(f"data 'lognormal_field': side must be > 0 degrees, found {side:g}.")
    low = 360 / side
    high = low * size / math.sqrt(2)
    if low < MULTIPOLES[0] or high > MULTIPOLES[1]:
        widest, finest = 360 / MULTIPOLES[0], 360 * size / math.sqrt(2) / MULTIPOLES[1]
        raise ConfigError(
            f"data 'lognormal_field': a map of {size} pixels over side={side:g} degrees has waves of ℓ = {low:,.0f} … "
            f"{high:,.0f}, but the spectrum is known for {MULTIPOLES[0]:g} … {MULTIPOLES[1]:,.0f}. Take a side between "
            f"{finest:.3g} and {widest:.3g} degrees, or another size."
        )
