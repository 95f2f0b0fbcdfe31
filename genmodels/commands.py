"""The commands: `train`, `sample`, `evaluate`, `leaderboard`; the scripts at the top level only call them."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

EXAMPLES = """examples:
  python train.py configs/digits/flow_matching.yaml train.steps=500 name=try
  python train.py configs/digits/flow_matching.yaml model.network.depth=6 --dry-run
  python train.py --list solver
  python train.py --describe network.dit
"""


def guarded(command: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str] | None], int]:
    """Run a command; a mistake of the user's is one message on stderr and exit status 2, without a traceback."""

    def run(argv: Sequence[str] | None = None) -> int:
        from .registry import ConfigError
        from .training.checkpoint import CheckpointError
        from .training.loop import TrainingFailed
        from .types import NotApplicable

        try:
            command(sys.argv[1:] if argv is None else argv)
        except (ConfigError, CheckpointError, TrainingFailed, NotApplicable, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return run


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Configuration files and overrides."""
    files = [w for w in words if "=" not in w or Path(w).is_file()]
    return files, [w for w in words if w not in files]


@guarded
def train(argv: Sequence[str]) -> None:
    """Train a configuration, or continue its run; list and describe components."""
    parser = argparse.ArgumentParser("train.py", description=train.__doc__, epilog=EXAMPLES, formatter_class=_Formatter)
    parser.add_argument(
        "config", nargs="*", help="configuration files and overrides key=value, later ones over earlier ones"
    )
    parser.add_argument("--root", default="runs", help="folder of runs (default: runs)")
    parser.add_argument("--fresh", action="store_true", help="set an existing run of that name aside and start again")
    parser.add_argument(
        "--dry-run", action="store_true", help="show configuration, size, one loss and speed; write nothing"
    )
    parser.add_argument("--list", nargs="?", const="", metavar="KIND", help="list components, of one kind or all")
    parser.add_argument("--describe", metavar="KIND.NAME", help="describe a component and its arguments")
    parser.add_argument("--cite", action="store_true", help="print the sources of the components of a configuration")
    given = parser.parse_intermixed_args(list(argv))

    from . import registry
    from .config import load

    if given.list is not None:
        print(registry.listing(given.list or None))
        return
    if given.describe:
        print(registry.describe_name(given.describe))
        return
    files, overrides = _split(given.config)
    if not files:
        raise registry.ConfigError(
            "no configuration file was given. Try: python train.py configs/digits/flow_matching.yaml"
        )
    config = load(files, overrides)
    if given.cite:
        print("\n".join(registry.cite(config.tree)))
    elif given.dry_run:
        from .training.dry_run import dry_run

        print(dry_run(config, Path(given.root)))
    else:
        from .training.loop import train as run

        run(config, root=given.root, fresh=given.fresh)


@guarded
def sample(argv: Sequence[str]) -> None:
    """Draw samples of a run; sample i depends on seed i alone."""
    parser = argparse.ArgumentParser("sample.py", description=sample.__doc__, formatter_class=_Formatter)
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("overrides", nargs="*", help="sampling options, e.g. sample.num_steps=20")
    parser.add_argument("--seeds", help="e.g. 0-63 or 3,7,20-29 (default: a row of 8 for each class, or 0-63)")
    parser.add_argument("--condition", type=int, help="class of every sample (default: all classes in equal blocks)")
    parser.add_argument("--weights", help="model or ema-<value> (default: the first average of the weights)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--npz", action="store_true", help="also write the samples as arrays")
    parser.add_argument("--out", type=Path, help="file to write without its suffix (default: in the run's samples/)")
    given = parser.parse_intermixed_args(list(argv))

    import torch

    from .config import digest, dotlist
    from .registry import ConfigError
    from .sampling import default_seeds, draw, parse_seeds, request, write_arrays, write_picture
    from .training.run import Run

    overrides = dotlist(given.overrides)
    if set(overrides) - {"sample"}:
        raise ConfigError(f"only overrides of sample.* apply here, found {', '.join(given.overrides)}.")
    seeds = parse_seeds(given.seeds) if given.seeds else None
    run = Run.open(given.run)
    options = run.config.options("sample", overrides.get("sample"))
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, dataset = run.load(given.weights, device), run.config.dataset()
    seeds = default_seeds(model, dataset) if seeds is None else seeds
    began = time.monotonic()
    x, condition = draw(model, dataset, seeds, options, given.condition)
    seconds = time.monotonic() - began
    answer, weights = run.config.answer("sample", overrides.get("sample")), run.weights_name(given.weights)
    notes = request(seeds, condition, answer, weights, run.step)
    label = f"{run.step:08d}-{weights}-seeds{(given.seeds or f'0-{len(seeds) - 1}').replace(',', '_')}"
    label += f"-class{given.condition}" if given.condition is not None else ""
    label += f"-{digest(answer)}" if overrides else ""
    stem = given.out or run.folder("samples") / label
    stem.parent.mkdir(parents=True, exist_ok=True)
    print(f"{write_picture(stem, x, dataset, notes)}  ({len(seeds)} samples in {seconds:.1f} s)")
    if given.npz:
        print(write_arrays(stem.with_name(stem.name + ".npz"), x, notes))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """`genmodels train|sample|evaluate|leaderboard …`."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbs = {"train": train, "sample": sample, "evaluate": _evaluate, "leaderboard": _leaderboard}
    if not words or words[0] not in verbs:
        print(f"usage: genmodels {{{'|'.join(verbs)}}} …   (each answers --help)", file=sys.stderr)
        return 2
    return verbs[words[0]](words[1:])


def _evaluate(argv: Sequence[str]) -> int:
    from .evaluation.evaluate import main as evaluate

    return evaluate(argv)


def _leaderboard(argv: Sequence[str]) -> int:
    from .evaluation.leaderboard import main as leaderboard

    return leaderboard(argv)
