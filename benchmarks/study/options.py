"""Options that every study of cells has, and what is wrong with them, in words."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.study.cell_file import CellFile

RESULTS = Path(__file__).parent / "results"
"""What is published with the project."""


FEWEST_IMAGES = 1000
"""That a hundred clients can share."""


def images(text: str) -> int:
    """Read a number of training images, for argparse."""
    if not text.isdecimal() or int(text) < FEWEST_IMAGES:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {FEWEST_IMAGES}, got {text}")
    return int(text)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_cell_options(parser: argparse.ArgumentParser, *, splits: Sequence[str], note: str = "") -> None:
    """Give a script the options that every grid of cells has.

    Args:
        parser: of the script.
        splits: what the grid runs where nothing else is asked for.
        note: added to the help of the splits.
    """
    parser.add_argument("--splits", default="", help=f"comma-separated; default {','.join(splits)}{note}")
    parser.add_argument("--quick", action="store_true", help="the embedded subset, a few rounds")
    parser.add_argument("--seeds", type=int, default=None, help="default 5")
    parser.add_argument("--cells", default="*", help="run only cells whose name matches, such as '*staircase*'")
    parser.add_argument("--limit-minutes", type=float, default=None, help="begin no cell after so many minutes")
    parser.add_argument("--report", action="store_true", help="run nothing: show what there is")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")


def keep_published(options: argparse.Namespace, published: Path, changing: Iterable[str]) -> None:
    """Let no other setting write over the results that are published with the project.

    Args:
        options: the command line, with `quick` and `out`.
        published: the folder where those results lie.
        changing: names of options that make another setting where they are given.

    Raises:
        SystemExit: one of them is, and the results would go there.
    """
    given = [name for name in changing if getattr(options, name) not in (None, "")]
    if given and not options.quick and options.out.resolve() == published.resolve():
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise SystemExit(
            f"out: expected a folder of its own beside {names}, got {published}, which keeps the usual setting"
        )


def check_pattern(pattern: str, file: CellFile) -> None:
    """Say so where a pattern has matched no cell, finished before or now."""
    names = sorted(file.cells())
    if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
        like = f" such as {names[0]}" if names else ""
        raise SystemExit(f"cells: expected a pattern that matches names of cells{like}, got {pattern}: none does")


def count(what: str, given: int | None, default: int) -> int:
    """Return how many of something are asked for."""
    if given is None:
        return default
    if given < 1:
        raise SystemExit(f"{what}: expected 1 or more, got {given}")
    return given


def words(what: str, given: str, usual: Sequence[str], known: Iterable[str]) -> list[str]:
    """Read comma-separated words, the usual ones where none are given.

    Raises:
        SystemExit: some are not known; with the nearest that is.
    """
    chosen, known = [word for part in given.split(",") if (word := part.strip())] or list(usual), list(known)
    wrong = [word for word in chosen if word not in known]
    if wrong:
        close = difflib.get_close_matches(wrong[0], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SystemExit(f"{what}: expected some of {', '.join(known)}, got {', '.join(wrong)}{hint}")
    return chosen
