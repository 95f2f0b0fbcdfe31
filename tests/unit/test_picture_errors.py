"""Errors of pictures against loops, filters of scipy, and closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate

from genmodels.metrics.picture_errors import mse, psnr, ssim
from genmodels.rng import generator


def noise(*shape, seed=0):
    return torch.rand(shape, generator=generator("pictures", seed), dtype=torch.float64)


def by_loops(x, y, peak, width):
    """The structural similarity of two pictures, window by window, from centred moments."""
    at = np.arange(width) - width // 2
    w = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    found = []
    for i in range(x.shape[0] - width + 1):
        for j in range(x.shape[1] - width + 1):
            a, b = x[i : i + width, j : j + width], y[i : i + width, j : j + width]
            m, n = (w * a).sum(), (w * b).sum()
            va, vb, cov = (w * (a - m) ** 2).sum(), (w * (b - n) ** 2).sum(), (w * (a - m) * (b - n)).sum()
            c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
            found.append((2 * m * n + c1) * (2 * cov + c2) / ((m * m + n * n + c1) * (va + vb + c2)))
    return np.mean(found)


@pytest.mark.parametrize(("sides", "width"), [((13, 15), 11), ((11, 11), 11), ((10, 14), 9), ((8, 8), 7), ((3, 4), 3)])
def test_similarity_is_that_of_loops_over_windows(sides, width):
    x = 16 * noise(2, 3, *sides)
    y = (x + 4 * noise(2, 3, *sides, seed=1)).clamp(0, 16)
    wanted = [np.mean([by_loops(x[i, c].numpy(), y[i, c].numpy(), 16, width) for c in range(3)]) for i in range(2)]
    assert torch.allclose(ssim(x, y, 16), torch.tensor(wanted), rtol=1e-11, atol=0)


def test_similarity_is_that_of_scipys_filters_for_frames_and_any_unit():
    x, y = noise(2, 3, 1, 20, 17), noise(2, 3, 1, 20, 17, seed=1)
    at = np.arange(11) - 5
    w = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / 4.5)
    w /= w.sum()

    def of(a, b):
        means = [correlate(v, w)[5:-5, 5:-5] for v in (a, b, a * a, b * b, a * b)]
        m, n, aa, bb, ab = means
        apart = (m**2 + n**2 + 1e-4) * (aa - m**2 + bb - n**2 + 9e-4)
        return (2 * m * n + 1e-4) * (2 * (ab - m * n) + 9e-4) / apart

    pairs = zip(x.numpy(), y.numpy(), strict=True)
    wanted = torch.tensor([np.mean([of(a[0], b[0]) for a, b in zip(i, j, strict=True)]) for i, j in pairs])
    assert torch.allclose(ssim(x, y, 1.0), wanted, rtol=1e-11, atol=0)
    assert torch.allclose(ssim(255 * x, 255 * y, 255), wanted, rtol=1e-11, atol=0)
    assert torch.allclose(ssim(x.float(), y.float(), 1.0), wanted, rtol=1e-4, atol=0)


def test_closed_forms():
    x = 16 * noise(3, 1, 12, 12)
    assert torch.equal(mse(x, x), torch.zeros(3, dtype=torch.float64)) and psnr(x, x, 16).isposinf().all()
    assert torch.allclose(ssim(x, x, 16), torch.ones(3, dtype=torch.float64), atol=1e-12)
    # constant pictures: only the first factor is left, (2ab + C1)/(a² + b² + C1)
    a, b, c1 = 3.0, 5.0, 0.16**2
    flat = torch.full((1, 2, 12, 12), a), torch.full((1, 2, 12, 12), b)
    assert ssim(*flat, 16).item() == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-9)
    assert mse(*flat).item() == 4.0 and psnr(*flat, 16).item() == pytest.approx(20 * math.log10(8))
    # each item has its own error: ± δ everywhere
    delta = torch.tensor([0.1, 1.0, 10.0]).double()[:, None, None, None]
    off = x + delta * torch.where(noise(3, 1, 12, 12, seed=2) < 0.5, -1.0, 1.0)
    assert torch.allclose(mse(x, off), delta.flatten() ** 2)
    assert torch.allclose(psnr(x, off, 100.0), torch.tensor([60.0, 40.0, 20.0]).double())


def test_pictures_that_cannot_be_compared():
    x = noise(2, 1, 8, 8)
    for f in (mse, lambda a, b: psnr(a, b, 1.0), lambda a, b: ssim(a, b, 1.0)):
        with pytest.raises(ValueError, match=r"of equal shape \[B, \*\] are needed, found \[2, 1, 8, 8\] and \[2, 1,"):
            f(x, x[..., :7])
    for f in (psnr, ssim):
        with pytest.raises(ValueError, match=f"{f.__name__}: the peak must be positive, found 0"):
            f(x, x, 0)
    with pytest.raises(ValueError, match="sides of 3 pixels or more"):
        ssim(x[..., :2], x[..., :2], 1.0)
