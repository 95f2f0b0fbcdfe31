"""Paths that are known at some times, and smooth in between; their knots are state, which travels with checkpoints."""

import csv
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from ..registry import ConfigError, register
from .interpolation import cubic, limit_slopes, pchip_slopes
from .schedules import Scales, Schedule, as_times

HALVINGS = 60  # of the place between two knots
COLUMNS = ("t", "log_snr", "alpha", "sigma", "dalpha", "dsigma")


class Table(Schedule, nn.Module):
    """A path through knots in polar coordinates, α = R cos φ and σ = R sin φ.

    φ (from 0, no noise, to π/2, no signal) grows with t, so that log-SNR = -2 log tan φ falls; both are finite cubics
    wherever log-SNR is not. Ends are exact, derivatives are those of the cubics and continuous.

    Attributes:
        knots: [5, K] float64 buffer: t, φ, φ', R, R'. A checkpoint may bring another number of them.
    """

    knots: Tensor

    def __init__(self, knots: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("knots", torch.empty(5, 0, dtype=torch.float64) if knots is None else knots)

    @property
    def ready(self) -> bool:
        return self.knots.shape[1] > 0

    @property
    def t_min(self) -> float:
        return float(self.knots[0, 0]) if self.ready else 0.0

    @property
    def t_max(self) -> float:
        return float(self.knots[0, -1]) if self.ready else 1.0

    def _read(self, device: torch.device) -> Tensor:
        """The knots where times are (single times and ends are asked for on the CPU), float64."""
        if not self.ready:
            raise ConfigError(self.missing())
        return self.knots.to(device, torch.float64)

    def missing(self) -> str:
        """What to do about a path without knots."""
        return f"{getattr(self, 'registered_name', 'schedule')}: the path has no knots. Load a checkpoint."

    def fit(self, batches: Iterable[Tensor], *, generator: Generator) -> dict[str, Tensor]:
        self._read(self.knots.device)  # training does not begin without a path
        return {}

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self(t)[:2]

    def __call__(self, t: Tensor) -> Scales:
        t = as_times(t, self.t_max)
        times, angles, turns, radii, rates = self._read(t.device)
        angle, turn = cubic(times, angles, turns, t)
        radius, rate = cubic(times, radii, rates, t)
        cos, sin = torch.sin(math.pi / 2 - angle), torch.sin(angle)  # cos(π/2) would round to 6e-17
        return Scales(radius * cos, radius * sin, rate * cos - radius * sin * turn, rate * sin + radius * cos * turn)

    def log_snr(self, t: Tensor) -> Tensor:
        times, angles, turns, _, _ = self._read(t.device)
        angle = cubic(times, angles, turns, as_times(t, self.t_max))[0]
        return 2 * (torch.sin(math.pi / 2 - angle).log() - torch.sin(angle).log())

    def _time(self, log_snr: Tensor) -> Tensor:
        """The cubic of φ is bisected between the two knots that enclose it."""
        times, angles, turns, _, _ = self._read(log_snr.device)
        angle = torch.atan(torch.exp(-log_snr / 2))
        k = torch.searchsorted(angles, angle.contiguous(), right=True).clamp(1, len(angles) - 1)
        low, high = times[k - 1], times[k]
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            later = cubic(times, angles, turns, middle)[0] < angle
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return (low + high) / 2

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}knots")
        if isinstance(found, Tensor) and found.ndim == 2 and found.shape != self.knots.shape:
            self.knots = self.knots.new_empty(found.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def knots_of(
    t: Tensor, alpha: Tensor, sigma: Tensor, dalpha: Tensor | None = None, dsigma: Tensor | None = None
) -> Tensor:
    """[5, K] the knots of a `Table` through these scales, with these derivatives or, if None, shape-preserving ones.

    Args:
        t: [K] increasing times in [0, 1].
        alpha, sigma: [K] >= 0, never both 0; σ/α must increase.
        dalpha, dsigma: [K] derivatives by t.
    Raises:
        ConfigError: naming the first knot that is out of order or range, or if derivatives are no numbers.
    """
    _check(t, alpha, sigma)
    if any(d is not None and (d.shape != t.shape or not d.isfinite().all()) for d in (dalpha, dsigma)):
        raise ConfigError(f"tabulated: dalpha and dsigma must be finite, one number for each of {len(t)} times.")
    radius, angle = torch.hypot(alpha, sigma), torch.atan2(sigma, alpha)
    if dalpha is None or dsigma is None:
        turn, rate = pchip_slopes(t, angle), pchip_slopes(t, radius)
    else:
        turn, rate = (alpha * dsigma - sigma * dalpha) / radius.square(), (alpha * dalpha + sigma * dsigma) / radius
        turn = limit_slopes(t, angle, turn)
    return torch.stack((t, angle, turn, radius, rate))


def _check(t: Tensor, alpha: Tensor, sigma: Tensor) -> None:
    if not len(t) == len(alpha) == len(sigma) or len(t) < 2:
        raise ConfigError(
            f"tabulated: as many values as times, and at least 2, are needed, found {len(t)} times, {len(alpha)} and "
            f"{len(sigma)} values."
        )
    whole = torch.stack((t, alpha, sigma))
    if not whole.isfinite().all():
        raise ConfigError("tabulated: times and scales must be finite (log-SNR may be infinite at the ends).")
    if not (t.diff() > 0).all() or t[0] < 0 or t[-1] > 1:
        k = int((t.diff() <= 0).nonzero()[0]) if (t.diff() <= 0).any() else -1
        found = f"{t[k]:g} then {t[k + 1]:g}" if k >= 0 else f"{t[0]:g} to {t[-1]:g}"
        raise ConfigError(f"tabulated: times must increase within [0, 1] (0 = data, 1 = noise), found {found}.")
    if (alpha < 0).any() or (sigma < 0).any() or (torch.hypot(alpha, sigma) == 0).any():
        raise ConfigError("tabulated: scales must be >= 0 and not both 0 at any time.")
    angle = torch.atan2(sigma, alpha)
    if not (angle.diff() > 0).all():
        k = int((angle.diff() <= 0).nonzero()[0])
        raise ConfigError(
            f"tabulated: noise must grow beside the signal, but σ/α does not from t = {t[k]:g} to t = {t[k + 1]:g}. "
            "Time runs from data (0) to noise (1): turn a table that runs the other way around."
        )


def scales_of(log_snr: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """α and σ of a log-SNR with α² + σ² = 1 ("variance_preserving") or α + σ = 1 ("straight")."""
    log_snr = log_snr.double()
    if form == "variance_preserving":
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    return torch.sigmoid(log_snr / 2), torch.sigmoid(-log_snr / 2)


@register(Schedule, "tabulated")
class Tabulated(Table):
    """A path through given knots: times with log-SNR, or with α and σ; a shape-preserving cubic between them.

    The angle atan(σ/α) and the radius √(α² + σ²) are what is interpolated. The path begins and ends at the first and
    the last time; a log-SNR of inf or -inf there is exact.

    Args:
        times: increasing, in [0, 1]; 0 is data and 1 is noise.
        log_snr: 2 log(α/σ) at the times, falling; infinite ends can be written in a file, or as alpha and sigma.
        alpha, sigma: instead of log_snr.
        dalpha, dsigma: beside alpha and sigma their derivatives by t, of which shape-preserving ones are made if not
            given.
        form: what log_snr leaves open: α² + σ² = 1 (variance_preserving), or α + σ = 1 (straight).
        file: instead of them a .csv with a header, or a .npz, of such columns, t for times.
            Checkpoints hold its knots, so that a run does without the file.
    Raises:
        ConfigError: if knots are missing, given twice, or out of order.
    Source: Fritsch & Carlson 1980 (Monotone piecewise cubic interpolation).
    """

    local = ("file",)

    def __init__(
        self,
        times: tuple[float, ...] = (),
        log_snr: tuple[float, ...] = (),
        alpha: tuple[float, ...] = (),
        sigma: tuple[float, ...] = (),
        dalpha: tuple[float, ...] = (),
        dsigma: tuple[float, ...] = (),
        form: Literal["variance_preserving", "straight"] = "variance_preserving",
        file: str | None = None,
    ) -> None:
        if (file is None) == (len(times) == 0) or (
            file is not None and (log_snr or alpha or sigma or dalpha or dsigma)
        ):
            raise ConfigError("tabulated: give either times (with log_snr, or alpha and sigma), or a file.")
        self.file = None if file is None else Path(file).expanduser()
        columns: dict[str, tuple[float, ...]] = {"t": times, "log_snr": log_snr, "alpha": alpha, "sigma": sigma}
        columns |= {"dalpha": dalpha, "dsigma": dsigma}
        if self.file is not None:
            columns = _columns(self.file) if self.file.exists() else {}
        super().__init__(_knots(columns, form) if columns else None)

    @staticmethod
    def node(path: Table) -> dict[str, Any]:
        """The arguments that make a path again, to rounding: all of it in numbers, without state or files."""
        t = path._read(torch.device("cpu"))[0]
        values = dict(zip(("alpha", "sigma", "dalpha", "dsigma"), path(t), strict=True))
        return {"name": "tabulated", "times": t.tolist(), **{key: value.tolist() for key, value in values.items()}}

    def missing(self) -> str:
        return f"tabulated: there is no file {self.file}, and no checkpoint with its knots was loaded."


def _knots(columns: Mapping[str, Any], form: str) -> Tensor:
    given = {key: torch.tensor(v, dtype=torch.float64) for key, v in columns.items() if len(v)}
    if set(given) == {"t", "log_snr"}:
        alpha, sigma = scales_of(given["log_snr"], form)
    elif set(given) in ({"t", "alpha", "sigma"}, {"t", "alpha", "sigma", "dalpha", "dsigma"}):
        alpha, sigma = given["alpha"], given["sigma"]
    else:
        raise ConfigError(
            "tabulated: t with log_snr, or with alpha and sigma (and both of dalpha and dsigma, or none), is needed, "
            f"found {', '.join(given) or 'nothing'}."
        )
    return knots_of(given["t"], alpha, sigma, given.get("dalpha"), given.get("dsigma"))


def _columns(path: Path) -> dict[str, Any]:
    """Columns of a .csv with a header, or arrays of a .npz.

    Raises:
        ConfigError: if the file is of another kind, or its columns are no numbers or have other names.
    """
    try:
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path, allow_pickle=False) as arrays:
                found = {key: arrays[key].astype(float).tolist() for key in arrays.files}
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as lines:
                rows = list(csv.DictReader(lines))
            found = {key.strip(): [float(row[key]) for row in rows] for key in (rows[0] if rows else {})}
        else:
            raise ConfigError(f"tabulated: {path} is neither a .csv nor a .npz.")
    except (OSError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"tabulated: {path} cannot be read as columns of numbers: {error}") from None
    if not set(found) <= set(COLUMNS) or "t" not in found:
        raise ConfigError(f"tabulated: {path} has the columns {', '.join(found)}; of {', '.join(COLUMNS)} are known.")
    return found
