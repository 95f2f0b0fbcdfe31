"""How far pictures are from their originals, item by item: squared error, signal to noise, structural similarity.

The last two axes of an item are a picture's; whatever lies before them (channels, frames) are pictures of their own.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW, SPREAD, K1, K2 = 11, 1.5, 0.01, 0.03


def mse(x: Tensor, y: Tensor) -> Tensor:
    """[B] float64 mean over all pixels of (x - y)², in squared units of the items [B, *].

    Raises:
        ValueError: if the shapes differ, or there are no pixels.
    """
    _check("mse", x, y)
    return (x.double() - y.double()).square().flatten(1).mean(1)


def psnr(x: Tensor, y: Tensor, peak: float) -> Tensor:
    """[B] float64 peak signal to noise ratio 10 log₁₀(peak²/MSE) in decibels; infinity for equal items [B, *].

    Args:
        peak: of the scale of pixels, largest less smallest value (255, 16, 1).
    Raises:
        ValueError: if the shapes differ, there are no pixels, or the peak is not positive.
    """
    _check("psnr", x, y, peak)
    return 20 * math.log10(peak) - 10 * mse(x, y).log10()


def ssim(x: Tensor, y: Tensor, peak: float) -> Tensor:
    """[B] float64 structural similarity of items [B, *, H, W], its mean over windows, channels and frames.

    With means μ, variances σ² and the covariance under a Gaussian window (11 pixels, σ = 1.5) that lies wholly inside:
    (2 μ_x μ_y + C₁)(2 σ_xy + C₂) / ((μ_x² + μ_y² + C₁)(σ_x² + σ_y² + C₂)), C = (0.01 peak)², (0.03 peak)². Pictures
    with a side below 11 get the widest odd window that fits, of the same σ.

    Args:
        peak: of the scale of pixels, largest less smallest value (255, 16, 1).
    Raises:
        ValueError: if the shapes differ, the peak is not positive, or a side has less than 3 pixels.
    Source: Wang et al. 2004 (Image quality assessment), section III-B, equation 13.
    """
    _check("ssim", x, y, peak)
    side = min(x.shape[-2:]) if x.ndim >= 3 else 0
    if side < 3:
        raise ValueError(f"ssim: [B, *, H, W] with sides of 3 pixels or more is needed, found {list(x.shape)}.")
    width = min(WINDOW, side - 1 + side % 2)
    g = torch.exp(-(torch.arange(width, dtype=torch.float64, device=x.device) - width // 2).square() / (2 * SPREAD**2))
    g = g / g.sum()
    a, b = (v.double().reshape(-1, 1, *v.shape[-2:]) for v in (x, y))
    means = F.conv2d(torch.cat([a, b, a * a, b * b, a * b], 1).flatten(0, 1)[:, None], g[None, None, :, None])
    means = F.conv2d(means, g[None, None, None]).unflatten(0, (-1, 5))[:, :, 0]
    of_x, of_y, xx, yy, xy = means.unbind(1)
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    alike = (2 * of_x * of_y + c1) * (2 * (xy - of_x * of_y) + c2)
    apart = (of_x.square() + of_y.square() + c1) * (xx - of_x.square() + yy - of_y.square() + c2)
    return (alike / apart).reshape(len(x), -1).mean(1)


def _check(name: str, x: Tensor, y: Tensor, peak: float = 1.0) -> None:
    if x.shape != y.shape or x.ndim < 2 or not math.prod(x.shape[1:]):
        raise ValueError(f"{name}: items of equal shape [B, *] are needed, found {list(x.shape)} and {list(y.shape)}.")
    if not (peak > 0 and math.isfinite(peak)):
        raise ValueError(f"{name}: the peak must be positive, found {peak}. It is the range of pixels, such as 255.")
