"""Averages of the weights that were not tracked, made after training from snapshots of those that were.

The power-function average of relative width std after T steps has the profile p(s) = (γ+1) s^γ/T^(γ+1) over the steps
s in [0, T]. A wanted profile is approximated by a combination Σ c_i p_i of those of the snapshots, and the same
combination of their weights is the wanted average up to ∫ (Σ c_i p_i - p) θ(s) ds.

Source: Karras et al. 2024 (Analyzing and improving the training dynamics of diffusion models), section 3.2, appendix C.
"""

import json
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..files import new_folder, tidy, write_text
from ..registry import ConfigError
from .checkpoint import (
    CheckpointError,
    Tensors,
    check_file,
    folder_of,
    manifest,
    read_tensors,
    steps_in,
    write_tensors,
)
from .ema import WIDEST, PowerProfile, WeightAverage, exponent_of

FORMAT = 1
REFUSED, DOUBTFUL = 0.10, 0.01  # relative errors of a profile
RANK = 1e-13  # eigenvalues of the Gram matrix below this fraction of the largest are rounding
HOW_TO_TRACK = (
    "Track two profiles (train.ema=[{name: power, std: 0.05}, {name: power, std: 0.1}]) and keep snapshots of them "
    "(train.snapshot_every, 30 to 100 in a run)."
)

Profile = tuple[float, int]  # relative standard deviation, and the steps T that it was averaged over


class ReconstructionWarning(UserWarning):
    """A profile that could only be approximated."""


# ---- profiles -------------------------------------------------------------------------------------------------------


def cadence(steps: int, count: int = 64) -> int:
    """Steps between snapshots, so that a run of `steps` keeps about `count` of them."""
    return max(1, -(-steps // count))


def cosines(first: Sequence[Profile], second: Sequence[Profile]) -> Tensor:
    """[n, m] float64 ⟨p_i, p_j⟩/(‖p_i‖ ‖p_j‖) in closed form.

    With r = T_i/T_j <= 1 it is √((2γ_i+1)(2γ_j+1))/(γ_i+γ_j+1) · r^(γ_j + 1/2), the exponent of the later one; nothing
    here grows with γ or T.
    """
    (a, s), (b, t) = _parts(first), _parts(second)
    a, s = a[:, None], s[:, None]
    later = torch.where(s < t, b, a)
    log_ratio = -(s.log() - t.log()).abs()
    return ((2 * a + 1) * (2 * b + 1)).sqrt() / (a + b + 1) * ((later + 0.5) * log_ratio).exp()


def norms(profiles: Sequence[Profile]) -> Tensor:
    """[n] float64 ‖p_i‖ = (γ_i+1)/√((2γ_i+1) T_i)."""
    gamma, steps = _parts(profiles)
    return (gamma + 1) / ((2 * gamma + 1) * steps).sqrt()


def _parts(profiles: Sequence[Profile]) -> tuple[Tensor, Tensor]:
    for std, step in profiles:
        if step < 1:
            raise ValueError(f"posthoc: the average of std {std} over {step} steps has no profile; steps count from 1.")
    exponents = [exponent_of(std) for std, _ in profiles]
    steps = [step for _, step in profiles]
    return torch.tensor(exponents, dtype=torch.float64), torch.tensor(steps, dtype=torch.float64)


def coefficients(available: Sequence[Profile], target: Profile) -> Tensor:
    """[n] float64 c that minimises ‖Σ c_i p_i - p‖ in L2 among those with Σ c_i = 1.

    The constraint makes the combination of weights that never moved exact; it costs next to nothing in L2 and several
    times less error in real weights, which move little against their size. Profiles are scaled to unit norm, whose Gram
    matrix has a condition of about 1e4 for 2x32 snapshots and 1e6 for 2x100; directions below 1e-13 of its largest
    eigenvalue (the same profile twice, or nearly) are left out. A target that is available has the coefficient 1.
    """
    if target in available:
        return torch.tensor([float(i == available.index(target)) for i in range(len(available))], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(cosines(available, available))
    kept = values > RANK * values[-1]
    root = vectors[:, kept] / values[kept].sqrt()
    wanted, mass = cosines(available, [target])[:, 0], norms([target]) / norms(available)
    free, toward = root @ (root.T @ wanted), root @ (root.T @ mass)  # unit-norm coefficients c, and mass · c = 1
    return (free + toward * (1 - mass @ free) / (mass @ toward)) * mass


def condition(available: Sequence[Profile]) -> float:
    """Largest over smallest eigenvalue of the Gram matrix of the profiles at unit norm; 1e16 stands for more."""
    values = torch.linalg.eigvalsh(cosines(available, available))
    return float(values[-1] / torch.maximum(values[0], 1e-16 * values[-1]))


def residual(available: Sequence[Profile], target: Profile, c: Tensor) -> float:
    """‖Σ c_i p_i - p‖/‖p‖, good to about 1e-8."""
    unit = c * norms(available) / norms([target])
    square = 1 - 2 * unit @ cosines(available, [target])[:, 0] + unit @ cosines(available, available) @ unit
    return float(square.clamp(min=0).sqrt())


def reachable(available: Sequence[Profile], step: int) -> tuple[float, float] | None:
    """The smallest and the largest std whose profile at `step` is met within REFUSED; None if there is none."""
    grid = [0.005 * (WIDEST / 0.005) ** (i / 60) for i in range(60)] + [WIDEST]
    good = [s for s in grid if residual(available, (s, step), coefficients(available, (s, step))) <= REFUSED]
    return (good[0], good[-1]) if good else None


# ---- weights --------------------------------------------------------------------------------------------------------


def combine(paths: Sequence[Path], c: Tensor, copied: Collection[str] = ()) -> Tensors:
    """Σ c_i θ̄_i, added in float64 and given back in the type of the files; one file is in memory at a time.

    Args:
        paths: safetensors files with the same tensors, the newest last.
        c: [n] their coefficients.
        copied: tensors that are no averages (buffers); these, and all that are not floating point, are the newest's.
    Raises:
        CheckpointError: naming a file that cannot be read, or that holds other tensors than the newest.
    """
    out = _read(paths[-1])
    types = {name: value.dtype for name, value in out.items() if value.is_floating_point() and name not in copied}
    shapes = {name: value.shape for name, value in out.items()}
    total = {name: c[-1].item() * out[name].double() for name in types}
    for path, weight in zip(paths[:-1], c[:-1].tolist(), strict=True):
        if weight == 0:
            continue
        tensors = _read(path)
        if {name: value.shape for name, value in tensors.items()} != shapes:
            raise CheckpointError(f"{path} holds other tensors than {paths[-1]}; they are of different models.")
        for name, value in total.items():
            value.add_(tensors[name].double(), alpha=weight)
    return out | {name: value.to(types[name]) for name, value in total.items()}


def _read(path: Path) -> Tensors:
    try:
        return read_tensors(path)[0]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None


@dataclass(frozen=True)
class Reconstruction:
    """How an average was made after training.

    Args:
        std, step: the profile that was asked for.
        snapshots: how many averages were combined.
        residual: relative L2 error of the combined profile.
        condition: of the Gram matrix of the profiles.
        gain: Σ|c_i|, by which rounding errors of the snapshots are multiplied at most.
    """

    std: float
    step: int
    snapshots: int
    residual: float
    condition: float
    gain: float

    def __str__(self) -> str:
        return (
            f"the average of std {self.std} at step {self.step:,} is combined from {self.snapshots} snapshots; its "
            f"profile is met within {self.residual:.1e}"
        )


class Snapshots:
    """The power averages of a run at regular steps: `<folder>/<step>/<label>.safetensors` and `snapshot.json`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def write(self, step: int, averages: Mapping[str, WeightAverage], header: Mapping[str, str]) -> Path | None:
        """Keep the power averages after optimiser step `step`, whole or not at all; None if there are none.

        Raises:
            ValueError: if step < 1.
            OSError: if the disk is full; earlier snapshots are untouched.
        """
        tracked = {label: average for label, average in averages.items() if isinstance(average.rule, PowerProfile)}
        if not tracked:
            return None
        if step < 1:
            raise ValueError(f"snapshots: an average over {step} steps has no profile; steps count from 1.")
        final = folder_of(self.folder, step)
        with new_folder(final) as temporary:
            for label, average in tracked.items():
                write_tensors(temporary / f"{label}.safetensors", average.tensors, header)
            profiles = {label: average.rule.std for label, average in tracked.items()}
            copied = next(iter(tracked.values())).copied
            facts = {"format": FORMAT, "step": step, "profiles": profiles, "copied": copied}
            facts["files"] = manifest(temporary)
            write_text(temporary / "snapshot.json", json.dumps(facts, indent=1))
        return final

    def rewind(self, step: int) -> None:
        """Remove the snapshots after a step, which a run restored at that step will write again."""
        tidy(self.folder)
        for later in steps_in(self.folder):
            if later > step:
                shutil.rmtree(folder_of(self.folder, later))

    def listed(self) -> list[tuple[float, int, Path]]:
        """(std, step, path) of every snapshot, by step.

        Raises:
            CheckpointError: naming a snapshot whose description is damaged.
        """
        found = []
        for step in steps_in(self.folder):
            folder = folder_of(self.folder, step)
            profiles = _facts(folder)["profiles"]
            found += [(std, step, folder / f"{label}.safetensors") for label, std in profiles.items()]
        return found

    def reconstruct(
        self, std: float, step: int | None = None, also: Sequence[tuple[float, int, Path]] = ()
    ) -> tuple[Tensors, Reconstruction]:
        """The average of relative width `std` after `step` steps, and how good it is.

        Warns with a ReconstructionWarning if the profile is met to more than 1 % only.

        Args:
            step: the newest snapshot's if not given.
            also: (std, step, path) of further averages of power profiles, those of a verified checkpoint.
        Raises:
            ConfigError: if there is nothing to combine, or if the profile is not met within 10 %, with what can be had.
            CheckpointError: naming a snapshot that is damaged.
        """
        listed = self.listed()
        known = {(s, k): path for s, k, path in [*also, *listed]}
        step = max((k for _, k in known), default=0) if step is None else step
        enough = min((k for _, k in known if k >= step), default=None)  # later ones say nothing more
        if not listed or (enough is not None and len(known) < 2 and (std, step) not in known):
            raise ConfigError(f"{self.folder} holds {len(listed)} snapshots of power averages. {HOW_TO_TRACK}")
        if enough is None or step < 1:
            newest = max(k for _, k in known)
            raise ConfigError(f"{self.folder}: no average of step {step:,} can be made; the newest is of {newest:,}.")
        chosen = sorted((p for p in known if p[1] <= enough), key=lambda p: p[1])
        c = coefficients(chosen, (std, step))
        report = self._judged(chosen, (std, step), c)
        paths = [known[profile] for profile in chosen]
        for path in {path for *_, path in listed}.intersection(paths):
            _verify(path)
        copied = _facts(listed[-1][2].parent)["copied"]
        return combine(paths, c, copied), report

    def _judged(self, chosen: Sequence[Profile], target: Profile, c: Tensor) -> Reconstruction:
        std, step = target
        used, gain = int(c.count_nonzero()), float(c.abs().sum())
        report = Reconstruction(std, step, used, residual(chosen, target, c), condition(chosen), gain)
        if report.residual > REFUSED:
            span = reachable(chosen, step)
            had = f"There, std from {span[0]:.3f} to {span[1]:.3f} can be had." if span else "There, none can be had."
            if all(k != step for _, k in chosen):  # the profile ends where none of the others does
                had += f" Steps with a snapshot: {', '.join(f'{k:,}' for k in sorted({k for _, k in chosen})[-3:])}."
            raise ConfigError(
                f"{self.folder}: the average of std {std} at step {step:,} is not made: the snapshots meet its profile "
                f"within {report.residual:.0%} only, {REFUSED:.0%} is the limit. {had} For others: {HOW_TO_TRACK}"
            )
        if report.residual > DOUBTFUL:
            warnings.warn(f"{report}; more snapshots would meet it better.", ReconstructionWarning, stacklevel=3)
        return report


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "snapshot.json"
    try:
        facts = json.loads(path.read_bytes())
        sound = facts["format"] == FORMAT and facts["step"] == int(folder.name) and facts["files"] and facts["profiles"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}. {_without(folder)}") from None
    if not sound:
        raise CheckpointError(f"{path} does not describe format {FORMAT} at its step. {_without(folder)}")
    return facts


def _verify(path: Path) -> None:
    """Raises CheckpointError if a file of a snapshot is missing, truncated or altered."""
    wanted = _facts(path.parent)["files"].get(path.name, {"bytes": 0, "sha256": ""})
    try:
        check_file(path, wanted)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_without(path.parent)}") from None


def _without(folder: Path) -> str:
    return f"Put a sound copy back, or remove {folder} to do without it."
