"""Short videos of the handwritten digits, which move along straight lines and turn at the walls."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..registry import ConfigError, register
from ..transforms import Transform
from ..types import Batch
from .dataset import SPLITS, Dataset, Split, centred, proposal
from .digits import LEVELS, Digits
from .memory import InMemory
from .trajectories import item_noise

SIDE = 8  # of a digit, in pixels


@register(Dataset, "moving_digits")
class MovingDigits(InMemory):
    """Videos [1, T, H, W] of one handwritten digit each, 8x8 pixels that move over a black square; ten classes.

    In frame t the digit's upper left corner is at r(p + t v), row and column alike, with a start p uniform on 0 … R,
    R = size - 8, a velocity v uniform on the whole numbers -speed … speed (both not 0), and the reflection
    r(u) = R - |u mod 2R - R|. Places are whole pixels, so that levels stay the integers 0 … 16. Splits are those of
    `digits`: train 1,197 · copies, val 100, test 500; item i shows digit i mod n of the n of its split, and its path
    depends on the split, i and the seed alone. The proposed transform adds uniform dequantisation noise and maps
    [0, 17) to [-1, 1).

    Args:
        frames: T.
        size: H = W, in pixels.
        speed: largest velocity along an axis, in pixels a frame.
        copies: training videos of each digit.
        seed: of the paths.
        transform: instead of the proposed one.
    Raises:
        ConfigError: if there is no frame, no room to move, no motion or no copy, or if a digit could meet two walls
            between two frames.
    Source: Srivastava et al. 2015 (Unsupervised learning of video representations using LSTMs), its moving digits;
        Alpaydin & Kaynak 1998 (Optical Recognition of Handwritten Digits, UCI repository), its test part.
    """

    bin_width = 1.0
    levels = LEVELS
    num_classes = 10
    frame_rate = 8.0

    def __init__(
        self,
        frames: int = 8,
        size: int = 16,
        speed: int = 2,
        copies: int = 4,
        seed: int = 0,
        transform: Callable[..., Transform] | None = None,
    ) -> None:
        if frames < 1 or copies < 1 or size <= SIDE or not 1 <= speed <= size - SIDE:
            raise ConfigError(
                f"data 'moving_digits': frames >= 1, copies >= 1, size > {SIDE} and speed in 1 … size - {SIDE} are "
                f"needed, found frames={frames}, copies={copies}, size={size}, speed={speed}."
            )
        self.shape, self.reach = (1, frames, size, size), size - SIDE
        self.transform = proposal(transform, centred(LEVELS))
        digits, self._places = Digits(), {}
        for split in SPLITS:
            images = digits.all(split)
            count = len(images) * (copies if split == "train" else 1)
            self._places[split] = places = self._paths(split, count, frames, speed, seed)
            shown = torch.arange(count) % len(images)
            videos = placed(images.x[shown].to(torch.uint8), places, size)
            self.hold(split, Batch(videos, condition=images.condition[shown]))

    def _paths(self, split: Split, count: int, frames: int, speed: int, seed: int) -> Tensor:
        """[count, T, 2] int64 places."""
        noise = item_noise(count, "moving_digits", split, seed)
        start = (noise.uniform(2, dtype=torch.float64) * (self.reach + 1)).long()
        # all pairs of velocities but the one amid them, which stands still
        each = 2 * speed + 1
        pair = (noise.uniform(1, dtype=torch.float64) * (each**2 - 1)).long()
        pair = pair + (pair >= each**2 // 2)
        velocity = torch.cat((pair // each, pair % each), 1) - speed
        way = start[:, None] + torch.arange(frames)[:, None] * velocity[:, None]
        return self.reach - (way % (2 * self.reach) - self.reach).abs()

    def places(self, split: Split) -> Tensor:
        """[N, T, 2] int64 row and column of the digit's upper left corner in every frame."""
        return self._places[split]


def placed(images: Tensor, places: Tensor, size: int) -> Tensor:
    """[N, 1, T, size, size] the images [N, 1, 8, 8] on black, their corners at the places [N, T, 2]."""
    n, frames, _ = places.shape
    out = images.new_zeros(n, frames, size, size)
    along = torch.arange(SIDE)
    rows, columns = (places[..., axis, None] + along for axis in (0, 1))
    item, frame = torch.arange(n).reshape(n, 1, 1, 1), torch.arange(frames).reshape(1, frames, 1, 1)
    out[item, frame, rows[..., None], columns[..., None, :]] = images.expand(n, frames, SIDE, SIDE)
    return out.unsqueeze(1)


def windows(x: Tensor, places: Tensor) -> Tensor:
    """[N, T, 8, 8] what the videos x [N, 1, T, H, W] show at the places [N, T, 2]: the digit, if it is there."""
    n, frames, _ = places.shape
    along = torch.arange(SIDE, device=x.device)
    rows, columns = (places[..., axis, None] + along for axis in (0, 1))
    item, frame = torch.arange(n).reshape(n, 1, 1, 1), torch.arange(frames).reshape(1, frames, 1, 1)
    return x[:, 0][item, frame, rows[..., None], columns[..., None, :]]
