"""Grids of experiments: run cell by cell, resumable, each cell a JSON of what its runs reached and what they cost."""

import argparse
import dataclasses
import difflib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress

from autorank_jax.experiment.config import Experiment, experiment_from
from autorank_jax.experiment.results import Results, Scores, summarize
from autorank_jax.experiment.run import DivergedError, RoundDone, run_experiment
from benchmarks import harness

Cell = dict[str, Any]


class Bounds(NamedTuple):
    """How much of a grid to run now; what lies there already is read in any case."""

    pattern: str = "*"  # of the names of cells to run
    until: float = float("inf")  # time.monotonic() after which no cell is begun

    @classmethod
    def within(cls, minutes: float | None, pattern: str = "*") -> "Bounds":
        """Return bounds that end some minutes from now, where minutes are given."""
        if minutes is not None and not minutes >= 0:
            raise SystemExit(f"limit-minutes: expected 0 or more, got {minutes:g}")
        return cls(pattern, time.monotonic() + 60 * minutes if minutes is not None else float("inf"))


NOTHING = Bounds(until=float("-inf"))
"""Bounds within which nothing is run: what is there is read."""


def add_grid_options(parser: argparse.ArgumentParser, *, splits: Sequence[str], out: Path, note: str = "") -> None:
    """Give a script the options that every grid of cells has.

    Args:
        parser: of the script.
        splits: what the grid runs where nothing else is asked for.
        out: the folder of results.
        note: added to the help of the splits.
    """
    parser.add_argument("--splits", default="", help=f"comma-separated; default {','.join(splits)}{note}")
    parser.add_argument("--quick", action="store_true", help="the embedded subset, a few rounds")
    parser.add_argument("--seeds", type=int, default=None, help="default 5")
    parser.add_argument("--cells", default="*", help="run only cells whose name matches, such as '*staircase*'")
    parser.add_argument("--limit-minutes", type=float, default=None, help="begin no cell after so many minutes")
    parser.add_argument("--report", action="store_true", help="run nothing: show what there is")
    parser.add_argument("--out", type=Path, default=out)


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


def check_pattern(pattern: str, folder: Path) -> None:
    """Say so where a pattern has matched no cell, finished before or now."""
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.json"))]
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


def run_cells(cells: Mapping[str, Experiment], folder: Path, bounds: Bounds = Bounds()) -> dict[str, Cell]:  # noqa: B008
    """Run the cells that are not there yet, and return all that are there then.

    Args:
        cells: experiments by a name that is good for a file; with slashes, for a file in a folder.
        folder: where each finished cell lies as `NAME.json` (an option that a cell does not name has its default);
            what does not read is run again.
        bounds: leave out what is beyond them.

    Raises:
        SystemExit: a cell of other options lies where one is to be run.

    Returns:
        Cells by name: `config`, `summary`, `accuracy[policy][seed]` by round, likewise `flops` and `bytes` spent so
        far, `clients[policy][seed]` with their own accuracy, `scores[seed]`. Cells of older versions have the first
        three.
    """
    found = {}
    with Progress(transient=True, disable=bounds == NOTHING) as progress:
        bar = progress.add_task("cells", total=len(cells))
        for name, experiment in cells.items():
            path = folder / f"{name}.json"
            cell = read_cell(path, experiment)
            if cell is None and fnmatchcase(name, bounds.pattern) and time.monotonic() < bounds.until:
                _refuse_to_lose(path, experiment)
                begin = time.monotonic()
                cell = _run(experiment, progress, name)
                harness.write_json(path, cell)
                progress.console.print(f"{name}: {time.monotonic() - begin:.0f} s", highlight=False)
            if cell is not None:
                found[name] = cell
            progress.advance(bar)
    return found


def read_cell(path: Path, experiment: Experiment) -> Cell | None:
    """Return a finished cell, None if it is not there, does not read, or has other options."""
    cell, options = _read(path)
    return cell if options == experiment else None


def _read(path: Path) -> tuple[Cell, Experiment | None]:
    """Return a cell and its options, None for options if it is not there or does not read."""
    try:
        cell = json.loads(path.read_text())
        return cell, experiment_from(cell["config"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}, None


def _refuse_to_lose(path: Path, experiment: Experiment) -> None:
    """Leave a finished cell of other options where it is: it may have taken hours."""
    _, theirs = _read(path)
    if theirs is not None:
        ours, others = dataclasses.asdict(experiment), dataclasses.asdict(theirs)
        name = next(name for name in ours if ours[name] != others[name])
        raise SystemExit(
            f"{path}: expected a cell of {name} {ours[name]}, got one of {others[name]}; probably another run put "
            "results there: choose another --out, or remove the cell"
        )


def _run(experiment: Experiment, progress: Progress, name: str) -> Cell:
    """Run a cell; where a run diverges, go on with those after it."""
    runs = len(experiment.rank_policies) * len(experiment.aggregators) * experiment.seeds
    bar = progress.add_task(name, total=runs * experiment.rounds)

    def show(event: Any) -> None:
        if isinstance(event, RoundDone):
            accuracy = event.row.accuracy
            text = name if accuracy is None else f"{name}  {event.row.policy} {100 * accuracy:.1f} %"
            progress.update(bar, advance=1, description=text)

    cell: Cell = {}
    diverged: dict[str, str] = {}
    left = [experiment]
    while left:
        part = left.pop()
        try:
            results = run_experiment(part, on_event=show)
        except DivergedError as error:
            results = error.results
            diverged.setdefault(error.record.policy, str(error))
            left += _after(part, error.record.policy, error.record.seed)
        _merge(cell, _contents(results))
    progress.remove_task(bar)
    return cell | {
        "config": json.loads(json.dumps(dataclasses.asdict(experiment))),
        "diverged": diverged,
        "versions": harness.versions(),
        "device": harness.device(),
    }


def _after(experiment: Experiment, policy: str, seed: int) -> list[Experiment]:
    """Return what is left of an experiment after one of its runs diverged."""
    seeds, policies = experiment.all_seeds, experiment.rank_policies
    later = policies[policies.index(policy) + 1 :]
    same = dataclasses.replace(experiment, first_seed=seed + 1, seeds=seeds.stop - seed - 1)
    return [
        dataclasses.replace(one, rank_policies=some, ratios=one.ratios if "manual" in some else ())
        for one, some in ((experiment, later), (same, (policy,)))
        if some and one.seeds
    ]


def _contents(results: Results) -> Cell:
    """Return what a cell keeps of some results."""
    table: Cell = {"summary": summarize(results)["policies"], "accuracy": {}, "flops": {}, "bytes": {}, "clients": {}}
    for run in results.runs:
        seed = str(run.seed)
        table["accuracy"].setdefault(run.policy, {})[seed] = [row.accuracy for row in run.rows]
        table["flops"].setdefault(run.policy, {})[seed] = [_tidy(row.train_flops) for row in run.rows]
        table["bytes"].setdefault(run.policy, {})[seed] = [_tidy(row.bytes) for row in run.rows]
        if run.clients:
            table["clients"].setdefault(run.policy, {})[seed] = dict(run.clients)
    table["scores"] = {str(scores.seed): _scores(scores) for scores in results.scores}
    return table


def _scores(scores: Scores) -> Cell:
    """Return the criteria of every client, their weights, and the first ratios under every policy."""
    known = scores.closeness is not None
    return {
        "criteria": list(scores.criteria),
        "size": scores.size.tolist(),
        "matrix": [[_tidy(value) for value in row] for row in scores.matrix.tolist()],
        "weights": [_tidy(value) for value in scores.weights.tolist()] if known else None,
        "closeness": [_tidy(value) for value in scores.closeness.tolist()] if known else None,
        "ratios": {policy: [_tidy(value) for value in ratios.tolist()] for policy, ratios in scores.ratios.items()},
    }


def _merge(cell: Cell, more: Cell) -> None:
    """Add the contents of one dictionary to another, deep down."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(cell.get(key), dict):
            _merge(cell[key], value)
        else:
            cell[key] = value


def _tidy(value: float) -> float:
    """Round to six digits."""
    return float(f"{value:.6g}")
