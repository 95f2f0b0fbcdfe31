"""Editing by a transformer of FLUX's kind that is trained in minutes: what solvers and sharing of attention are worth.

    python -m evals.studies.editing_toy [--root runs/editing_toy] [--publish]

Pictures of 8x8 pixels have a blob at a random place (what an edit is to keep) on a dark or a bright background (what it
is to change), which is what the two prompts say. A network of diffusers' FluxTransformer2DModel learns their rectified
flow; then held-out pictures are inverted and come back, by every solver at equal evaluations, and are edited from dark
to bright by every method. It writes editing_toy.md and editing_toy.png into the folder of the run, where the weights
are kept for the next time, or with `--publish` into evals/results. Minutes on a CPU.
"""

import argparse
import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genmodels.editing.apply import edit
from genmodels.editing.editor import Attention, Editor, Prompt, Tap
from genmodels.editing.method import EditMethod
from genmodels.files import write_text
from genmodels.registry import build
from genmodels.rng import SeedNoise

from .plans import ROOT

RESULTS = ROOT / "evals" / "results"
SIDE, WIDTH, HEIGHT, NOISE = (
    8,
    1.2,
    2.5,
    0.1,
)  # of pictures: pixels, deviation and height of the blob, deviation of noise
BACKGROUNDS = (-0.7, 0.7)  # of the classes
PLACES = (1.5, 5.5)  # of centres, in pixels
PEAK = 2 * BACKGROUNDS[1] + HEIGHT  # of PSNR: from the dark background to the top of a blob on the bright one
TEXT, TOKENS = 32, 4  # width and tokens of prompts
STEPS, BATCH, RATE, KEEP = 2000, 48, 2e-3, 0.995  # of training; of its average of weights
ITEMS = 64
FASTEST = 5.0  # radians
BUDGETS = (20, 60, 120)  # evaluations up and down together


class Solver(NamedTuple):
    """A method that inverts, and the evaluations up and down of a step and beside."""

    node: dict[str, Any]
    each: int
    beside: int = 0


SOLVERS = {
    "Euler": Solver({"name": "vanilla"}, 2),
    "Uni-Inv up, Euler down": Solver({"name": "uni_inv"}, 2, 1),
    "AB2": Solver({"name": "ab2"}, 2),
    "RF-Solver": Solver({"name": "rf_edit", "share": None}, 4),
    "Heun": Solver({"name": "heun"}, 4),
    "FireFlow": Solver({"name": "fireflow", "share": None}, 2, 2),
    "RF-Solver of order 3": Solver({"name": "rf_edit", "share": None, "order": 3}, 6),
}


def sharing(steps: int, **more: Any) -> dict[str, Any]:
    """RF-Edit in 15 steps with features of this many shared."""
    return {"name": "rf_edit", "num_steps": 15, "share": {"steps": steps, **more}}


EDITS: dict[str, dict[str, Any]] = {
    "RF-Solver, nothing shared": {"name": "rf_edit", "num_steps": 15, "share": None},
    "V of the last 2 blocks, 3 steps": sharing(3),
    "the same, midpoints only": sharing(3, evaluations="mid"),
    "V of the last 2 blocks, 15 steps": sharing(15),
    "V of all 4 blocks, 15 steps": sharing(15, blocks="all"),
    "Q added, 3 steps": sharing(3, tensors=["q"], combine="add"),
    "K added, 3 steps": sharing(3, tensors=["k"], combine="add"),
    "V added, 3 steps": sharing(3, tensors=["v"], combine="add"),
    "FireFlow, 29": {"name": "fireflow", "num_steps": 29, "share": None},
    "Euler, 30": {"name": "vanilla", "num_steps": 30},
    "Uni-Inv, 30": {"name": "uni_inv", "num_steps": 30},
    "Uni-Edit, 15, α 0.6, ω 5": {"name": "uni_edit"},
    "Uni-Edit, 15, α 0.8, ω 1": {"name": "uni_edit", "alpha": 0.8, "omega": 1.0},
    "FlowEdit, 30, n_max 30": {"name": "flowedit", "num_steps": 30, "n_max": 30},
    "FlowEdit, 30, n_max 24": {"name": "flowedit", "num_steps": 30, "n_max": 24},
    "FlowEdit, 30, n_max 15": {"name": "flowedit", "num_steps": 30, "n_max": 15},
    "DNAEdit, 28, mvg 0.85, skip 4": {"name": "dnaedit"},
    "RF-Inversion, 28, stop 0": {"name": "rf_inversion", "stop": 0},
    "RF-Inversion, 28, stop 7": {"name": "rf_inversion"},
    "RF-Inversion, 28, stop 14": {"name": "rf_inversion", "stop": 14},
}
SHOWN = (
    "RF-Solver, nothing shared",
    "V of all 4 blocks, 15 steps",
    "FlowEdit, 30, n_max 24",
    "RF-Inversion, 28, stop 7",
)


def pictures(centres: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """[B, 1, SIDE, SIDE] with blobs at centres [B, 2] (row, column) on the backgrounds of labels [B]."""
    place = torch.arange(SIDE, dtype=torch.float32)
    apart = (place - centres[..., None]).square()  # [B, 2, SIDE]
    blob = HEIGHT * torch.exp(-(apart[:, 0, :, None] + apart[:, 1, None]) / (2 * WIDTH**2))
    background = torch.tensor(BACKGROUNDS)[labels]
    clean = blob + rearrange(background, "b -> b 1 1")
    return (clean + NOISE * torch.randn(clean.shape, generator=generator))[:, None]


def drawn(count: int, generator: torch.Generator) -> Tensor:
    """[count, 2] centres."""
    low, high = PLACES
    return low + (high - low) * torch.rand(count, 2, generator=generator)


def background(x: Tensor) -> Tensor:
    """[B] medians of pixels."""
    return x.flatten(1).median(1).values


def centre(x: Tensor) -> Tensor:
    """[B, 2] mean place of what is a fifth of a blob's height or more above the background."""
    above = (x[:, 0] - rearrange(background(x), "b -> b 1 1") - HEIGHT / 5).clamp(min=0)
    place = torch.arange(SIDE, dtype=x.dtype)
    mass = above.sum((1, 2)).clamp(min=1e-6)  # an edit may have lost its blob
    return torch.stack((above.sum(2) @ place, above.sum(1) @ place), 1) / mass[:, None]


def network() -> nn.Module:
    """A double-stream block and four single-stream ones of FLUX, 2 heads of 16."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=4, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=TEXT, pooled_projection_dim=TEXT, axes_dims_rope=(4, 4, 8),
            guidance_embeds=False,
        )  # fmt: skip


class ToyEditor(Editor):
    """The toy's flow: conditions of prompts are labels, told as fixed random embeddings; items are its states."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer
        generator = torch.Generator().manual_seed(1)
        self.texts = torch.randn(len(BACKGROUNDS), TOKENS, TEXT, generator=generator)
        self.pooled = torch.randn(len(BACKGROUNDS), TEXT, generator=generator)
        row, column = torch.meshgrid(torch.arange(SIDE // 2), torch.arange(SIDE // 2), indexing="ij")
        self.places = torch.stack((torch.zeros_like(row), row, column), -1).flatten(0, 1).float()

    def answer(self, t: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        """[B, 1, SIDE, SIDE] velocities at times t [B]."""
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
        found = self.transformer(
            hidden_states=tokens,
            timestep=t.to(x.dtype),
            encoder_hidden_states=self.texts[labels],
            pooled_projections=self.pooled[labels],
            img_ids=self.places,
            txt_ids=torch.zeros(TOKENS, 3),
            return_dict=False,
        )[0]
        return rearrange(found, "b (h w) (c p q) -> b c (h p) (w q)", h=SIDE // 2, p=2, q=2)

    def velocity(self, t: Tensor, x: Tensor, prompt: Prompt) -> Tensor:
        return self.answer(t.expand(len(x)), x, torch.full((len(x),), prompt.condition))

    def times(self, num_steps: int, x: Tensor) -> Tensor:
        return torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)

    def encode(self, items: Tensor) -> Tensor:
        return items

    def decode(self, x: Tensor) -> Tensor:
        return x

    def attention(self) -> list[Attention]:
        """Of the single-stream blocks, whose tokens are those of text and picture."""
        parts = {"q": "norm_q", "k": "norm_k", "v": "to_v"}
        return [
            Attention(
                f"single_transformer_blocks.{number}",
                "all",
                {key: Tap(getattr(block.attn, part)) for key, part in parts.items()},
            )
            for number, block in enumerate(self.transformer.single_transformer_blocks)
        ]


def train(transformer: nn.Module, steps: int) -> list[float]:
    """Learn the flow of both classes; the weights are then the moving average. Returns the loss of every step."""
    editor, generator = ToyEditor(transformer), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (1 + math.cos(math.pi * k / steps)) / 2)
    average = copy.deepcopy(transformer).requires_grad_(False)
    losses = []
    for number in range(steps):
        labels = torch.randint(len(BACKGROUNDS), (BATCH,), generator=generator)
        x = pictures(drawn(BATCH, generator), labels, generator)
        eps, t = torch.randn(x.shape, generator=generator), torch.randn(BATCH, generator=generator).sigmoid()
        share = rearrange(t, "b -> b 1 1 1")
        loss = (editor.answer(t, x.lerp(eps, share), labels) - (eps - x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        keep = min(KEEP, (1 + number) / (10 + number))  # the first weights are none to remember
        for mean, value in zip(average.parameters(), transformer.parameters(), strict=True):
            mean.lerp_(value, 1 - keep)
        losses.append(float(loss.detach()))
    transformer.load_state_dict(average.state_dict())
    return losses


def trained(root: Path) -> ToyEditor:
    """The editor of a folder's weights, which are learnt if they are not there."""
    transformer, path = network(), root / "weights.safetensors"
    if path.is_file():
        transformer.load_state_dict(load_file(path))
    else:
        losses = train(transformer, STEPS)
        print(f"loss of the last tenth {sum(losses[-STEPS // 10 :]) / (STEPS // 10):.4f}", flush=True)
        root.mkdir(parents=True, exist_ok=True)
        save_file({key: value.contiguous() for key, value in transformer.state_dict().items()}, path)
    return ToyEditor(transformer.eval().requires_grad_(False))


def held_out() -> tuple[Tensor, Tensor, Tensor]:
    """Dark pictures, their centres, and bright pictures of the same centres."""
    generator = torch.Generator().manual_seed(3)
    centres = drawn(ITEMS, generator)
    dark, bright = (pictures(centres, torch.full((ITEMS,), label), generator) for label in (0, 1))
    return dark, centres, bright


def carried(editor: ToyEditor, node: dict[str, Any], x: Tensor, target: int) -> tuple[Tensor, int, int]:
    """Pictures that a method makes of dark ones under a prompt, the evaluations, and bytes of features."""
    noise = SeedNoise(range(len(x)), purpose="edit")
    made = edit(editor, x, Prompt(0), Prompt(target), method=build(EditMethod, node), noise=noise, reconstruct=False)
    return made.items, made.nfe, made.stored


def psnr(x: Tensor, y: Tensor) -> float:
    """Decibels, of the mean square over all pixels."""
    return float(20 * math.log10(PEAK) - 10 * (x - y).double().square().mean().log10())


def smooth(editor: ToyEditor) -> ToyEditor:
    """The same without the part of its embedding of time that turns by more than `FASTEST` per unit of time."""
    transformer = copy.deepcopy(editor.transformer)
    weight = transformer.time_text_embed.timestep_embedder.linear_1.weight
    pairs = weight.shape[1] // 2  # frequencies 1000 · 10^(-4k/pairs), cosines first
    fast = 1000 * 10 ** (-4 * torch.arange(pairs) / pairs) > FASTEST
    weight.data[:, fast.repeat(2)] = 0.0
    return ToyEditor(transformer)


def reconstructions(editor: ToyEditor) -> dict[str, list[float]]:
    """Of each solver at every budget."""
    x, found = held_out()[0], {}
    for name, solver in SOLVERS.items():
        found[name] = []
        for budget in BUDGETS:
            node = solver.node | {"num_steps": (budget - solver.beside) // solver.each}
            y, nfe, _ = carried(editor, node, x, 0)
            if nfe > budget:
                raise RuntimeError(f"{name} took {nfe} evaluations of {budget}.")
            found[name].append(psnr(x, y))
    return found


class Row(NamedTuple):
    """Figures of edits: share of bright ones, mean background, mean distance of centres in pixels."""

    nfe: int
    bright: float
    background: float
    centre: float
    stored: int


def figures(y: Tensor, centres: Tensor, nfe: int = 0, stored: int = 0) -> Row:
    level, apart = background(y), (centre(y) - centres).norm(dim=1)
    return Row(nfe, float((level > 0).float().mean()), float(level.mean()), float(apart.mean()), stored)


def edits(editor: ToyEditor) -> dict[str, Row]:
    """Of every method, below what true bright pictures have."""
    x, centres, bright = held_out()
    found = {"true bright pictures": figures(bright, centres)}
    for name, node in EDITS.items():
        y, nfe, stored = carried(editor, node, x, 1)
        found[name] = figures(y, centres, nfe, stored)
    return found


NOTE = f"""{ITEMS} held-out pictures, even times. NFE counts evaluations up and down; of a budget a solver takes as
many steps as fit. PSNR is of the root mean square over all pixels, its peak {PEAK:g}. Networks of this kind are told
sines of up to 1000 t, so that no step is short. Rules that ask at the same times up and down (Heun's, FireFlow's) are
spared most of that; RF-Solver, which probes from the other end on its way back, AB2 and order 3 are not. Smooth in
time is the same network without what turns faster than {FASTEST:g} t. An edit is to be bright, with the background of
true pictures, and its blob where the source has it: distances are from the true centre, as the centre is estimated
from pixels, so that true pictures have one, too. RF-Edit's are of 15 steps; bytes of features are for one picture. The
effects are small: it is a check of the machinery, and no evidence for pictures of the size of FLUX's.
"""


def reconstruction_table(found: dict[str, list[float]], smoothed: dict[str, list[float]]) -> str:
    heads = [f"{of}NFE ≤ {budget}" for of in ("", "smooth in time: ") for budget in BUDGETS]
    lines = [f"| reconstruction: PSNR in dB ↑ | {' | '.join(heads)} |", "|:---|" + "---:|" * len(heads)]
    for name, values in found.items():
        lines.append(f"| {name} | {' | '.join(f'{v:.1f}' for v in (*values, *smoothed[name]))} |")
    return "\n".join(lines)


def edit_table(found: dict[str, Row]) -> str:
    lines = ["| dark → bright | NFE | bright ↑ | background | centre off by, px ↓ | features, bytes |"]
    lines.append("|:---|---:|---:|---:|---:|---:|")
    for name, r in found.items():
        stored = f"{r.stored // ITEMS:,}" if r.stored else ""
        lines.append(f"| {name} | {r.nfe or ''} | {r.bright:.2f} | {r.background:+.3f} | {r.centre:.3f} | {stored} |")
    return "\n".join(lines)


def table(found: dict[str, list[float]], smoothed: dict[str, list[float]], rows: dict[str, Row]) -> str:
    """In Markdown."""
    return "\n\n".join((reconstruction_table(found, smoothed), edit_table(rows), NOTE))


def picture(editor: ToyEditor, found: dict[str, list[float]], rows: dict[str, Row], path: Path) -> None:
    """PSNR by evaluations, centres by backgrounds, and a few edits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    left, right = top.subplots(1, 2)
    for name, values in found.items():
        left.plot(BUDGETS, values, marker="o", ms=3, lw=1.2, label=name)
    left.set(xscale="log", xlabel="NFE up and down", ylabel="PSNR of the reconstruction, dB")
    left.set_xticks(BUDGETS, [str(n) for n in BUDGETS], minor=False)
    left.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    true, *rest = rows.values()
    right.axhline(true.centre, color="0.5", lw=1, ls="--", label="true bright pictures")
    for number, (name, r) in enumerate(zip([*rows][1:], rest, strict=True)):
        off = max(abs(r.background - true.background), 1e-3)
        right.scatter(off, r.centre, s=22, color=f"C{number % 10}", marker="os^"[number // 10], label=name)
    right.set(xlabel="background off by", ylabel="centre off by, px", xscale="log", yscale="log")
    right.legend(frameon=False, fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in (left, right):
        axis.grid(alpha=0.3, lw=0.5)
        axis.spines[["top", "right"]].set_visible(False)
    x = held_out()[0]
    shown = {"source": x, "reconstruction": carried(editor, EDITS[SHOWN[0]], x, 0)[0]}
    shown |= {name: carried(editor, EDITS[name], x, 1)[0] for name in SHOWN}
    for axis, (name, y) in zip(bottom.subplots(len(shown), 1), shown.items(), strict=True):
        axis.imshow(rearrange(y[:12, 0], "b h w -> h (b w)").numpy(), vmin=-1.2, vmax=3.2, cmap="magma")
        axis.set(xticks=(), yticks=())
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/editing_toy"))
    parser.add_argument("--publish", action="store_true", help="write evals/results/editing_toy.md and .png")
    given = parser.parse_args()
    editor, folder = trained(given.root), RESULTS if given.publish else given.root
    found, rows = reconstructions(editor), edits(editor)
    text = table(found, reconstructions(smooth(editor)), rows)
    print(text)
    write_text(folder / "editing_toy.md", text)
    picture(editor, found, rows, folder / "editing_toy.png")


if __name__ == "__main__":
    main()
