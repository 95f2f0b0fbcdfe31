"""Leaderboards from result files: `python -m evals.leaderboard runs/*`, or without arguments the published one."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..commands import guarded
from ..files import write_text
from ..registry import ConfigError
from .assemble import leaderboard, superseded
from .board import Board
from .exports import as_csv, as_json
from .markdown import markdown
from .page import page
from .protocol import FOLDER
from .quoted import quoted_for
from .results import BOARD_FILE, Companions, Result, ResultError, find, read

EVALS = FOLDER.parent
BENCHMARKS = "benchmarks"  # the folder of evals/results that holds timings instead of results


@dataclass(frozen=True)
class Collection:
    """Results and what lies beside them, by the id of the result."""

    results: dict[str, Result]
    beside: dict[str, Companions]

    def boards(self) -> list[Board]:
        """Their leaderboards, with the rows that papers report."""
        results = list(self.results.values())
        quoted = quoted_for(results, EVALS / "quoted")
        return leaderboard(results, {key: found.items for key, found in self.beside.items()}, quoted)


def collect(places: Sequence[str | Path], strict: bool) -> Collection:
    """All results found in runs, folders and files; those that newer ones take the place of are named on stderr.

    Args:
        strict: a file that is no valid result is an error; otherwise it is named on stderr and left out.
    """
    collection, paths = Collection({}, {}), {}
    for path in find(places):
        try:
            result, beside = read(path)
        except ResultError as error:
            if strict:
                raise
            print(f"left out: {error}", file=sys.stderr)
            continue
        collection.results[result["id"]] = result
        collection.beside[result["id"]] = beside
        paths[result["id"]] = path
    for older, newer in superseded(list(collection.results.values())):
        which = "of the same run, options, seed, step and weights"
        print(f"left out: {paths[older['id']]} is older than {paths[newer['id']]}, {which}", file=sys.stderr)
    return collection


def write_all(collection: Collection, out: Path) -> dict[Path, str]:
    """The files of a leaderboard with their contents."""
    boards, grids = collection.boards(), {key: found.grid for key, found in collection.beside.items()}
    return {
        out / "LEADERBOARD.md": markdown(boards),
        out / BOARD_FILE: as_json(boards),
        out / "leaderboard.csv": as_csv(boards),
        out / "leaderboard.html": page(boards, collection.results, grids),
    }


@guarded
def main(argv: Sequence[str]) -> None:
    """Compare runs; without arguments, regenerate the published leaderboard from evals/results."""
    parser = argparse.ArgumentParser("evals.leaderboard", description=main.__doc__)
    parser.add_argument("places", nargs="*", help="runs, folders of results, or result files (default: evals/results)")
    parser.add_argument("--out", type=Path, help="folder for LEADERBOARD.md and leaderboard.{html,csv,json}")
    parser.add_argument("--check", action="store_true", help="only say whether the files on disk are up to date")
    given = parser.parse_args(list(argv))
    published = [p for p in (EVALS / "results").glob("*") if p.is_dir() and p.name != BENCHMARKS]
    collection = collect(given.places or published, strict=not given.places)
    if given.places and not collection.results:
        raise ConfigError("no results were found there. Make some: python -m evals.evaluate <run> --protocol <name>")
    out = given.out or (None if given.places else EVALS)
    files = {} if out is None else write_all(collection, out)
    if given.check:
        stale = [str(p) for p, text in files.items() if not p.is_file() or p.read_bytes() != text.encode()]
        if stale:
            raise ConfigError(f"out of date: {', '.join(stale)}. Regenerate: python -m evals.leaderboard")
        return
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    print(markdown(collection.boards()) if given.places else "\n".join(f"written {path}" for path in files))


if __name__ == "__main__":
    sys.exit(main())
