"""Weights, images and features that every machine makes alike: what independent packages were run on, and what we are.

All of it comes from uniform draws of torch's CPU generator, which are the same bits everywhere; this file needs torch
alone, so that it also runs where the reference packages are installed.
"""

import math
from pathlib import Path

import torch

KEYS = Path(__file__).with_name("inception_keys.txt")  # `name size size …` of the published weights, one a line
SEED = 20151205


def uniform(g, *shape, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(*shape, generator=g)


def inception_state(path=KEYS, seed=SEED):
    """A state of the published network's shape, drawn in the order of the key list.

    Weights of convolutions and of the last layer: zero mean and variance 2 / fan-in (He); scales and variances of batch
    norms on [0.5, 1.5]; their shifts and means on [-0.1, 0.1].
    """
    g = torch.Generator().manual_seed(seed)
    state = {}
    for line in path.read_text().splitlines():
        key, *sizes = line.split()
        shape = [int(size) for size in sizes]
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
        elif len(shape) > 1:
            bound = math.sqrt(6 / math.prod(shape[1:]))
            state[key] = uniform(g, *shape, low=-bound, high=bound)
        elif key.endswith(("bn.weight", "running_var")):
            state[key] = uniform(g, *shape, low=0.5, high=1.5)
        else:
            state[key] = uniform(g, *shape, low=-0.1, high=0.1)
    return state


def images(height, width, n=2, seed=SEED):
    """[n, 3, height, width] uint8: waves of different lengths and colours with noise, so that every rule of resizing
    matters and no two images are alike."""
    g = torch.Generator().manual_seed(seed + height)
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    phase, step = uniform(g, n, 3, 1, 1, high=6.3), uniform(g, n, 3, 1, 1, low=0.1, high=0.6)
    wave = 110 + 70 * torch.sin(step.double() * (rows + 2 * columns) + phase.double())
    return (wave + 60 * uniform(g, n, 3, height, width)).clamp(0, 255).to(torch.uint8)


BATCHES = {"up": (40, 32), "down": (320, 360)}  # height and width, smaller and larger than the network's input


def feature_sets(n=500, dims=64, seed=SEED):
    """Two sets [n, dims] float64 of correlated features; the second is scaled, shifted and of another mixing."""
    g = torch.Generator().manual_seed(seed)
    sets = []
    for scale, shift in ((1.0, 0.0), (1.1, 0.05)):
        mixing = uniform(g, dims, dims, low=-1.0).double()
        mixing = torch.eye(dims, dtype=torch.float64) + 0.1 * mixing
        sets.append(scale * uniform(g, n, dims, low=-1.0).double() @ mixing + shift)
    return sets
