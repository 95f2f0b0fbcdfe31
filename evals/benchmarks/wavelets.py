"""Wavelet packets of fields: CPU time of ours, ptwt and PyWavelets on the same numbers, in one process.

    python -m evals.benchmarks.wavelets [--repeats 15] [--wavelet db4]

Values and gradient of forward and inverse, at one and three octave splits of 256 fields of 32², 64 of 128² and 16 of
512². PyWavelets has no gradients. Its mode "periodization" is our transform, and the file holds how far both are apart;
the periodic mode of ptwt is redundant (it adds coefficients at the edge), so that only its cost can be compared.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genmodels.wavelet.filter_bank import Packets
from genmodels.wavelet.filters import low_pass

from .side_by_side import medians, report

RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "wavelets.json"
CASES = ((256, 32), (64, 128), (16, 512))
DEPTHS = (1, 3)
Transform = Callable[[Tensor], object]


def ours(size: int, wavelet: str, depth: int) -> tuple[Transform, Transform]:
    packets = Packets((size, size), wavelet, depth)
    return packets, packets.inverse


def ptwt(size: int, wavelet: str, depth: int) -> tuple[Transform, Transform]:
    """The full packet tree by repeated two-dimensional transforms, and back."""
    import ptwt as library

    def forward(x):
        parts = [x]
        for _ in range(depth):
            split = [library.wavedec2(part, wavelet, mode="periodic", level=1) for part in parts]
            parts = [part for low, high in split for part in (low, *high)]
        return parts

    def inverse(parts):
        parts = list(parts)
        for _ in range(depth):
            fours = [parts[k : k + 4] for k in range(0, len(parts), 4)]
            parts = [library.waverec2((low, tuple(high)), wavelet) for low, *high in fours]
            # an edge is added at every depth: the reconstruction of inner ones is wider than their siblings
            size_ = min(part.shape[-1] for part in parts)
            parts = [part[..., :size_, :size_] for part in parts]
        return parts[0]

    return forward, inverse


def pywavelets(size: int, wavelet: str, depth: int) -> tuple[Transform, Transform]:
    import pywt

    h = low_pass(wavelet, size).tolist()  # ours, which has the last digits right
    high = [(-1) ** k * value for k, value in enumerate(h[::-1])]
    bank = pywt.Wavelet("ours", filter_bank=[h[::-1], high[::-1], h, high])
    axes = {"mode": "periodization", "axes": (-2, -1)}

    def forward(x):
        parts = [np.asarray(x)]
        for _ in range(depth):
            split = [pywt.dwt2(part, bank, **axes) for part in parts]
            parts = [part for low, others in split for part in (low, *others)]
        return parts

    def inverse(parts):
        parts = list(parts)
        for _ in range(depth):
            parts = [pywt.idwt2((parts[k], tuple(parts[k + 1 : k + 4])), bank, **axes) for k in range(0, len(parts), 4)]
        return parts[0]

    return forward, inverse


def tasks(pair: tuple[Transform, Transform], x: Tensor, gradients: bool, label: str) -> dict[str, Callable[[], None]]:
    """What is timed: one closure per task."""
    forward, inverse = pair
    with torch.no_grad():
        c = forward(x)

    def backward(f, inputs):
        leaves = [part.clone().requires_grad_() for part in (inputs if isinstance(inputs, list) else [inputs])]
        out = f(leaves if isinstance(inputs, list) else leaves[0])
        parts = out if isinstance(out, list) else [out]
        torch.autograd.grad(sum(part.square().sum() for part in parts), leaves)

    def plain(f, inputs):
        with torch.no_grad():
            f(inputs)

    found = {f"{label} forward": lambda: plain(forward, x), f"{label} inverse": lambda: plain(inverse, c)}
    if gradients:
        found[f"{label} forward, gradient"] = lambda: backward(forward, x)
        found[f"{label} inverse, gradient"] = lambda: backward(inverse, c)
    return found


def difference(size: int, wavelet: str, depth: int) -> float:
    """Largest difference of the sorted coefficients of one field in float64 to PyWavelets', over the largest of them.

    Bands come in different orders; rolling the field by (2^depth - 1)(K/2 - 1) makes the phases agree.
    """
    x = torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = (2**depth - 1) * (len(low_pass(wavelet, size)) // 2 - 1)
    here = ours(size, wavelet, depth)[0](x.roll((moved, moved), (0, 1))).flatten().sort().values.numpy()
    there = np.sort(np.concatenate([part.ravel() for part in pywavelets(size, wavelet, depth)[0](x)]))
    return float(np.abs(here - there).max() / np.abs(there).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--wavelet", default="db4")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found, apart = {}, {}
    for count, size in CASES:
        x = torch.randn(count, size, size, generator=torch.Generator().manual_seed(0))
        for depth in DEPTHS:
            label = f"{count}x{size}² depth {depth}"
            contenders = {
                f.__name__: tasks(f(size, given.wavelet, depth), x, f is not pywavelets, label)
                for f in (ours, ptwt, pywavelets)
            }
            found |= medians(contenders, given.repeats)
            apart[label] = difference(size, given.wavelet, depth)
    report(found, {"repeats": given.repeats}, RESULT, wavelet=given.wavelet, difference_to_pywavelets=apart)
    print("float64, ours beside PyWavelets: " + ", ".join(f"{label} {value:.1e}" for label, value in apart.items()))


if __name__ == "__main__":
    main()
