"""`sample.py --pipeline PLACE --edit` and `--invert`: photographs and texts for `command.deliver`."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..config import dotlist, overlay
from ..data.decoding import converted, loaded, opened
from ..diffusion.checks import at_least_one
from ..hashing import digest
from ..metrics.picture_errors import mse
from ..registry import ConfigError, member
from ..rng import SeedNoise
from ..sampling import parse_seeds
from ..training import processes
from .by_inversion import RFEdit
from .command import Words, check_folder, deliver
from .method import ByInversion, EditMethod
from .parts import Part
from .pictures import Scale, write_gif
from .pipeline_editor import PipelineEditor
from .pipelines import defaults, load_pipeline, of_pipeline, shared_bytes
from .pixels import check_frames, fitted, pixels
from .run_command import edit_words, short_options, with_shared

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class PipelineEdit:
    """The options `edit.*` of a pipeline.

    Args:
        method: how, in how many steps.
        guidance: of the text of the edit.
        source_guidance: of the text of the source. An inversion is undone by the same guidance alone.
        true_guidance: of the text of the edit, away from `negative`, for models that are told `guidance`.
        interval: noise levels (low, high) of σ/α within which guidance acts.
        negative: what guidance goes away from.
        max_sequence_length: of texts, in tokens; null for the pipeline's own.
        reconstruct: whether to tell what the method makes of the source under its own text.
    """

    method: EditMethod = RFEdit()
    guidance: float = 1.0
    source_guidance: float = 1.0
    true_guidance: float = 1.0
    interval: tuple[float, float] | None = None
    negative: str = ""
    max_sequence_length: int | None = None
    reconstruct: bool = True


def edit_pipeline(given: argparse.Namespace, device: torch.device) -> None:
    """Edit or invert photographs by a pipeline, and say where that is written; the first of several processes does.

    What is not said is set as the method's authors do for the family of the pipeline, see `pipelines.SETTINGS`.

    Args:
        given: from the parser of `sample.py`.
    Raises:
        ConfigError, ValueError: if words, pictures or options do not fit each other or the pipeline.
    """
    if not processes.main():
        return
    files, overrides = edit_words(given)
    editing = given.edit is not None
    if editing and given.target is None:
        raise ConfigError('--to: say what the edits shall show, such as --to "a dog".')
    if given.weights is not None:
        raise ConfigError("--weights: is for runs; a pipeline has one set of weights.")
    tree = short_options(given, dotlist(overrides))
    name = (tree.get("method") or {}).get("name", RFEdit.registered_name)
    member(EditMethod, name, "edit.method")
    for file in files:
        if not Path(file).expanduser().exists():
            raise ConfigError(f"{file}: there is no such picture.")
    dtype = DTYPES[given.dtype or ("float32" if device.type == "cpu" else "bf16")]
    pipe = load_pipeline(given.pipeline, dtype, device, given.offload)
    pipe.set_progress_bar_config(disable=True)
    editor = of_pipeline(pipe, "pixels", given.resize)
    setting = defaults(editor, name)
    node = {"method": {"name": name, **setting.options}, "guidance": setting.target_guidance}
    node = overlay(node | {"source_guidance": setting.source_guidance}, tree, "edit")
    answer = registry.validate(PipelineEdit, node, "edit")
    if given.inject_steps is not None:
        answer = registry.validate(PipelineEdit, with_shared(answer, given.inject_steps), "edit")
    options = PipelineEdit(**registry.values(PipelineEdit, answer))
    if options.negative and editor.told_guidance and options.true_guidance == 1:
        raise ConfigError(
            f"edit.negative has no effect on {type(pipe).__name__}, which is told the guidance. Give "
            "edit.true_guidance, too, or leave it out."
        )
    editor.max_sequence_length = options.max_sequence_length or editor.max_sequence_length
    items, seeds = _items(files, editor, given)
    texts = [given.source or "", given.target if editing else given.source or ""]
    prompts = _prompts(editor, texts, options, editing)
    size = 1 if given.batch_size is None else given.batch_size
    at_least_one("edit", batch_size=size)
    parts = [
        Part(items[rows], *prompts, SeedNoise([seeds[i] for i in rows], purpose="edit", device=device))
        for rows in torch.arange(len(items)).split(size)
    ]
    names = [Path(file).name for file in files] if len(files) == len(items) else [f"seed {seed}" for seed in seeds]
    words = Words(names, [texts[0] or "no text"], [texts[1]] if editing else None, name)
    notes = {
        "pipeline": given.pipeline,
        "class": type(pipe).__name__,
        "dtype": given.dtype or str(dtype),
        "seeds": seeds,
    }
    notes |= {"options": answer, "setting": setting.origin, "autoencoder": _kept(editor, parts)}
    folder = given.out or Path("edits") / _label(files, words, notes)
    check_folder(folder)
    if editing:
        _foretell(editor, options.method, parts[0])
    moving = (lambda stem, item: write_gif(stem, item, editor.frame_rate)) if editor.video else None
    scale = Scale()
    print(deliver(folder, editor, parts, options.method, words, scale, notes, reconstruct=options.reconstruct,
                  arrays=given.npz, videos=moving))  # fmt: skip


def _items(files: Sequence[str], editor: PipelineEditor, given: argparse.Namespace) -> tuple[Tensor, list[int]]:
    """[B, 3, (T,) H, W] in [0, 1] of a size that the model takes, and a seed for each; one picture for all seeds."""
    found = [_read(file, editor, given.resize) for file in files]
    if len({item.shape for item in found}) > 1:
        shown = ", ".join("x".join(map(str, reversed(item.shape[2:]))) for item in found)
        raise ConfigError(f"pictures of one size are needed, found {shown}. Edit them one after another.")
    items = torch.cat(found)
    seeds = list(range(len(items))) if given.seeds is None else parse_seeds(given.seeds)
    items = items.expand(len(seeds), *items.shape[1:]) if len(items) == 1 else items
    if len(items) != len(seeds):
        raise ConfigError(f"--seeds: one for each of {len(items)} pictures is needed, found {len(seeds)}.")
    return items, seeds


def _read(file: str, editor: PipelineEditor, resize: bool) -> Tensor:
    path = Path(file).expanduser()
    try:
        found = fitted((_clip if editor.video else _photograph)(path, resize), editor.multiple, resize)
        if editor.video:
            check_frames(found.shape[2], editor.every)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{file}: {error} (Here resize=True is --resize.)") from error
    return found


def _photograph(path: Path, convert: bool) -> Tensor:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder. Name pictures; folders of frames are for pipelines of videos.")
    with opened(path) as image:
        found = loaded(path, image)
        if found.mode != "RGB" and not convert:
            raise ConfigError(
                f"{path} is of Pillow's mode {found.mode}, and colour (RGB) is needed. Convert it, or add --resize, "
                "which also converts."
            )
        return pixels(converted(path, found, 3, 0), video=False)


def _clip(path: Path, convert: bool) -> Tensor:
    from ..videos import stored_frames

    return pixels([frame for frame, _ in stored_frames(path)], video=True)


def _prompts(editor: PipelineEditor, texts: Sequence[str], options: PipelineEdit, editing: bool) -> tuple[Any, Any]:
    told = {"negative": options.negative, "interval": options.interval}
    source = editor.prompt(texts[0], options.source_guidance, **told)
    if not editing:
        return source, source
    return source, editor.prompt(texts[1], options.guidance, true_guidance=options.true_guidance, **told)


def _foretell(editor: PipelineEditor, method: EditMethod, part: Part) -> None:
    """Print how much memory the features will take, before a long run finds out."""
    sharing = method.share if isinstance(method, ByInversion) else None
    if sharing is None:
        return
    size = shared_bytes(editor, sharing, editor.encode(part.items), part.source, method.down.stages)
    where = {"device": "on the device", "host": "in memory of the host", "disk": "on disk"}[sharing.store]
    print(f"features that are shared will take about {size / 2**30:.3g} GiB {where} (edit.method.share.store)")


def _kept(editor: PipelineEditor, parts: Sequence[Part]) -> dict[str, list[float]]:
    """The error that the autoencoder makes by itself: no reconstruction can be better but by luck."""
    errors = [mse(part.items, editor.decode(editor.encode(part.items)).cpu()) for part in parts]
    return {"mse": torch.cat(errors).tolist()}


def _label(files: Sequence[str], words: Words, notes: dict[str, Any]) -> str:
    """The name of a folder: picture, target, method, and a digest of all that was asked."""
    picture = re.sub(r"\W+", "_", Path(files[0]).stem)[:40] + (f"+{len(files) - 1}" if len(files) > 1 else "")
    target = ["invert"] if words.target is None else [f"to_{re.sub(r'[^a-zA-Z0-9]+', '_', words.target[0])[:40]}"]
    tail = digest([[str(Path(file).resolve()) for file in files], words.source, words.target, notes])[:6]
    return "-".join([picture, *target, words.method, tail])
