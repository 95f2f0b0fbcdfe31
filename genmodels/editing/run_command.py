"""`sample.py RUN --edit` and `--invert`: a run's model, its items and classes, for `command.deliver`."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import dotlist, overlay
from ..data.dataset import SPLITS, Dataset
from ..diffusion.editable import Editable, check_scales
from ..hashing import digest
from ..model import Model
from ..registry import ConfigError, member, names
from ..sampling import parse_seeds
from ..schema import arguments
from ..training import processes
from ..training.run import Run
from .command import Words, check_folder, deliver
from .editor import Prompt
from .method import EditMethod
from .parts import model_parts
from .pictures import Scale, are_pictures, read_picture, scale_of

OVERRIDE = re.compile(r"[a-z_]+(\.[\w\[\]]+)*=")


def edit_run(given: argparse.Namespace, device: Any) -> None:
    """Edit or invert pictures by a run's model, and say where that is written; the first of several processes does.

    Args:
        given: from the parser of `sample.py`.
    Raises:
        ConfigError, ValueError: if words, pictures, classes or options do not fit each other, the run or its model.
        NotApplicable: if that is no rectified flow.
    """
    if not processes.main():
        return
    pictures, overrides = edit_words(given)
    tree = short_options(given, dotlist(overrides))
    run = Run.open(given.run)
    if "edit" not in dir(member(Model, run.config.tree["model"]["name"], "model")):
        raise ConfigError(
            f"{run.path}: model '{run.config.tree['model']['name']}' does not edit. Take a rectified flow."
        )
    answer = run.config.answer("edit", tree)
    if given.inject_steps is not None:
        tree = overlay(tree, {"method": {"share": _shared(given.inject_steps, answer["method"])}}, "edit")
        answer = run.config.answer("edit", tree)
    options = run.config.options("edit", tree)
    dataset, model = run.dataset(), run.load(given.weights, device)
    editor = model.editor(options["grid"])
    editing = given.edit is not None
    scale = scale_of(dataset)
    items = _items(pictures, dataset, scale, given.resize)
    seeds = list(range(len(items.x))) if given.seeds is None else parse_seeds(given.seeds)
    if len(items.x) == 1 < len(seeds):
        items = _Items(*(None if v is None else v.expand(len(seeds), *v.shape[1:]) for v in items[:2]),
                       [f"{items.names[0]}, seed {seed}" for seed in seeds])  # fmt: skip
    before, after = _classes(given, model, dataset, items)
    guidance, interval = options["source_guidance"], options["interval"]
    check_scales(options["guidance"] if editing else guidance, guidance, interval)
    source = Prompt(before, guidance, interval)
    target = Prompt(after, options["guidance"], interval) if editing else source
    size = options["batch_size"] if given.batch_size is None else given.batch_size
    parts = list(model_parts(editor, items.x, source, target, seeds, size))
    weights = run.weights_name(given.weights)
    name = answer["method"]["name"]
    words = Words(items.names, _said(before), _said(after) if editing else None, name)
    notes = {"run": run.name, "weights": weights, "step": run.step_of(weights), "seeds": seeds, "options": answer}
    folder = given.out or run.path / "edits" / _label(run, weights, pictures, words, notes)
    check_folder(folder)
    print(
        deliver(
            folder,
            editor,
            parts,
            options["method"],
            words,
            scale,
            notes,
            reconstruct=options["reconstruct"],
            arrays=given.npz,
            videos=_videos(dataset),
        )
    )


def check_unused(given: argparse.Namespace) -> None:
    """Raises ConfigError if an option of editing was given, and nothing is edited."""
    told = {"--from": given.source, "--to": given.target, "--method": given.method, "--num-steps": given.num_steps,
            "--inject-steps": given.inject_steps, "--resize": given.resize or None, "--pipeline": given.pipeline,
            "--dtype": given.dtype, "--offload": given.offload or None}  # fmt: skip
    for flag, value in told.items():
        if value is not None:
            raise ConfigError(f"{flag}: is for --edit and --invert. Say which picture, such as --edit picture.png.")


def check_place(given: argparse.Namespace) -> None:
    """Take what stands in the place of the run for an override, with a pipeline.

    Raises:
        ConfigError: unless there is a run or a pipeline, and not both; or if options of pipelines are given to a run.
    """
    if given.pipeline is None:
        if given.run is None:
            raise ConfigError("name the folder of a run, or a pipeline (--pipeline).")
        for flag, value in (("--dtype", given.dtype), ("--offload", given.offload or None)):
            if value is not None:
                raise ConfigError(f"{flag}: is for pipelines. Say which one (--pipeline).")
    elif given.run is not None:
        if not OVERRIDE.match(given.run):
            raise ConfigError(f"{given.run} and --pipeline: choose one; a pipeline stands in place of a run.")
        given.overrides, given.run = [given.run, *given.overrides], None


def edit_words(given: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Pictures and overrides: an option that takes several words takes overrides that stand behind it, too."""
    if given.edit is not None and given.invert is not None:
        raise ConfigError("--edit and --invert: choose one. --edit inverts by itself, if its method does.")
    if given.condition is not None:
        raise ConfigError("--condition: is for samples. Say --from and --to of what is edited.")
    if given.invert is not None and given.target is not None:
        raise ConfigError("--to: is for --edit; an inversion has no target.")
    if given.invert is not None and given.inject_steps is not None:
        raise ConfigError("--inject-steps: is for --edit; an inversion shares nothing.")
    words = given.invert if given.edit is None else given.edit
    taken = [word for word in words if OVERRIDE.match(word) and not Path(word).exists()]
    pictures = [word for word in words if word not in taken]
    if not pictures:
        raise ConfigError(f"--{'invert' if given.edit is None else 'edit'}: no picture was given.")
    return pictures, [*given.overrides, *taken]


def short_options(given: argparse.Namespace, tree: dict) -> dict:
    """The section `edit` with the short options laid over it."""
    if set(tree) - {"edit"}:
        raise ConfigError(f"only overrides of edit.* apply to edits, found {', '.join(f'{key}.*' for key in tree)}.")
    if given.invert is not None and "guidance" in tree.get("edit", {}):
        raise ConfigError("edit.guidance: is that of an edit; an inversion is guided by edit.source_guidance.")
    short = {"name": given.method, "num_steps": given.num_steps}
    short = {key: value for key, value in short.items() if value is not None}
    return overlay(tree.get("edit", {}), {"method": short} if short else {}, "edit")


def with_shared(answer: dict[str, Any], steps: int) -> dict[str, Any]:
    """Resolved options with what --inject-steps says."""
    return overlay(answer, {"method": {"share": _shared(steps, answer["method"])}}, "edit")


def _shared(steps: int, node: Mapping[str, Any]) -> dict[str, Any] | None:
    """What --inject-steps says of a method's sharing.

    Raises:
        ConfigError: if the method shares nothing, or has fewer steps.
    """
    if "share" not in node:
        able = [name for name in names(EditMethod) if "share" in _arguments(name)]
        raise ConfigError(f"--inject-steps: '{node['name']}' shares no features. Methods that do: {', '.join(able)}.")
    if not 0 <= steps <= node["num_steps"]:
        raise ConfigError(
            f"--inject-steps: '{node['name']}' can share from 0 to its {node['num_steps']} steps, found {steps}. Take "
            "fewer, or more steps (--num-steps)."
        )
    return {"steps": steps} if steps else None


def _arguments(name: str) -> list[str]:
    return [argument.name for argument in arguments(member(EditMethod, name, "edit.method"))]


class _Items(NamedTuple):
    """Items [B, *shape] in data units, their own classes [B] where they are known, and names."""

    x: Tensor
    label: Tensor | None
    names: list[str]


def _items(pictures: list[str], dataset: Dataset, scale: Scale, resize: bool) -> _Items:
    """Files and items of splits in the order of the words."""
    found = [_taken(word, dataset) or _read(word, dataset, scale, resize) for word in pictures]
    labels = [part.label for part in found]
    label = None if any(part is None for part in labels) else torch.cat(labels)
    return _Items(torch.cat([part.x for part in found]), label, [name for part in found for name in part.names])


def _taken(word: str, dataset: Dataset) -> _Items | None:
    """The items that `split:5` or `split:0-7` names; None for other words."""
    split, colon, which = word.partition(":")
    if not colon or split not in SPLITS or Path(word).exists():
        return None
    rows, size = parse_seeds(which, word, "item"), dataset.size(split)
    if not size or max(rows) >= size:
        raise ConfigError(f"{word}: the split '{split}' has {f'items 0 … {size - 1}' if size else 'none'}.")
    batch = dataset.take(split, torch.tensor(rows))
    label = batch.condition if dataset.num_classes and isinstance(batch.condition, Tensor) else None
    return _Items(batch.x, label, [f"{split}:{row}" for row in rows])


def _read(word: str, dataset: Dataset, scale: Scale, resize: bool) -> _Items:
    """The picture of a file, or a video of a file or a folder of frames."""
    path = Path(word).expanduser()
    if not are_pictures(dataset.shape):
        raise ConfigError(
            f"{word}: items of shape {list(dataset.shape)} are no pictures and come from no file. Name some of a "
            "split, such as test:5."
        )
    if len(dataset.shape) == 4:
        from ..videos import read_video

        try:
            return _Items(read_video(path, dataset, resize), None, [path.name])
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(str(error).replace("(resize)", "(--resize)")) from error
    return _Items(read_picture(path, dataset.shape, scale, resize), None, [path.name])


def _videos(dataset: Dataset) -> Any:
    """What writes a GIF of an item, for videos."""
    if len(dataset.shape) != 4:
        return None
    from ..videos import write_gif

    return lambda stem, item: write_gif(stem.with_name(stem.name + ".gif"), item[None], dataset)


def _classes(
    given: argparse.Namespace, model: Editable, dataset: Dataset, items: _Items
) -> tuple[Tensor | None, Tensor | None]:
    """The classes [B] of the source and the target; None for what is not told.

    Raises:
        ConfigError: if the model has no classes, or they are out of range, or missing.
    """
    told = [flag for flag, value in (("--from", given.source), ("--to", given.target)) if value is not None]
    if not (model.conditional and dataset.num_classes):
        if given.edit is not None or told:
            raise ConfigError(
                f"{told[0] if told else '--edit'}: the model was not trained on classes, so that there are none to "
                "edit from and to. --invert works without."
            )
        return None, None
    source = items.label if given.source is None else _class("--from", given.source, dataset, len(items.x))
    if given.edit is None:
        return source, None
    if source is None:
        raise ConfigError("--from: say which class the pictures show (items of a split know theirs).")
    if given.target is None:
        raise ConfigError("--to: say which class the edits shall show.")
    return source, _class("--to", given.target, dataset, len(items.x))


def _class(flag: str, text: str, dataset: Dataset, count: int) -> Tensor:
    if not text.isdecimal() or int(text) >= dataset.num_classes:
        raise ConfigError(f"{flag} {text}: there is no such class; there are 0 … {dataset.num_classes - 1}.")
    return torch.full((count,), int(text))


def _said(classes: Tensor | None) -> list[str]:
    return ["no class"] if classes is None else [str(c) for c in classes.tolist()]


def _label(run: Run, weights: str, pictures: list[str], words: Words, notes: Mapping[str, Any]) -> str:
    """The name of a folder: step, weights, picture, classes, method, and a digest of all that was asked."""
    word = re.sub(r"\W+", "_", pictures[0] if ":" in pictures[0] else Path(pictures[0]).stem)[:40]
    more = f"+{len(pictures) - 1}" if len(pictures) > 1 else ""
    classes = [] if words.target is None else ["from" + "_".join(sorted({*words.source})), f"to{words.target[0]}"]
    asked = [[str(Path(p).resolve()) if Path(p).exists() else p for p in pictures], words.source, words.target]
    tail = digest([*asked, notes["options"], notes["seeds"]])[:6]
    kind = "invert" if words.target is None else words.method
    return "-".join([f"{run.step:08d}", weights, word + more, *classes, kind, tail])
