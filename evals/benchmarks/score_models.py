"""Score models: training and sampling beside the diffusers way with the same network, and local-DSM beside its kin.

    python -m evals.benchmarks.score_models [--repeats 20] [--batch 128] [--steps 20] [--items 1 64 500]

Both sides hold one and the same network, and items of scikit-learn's digits. "diffusers" trains as its example of
unconditional training does (a data loader, integer timesteps, DDPMScheduler.add_noise, AdamW, clipping by Accelerate,
a schedule of learning rates, EMAModel, the loss read at every step), and samples by the loop of its pipelines. "ours"
is the training step with its data stream and average, and `sample`. "network" is the floor: the calls of the network
alone, in training with the gradient of its squared error. Steps of samplers are equal in number; "heun" is two
evaluations a step (diffusers leaves out the last). "two calls": guidance by two calls of the network a step in place of
one on twice the rows. "DiT" trains diffusers' own transformer of the same width, depth and patches in the diffusers
way, another network. Diffusers gives its network a time for every row, and ours has one for all of them in sampling,
of which its networks make one embedding, or one for each class. Local-DSM of a process with a logistic prior, from
simulated paths, is timed beside that from the last kernel of a path, "global" denoising score matching (Gaussian prior)
and "implicit" score matching, all by our training step.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from genmodels.config import Config, load
from genmodels.data.stream import Passes, stream
from genmodels.model import Model
from genmodels.registry import build
from genmodels.rng import generator
from genmodels.solvers.base import Solver
from genmodels.training import processes
from genmodels.training.ema import WeightAverage
from genmodels.training.step import Step
from genmodels.training.watch import Interval

from .side_by_side import Medians, Tasks, medians, report

RESULT = Path(__file__).parents[1] / "results" / "benchmarks" / "score_models.json"
CONFIGS = Path(__file__).parents[2] / "configs"
TIMESTEPS = 1000
NETWORKS = {"dit": "digits/flow_matching", "residual_mlp": "digits/etsdm"}
LOCAL = {"digits": "digits/local_dsm", "toy2d": "toy2d/local_dsm"}
GUIDANCE = 1.5

# solver -> the path of the model, and diffusers' scheduler of the same rule
SAMPLERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "euler": ("linear", "FlowMatchEulerDiscreteScheduler", {}),
    "ddim": ("vp", "DDIMScheduler", {"clip_sample": False}),
    "dpmpp": ("vp", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "heun": ("vp", "HeunDiscreteScheduler", {}),
}


class Answer:
    """What a network of diffusers returns."""

    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


class AsUNet(nn.Module):
    """A network of ours behind the signature of UNet2DModel, whose time is a step of 1000."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Answer:
        timestep = timestep.expand(len(sample))  # as UNet2DModel and the pipeline of DiT do
        return Answer(self.network((timestep + 1) / TIMESTEPS, sample, class_labels))


def configured(name: str, batch: int, overrides: tuple[str, ...] = ()) -> Config:
    return load(CONFIGS / f"{name}.yaml", [f"train.batch_size={batch}", *overrides])


def built(config: Config) -> Model:
    """The model, fitted to its data and ready to train."""
    dataset = config.dataset()
    torch.manual_seed(0)
    model = config.model(dataset.facts())
    model.prepare(Passes(dataset, 256, torch.device("cpu")), generator=generator("benchmark"))
    return model


# ---- training --------------------------------------------------------------------------------------------------------


def ours(config: Config, model: Model) -> Callable[[], None]:
    """A step of the training loop: data, loss, gradient, clipping, optimiser, average and logs."""
    step, interval = Step(config, model, processes.join("cpu")), Interval()
    step.start({rule.label: WeightAverage(rule, model) for rule in config.train.ema})
    batches = stream(config.dataset(), config.seed, config.train.batch_size, 0, 10**9)

    def train() -> None:
        outcome = step(*next(batches))
        if outcome.problem:
            raise RuntimeError(outcome.problem)
        interval.add(outcome.loss, outcome.logs, config.train.batch_size)

    return train


def diffusers(config: Config, unet: nn.Module) -> Callable[[], None]:
    """A step of diffusers' example of unconditional training."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator, dataset = processes.join("cpu"), config.dataset()
    images = 2 * dataset.take("train", torch.arange(dataset.size("train"))).x / 16 - 1
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    noise_scheduler = DDPMScheduler(num_train_timesteps=TIMESTEPS)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    items = [{"input": image} for image in images]
    loader = DataLoader(items, batch_size=config.train.batch_size, shuffle=True, drop_last=True)
    unet, optimizer, loader, rate = accelerator.prepare(unet, optimizer, loader, rate)
    average = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def forever() -> Iterator[dict[str, Tensor]]:
        while True:
            yield from loader

    batches = forever()
    unet.train()

    def train() -> None:
        clean = next(batches)["input"]
        noise = torch.randn(clean.shape, dtype=clean.dtype)
        timesteps = torch.randint(0, TIMESTEPS, (len(clean),)).long()
        noisy = noise_scheduler.add_noise(clean, noise, timesteps)
        with accelerator.accumulate(unet):
            loss = F.mse_loss(unet(noisy, timesteps).sample.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(unet.parameters())
        {"loss": loss.detach().item(), "lr": rate.get_last_lr()[0], "ema_decay": average.cur_decay_value}

    return train


def floor(network: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    """The network, and the gradient of a squared error, on rows that are there already."""
    x, wanted, t = torch.randn(*shape), torch.randn(*shape), torch.rand(shape[0])
    parameters = [p for p in network.parameters() if p.requires_grad]

    def train() -> None:
        torch.autograd.grad(F.mse_loss(network(t, x), wanted), parameters, allow_unused=True)

    return train


def their_transformer(config: Config) -> nn.Module:
    """Diffusers' own transformer of the width, depth, heads and patches of a configuration."""
    from diffusers import DiTTransformer2DModel

    own = config.core["model"]["network"]
    side = config.dataset().facts()["shape"][-1]
    model = DiTTransformer2DModel(
        num_attention_heads=own["heads"],
        attention_head_dim=own["width"] // own["heads"],
        in_channels=1,
        out_channels=1,
        num_layers=own["depth"],
        sample_size=side,
        patch_size=own["patch"],
    )
    return Unlabelled(model)


class Unlabelled(nn.Module):
    """A class-conditional transformer of diffusers that is told "no class" alone."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, sample: Tensor, timestep: Tensor) -> Answer:
        none = torch.full((len(sample),), self.transformer.config.num_embeds_ada_norm)
        return self.transformer(sample, timestep=timestep, class_labels=none)


def training(batch: int) -> dict[str, Tasks]:
    """The tasks of training, by contender."""
    contenders: dict[str, dict[str, Callable[[], Any]]] = {"ours": {}, "diffusers": {}, "network": {}, "DiT": {}}
    for name, path in NETWORKS.items():
        config = configured(path, batch, ("model.conditional=false", "model.time_condition=null"))
        task, model = f"train {name}, {batch} items", built(config)
        contenders["ours"][task] = ours(config, model)
        contenders["diffusers"][task] = diffusers(config, AsUNet(built(config).denoiser.network))
        contenders["network"][task] = floor(built(config).denoiser.network, (batch, *model.model_shape))
        if name == "dit":
            contenders["DiT"][task] = diffusers(config, their_transformer(config))
    return contenders


def local_training(batches: dict[str, int]) -> dict[str, Tasks]:
    """Local-DSM from whole paths and from last kernels, with a Gaussian prior's exact kernel, and implicit."""
    kinds = {
        "ours": ("model.objective=path",),
        "kernels": ("model.objective=local",),
        "global": ("model.objective=global", "model.process.prior=gaussian"),
        "implicit": ("model.objective=ism",),
    }
    contenders: dict[str, dict[str, Callable[[], Any]]] = {kind: {} for kind in kinds}
    for name, path in LOCAL.items():
        for kind, overrides in kinds.items():
            config = configured(path, batches[name], overrides)
            contenders[kind][f"local-DSM {name}, {batches[name]} items"] = ours(config, built(config))
    return contenders


# ---- sampling --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pipeline(
    unet: nn.Module,
    name: str,
    options: dict,
    steps: int,
    shape: tuple[int, ...],
    guidance: float,
    labels: Tensor | None,
) -> Tensor:
    """The loop of diffusers' pipelines, with guidance as in its pipeline of DiT: one call on twice the rows."""
    import diffusers
    from diffusers.utils.torch_utils import randn_tensor

    scheduler = getattr(diffusers, name)(num_train_timesteps=TIMESTEPS, **options)
    x = randn_tensor(shape, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(steps)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    null = None if labels is None else torch.full_like(labels, 10)
    scales = hasattr(scheduler, "scale_model_input")
    for t in scheduler.timesteps:
        if guidance == 1:
            answer = unet(scheduler.scale_model_input(x, t) if scales else x, t, labels).sample
        else:
            twice = torch.cat((x, x))
            given, free = unet(
                scheduler.scale_model_input(twice, t) if scales else twice, t, torch.cat((labels, null))
            ).sample.chunk(2)
            answer = free + guidance * (given - free)
        x = scheduler.step(answer, t, x, return_dict=False)[0]
    return (x / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def calls(network: nn.Module, count: int, shape: tuple[int, ...], labels: Tensor | None, times: int = 1) -> None:
    """A number of calls of a network, at one time for all rows."""
    x, t = torch.randn(*shape), torch.tensor(0.5)
    for _ in range(count * times):
        network(t, x, labels)


def sampling(items: int, steps: int) -> dict[str, Tasks]:
    """The tasks of sampling, by contender: unconditional models with every sampler, and guided ones."""
    contenders: dict[str, dict[str, Callable[[], Any]]] = {
        "ours": {},
        "diffusers": {},
        "network": {},
        "two calls": {},
    }
    for name, path in NETWORKS.items():
        for solver, (schedule, theirs, options) in SAMPLERS.items():
            guided = solver in ("euler", "ddim")
            for guidance in (1.0, GUIDANCE) if guided else (1.0,):
                overrides = [f"model.schedule={schedule}", "model.time_condition=null"]
                overrides += [f"model.prediction={'velocity' if schedule == 'linear' else 'eps'}"]
                overrides += [f"model.conditional={'true' if guidance != 1 else 'false'}"]
                model = built(configured(path, 128, tuple(overrides))).eval()
                network, shape = model.denoiser.network, (items, *model.model_shape)
                labels = torch.arange(items) % 10 if guidance != 1 else None
                task = f"{name} {solver}, {items} items" + (f", guidance {guidance:g}" if guidance != 1 else "")
                rule = build(Solver, {"name": solver})
                evaluations = steps * rule.stages
                twice = None if labels is None else torch.cat((labels, labels))
                rows = shape if labels is None else (2 * items, *shape[1:])
                contenders["ours"][task] = lambda m=model, n=items, r=rule, g=guidance, y=labels: m.sample(
                    n, num_steps=steps, solver=r, guidance=g, condition=y, batch_size=n
                )
                given = (AsUNet(network), theirs, options, steps, shape, guidance, labels)
                contenders["diffusers"][task] = lambda a=given: pipeline(*a)
                contenders["network"][task] = lambda a=(network, evaluations, rows, twice): calls(*a)
                if labels is not None:
                    contenders["two calls"][task] = lambda a=(network, evaluations, shape, labels, 2): calls(*a)
    return contenders


# ---- all of it -------------------------------------------------------------------------------------------------------


def measure(batch: int, toy_batch: int, items: list[int], steps: int, repeats: int) -> Medians:
    """Median CPU milliseconds by task and contender; sampling of many items is repeated less."""
    found = medians(training(batch), repeats, warm_up=5)
    found |= medians(local_training({"digits": batch, "toy2d": toy_batch}), repeats, warm_up=5)
    for n in items:
        found |= medians(sampling(n, steps), min(repeats, max(3, 640 // n)), warm_up=1)
    return found


def beyond(found: Medians) -> dict[str, dict[str, float]]:
    """Milliseconds that either side spends outside the network, by task."""
    sides = ("ours", "diffusers")
    return {
        task: {s: round(row[s] - row["network"], 3) for s in sides} for task, row in found.items() if "network" in row
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("repeats", 20), ("batch", 128), ("toy_batch", 256), ("steps", 20)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--items", type=int, nargs="+", default=[1, 64, 500])
    parser.add_argument("--out", type=Path, default=RESULT)
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    torch.set_num_threads(1)
    found = measure(**given)
    report(found, given, out, **{"milliseconds beyond the network": beyond(found)})


if __name__ == "__main__":
    main()
