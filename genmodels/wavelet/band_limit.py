"""Fields that hold no power above some frequency: detected where a model is fitted, before chains have to fail."""

import torch
from torch import Tensor

from ..registry import ConfigError
from ..transforms import Transform
from .tree import Level

ROUNDING = 100.0  # powers of the rounding of float32: filters in float32 leave some of it where they take all away
RELATIVE = 1e-10  # of the mean power in a band: chains would need so many steps for the loudest of it to move
SHARE = 0.1  # of the frequencies of a band: an energy of short reach is smooth in frequency, and bridges a few


class Power:
    """Sums over fields of |F y|² [H, W//2 + 1] of the unitary Fourier transform, and of the rounding of the data.

    The latter is the power, the same at all frequencies, of numbers uniform between neighbouring float32 items, in
    model space: mean (y(x) - y(x'))²/12, x' next to x. Chains are float32 too, whatever the data are.

    Args:
        size: (H, W) of the fields.
        transform: to model space.
    """

    def __init__(self, size: tuple[int, int], transform: Transform, device: torch.device) -> None:
        self.size, self.transform, self.n = size, transform, 0
        self.power = torch.zeros(size[0], size[1] // 2 + 1, dtype=torch.float64, device=device)
        self.rounding = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in items x [B, 1, H, W] in data units, and their fields y [B, H, W] float64."""
        self.power += torch.fft.rfft2(y, norm="ortho").abs().square().sum(0)
        x = x.to(y.device).float()
        # towards 0, which no transform's domain leaves out
        near = torch.nextafter(x, torch.zeros_like(x)).double()
        error = self.transform(near)[0] - self.transform(x.double())[0]
        self.rounding += error.square().mean((1, 2, 3)).sum() / 12
        self.n += len(x)

    def check(self, level: Level) -> None:
        """Raise if the fields are empty in an upper part of the level's band.

        A frequency (k, q), both positive, is empty if its power is below 100 times that of the rounding, or 1e-10 of
        the mean of the band, and if all with larger k and q are empty as well: holes below, as of a filter that takes
        trends away, are no limit. Those of half the side are left out, which some simulations have not.

        Raises:
            ConfigError: if a tenth of the frequencies of the band is empty.
        """
        height, width = self.size
        folded = (self.power + self.power.roll(-1, 0).flip(0)) / (2 * self.n)  # k and -k
        folded = folded[: (height + 1) // 2, : (width + 1) // 2].cpu()
        k, q = (torch.arange(n, dtype=torch.float64) for n in folded.shape)
        far = torch.maximum(2 * k[:, None] / height, 2 * q / width)  # 1 at half of the side
        octave, rings = level.size[0] / height, 2**level.packets.depth
        band = (far >= octave * level.ring / rings) & (far < octave * (level.ring + 1) / rings)
        if not band.any():
            return
        least = max(ROUNDING * float(self.rounding) / self.n, RELATIVE * float(folded[band].mean()))
        above = (folded < least).flip(0, 1).int().cummin(0).values.cummin(1).values.flip(0, 1).bool()
        empty = above & band
        share = float(empty.sum() / band.sum())
        if share < SHARE:
            return
        radius = ((k[:, None] / height).square() + (q / width).square()).sqrt() * max(self.size)
        fits = " x ".join(str(max(1, round(n * float(far[above].min())))) for n in self.size)
        raise ConfigError(
            f"{level.label}: the training fields are empty from {float(radius[above].min()):.3g} to "
            f"{float(radius[above].max()):.3g} cycles per side ({share:.0%} of the frequencies of this band), where "
            f"they hold a power of {float(folded[above].mean() / folded.mean()):.1g} of the mean: rounding alone, of "
            f"which there is no law to fit. Downsample the maps to at most {fits} pixels, so that they have all "
            "frequencies below half of the side, or add the noise of the instrument to them."
        )
