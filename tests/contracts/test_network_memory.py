"""The contract of what runs decide about networks: recomputation in backward and compilation change no numbers."""

import contextlib
import copy
import inspect
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from genmodels.networks.network import Network, set_autocast, set_compile, set_gradient_checkpointing
from genmodels.registry import ConfigError, arguments, member, names
from tests.contracts.test_network import LABELS, TIMES, image, make, randn

every = pytest.mark.parametrize("name", names(Network))


def training(name: str, **arguments_: object) -> Network:
    """A network in training, with dropout wherever it has some."""
    has_dropout = "dropout" in {a.name for a in arguments(member(Network, name, "network"))}
    return make(name, **({"dropout": 0.3} if has_dropout else {}) | arguments_).train()


def gradients(network: Network, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss and its gradients by x and every parameter, for one fixed draw of the dropout."""
    x = x.detach().clone().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss = network(TIMES, x, LABELS).square().sum()
        grads = torch.autograd.grad(loss, [x, *network.parameters()])
    return loss.detach(), list(grads)


@contextlib.contextmanager
def kept_bytes(network: Network, x: Tensor) -> Iterator[list[int]]:
    """Bytes of what a forward pass keeps for backward, parameters and input aside."""
    own = {p.untyped_storage().data_ptr() for p in [x, *network.parameters()]}
    seen: dict[int, int] = {}
    total: list[int] = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        yield total
    total.append(sum(seen.values()))


@every
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_recomputing_changes_no_gradient_by_a_bit(name, autocast):
    network, x = training(name).float(), randn(5, *image(name)).float()
    set_autocast(network, autocast)
    loss, plain = gradients(network, x)
    set_gradient_checkpointing(network)
    again, recomputed = gradients(network, x)
    assert torch.equal(again, loss) and all(map(torch.equal, recomputed, plain))


@every
def test_recomputing_keeps_less(name):
    network, x = training(name), randn(5, *image(name))
    kept = {}
    for on in (False, True):
        set_gradient_checkpointing(network, on)
        with kept_bytes(network, x) as kept[on]:
            out = network(TIMES, x, LABELS)
        del out
    assert kept[True][0] < 0.6 * kept[False][0]


@every
def test_nothing_is_recomputed_outside_training_and_without_gradients(name, monkeypatch):
    from genmodels.networks import network as module

    network, x = training(name), randn(5, *image(name))
    set_gradient_checkpointing(network)
    calls = []
    real = module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *inputs, **options: calls.append(1) or real(*inputs, **options))
    with torch.no_grad():
        network(TIMES, x, LABELS)
    network.eval()(TIMES, x, LABELS)
    assert calls == []
    network.train()(TIMES, x, LABELS)
    assert calls


@every
def test_recomputed_networks_have_second_derivatives(name):
    def second(network: Network) -> list[Tensor]:
        x = randn(5, *image(name)).requires_grad_()
        slope = torch.autograd.grad(network(TIMES, x, LABELS).sum(), x, create_graph=True)[0]
        return list(torch.autograd.grad(slope.square().sum(), [p for p in network.parameters()], allow_unused=True))

    network = make(name).train()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative, recomputed or not
        plain = second(network)
        set_gradient_checkpointing(network)
        recomputed = second(network)
    assert [g is None for g in plain] == [g is None for g in recomputed]
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True) if a is not None)


# ---- compilation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """How many graphs were compiled so far in a test."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def compare_compiled(
    name: str, backend: str, checkpointing: bool, graphs: Callable[[], int], **arguments_: object
) -> None:
    """Loss and gradients to 1e-5 of the largest, with the same names of tensors; bfloat16's digits under autocast."""
    network, x = make(name, **arguments_).float().train(), randn(5, *image(name)).float()
    loss, plain = gradients(network, x)
    compiled = copy.deepcopy(network)
    set_compile(compiled, backend)
    set_gradient_checkpointing(compiled, checkpointing)
    assert list(compiled.state_dict()) == list(network.state_dict())
    found, grads = gradients(compiled, x)
    assert graphs() > 0
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    for a, b in zip(grads, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    set_autocast(compiled, torch.bfloat16)
    low, _ = gradients(compiled, x)
    assert 0 < abs(low - loss) < 0.05 * loss


@every
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_traced_networks_give_the_same(name, checkpointing, graphs):
    compare_compiled(name, "aot_eager", checkpointing, graphs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments_", "checkpointing"),
    [("residual_mlp", {"blocks": 1}, True), ("unet", {"multipliers": (1,), "heads": 1}, False)],
)
def test_compiled_networks_give_the_same(name, arguments_, checkpointing, graphs):
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler")
    compare_compiled(name, "inductor", checkpointing, graphs, **arguments_)


@every
@pytest.mark.slow
def test_batch_sizes_do_not_compile_without_end(name, graphs):
    network = make(name).float().train()
    set_compile(network, "aot_eager")
    counts = []
    for n in (4, 6, 7, 9, 12, 16, 20):
        x = randn(n, *image(name)).float()
        network(torch.linspace(0, 1, n), x, torch.arange(n) % 4).sum().backward()
        counts.append(graphs())
    assert counts[0] > 0 and counts[-1] <= 3  # one for a number, one for a symbol, one where it equals another size


@pytest.mark.slow
def test_many_networks_of_one_class_are_all_compiled(graphs):
    """Twelve of different widths, more than the graphs that torch keeps by default for one piece of code."""
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        pytest.skip("torch before 2.13 counts the graphs of all of them together")

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"in_shape": (4,), "out_shape": (4,), "timed": False, "num_classes": None}
            self.parts = nn.ModuleList(make("mlp", hidden=(8 + k, 8), **sizes) for k in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(None, x)
            return x

    chain, x = Chain().float(), torch.ones(3, 4)
    expected = chain(x)
    set_compile(chain, "aot_eager")
    torch.testing.assert_close(chain(x), expected, rtol=1e-5, atol=1e-5)
    assert graphs() == 12


def test_losses_with_second_derivatives_are_not_compiled():
    class Twice(nn.Module):
        differentiates_twice = True

    with pytest.raises(ConfigError, match=r"train\.compile: the loss of Twice.*no second derivative"):
        set_compile(Twice())
