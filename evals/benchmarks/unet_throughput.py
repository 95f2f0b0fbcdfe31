"""Images a second in training and sampling: ours beside the loops of diffusers on the same networks, on a GPU or CPU.

    python -m evals.benchmarks.unet_throughput [--networks unet dit diffusers_unet] [--batch 128] [--steps 50] \\
        [--channels 128] [--side 32] [--compile] [--channels-last] [--device cuda] [--out FILE]

The networks are the U-Net of the CIFAR-10 recipes, a DiT with patches of 2x2, and diffusers' UNet2DModel with the
layers of the first. Both sides train noise prediction in the chain of DDPM with AdamW, gradients clipped to 1 and an
average of the weights: ours is one step of `train.py`, theirs the loop of diffusers' example of unconditional training
(DDPMScheduler, mean squared error, EMAModel), each on its own copy of the weights. Sampling is DDIM with as many
evaluations, ours by `model.sample`, theirs as DDIMPipeline does it. On a GPU networks compute in bf16 under autocast
and wall time is measured, everything waited for; on a CPU in float32 and one thread's CPU time. Contenders take turns,
and medians are compared. The share of the peak counts matrix products, convolutions and attention against the dense
bf16 rate of the data sheet, where the GPU is a known one.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodels.config import Config, load
from genmodels.diffusion.grids import Discrete
from genmodels.diffusion.model import DiffusionModel
from genmodels.networks.network import set_compile
from genmodels.operations import count_operations
from genmodels.solvers.exponential import DDIM
from genmodels.training import processes
from genmodels.training.ema import WeightAverage
from genmodels.training.step import Step
from genmodels.types import Batch

RECIPE = Path(__file__).parents[2] / "configs" / "cifar10" / "flow_matching.yaml"
RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "unet_throughput.json"
NETWORKS = ("unet", "dit", "diffusers_unet")
CHAIN = 1000  # steps of DDPM
# dense bf16 operations a second by what is in the name of the device; the first that fits counts
PEAKS = {"H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
Rates = dict[str, dict[str, dict[str, float]]]  # task -> network -> contender -> images a second


def network(name: str, channels: int, side: int) -> dict[str, Any]:
    """The node of a network; 128 channels are those of the recipe, and of a DiT of the size S."""
    heads = max(1, channels // 2)
    groups = min(32, channels // 4)
    if name == "dit":
        return {"name": "dit", "patch": 2, "width": 3 * channels, "depth": 12, "heads": 6}
    if name == "unet":
        return {
            "name": "unet", "channels": channels, "multipliers": [1, 2, 2, 2], "blocks": 2, "attention": [side // 2],
            "head_channels": heads, "groups": groups, "modulation": "shift", "resample": "convolution",
        }  # fmt: skip
    return {
        "name": "diffusers_unet",
        "block_out_channels": [channels * m for m in (1, 2, 2, 2)],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": heads,
        "norm_num_groups": groups,
        "time_scale": float(CHAIN),
        "time_offset": -1.0,
    }


def settings(name: str, channels: int, side: int, bf16: bool) -> Config:
    """The recipe with what both sides share in place of its own."""
    model = {
        "name": "diffusion",
        "prediction": "eps",
        "schedule": {"name": "discrete", "steps": CHAIN},
        "times": {"name": "uniform"},
        "sigma_data": 0.5,
        "network": network(name, channels, side),
    }
    train = {
        "optimizer": {"name": "adam", "lr": 1.0e-4, "betas": [0.95, 0.999], "weight_decay": 1.0e-6},
        "learning_rate": {"name": "constant"},
        "precision": "bf16" if bf16 else "float32",
    }
    tree = load([RECIPE], blank=True).tree
    return Config({**tree, "model": model, "train": {**tree["train"], **train}})


class Ours:
    """Steps of training and sampling of this package.

    Args:
        images: [B, 3, side, side] levels 0 … 255 on the device.
        last: keep weights with channels as the last axis of memory.
    """

    def __init__(self, config: Config, images: Tensor, last: bool = False) -> None:
        device = images.device
        facts = {"num_classes": None, "condition_shape": None, "target_shape": None, "bin_width": 1.0}
        scaled = {"name": "affine", "loc": 127.5, "scale": 127.5}
        torch.manual_seed(0)
        self.model: DiffusionModel = config.model({"shape": list(images.shape[1:]), "transform": scaled, **facts})
        if last:  # before optimiser and average copy them
            self.network.to(memory_format=torch.channels_last)
        self.step = Step(config, self.model, processes.join("cpu" if device.type == "cpu" else None))
        self.step.start({rule.label: WeightAverage(rule, self.model) for rule in config.train.ema})
        self.batch, self.done = Batch(images), 0

    @property
    def network(self) -> nn.Module:
        return next(part for part in self.model.denoiser.modules() if hasattr(part, "autocast"))

    def train(self) -> Tensor:
        loss = self.step(self.done, [self.batch]).loss
        self.done += 1
        return loss

    @torch.no_grad()
    def sample(self, count: int, steps: int) -> Tensor:
        """[count, *shape] in data units."""
        self.model.eval()
        return self.model.sample(
            count, num_steps=steps, solver=DDIM(), grid=Discrete(count=CHAIN), denoise=True, batch_size=count
        )


class Theirs:
    """The loops of diffusers over a copy of a network.

    Args:
        images: [B, 3, side, side] levels 0 … 255 on the device; kept in [-1, 1].
    """

    def __init__(self, net: nn.Module, images: Tensor, bf16: bool) -> None:
        from diffusers import DDIMScheduler, DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.net, self.images, self.bf16 = copy.deepcopy(net), images / 127.5 - 1, bf16
        self.net.autocast = None  # their loops bring their own
        self.noising = DDPMScheduler(num_train_timesteps=CHAIN, beta_schedule="linear")
        self.sampling = DDIMScheduler(
            num_train_timesteps=CHAIN, beta_schedule="linear", clip_sample=False, timestep_spacing="trailing"
        )
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        self.ema = EMAModel(parameters, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.parameters = parameters

    def predict(self, x: Tensor, timestep: Tensor) -> Tensor:
        """ε of the network at timesteps 0 … 999; one of their own is asked without our adapter."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            if hasattr(self.net, "model"):
                return self.net.model(x, timestep).sample.float()
            return self.net((timestep.float() + 1) / CHAIN, x).float()

    def train(self) -> Tensor:
        self.net.train()
        noise = torch.randn_like(self.images)
        timesteps = torch.randint(0, CHAIN, (len(noise),), device=noise.device)
        loss = F.mse_loss(self.predict(self.noising.add_noise(self.images, noise, timesteps), timesteps), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters)
        return loss.detach()

    @torch.no_grad()
    def sample(self, count: int, steps: int, z: Tensor | None = None) -> Tensor:
        """[count, *shape] in [-1, 1], from z if given."""
        self.net.eval()
        x = torch.randn(count, *self.images.shape[1:], device=self.images.device) if z is None else z
        self.sampling.set_timesteps(steps)
        for timestep in self.sampling.timesteps:
            answer = self.predict(x, timestep.to(x.device).expand(count))
            x = self.sampling.step(answer, timestep, x).prev_sample
        return x


def medians(calls: dict[str, Callable[[], Any]], repeats: int, device: torch.device, warm_up: int = 3) -> dict:
    """Median seconds of calls that take turns: of wall time on a GPU, of CPU time on a CPU."""
    cuda, seconds = device.type == "cuda", {name: [] for name in calls}
    for round_ in range(-warm_up, repeats):
        for name, call in calls.items():
            if cuda:
                torch.cuda.synchronize(device)
            clock = time.perf_counter if cuda else time.process_time
            began = clock()
            call()
            if cuda:
                torch.cuda.synchronize(device)
            if round_ >= 0:
                seconds[name].append(clock() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def peak(device_name: str) -> float | None:
    """Dense bf16 operations a second of a known GPU, by its data sheet; None for others, NVL cards among them."""
    if "NVL" in device_name:
        return None
    return next((rate for name, rate in PEAKS.items() if all(part in device_name for part in name.split())), None)


def contenders(name: str, images: Tensor, channels: int, bf16: bool, compiled: bool, last: bool) -> tuple[Ours, Theirs]:
    """Both sides with the same weights."""
    own = Ours(settings(name, channels, images.shape[-1], bf16), images, last)
    other = Theirs(own.network, images, bf16)
    if compiled:
        set_compile(own.model)
        getattr(other.net, "model", other.net).compile()
    return own, other


def measure(given: argparse.Namespace) -> tuple[Rates, dict[str, Any]]:
    """Images a second of every task, and what else is known of each network."""
    device = torch.device(given.device)
    bf16 = device.type == "cuda"
    images = torch.randint(0, 256, (given.batch, 3, given.side, given.side), generator=torch.Generator().manual_seed(0))
    images = images.float().to(device)
    rates: Rates = {"training": {}, "sampling": {}}
    facts: dict[str, Any] = {}
    top = peak(torch.cuda.get_device_name(device)) if bf16 else None
    for name in given.networks:
        own, other = contenders(name, images, given.channels, bf16, False, given.channels_last)
        with count_operations() as counted:  # before it is compiled
            own.train()
        if given.compile:
            own, other = contenders(name, images, given.channels, bf16, True, given.channels_last)
        training = medians({"ours": own.train, "diffusers": other.train}, given.repeats, device)
        draw = {"ours": lambda o=own: o.sample(given.batch, given.steps)}
        draw["diffusers"] = lambda o=other: o.sample(given.batch, given.steps)
        sampling = medians(draw, max(1, given.repeats // 5), device, warm_up=1)
        for task, seconds in (("training", training), ("sampling", sampling)):
            rates[task][name] = {who: given.batch / s for who, s in seconds.items()}
        facts[name] = {"parameters": sum(p.numel() for p in own.network.parameters()), "operations": counted.total}
        if top is not None:
            facts[name]["share of peak"] = {who: counted.total / s / top for who, s in training.items()}
        del own, other
    return rates, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 20), ("batch", 128), ("side", 32), ("channels", 128), ("steps", 50)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    cuda = given.device.startswith("cuda")
    if not cuda:
        torch.set_num_threads(1)
    rates, facts = measure(given)
    for task, row in rates.items():
        for name, found in row.items():
            ours, theirs = found["ours"], found["diffusers"]
            print(f"{task:9} {name:15} {ours:10.1f} {theirs:10.1f} images/s   ours/diffusers {ours / theirs:.2f}")
    for name, known in facts.items():
        print(f"{name:15} {known['parameters']:,} parameters", {k: v for k, v in known.items() if k != "parameters"})
    size = {key: value for key, value in vars(given).items() if key not in ("out", "device")}
    result = {
        "what": "images a second; " + ("wall time, bf16 autocast" if cuda else "CPU time of one thread, float32"),
        "size": size,
        "images a second": rates,
        "networks": facts,
        "environment": {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(given.device) if cuda else platform.machine(),
            "python": platform.python_version(),
        },
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
