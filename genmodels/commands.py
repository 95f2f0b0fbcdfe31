"""The commands: `train`, `sample`, `evaluate`, `leaderboard`, `plots`; the scripts at the top level only call them."""

import argparse
import functools
import importlib
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  python train.py configs/digits/flow_matching.yaml train.steps=500 name=try
  python train.py configs/digits/flow_matching.yaml model.network.depth=6 --dry-run
  python train.py runs/try                                 (continues that run)
  python train.py configs/toy2d/nsf.yaml --sweep seed=0,1,2 model.layers[0].count=2,4 --jobs 2
  python train.py --list solver
  python train.py --describe network.dit
"""


def guarded(command: Callable[[Sequence[str]], int | None]) -> Callable[[Sequence[str] | None], int]:
    """Run a command; a mistake of the user's is one message on stderr and exit status 2, without a traceback.

    A command may return another status than 0. Interrupted commands exit with 130. With the environment variable
    GENMODELS_DEBUG set, errors keep their traceback.
    """

    @functools.wraps(command)
    def run(argv: Sequence[str] | None = None) -> int:
        from .evaluation.results import ResultError
        from .registry import ConfigError
        from .solvers.solution import SolverError
        from .training import processes
        from .training.checkpoint import CheckpointError
        from .training.guard import TrainingFailed
        from .types import NotApplicable

        deliberate = (ConfigError, ResultError, CheckpointError, TrainingFailed, SolverError, NotApplicable)
        status = None
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                status = command(sys.argv[1:] if argv is None else argv)
                sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of a pipe has seen enough; nothing may be written to it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            words = _account(error, deliberate)
            if words is None or os.environ.get("GENMODELS_DEBUG"):
                raise
            print(words, end="", file=sys.stderr, flush=True)
            if processes.ended_together(error):
                processes.leave()
            return 2
        processes.leave()
        return status or 0

    return run


def _account(error: Exception, deliberate: tuple[type[Exception], ...]) -> str | None:
    """What to say of an error: nothing if another process does, None if it is a bug whose traceback is wanted."""
    from .training import processes

    if processes.told_elsewhere(error):
        return ""
    if processes.left_alone(error):
        return f"{_process()}error: another process has ended; it, or the launcher, says why.\n"
    if not isinstance(error, (*deliberate, ValueError, OSError)):
        return None
    where = f"\n({type(error).__name__}; set GENMODELS_DEBUG=1 to see where it was raised.)"
    return f"{_process()}error: {error}{'' if isinstance(error, deliberate) else where}\n"


def _process() -> str:
    """Which of several processes speaks."""
    return f"[process {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    """Our own warnings as one line; those of other packages with their place; from the first of several processes."""
    if os.environ.get("RANK", "0") != "0":
        return
    ours = Path(filename).is_relative_to(Path(__file__).parent) or category.__module__.startswith("genmodels")
    place = "" if ours else f" ({category.__name__}, {filename}:{lineno})"
    print(f"warning: {message}{place}", file=sys.stderr)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Configuration files and overrides; a folder stands for its config.yaml.

    Raises:
        ConfigError: if a word is neither a file nor key=value.
    """
    from .config import dotlist

    files, overrides = [], []
    for word in words:
        if Path(word).is_dir() and (Path(word) / "config.yaml").is_file():
            files.append(str(Path(word) / "config.yaml"))
        elif Path(word).is_file() or ("=" not in word and Path(word).suffix in (".yaml", ".yml")):
            files.append(word)
        else:
            dotlist([word])
            overrides.append(word)
    return files, overrides


def _run_of(files: Sequence[str]) -> Path | None:
    """The folder of the run whose own config.yaml was given alone: training that means to continue there."""
    path = Path(files[0]).resolve() if len(files) == 1 else Path()
    return path.parent if path.name == "config.yaml" and (path.parent / "checkpoints").is_dir() else None


def _train_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("train.py", description=train.__doc__, epilog=EXAMPLES, formatter_class=_Formatter)
    parser.add_argument(
        "config", nargs="*", help="configuration files (or a run) and overrides key=value, later ones over earlier ones"
    )
    parser.add_argument("--root", help="folder of runs (default: runs, or where the given run is)")
    parser.add_argument("--fresh", action="store_true", help="set an existing run of that name aside and start again")
    many = parser.add_argument_group("many runs")
    many.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        metavar="KEY=A,B",
        help="train every combination of these values, each as a run of its own named by them; the same command again "
        "skips what is finished and continues the rest (a comma inside brackets or quotes belongs to the value)",
    )
    many.add_argument(
        "--jobs", type=int, metavar="N", help="runs of a sweep at a time; they share threads and GPUs (default: 1)"
    )
    look = parser.add_argument_group("looking, without training")
    look.add_argument(
        "--dry-run",
        action="store_true",
        help="show configuration, size, one loss and speed, or the runs of a sweep; write nothing",
    )
    look.add_argument("--profile", action="store_true", help="show where the time of a step goes; writes a trace")
    look.add_argument("--list", nargs="?", const="", metavar="KIND", help="list components, of one kind or all")
    look.add_argument("--describe", metavar="KIND.NAME", help="describe a component and its arguments")
    look.add_argument("--cite", action="store_true", help="print what a configuration stands on, as BibTeX")
    return parser


@guarded
def train(argv: Sequence[str]) -> int | None:
    """Train a configuration, or continue its run; train many; list, describe and cite components."""
    given = _train_options().parse_intermixed_args(list(argv))

    from . import registry
    from .config import dotlist, load

    if given.list is not None:
        print(registry.listing(given.list or None))
        return None
    if given.describe:
        print(registry.describe_name(given.describe))
        return None
    axes = [word for word in given.sweep or () if "=" in word and not Path(word).is_file()]
    files, overrides = split_words([*given.config, *(word for word in given.sweep or () if word not in axes)])
    if not files:
        raise registry.ConfigError(
            "no configuration file was given. Try: python train.py configs/digits/flow_matching.yaml"
        )
    of_run = _run_of(files)
    if of_run is not None and "name" not in dotlist(overrides):
        overrides = [*overrides, f"name={of_run.name}"]  # the folder may have been renamed
    root = Path(given.root or (of_run.parent if of_run is not None else "runs"))
    if given.sweep:
        return _sweep(given, files, overrides, axes, root)
    if given.jobs is not None:
        raise registry.ConfigError("--jobs: is for --sweep; one run is one process (or those of a launcher).")
    config = load(files, overrides, blank=given.cite)
    if given.cite:
        from .citations import cite

        print(cite(config.tree))
    elif given.profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's tracer would write its own log over the table
        from .training.profile import profile

        print(profile(config, root))
    elif given.dry_run:
        from .training.dry_run import dry_run

        print(dry_run(config, root))
    else:
        from .training.interruption import signals
        from .training.loop import train as run

        with signals() as stop:
            run(config, root=root, fresh=given.fresh, stop=stop)
    return None


def _sweep(given: argparse.Namespace, files: list[str], overrides: list[str], axes: list[str], root: Path) -> int:
    from .registry import ConfigError
    from .training.grid import grid
    from .training.sweep import Sweep, listing

    if given.cite or given.profile:
        raise ConfigError(f"--{'cite' if given.cite else 'profile'} is for one configuration; leave --sweep out.")
    plans = grid(files, overrides, axes)
    if given.dry_run:
        print(listing(plans, root, fresh=given.fresh))
        return 0
    jobs = 1 if given.jobs is None else given.jobs
    return Sweep(plans, [*files, *overrides], root, jobs=jobs, fresh=given.fresh).run()


@guarded
def sample(argv: Sequence[str]) -> None:
    """Draw samples of a run; sample i depends on seed i alone. Or edit, invert or upsample items by it."""
    from .editing.command import add_options
    from .wavelet import upsample_command

    parser = argparse.ArgumentParser("sample.py", description=sample.__doc__, formatter_class=_Formatter)
    parser.add_argument("run", nargs="?", help="folder of a run (none with --pipeline)")
    parser.add_argument("overrides", nargs="*", help="options, e.g. sample.num_steps=20, edit.guidance=2")
    parser.add_argument("--seeds", help="e.g. 0-63 or 3,7,20-29 (default: a row of 8 for each class, or 0-63)")
    parser.add_argument(
        "--condition",
        help="class of every sample (default: all classes in equal blocks); or a split whose items give the conditions "
        "(test: seed i takes that of item i; test:5: all take that of item 5; default: val); or a file to make them "
        "from, such as clip.wav for spectrograms: seed i takes the i-th segment",
    )
    parser.add_argument("--weights", help="model, best or ema-<value> (default: the first average)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--npz", action="store_true", help="also write samples, or edits, as arrays")
    parser.add_argument(
        "--out",
        type=Path,
        help="file to write without its suffix (default: in the run's samples/); of edits, a folder (in its edits/)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help="seeds per call of the model (default: a quarter, 8 to 256); of edits, items (256; 1 of a pipeline)",
    )
    add_options(parser)
    upsample_command.add_options(parser)
    given = parser.parse_intermixed_args(list(argv))

    from .editing.run_command import check_place, check_unused, edit_run
    from .training import processes

    editing = given.edit is not None or given.invert is not None
    if not editing:
        check_unused(given)
    check_place(given)
    act = edit_run if editing else _sample
    if upsample_command.asked(given):
        act = upsample_command.upsample_run
    if given.pipeline is not None:
        from .editing.pipeline_command import edit_pipeline as act
    device = processes.place(given.device)
    with processes.together():
        act(given, device)


def _sample(given: argparse.Namespace, device: Any) -> None:
    """All processes draw, the first one writes and speaks."""
    from .config import dotlist
    from .registry import ConfigError
    from .sampling import conditions, default_seeds, draw_in_batches, parse_seeds, request, write_arrays, write_samples
    from .training.run import Run

    overrides = dotlist(given.overrides)
    if set(overrides) - {"sample"}:
        raise ConfigError(f"only overrides of sample.* apply here, found {', '.join(given.overrides)}.")
    seeds = None if given.seeds is None else parse_seeds(given.seeds)
    run = Run.open(given.run)
    options = run.config.options("sample", overrides.get("sample"))
    model, dataset = run.load(given.weights, device), run.dataset()
    seeds = default_seeds(model, dataset) if seeds is None else seeds
    began = time.monotonic()
    x = draw_in_batches(model, dataset, seeds, options, given.condition, given.batch_size)
    if x is None:
        return
    seconds = time.monotonic() - began
    condition = conditions(model, dataset, seeds, given.condition)
    answer = run.config.answer("sample", overrides.get("sample"))
    weights = run.weights_name(given.weights)
    notes = request(seeds, condition, answer, weights, run.step_of(weights))
    if given.condition is not None:
        notes["given"] = given.condition
    stem = _stem(given, run, seeds, answer if overrides else None)
    stem.parent.mkdir(parents=True, exist_ok=True)
    written, remark = write_samples(stem, x, dataset, notes)
    print(f"{written}  ({len(seeds)} samples in {seconds:.1f} s{f'; {remark}' if remark else ''})")
    if given.npz and not written.suffix == ".npz":
        print(write_arrays(stem.with_name(stem.name + ".npz"), x, notes))


def _stem(given: argparse.Namespace, run: Any, seeds: list[int], answer: dict[str, Any] | None) -> Path:
    """Where samples are written, without a suffix: as asked for, or named by step, weights, seeds, class, options."""
    from .hashing import digest

    which = (given.seeds or f"0-{len(seeds) - 1}").replace(",", "_").replace(" ", "")
    label = f"{run.step:08d}-{run.weights_name(given.weights)}"
    label += f"-seeds{which if len(which) < 60 else f'-{digest(seeds)}'}"
    if given.condition is not None:
        word = re.sub(r"\W+", "_", Path(given.condition).stem)
        label += f"-class{word}" if word.isdecimal() else f"-{word}-{digest(given.condition)[:6]}"
    label += f"-{digest(answer)}" if answer is not None else ""
    stem = given.out or run.folder("samples") / label
    return stem.with_suffix("") if stem.suffix in (".png", ".npz") else stem


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


@guarded
def plots(argv: Sequence[str]) -> None:
    """Draw the training curves of runs beside each other."""
    parser = argparse.ArgumentParser("genmodels plots", description=plots.__doc__, formatter_class=_Formatter)
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help=".png, .pdf or .svg (default: curves.png)")
    parser.add_argument("--keys", help="what to draw, e.g. train/loss,train/grad_norm (default: train/loss,val/loss)")
    parser.add_argument("--x", choices=("step", "seconds", "samples"), default="step", help="the axis below")
    parser.add_argument(
        "--smooth", type=float, default=0, metavar="STEPS", help="draw means over so many steps, the values behind them"
    )
    parser.add_argument("--log", action="store_true", help="logarithmic scale of the values")
    given = parser.parse_args(list(argv))

    from .training.plots import curves
    from .training.run import Run

    keys = None if given.keys is None else [key.strip() for key in given.keys.split(",")]
    runs = [Run.open(folder) for folder in given.runs]
    print(curves(runs, given.out, keys, x=given.x, window=given.smooth, log=given.log))


ELSEWHERE = {
    "evaluate": ".evaluation.evaluate",
    "leaderboard": ".evaluation.leaderboard",
    "compare": ".evaluation.compare",
    "concavity": ".wavelet.concavity_command",
    "reference": ".metrics.reference_command",
    "export": ".export.write",
    "import": ".export.read",
}
VERBS = """usage: genmodels VERB …

  train        train a configuration, continue a run, sweep a grid; list and describe components
  sample       draw samples of a run
  evaluate     score runs under a protocol
  leaderboard  make the tables and the page of results
  compare      compare the results of runs in words, with intervals
  concavity    measure how convex a wavelet model's energies are, and suggest the width of its packets
  reference    write the statistics of reference data to a file
  plots        draw the training curves of runs
  export       write a diffusion model as a pipeline folder of diffusers
  import       make a run of a pipeline folder of diffusers

Each answers --help.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """`genmodels train|sample|evaluate|leaderboard|compare|concavity|reference|plots|export|import …`.

    Also by `python -m genmodels`.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    verbs = {
        "train": train,
        "sample": sample,
        **{verb: _of(module) for verb, module in ELSEWHERE.items()},
        "plots": plots,
    }
    if words and words[0] in verbs:
        return verbs[words[0]](words[1:])
    if words and words[0] in ("-h", "--help"):
        print(VERBS, end="")
        return 0
    unknown = f"error: there is no verb '{words[0]}'.\n" if words else ""
    print(f"{unknown}usage: genmodels {{{'|'.join(verbs)}}} …   (each answers --help)", file=sys.stderr)
    return 2


def _of(module: str) -> Callable[[Sequence[str]], int]:
    """The `main` of a module, which is imported when it is wanted."""

    def run(argv: Sequence[str]) -> int:
        return importlib.import_module(module, __package__).main(argv)

    return run
