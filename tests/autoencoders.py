"""A small autoencoder of diffusers with random weights, in a folder as `save_pretrained` writes it."""

import functools
import tempfile
from pathlib import Path

import torch

_FOLDER = tempfile.TemporaryDirectory()  # removed with the process


def save(folder: Path, seed: int = 0, **options: object) -> Path:
    """Images of 3 channels, half the resolution, two latent channels."""
    from diffusers import AutoencoderKL

    sizes = {"block_out_channels": (4, 8), "latent_channels": 2, "norm_num_groups": 2, "layers_per_block": 1}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKL(**sizes, **types, **{"scaling_factor": 0.7, "shift_factor": 0.1} | options)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return folder


@functools.cache
def tiny() -> str:
    """The path of one such folder, the same in a whole process."""
    return str(save(Path(_FOLDER.name) / "autoencoder"))
