"""`sample.py … --edit` and `--invert`: what is asked in words, and a folder with what came of it.

`deliver` knows nothing of runs: whatever is an editor, with its items and prompts at hand, is edited and written by it.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import new_folder
from ..metrics.picture_errors import mse, psnr, ssim
from ..registry import ConfigError
from .editor import Editor
from .method import EditMethod
from .parts import Part, edit_parts, invert_parts
from .pictures import Panel, Scale, are_pictures, write_picture, write_strip


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sample.py` that edit and invert."""
    group = parser.add_argument_group(
        "editing and inverting",
        """Pictures are files, or items of a split (test:5, test:0-7). What is made of them goes
  to a folder in the run's edits/ (or --out): pictures, a strip of source,
  reconstruction and edit, and costs and errors as JSON. Options are overrides
  (edit.guidance=2 edit.method.share.blocks=[2,3]); `train.py --list edit_method`
  names the methods. Beside edit.method, pipelines know edit.guidance,
  source_guidance, true_guidance, negative, interval, max_sequence_length and
  reconstruct.""",
    )
    group.add_argument("--edit", nargs="+", metavar="PICTURE", help="turn pictures of one class into another")
    group.add_argument("--invert", nargs="+", metavar="PICTURE", help="find the noise that pictures are made from")
    group.add_argument(
        "--from", dest="source", metavar="CLASS", help="what the pictures show (default: labels of items); or a text"
    )
    group.add_argument("--to", dest="target", metavar="CLASS", help="what the edits shall show; or a text")
    group.add_argument(
        "--method", help="short for edit.method=…, e.g. rf_edit, flowedit (default: that of the run, or rf_edit)"
    )
    group.add_argument("--num-steps", type=int, metavar="N", help="short for edit.method.num_steps=N")
    group.add_argument(
        "--inject-steps",
        type=int,
        metavar="N",
        help="short for edit.method.share.steps=N: steps next to noise whose features are shared; 0 shares none",
    )
    group.add_argument(
        "--resize",
        action="store_true",
        help="crop, resample and convert pictures of another size; for pipelines, resample to the nearest size",
    )
    group.add_argument(
        "--pipeline",
        metavar="PLACE",
        help="in place of a run: a folder of a diffusers pipeline, or its id on the hub, which knows texts "
        "(FLUX, SD3, Wan, HunyuanVideo, LTX)",
    )
    group.add_argument(
        "--dtype", choices=("float32", "bf16", "fp16"), help="of a pipeline (default: bf16 on a GPU, float32 elsewhere)"
    )
    group.add_argument("--offload", action="store_true", help="keep networks of a pipeline off the GPU until needed")


class Made(NamedTuple):
    """What came of items; None for what was not asked for, or is not to be had."""

    edit: Tensor | None
    reconstruction: Tensor | None
    noise: Tensor | None
    nfe: int
    seconds: float
    stored: int


class Words(NamedTuple):
    """What is said of items: their names, and what their prompts are called; one for each, or one for all.

    Args:
        target: None for an inversion.
        method: the name of the method.
    """

    names: Sequence[str]
    source: Sequence[str]
    target: Sequence[str] | None
    method: str


def perform(editor: Editor, parts: Sequence[Part], method: EditMethod, edit: bool, reconstruct: bool = True) -> Made:
    """Edit the items of all parts, or invert them and come back.

    Raises:
        ConfigError, ValueError: as `edit` and `invert`.
    """
    if edit:
        return Made(*edit_parts(editor, parts, method=method, reconstruct=reconstruct))
    found = invert_parts(editor, parts, method=method)
    return Made(None, found.reconstruction, found.noise, found.nfe, found.seconds, 0)


def deliver(
    folder: Path,
    editor: Editor,
    parts: Sequence[Part],
    method: EditMethod,
    words: Words,
    scale: Scale,
    notes: Mapping[str, Any],
    *,
    reconstruct: bool = True,
    arrays: bool = False,
    videos: Any = None,
) -> str:
    """Edit (or invert, if no target is named) the items of parts, and write a folder of it; a line that says so.

    The folder holds source, reconstruction and edit as PNG pixel by pixel (numbered if there are several items), a
    strip of all three, and edit.json or invert.json: the notes, costs and errors. An inversion has noise.npz besides.
    Nothing is written unless everything was made.

    Args:
        folder: is made; one of an earlier delivery is replaced.
        parts: with items [B, *shape] as tensors.
        notes: what the JSON says beside costs and errors.
        arrays: whether to write arrays.npz with everything in data units, unrounded.
        videos: for items [C, T, H, W], called with a path without suffix and an item [C, T, H, W], also writes it in
            a form that moves.
    Raises:
        ConfigError: if the folder holds anything else; and what `perform` raises.
    """
    check_folder(folder)
    made = perform(editor, parts, method, words.target is not None, reconstruct)
    source = torch.cat([part.items for part in parts]).detach().float().cpu()
    made = made._replace(**{k: v.detach().float().cpu() for k, v in made._asdict().items() if isinstance(v, Tensor)})
    facts = _facts(source, made, scale)
    facts["peak_memory_bytes"] = _peak_memory()
    told = {
        **notes,
        "method": words.method,
        "items": list(words.names),
        "from": list(words.source),
        **({"to": list(words.target)} if words.target else {}),
        **facts,
    }
    stages = {"source": source, "reconstruction": made.reconstruction, "edit": made.edit}
    stages = {name: x for name, x in stages.items() if x is not None}
    with new_folder(folder) as place:
        if are_pictures(tuple(source.shape[1:])):
            _draw(place, stages, words, scale, videos)
        if arrays or not are_pictures(tuple(source.shape[1:])):
            held = stages | ({} if made.noise is None else {"noise": made.noise})
            np.savez_compressed(place / "arrays.npz", **{name: x.numpy() for name, x in held.items()})
        if made.edit is None and made.noise is not None:
            np.savez_compressed(place / "noise.npz", arr_0=made.noise.numpy(), notes=np.array(json.dumps(told)))
        text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False)
        (place / ("invert.json" if words.target is None else "edit.json")).write_text(text + "\n", encoding="utf-8")
    return f"{folder}  ({_sentence(words, made, facts, len(source))})"


def _peak_memory() -> int:
    """Bytes that the process took at most: on the GPU, if it used one, else in memory of the host."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux


def check_folder(folder: Path) -> None:
    """Raises ConfigError if a folder could not be replaced without losing what is no edit."""
    if not folder.exists():
        return
    ours = folder.is_dir() and ((folder / "edit.json").is_file() or (folder / "invert.json").is_file())
    if not ours and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"--out: {folder} exists, and holds no edit that could be replaced. Name a new folder.")


def _draw(place: Path, stages: Mapping[str, Tensor], words: Words, scale: Scale, videos: Any) -> None:
    for name, x in stages.items():
        for number, item in enumerate(x):
            stem = name if len(x) == 1 else f"{name}-{number}"
            write_picture(place / f"{stem}.png", item, scale)
            if videos is not None and item.ndim == 4:
                videos(place / stem, item)
    said = {"source": words.source, "reconstruction": (), "edit": words.target or ()}
    heads = {"edit": words.method}
    panels = []
    for name, x in stages.items():
        same = len(set(said[name])) == 1
        panels.append(Panel(f"{heads.get(name, name)}{f': {said[name][0]}' if same else ''}", x))
    rows = len(stages["source"])
    names = [_of(words.names, i) + _arrow(words, i) for i in range(rows)]
    write_strip(place / "strip.png", panels, names, scale)


def _of(texts: Sequence[str], row: int) -> str:
    return texts[row] if len(texts) > 1 else texts[0]


def _arrow(words: Words, row: int) -> str:
    target = f" to {_of(words.target, row)}" if words.target else ""
    return f": {_of(words.source, row)}{target}" if len({*words.source}) > 1 else ""


def _facts(source: Tensor, made: Made, scale: Scale) -> dict[str, Any]:
    """Costs and errors, item by item; errors are in squared data units, of values that are not rounded to levels."""
    facts: dict[str, Any] = {"nfe": made.nfe, "seconds": round(made.seconds, 3), "stored_bytes": made.stored}
    if made.reconstruction is not None:
        facts["reconstruction"] = _apart(source, made.reconstruction, scale)
    if made.edit is not None:
        facts["edit_from_source"] = _apart(source, made.edit, scale)
    if made.noise is not None:
        size = math.prod(made.noise.shape[1:])
        facts["noise"] = {
            "mean_square": made.noise.double().square().flatten(1).mean(1).tolist(),
            # of the mean square of so many standard normal numbers
            "standard_normal": {"mean": 1.0, "standard_deviation": math.sqrt(2 / size)},
        }
        if scale.levels:
            facts["noise"]["remark"] = (
                "Discrete items enter amid their cells, without the noise of dequantisation that the model was trained "
                "with: their noise is smaller than standard normal."
            )
    return facts


def _apart(x: Tensor, y: Tensor, scale: Scale) -> dict[str, list[float | None]]:
    """How far y is from x; an infinite PSNR, of equal items, is null."""
    found = {"mse": mse(x, y)}
    if are_pictures(tuple(x.shape[1:])):
        found["psnr"] = psnr(x, y, scale.peak)
        if min(x.shape[-2:]) >= 3:
            found["ssim"] = ssim(x, y, scale.peak)
    return {name: [v if math.isfinite(v) else None for v in value.tolist()] for name, value in found.items()}


def _sentence(words: Words, made: Made, facts: Mapping[str, Any], count: int) -> str:
    out = [f"{count} items" if count > 1 else words.names[0]]
    if words.target:
        out[0] += f" from {_any(words.source)} to {_any(words.target)}"
    out[0] += f" by {words.method}"
    for name, text in (("reconstruction", "reconstruction {}"), ("edit_from_source", "edit {} from the source")):
        if name in facts:
            out.append(text.format(_mean(facts[name])))
    if words.target is None:
        out.append(f"noise of mean square {np.mean(facts['noise']['mean_square']):.3f}")
    return ", ".join([*out, f"{made.nfe} evaluations", f"{made.seconds:.1f} s"])


def _any(texts: Sequence[str]) -> str:
    return texts[0] if len(set(texts)) == 1 else f"{len(set(texts))} kinds"


def _mean(errors: Mapping[str, list[float | None]]) -> str:
    """The PSNR of the mean squared error would hide bad items: the mean of PSNRs where there are pictures."""
    values = errors.get("psnr")
    if values is None:
        return f"MSE {np.mean(errors['mse']):.3g}"
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.1f} dB" if known else "exact"
