"""`TimestepShared` around networks of diffusers: its map of timesteps, stock schedulers and pipelines, its folders."""

import json

import diffusers
import pytest
import torch
from torch import Tensor, nn

from genmodels.diffusion.schedules import VariancePreserving
from genmodels.diffusion.time_condition import Shared
from genmodels.export.timestep_shared import TimestepShared, share, shared_edges

SCHEDULERS = {
    "DDPMPipeline": diffusers.DDPMScheduler,
    "DDIMPipeline": diffusers.DDIMScheduler,
    "dpm": diffusers.DPMSolverMultistepScheduler,
}


def unet(**changes) -> diffusers.UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8)}
        made = diffusers.UNet2DModel(**sizes, **blocks, layers_per_block=1, norm_num_groups=4, **changes)
    return made.eval()


class Spy(nn.Module):
    """A network in the place of a U-Net: keeps the timesteps that it is told, and looks at the state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.config = diffusers.configuration_utils.FrozenDict(sample_size=8, in_channels=1)
        self.weight, self.told = nn.Parameter(torch.ones(())), []
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def forward(self, sample: Tensor, timestep: Tensor | float) -> diffusers.utils.BaseOutput:
        self.told.append(timestep)
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=self.weight * torch.tanh(sample))


# ---- the map ---------------------------------------------------------------------------------------------------------


def test_known_edges():
    """T = 1000, t̃ = 100: n = 5 by twenties; n = 3 does not divide it, and has the edges 0, 33, 66."""
    k = torch.arange(1000)
    assert torch.equal(share(k, shared_edges(5, 100)), torch.where(k < 100, k // 20 * 20, k))
    assert shared_edges(3, 100) == (0, 33, 66, 100)
    expected = {0: 0, 19: 0, 32: 0, 33: 33, 65: 33, 66: 66, 99: 66, 100: 100, 999: 999}
    found = share(torch.tensor(list(expected)), shared_edges(3, 100))
    assert found.tolist() == list(expected.values())
    # the same map in continuous time, wherever n divides t̃
    for n in (1, 2, 5, 10, 20, 50, 100):
        continuous = Shared(n, 0.1)(k.double() / 1000, VariancePreserving())
        assert torch.equal((1000 * continuous).round().long(), share(k, shared_edges(n, 100)))
    assert torch.equal(share(k, shared_edges(100, 100)), k)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.float32, torch.float16])
def test_shape_and_dtype_stay(dtype):
    steps = torch.tensor([[0, 19, 20], [99, 100, 999]]).to(dtype)
    found = share(steps, shared_edges(5, 100))
    assert found.dtype == dtype and torch.equal(found, torch.tensor([[0, 0, 20], [80, 100, 999]]).to(dtype))
    assert share(steps[0, 2], shared_edges(5, 100)).shape == ()
    if dtype.is_floating_point:  # what lies between two steps belongs to the one before
        between = torch.tensor([19.5, 32.9, 33.0, 33.5, 99.9, 100.5], dtype=dtype)
        told = torch.tensor([0, 0, 33, 33, 66, 100.5], dtype=dtype)
        assert torch.equal(share(between, shared_edges(3, 100)), told)


def test_numbers_stay_numbers():
    for value, expected in ((19, 0), (20, 20), (99.5, 80.0), (500, 500), (100.25, 100.25)):
        found = share(value, shared_edges(5, 100))
        assert found == expected and type(found) is type(value)


@pytest.mark.parametrize(("n", "t_tilde"), [(0, 100), (-1, 100), (5, 0), (101, 100), (3, 2)])
def test_intervals_that_cannot_be_are_refused(n, t_tilde):
    with pytest.raises(ValueError, match=r"TimestepShared: .*(n >= 1|do not fit into the \d+ timesteps)"):
        TimestepShared(unet(), n, t_tilde)


def test_networks_that_do_not_fit_are_refused():
    known = unet(num_train_timesteps=50)
    with pytest.raises(ValueError, match="t_tilde=100 is beyond the network's 50 timesteps"):
        TimestepShared(known, 5, 100)
    with pytest.raises(ValueError, match="'Nothing' is no model of diffusers"):
        TimestepShared({"_class_name": "Nothing"})


# ---- stock schedulers and pipelines ----------------------------------------------------------------------------------


def drawn(network: nn.Module, scheduler: str, steps: int = 6) -> Tensor:
    made = SCHEDULERS[scheduler](num_train_timesteps=1000)
    if scheduler == "dpm":  # no stock pipeline of images without conditions has it: its loop by hand
        made.set_timesteps(steps)
        x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        for t in made.timesteps:
            with torch.no_grad():
                x = made.step(network(x, t).sample, t, x).prev_sample
        return x
    pipeline = getattr(diffusers, scheduler)(network, made)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(3), "output_type": "np"}
    return torch.as_tensor(pipeline(batch_size=2, **options).images)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_keep_the_true_time(scheduler):
    """A network that ignores its label gives the same samples bit for bit, and is told the left edges."""
    plain, inner = Spy(), Spy()
    wrapped = TimestepShared(inner, 5, 400)
    one, two = drawn(plain, scheduler), drawn(wrapped, scheduler)
    assert torch.equal(one, two) and one.std() > 0.1
    true, told = torch.stack(plain.told), torch.stack(inner.told)
    assert torch.equal(told, torch.where(true < 400, true // 80 * 80, true)) and not torch.equal(told, true)
    assert told.dtype == true.dtype


def test_a_real_network_sees_the_shared_steps():
    network = unet()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05)
    wrapped, x = TimestepShared(network, 5, 400), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([5, 399, 700])
    with torch.no_grad():
        found = wrapped(x, t).sample
        assert torch.equal(found, network(x, torch.tensor([0, 320, 700])).sample)
        assert (found[:2] - network(x, t).sample[:2]).abs().amax((1, 2, 3)).min() > 1e-4
        assert torch.equal(wrapped(x, 399, return_dict=False)[0], network(x, 320).sample)
        each = TimestepShared(network, 400, 400)  # every step its own interval
        assert torch.equal(each(x, t).sample, network(x, t).sample)
    assert (wrapped.dtype, wrapped.device) == (torch.float32, torch.device("cpu"))
    assert wrapped.double().dtype == torch.float64 and wrapped(x.double(), t).sample.dtype == torch.float64
    wrapped(x.double(), t).sample.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_labels_pass_through():
    network = unet(num_class_embeds=4)
    wrapped, x = TimestepShared(network, 2, 100), torch.zeros(2, 1, 8, 8)
    labels = torch.tensor([1, 3])
    with torch.no_grad():
        found = wrapped(x, torch.tensor(70), class_labels=labels).sample
        assert torch.equal(found, network(x, torch.tensor(50), class_labels=labels).sample)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_saved_network_comes_back(tmp_path):
    wrapped = TimestepShared(unet(num_class_embeds=4), 3, 90)
    wrapped.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["_class_name"], saved["n"], saved["t_tilde"]) == ("TimestepShared", 3, 90)
    assert saved["unet"]["_class_name"] == "UNet2DModel" and saved["unet"]["num_class_embeds"] == 4
    again = TimestepShared.from_pretrained(tmp_path)
    assert again.edges == (0, 30, 60, 90) and again.config.keys() - wrapped.config.keys() <= {"_name_or_path"}
    assert again.config.in_channels == 1 and again.config.sample_size == 8 and again.config.n == 3
    states = wrapped.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_saved_pipeline_comes_back(tmp_path):
    pipeline = diffusers.DDIMPipeline(TimestepShared(unet(), 5, 400), diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path)
    again = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is TimestepShared and again.unet.edges == (0, 80, 160, 240, 320, 400)
    assert torch.equal(drawn(again.unet, "DDIMPipeline", 3), drawn(pipeline.unet, "DDIMPipeline", 3))
