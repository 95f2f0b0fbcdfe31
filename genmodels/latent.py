"""Images as latents of an autoencoder of diffusers: model space is its latent space."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import pretrained
from .hashing import sha256
from .pretrained import WEIGHTS
from .registry import ConfigError, register
from .rng import Noise
from .transforms import Transform
from .types import Shape

KIND = "AutoencoderKL"


@register(Transform, "latent")
class Latent(Transform):
    """y = scaling (z - shift) with z of the autoencoder's posterior given 2 (x - low)/(high - low) - 1.

    No volume: what a model learns is the law of latents, and data have no likelihood. `inverse` decodes and clamps to
    [low, high]; it undoes `forward` as well as the autoencoder can.

    The autoencoder is frozen, always in eval mode, computes in float32 or wider whatever the precision of a run, and is
    no part of the model: not of its parameters, averages or checkpoints. A checkpoint holds the SHA-256 of its weights
    and the scaling instead, and loads only where the folder has the same weights.

    Args:
        path: a folder with config.json and weights of an AutoencoderKL, as diffusers' save_pretrained writes it.
        scaling: model units per unit of the latents; the folder's scaling_factor if not given.
        shift: subtracted before scaling; the folder's shift_factor (0 without one) if not given.
        sample: draw z from the posterior where there is noise (training); otherwise, and with false, z is its mean.
        low, high: range of the pixels of the data.
        batch_size: how many images are encoded or decoded at once.
    Raises:
        ConfigError: if the folder holds no such autoencoder, if it does not take images of this shape, or if the
            weights are not those that a checkpoint was trained with.
    Source: Rombach et al. 2022 (High-resolution image synthesis with latent diffusion models), section 3.1.
    """

    volume = False
    local = ("path",)

    def __init__(
        self,
        path: str,
        scaling: float | None = None,
        shift: float | None = None,
        sample: bool = True,
        low: float = 0.0,
        high: float = 255.0,
        batch_size: int = 64,
        *,
        shape: Shape,
    ) -> None:
        super().__init__()
        config = pretrained.check_folder(path, KIND, "latent")
        scaling = config.get("scaling_factor", 0.18215) if scaling is None else scaling
        shift = (config.get("shift_factor") or 0.0) if shift is None else shift
        if not (high > low and scaling > 0 and batch_size > 0):
            raise ConfigError(
                "latent: low < high, scaling > 0 and batch_size > 0 are needed, found "
                f"low={low}, high={high}, scaling={scaling} and batch_size={batch_size}."
            )
        self.path, self.sample, self.low, self.high, self.batch_size = path, sample, low, high, batch_size
        # in a tuple it is no submodule: `_apply` moves it, and nothing else of a run sees it
        self.held = (pretrained.load(path, KIND, "latent").requires_grad_(False),)
        self.register_buffer("scaling", torch.tensor(scaling, dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.float64))
        self.register_buffer("weights", torch.tensor(list(bytes.fromhex(sha256(self.file))), dtype=torch.uint8))
        self.out_shape(shape)

    @property
    def file(self) -> pretrained.Path:
        return pretrained.Path(self.path) / WEIGHTS

    @property
    def autoencoder(self) -> nn.Module:
        return self.held[0]

    def out_shape(self, shape: Shape) -> Shape:
        """The shape of the latents of images of a shape.

        Raises:
            ConfigError: if the autoencoder does not take such images.
        """
        config = self.autoencoder.config
        unit = 2 ** (len(config.block_out_channels) - 1)
        if len(shape) != 3 or shape[0] != config.in_channels or shape[1] % unit or shape[2] % unit:
            raise ConfigError(
                f"latent: the autoencoder of {self.path} takes images of {config.in_channels} channels with sides "
                f"divisible by {unit}, found items of shape {list(shape)}."
            )
        return (config.latent_channels, shape[1] // unit, shape[2] // unit)

    def forward(self, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, Tensor]:
        def encode(part: Tensor) -> Tensor:
            posterior = self.autoencoder.encode(part).latent_dist
            return torch.cat((posterior.mean, posterior.std), 1)

        latents = self.out_shape(tuple(x.shape[1:]))
        mean, std = self._batched(encode, 2 * (x - self.low) / (self.high - self.low) - 1, latents, 2).chunk(2, 1)
        if self.sample and noise is not None:
            mean = mean + std * noise.normal(*latents, dtype=mean.dtype).to(mean.device)
        y = self.scaling.to(mean.dtype) * (mean - self.shift.to(mean.dtype))
        return y.to(x.dtype), x.new_zeros(len(x), dtype=torch.float64)

    def inverse(self, y: Tensor) -> Tensor:
        config = self.autoencoder.config
        unit = 2 ** (len(config.block_out_channels) - 1)
        shape = (config.out_channels, y.shape[2] * unit, y.shape[3] * unit)
        z = y / self.scaling.to(y.dtype) + self.shift.to(y.dtype)
        x = self._batched(lambda part: self.autoencoder.decode(part).sample, z, shape, 1)
        return ((x.to(y.dtype) + 1) / 2).clamp(0, 1) * (self.high - self.low) + self.low

    def _batched(self, f: Callable[[Tensor], Tensor], x: Tensor, shape: Shape, parts: int) -> Tensor:
        """f of a few items at a time, in the autoencoder's own precision; [B, parts · C, …] for the shape [C, …]."""
        x = x.to(self.autoencoder.dtype)
        if not len(x):
            return x.new_zeros(0, parts * shape[0], *shape[1:])
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat([f(part) for part in x.split(self.batch_size)])

    def _apply(self, fn: Callable, recurse: bool = True) -> "Latent":
        self.autoencoder._apply(fn)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: object) -> None:
        trained, own = state_dict.get(f"{prefix}weights"), self.weights
        if trained is not None and not torch.equal(trained.to(own), own):
            raise ConfigError(
                f"latent.path: {self.file} has the SHA-256 {_hex(own)}…, but the checkpoint was trained with the "
                f"autoencoder {_hex(trained)}…. Put those weights back."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _hex(digest: Tensor) -> str:
    return bytes(digest.tolist()).hex()[:12]
