"""What passes between the parts: batches, shapes, sums, capabilities."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genmodels.types import (
    Batch,
    Likelihood,
    SupportsEncode,
    SupportsLogProb,
    SupportsPredict,
    SupportsSample,
    SupportsScore,
    SupportsVelocity,
    expand_like,
    sum_items,
)


def full(n: int = 5) -> Batch:
    rows = torch.arange(n)
    return Batch(
        x=rows.float()[:, None].expand(n, 3).clone(),
        condition={"label": rows, "text": rows[:, None].repeat(1, 2).double()},
        target=rows * 10,
        times=rows[:, None].double() + torch.tensor([0.1, 0.2]),
        mask=rows[:, None] % 2 == torch.tensor([0, 1]),
        target_times=rows[:, None].double() + 0.5,
        target_mask=rows[:, None] % 2 == 0,
    )


def tensors(batch: Batch) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in ("x", "condition", "target", "times", "mask", "target_times", "target_mask"):
        value = getattr(batch, name)
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return found


ROWS = [slice(1, 4), slice(None, None, 2), torch.tensor([3, 0, 3]), torch.tensor([True, False, False, True, False])]


@pytest.mark.parametrize("rows", ROWS)
def test_indexing_takes_the_same_rows_of_every_tensor(rows):
    whole, part = full(), full()[rows]
    assert len(part) == len(torch.arange(5)[rows])
    for (name, old), (same, new) in zip(tensors(whole).items(), tensors(part).items(), strict=True):
        assert name == same and torch.equal(new, old[rows]) and new.dtype == old.dtype


def test_one_integer_is_no_index():
    with pytest.raises(TypeError, match=r"batch\[2:3\] is one item"):
        full()[2]
    with pytest.raises(TypeError):
        list(full())  # would give batches without batch axis


def test_moving_and_replacing_keep_the_rest():
    there = full().to("meta")
    assert {t.device.type for t in tensors(there).values()} == {"meta"}
    assert {t.dtype for t in tensors(there).values()} == {t.dtype for t in tensors(full()).values()}
    batch = full()
    changed = batch.replace(x=batch.x + 1, condition=None)
    assert changed.condition is None and changed.times is batch.times and torch.equal(changed.x, batch.x + 1)
    assert torch.equal(batch.x, full().x)
    bare = Batch(batch.x)
    assert bare[1:2].condition is None and bare.to("cpu").mask is None
    assert Batch(batch.x, condition=torch.arange(5))[torch.tensor([4])].condition.tolist() == [4]
    assert (
        bare == bare and bare != Batch(batch.x) and len({bare, bare}) == 1
    )  # identity, as tensors have no truth value
    with pytest.raises(AttributeError):
        bare.x = batch.x


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2, 2)])
def test_times_are_broadcast_over_items(shape):
    x = torch.rand(shape)
    t = torch.rand(4)
    expected = torch.stack([t[i] * x[i] for i in range(4)])
    assert expand_like(t, x).ndim == len(shape) and torch.equal(expand_like(t, x) * x, expected)
    scalar = torch.tensor(0.25)
    assert expand_like(scalar, x).shape == () and torch.equal(expand_like(scalar, x) * x, 0.25 * x)
    assert expand_like(t.double(), x).dtype == torch.float64


def test_times_of_a_square_batch_follow_the_items():
    x = torch.ones(3, 3)
    assert torch.equal(
        expand_like(torch.tensor([1.0, 2.0, 3.0]), x) * x, torch.tensor([[1.0] * 3, [2.0] * 3, [3.0] * 3])
    )


def test_sums_are_taken_in_double_precision():
    # 2^24 + 1 is no float32: a running float32 sum would lose every one of the ones that follow
    x = torch.ones(2, 1001)
    x[:, 0] = 2.0**24
    assert sum_items(x).tolist() == [2.0**24 + 1000] * 2
    y = torch.full((1, 3), 0.1)
    assert sum_items(y).item() == 3 * torch.tensor(0.1).double().item()
    cancelling = torch.tensor([[1e8, 1.0, -1e8]])
    assert sum_items(cancelling).item() == 1.0 and cancelling.sum(1).item() != 1.0


@pytest.mark.parametrize("shape", [(0,), (3,), (0, 2), (3, 0), (3, 2), (3, 2, 4, 1)])
def test_sums_keep_the_batch_axis(shape):
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int64, torch.bool):
        x = torch.ones(shape).to(dtype)
        out = sum_items(x)
        assert out.shape == shape[:1] and out.dtype == torch.float64
        assert torch.equal(out, torch.full(shape[:1], float(torch.Size(shape[1:]).numel()), dtype=torch.float64))


def test_gradients_pass_through_the_sum():
    x = torch.ones(2, 3, requires_grad=True)
    sum_items(x).sum().backward()
    assert x.grad.dtype == torch.float32 and torch.equal(x.grad, torch.ones(2, 3))


class Sampler(nn.Module):
    def sample(self, seeds: int, *, condition: Tensor | None = None, num_steps: int = 3) -> Tensor:
        return torch.full((seeds,), float(num_steps))


class Scorer(nn.Module):
    def likelihood(self, x: Tensor, *, condition: Tensor | None = None, seeds: Any = None) -> Likelihood:
        return Likelihood(sum_items(x), "exact")

    def log_prob(self, x: Tensor, *, condition: Tensor | None = None, seeds: Any = None) -> Tensor:
        return self.likelihood(x, condition=condition, seeds=seeds).value


class HalfScorer(nn.Module):
    def log_prob(self, x: Tensor) -> Tensor:
        return sum_items(x)


class Wrapper(nn.Module):
    """Forwards what it wraps, one capability at a time."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def sample(self, seeds: int, *, condition: Tensor | None = None, num_steps: int = 3) -> Tensor:
        return self.inner.sample(seeds, condition=condition, num_steps=num_steps)


def test_capabilities_are_found_by_isinstance():
    every = [SupportsSample, SupportsLogProb, SupportsEncode, SupportsPredict, SupportsVelocity, SupportsScore]

    def able(model: object) -> list[type]:
        return [capability for capability in every if isinstance(model, capability)]

    assert able(Sampler()) == [SupportsSample] and able(Scorer()) == [SupportsLogProb]
    assert able(HalfScorer()) == [] and able(nn.Linear(1, 1)) == []  # both methods make the capability
    wrapped = Wrapper(Sampler())
    assert able(wrapped) == [SupportsSample] and wrapped.sample(2, num_steps=7).tolist() == [7.0, 7.0]
    assert able(nn.Sequential(Sampler())) == []  # a container forwards nothing by itself
    assert issubclass(Sampler, SupportsSample) and not issubclass(Sampler, SupportsLogProb)
