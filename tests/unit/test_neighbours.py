"""Neighbours from blocks are those of brute force, to the bit, and no large matrix is held."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genmodels.metrics import neighbours as module
from genmodels.metrics.neighbours import blocks, distances, nearest, neighbours, radii, squared_by_product
from genmodels.rng import generator


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator("neighbours", seed), dtype=dtype)


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def brute(x, y, k, own=False):
    d = distances(x, y)
    if own:
        d.fill_diagonal_(math.inf)
    found = d.sort(dim=1, stable=True)
    return found.values[:, :k], found.indices[:, :k]


@pytest.fixture(params=["one block", "small blocks"])
def sizes(request, monkeypatch):
    if request.param == "small blocks":
        monkeypatch.setattr(module, "ROWS", 13)
        monkeypatch.setattr(module, "COLUMNS", 17)
        monkeypatch.setattr(module, "BUDGET", 700)


CASES = {
    "generic": lambda: (normal(60, 7), normal(90, 7, seed=1)),
    "float32": lambda: (normal(60, 7, dtype=torch.float32), normal(90, 7, seed=1, dtype=torch.float32)),
    "far out": lambda: (normal(60, 7) + 1e6, normal(90, 7, seed=1) + 1e6),
    "nearly equal": lambda: (1 + 1e-9 * normal(60, 7), 1 + 1e-9 * normal(90, 7, seed=1)),
    "one outlier": lambda: (normal(60, 7), torch.cat([normal(89, 7, seed=1), torch.full((1, 7), 1e9).double()])),
    "whole numbers": lambda: (normal(60, 3).round(), normal(90, 3, seed=1).round()),  # ties everywhere
    "copies": lambda: (normal(60, 7), normal(60, 7).repeat(2, 1)),
    "constant": lambda: (torch.ones(60, 2), torch.ones(90, 2)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_equal_brute_force(case, k, sizes):
    x, y = CASES[case]()
    for found, (d, index) in (
        (neighbours(x, y, k), brute(x, y, k)),
        (neighbours(y, y, k, own=True), brute(y, y, k, own=True)),
    ):
        assert torch.equal(found.distances, d) and torch.equal(found.indices, index)


@pytest.mark.parametrize("case", CASES)
def test_balls_equal_brute_force(case, sizes):
    """With radii at which points lie exactly on the edge."""
    x, y = CASES[case]()
    d = distances(x, y)
    of_x, of_y = radii(x, 2)[:, None], radii(y, 2)[None]
    on_edge = d[:, 3:4].clone()
    inside = [torch.zeros_like(d, dtype=torch.bool) for _ in range(4)]
    for block in blocks(x, y):
        i, j = block.rows, block.columns
        inside[0][i, j] = block.within(of_x[i])
        inside[1][i, j] = block.within(of_y[:, j], inclusive=True)
        inside[2][i, j] = block.within(on_edge[i])
        inside[3][i, j] = block.within(on_edge[i], inclusive=True)
    for found, expected in zip(inside, (d < of_x, d <= of_y, d < on_edge, d <= on_edge), strict=True):
        assert torch.equal(found, expected)
    assert inside[3][:, 3].all() and not inside[2][:, 3].any()


@pytest.mark.parametrize("width", [1, 30, 700])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_the_bound_holds(width, offset):
    """|product form - differences| <= bound, with room: the bound is a worst case, errors are of mixed signs."""
    x, y = normal(80, width) + offset, normal(120, width, seed=1) + offset
    for block in blocks(x, y):
        error = (block.squared - distances(x, y).square()).abs()
        assert (error <= block.bound / 2).all()
        assert block.bound.max() < 1e-11 * width * (1 + x.var() * width)  # and is small, however far out


def test_the_product_form_alone_loses_copies():
    """Why there is a second look: far out, the plain product form finds no copy at 0."""
    x = normal(50, 7) + 1e6
    assert squared_by_product(x, x).diagonal().abs().max() > 1e-3
    assert (distances(x, x).diagonal() == 0).all() and (nearest(x, x)[0] == 0).all()


def test_against_scikit_learn():
    from sklearn.neighbors import NearestNeighbors

    x, y = normal(70, 5), normal(200, 5, seed=1)
    theirs, index = NearestNeighbors(n_neighbors=4, algorithm="kd_tree").fit(y.numpy()).kneighbors(x.numpy())
    ours = neighbours(x, y, 4)
    assert np.array_equal(ours.indices.numpy(), index)
    assert torch.allclose(ours.distances, torch.from_numpy(theirs), rtol=1e-12)


def test_by_hand():
    train = column(0, 1, 3, 10)
    assert radii(train, 1).tolist() == [1, 1, 2, 7] and radii(train, 3).tolist() == [10, 9, 7, 10]
    d, index = nearest(column(0.25, 2.5, 7, 2), train)
    assert d.tolist() == [0.25, 0.5, 3, 1] and index.tolist() == [0, 2, 3, 1]  # 2 is as near to 1 as to 3


def test_too_few_items():
    with pytest.raises(ValueError, match="3 other items are needed for each item, but there are only 3 in all"):
        radii(normal(3, 2), 3)
    with pytest.raises(ValueError, match="k must be from 1 to the 3 items"):
        neighbours(normal(2, 2), normal(3, 2), 4)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and not func.is_view:
                self.bytes = max(self.bytes, value.numel() * value.element_size())
        return out


@pytest.mark.parametrize("shape", [(1500, 4), (500, 300), (30, 20_000)])
def test_the_largest_tensor_keeps_the_budget(shape, monkeypatch):
    """All pairs would be 18 MB or 2 MB, and 30 items of 20 000 features are 4.8 MB; the budget here is 0.5 MB."""
    monkeypatch.setattr(module, "ROWS", 128)
    monkeypatch.setattr(module, "COLUMNS", 512)
    monkeypatch.setattr(module, "BUDGET", 2**16)
    x = normal(*shape, dtype=torch.float32)
    with Largest() as largest:
        radii(x, 5)
        for block in blocks(x, x):
            block.within(torch.ones(len(block.squared), 1).double())
    # beside the budget: one row of candidates, 9 items of 20 000 features
    assert 0 < largest.bytes <= max(8 * 2**16, 8 * 9 * shape[1])
