"""Systems without a solution in closed form, integrated to near rounding: chaos (Lorenz), stiffness (van der Pol)."""

import functools
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..rng import Noise
from .dataset import Dataset
from .trajectories import Trajectories

CENTRE, SCALE = (0.0, 0.0, 23.55), (7.92, 9.01, 8.62)  # mean and standard deviation on Lorenz's attractor
BURN_IN = 5.0  # units of time from a point near the attractor to one on it


def lorenz(y: np.ndarray) -> np.ndarray:
    """[N, 3] dy/dt = (10 (y₂ - y₁), y₁ (28 - y₃) - y₂, y₁ y₂ - 8/3 y₃)."""
    a, b, c = y.T
    return np.stack((10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c), 1)


def integrated(field: Callable[[np.ndarray], np.ndarray], start: np.ndarray, times: np.ndarray) -> np.ndarray:
    """[N, L, C] solutions of dy/dt = field(y) from start [N, C] at time 0, at the times [N, L] of each.

    From one time to the next all items go together, each in a time of its own that runs from 0 to 1 (DOP853, rtol
    1e-10, atol 1e-11).

    Source: Hairer et al. 1993 (Solving Ordinary Differential Equations I), section II.5.
    """
    from scipy.integrate import solve_ivp

    out, y = [], start
    for gap in np.diff(times, axis=1, prepend=0.0).T[..., None]:
        scaled = lambda _, flat, gap=gap: (gap * field(flat.reshape(start.shape))).ravel()  # noqa: E731
        y = solve_ivp(scaled, (0, 1), y.ravel(), "DOP853", (1.0,), rtol=1e-10, atol=1e-11).y[:, -1]
        y = y.reshape(start.shape)
        out.append(y)
    return np.stack(out, 1)


@register(Dataset, "lorenz")
class Lorenz(Trajectories):
    """Lorenz's system on its attractor, (x, y, z) seen at irregular times on [0, horizon].

    x' = 10 (y - x), y' = x (28 - z) - y, z' = x y - 8/3 z, standardised: minus (0, 0, 23.55), over (7.92, 9.01, 8.62).
    Starts are N((0, 0, 25), 8² I) followed for 5 units of time. Errors grow exponentially, so that no forecast
    reaches far. What is given, seen and asked for says `Trajectories.observe`.

    Args:
        task: "interpolate" asks for the values at all times; "forecast" gives the first half of the times and asks for
            the values at the others.
        count: training items; a quarter as many validate, as many test.
        points: times of an item.
        observed: share of the values given that is seen.
        noise: standard deviation of the observations' noise, after standardisation.
        horizon: the end of time.
        seed: of the draws.
    Source: Lorenz 1963 (Deterministic nonperiodic flow).
    """

    unit_of_time = "1"
    channels = 3

    def __init__(
        self,
        task: Literal["interpolate", "forecast"] = "interpolate",
        count: int = 1000,
        points: int = 50,
        observed: float = 0.5,
        noise: float = 0.05,
        horizon: float = 2.0,
        seed: int = 0,
    ) -> None:
        _positive("lorenz", horizon=horizon)
        self.horizon = horizon
        self.observe(task, count, points, observed, noise, seed)

    def curves(self, noise: Noise, times: Tensor) -> tuple[Tensor, None]:
        start = torch.tensor([0.0, 0.0, 25.0], dtype=torch.float64) + 8 * noise.normal(3, dtype=torch.float64)
        y = _lorenz(start.numpy().tobytes(), times.numpy().tobytes(), len(times))
        return (torch.from_numpy(y) - torch.tensor(CENTRE)) / torch.tensor(SCALE), None


@functools.lru_cache(maxsize=6)
def _lorenz(start: bytes, times: bytes, n: int) -> np.ndarray:
    """[n, L, 3] of float64 in bytes, kept for those who ask again."""
    later = BURN_IN + np.frombuffer(times).reshape(n, -1)
    return integrated(lorenz, np.frombuffer(start).reshape(n, 3), later)


@register(Dataset, "van_der_pol")
class VanDerPol(Trajectories):
    """Van der Pol's oscillator y'' = mu (1 - y²) y' - y, (y, y'/(1 + mu)) seen at irregular times on [0, horizon].

    The greater mu, the stiffer: long slow stretches, on which the Jacobian has an eigenvalue down to -3 mu, between
    jumps that take times of order 1/mu; the velocity reaches 4/3 mu. Starts are uniform on [-2, 2]². What is given,
    seen and asked for says `Trajectories.observe`.

    Args:
        mu: stiffness, at least 0 (0 is the harmonic oscillator).
        task: "interpolate" asks for the values at all times; "forecast" gives the first half of the times and asks for
            the values at the others.
        count: training items; a quarter as many validate, as many test.
        points: times of an item.
        observed: share of the values given that is seen.
        noise: standard deviation of the observations' noise.
        horizon: the end of time; a cycle takes 2 pi for mu = 0, and (3 - 2 ln 2) mu for large mu.
        seed: of the draws.
    Source: van der Pol 1926 (On relaxation-oscillations).
    """

    unit_of_time = "1"
    channels = 2

    def __init__(
        self,
        mu: float = 5.0,
        task: Literal["interpolate", "forecast"] = "interpolate",
        count: int = 500,
        points: int = 50,
        observed: float = 0.5,
        noise: float = 0.05,
        horizon: float = 12.0,
        seed: int = 0,
    ) -> None:
        _positive("van_der_pol", horizon=horizon)
        if not mu >= 0:
            raise ConfigError(f"data 'van_der_pol': mu must be at least 0, found {mu:g}.")
        self.mu, self.horizon = mu, horizon
        self.observe(task, count, points, observed, noise, seed)

    def curves(self, noise: Noise, times: Tensor) -> tuple[Tensor, None]:
        start = 4 * noise.uniform(2, dtype=torch.float64) - 2
        pairs = zip(start.tolist(), times.tolist(), strict=True)
        y = np.stack([van_der_pol(self.mu, tuple(a), tuple(t)) for a, t in pairs])
        return torch.from_numpy(y) / torch.tensor([1.0, 1 + self.mu], dtype=torch.float64), None


@functools.lru_cache(maxsize=10_000)
def van_der_pol(mu: float, start: tuple[float, float], times: tuple[float, ...]) -> np.ndarray:
    """[L, 2] y and y' from the start at time 0, at increasing times > 0 (LSODA, rtol 1e-10, atol 1e-11)."""
    from scipy.integrate import odeint

    def field(y: np.ndarray, _: float) -> tuple[float, float]:
        a, b = y.item(0), y.item(1)  # plain numbers are a third of the time
        return b, mu * (1 - a * a) * b - a

    y = odeint(field, start, (0.0, *times), rtol=1e-10, atol=1e-11, mxstep=100_000)
    return y[1:]


def _positive(name: str, **values: float) -> None:
    for key, value in values.items():
        if not value > 0:
            raise ConfigError(f"data '{name}': {key} must be > 0, found {value}.")
