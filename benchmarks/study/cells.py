"""Grids of experiments: run cell by cell, resumable. A cell holds what its runs reached, and what they cost."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
from rich.progress import Progress

from autorank_jax.experiment import DivergedError, Experiment, Results, RoundDone, Run, experiment_from, run_experiment
from benchmarks import harness
from benchmarks.study.cell_file import Cell, CellFile, options_of


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


def run_cells(cells: Mapping[str, Experiment], file: CellFile, bounds: Bounds = Bounds()) -> dict[str, Cell]:  # noqa: B008
    """Run the cells that are not there yet, and return all that are there then.

    Args:
        cells: experiments by name.
        file: where each finished cell is a line (an option that a cell does not name has its default); what does not
            read is run again.
        bounds: leave out what is beyond them.

    Raises:
        SystemExit: a cell of other options has the name of one that is to be run.

    Returns:
        Cells by name.
    """
    found = {}
    with Progress(transient=True, disable=bounds == NOTHING) as progress:
        bar = progress.add_task("cells", total=len(cells))
        for name, experiment in cells.items():
            cell = read_cell(file, name, experiment)
            if cell is None and fnmatchcase(name, bounds.pattern) and time.monotonic() < bounds.until:
                _refuse_to_lose(file, name, experiment)
                begin = time.monotonic()
                file.append(name, _run(experiment, progress, name))
                progress.console.print(f"{name}: {time.monotonic() - begin:.0f} s", highlight=False)
                cell = file.cell(name)
            if cell is not None:
                found[name] = cell
            progress.advance(bar)
    return found


def read_cell(file: CellFile, name: str, experiment: Experiment) -> Cell | None:
    """Return a finished cell, None if it is not there, does not read, or has other options."""
    cell = file.cell(name)
    return cell if cell is not None and experiment_from(cell["options"]) == experiment else None


def _refuse_to_lose(file: CellFile, name: str, experiment: Experiment) -> None:
    """Leave a finished cell of other options where it is: it may have taken hours."""
    if (cell := file.cell(name)) is not None:
        ours, others = (dataclasses.asdict(one) for one in (experiment, experiment_from(cell["options"])))
        option = next(option for option in ours if ours[option] != others[option])
        raise SystemExit(
            f"{file.path}: expected {name} to be a cell of {option} {ours[option]}, got one of {others[option]}; "
            "probably another run put results there: choose another --out, or remove the cell's line"
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
    left = [experiment]
    while left:
        part = left.pop()
        try:
            _merge(cell, contents(run_experiment(part, on_event=show)))
        except DivergedError as error:
            lost = error.record
            _merge(cell, contents(error.results))
            _merge(cell, {"runs": {lost.policy: {str(lost.seed): {"diverged": str(error), "rounds": lost.round}}}})
            left += _after(part, lost.policy, lost.seed)
    progress.remove_task(bar)
    versions, device = harness.versions(), harness.device()
    with_versions = ", ".join(f"{name} {versions[name]}" for name in ("autorank-jax", "jax"))
    ran = f"{device['date']}, {device['cores']} × {device['kind']}, {with_versions}"
    return {"options": options_of(experiment), "ran": ran, **cell}


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


def contents(results: Results) -> Cell:
    """Return what a cell keeps of some results.

    Returns:
        `size[seed]`, the examples of every client, and `runs[policy][seed]`: the clients' first `ratios`; `accuracy`
        in the rounds that are `due`, nothing where there is no server model; training `flops` and `bytes` from one of
        these to the next (one number where all are equal), FLOPs of the `probe` and of the `slowest` client in a
        round; `clients`, their own accuracy. A run that diverged has `rounds`, those that it trained, and `diverged`,
        why.
    """
    sizes, runs = {str(scores.seed): scores.size.tolist() for scores in results.scores}, {}
    ratios = {scores.seed: scores.ratios for scores in results.scores}
    for run in results.runs:
        own = {"ratios": [tidy(ratio) for ratio in ratios[run.seed][run.policy].tolist()]}
        runs.setdefault(run.policy, {})[str(run.seed)] = own | _contents(run, results.config)
    return {"size": sizes, "runs": runs}


def due(config: Mapping[str, Any]) -> list[int]:
    """Return the rounds in which a server model is tested."""
    every, last = config["eval_every"], config["rounds"]
    return [number for number in range(1, last + 1) if number % every == 0 or number == last]


def _contents(run: Run, config: Mapping[str, Any]) -> Cell:
    rows = [run.rows[number - 1] for number in due(config) if number <= len(run.rows)]
    accuracy = [None if row.accuracy is None else tidy(row.accuracy) for row in rows]
    return {
        "accuracy": accuracy if any(value is not None for value in accuracy) else [],
        "flops": added([row.train_flops for row in rows], run.probe_flops),
        "bytes": added([row.bytes for row in rows]),
        "probe": tidy(run.probe_flops),
        "slowest": tidy(run.costs.slowest_client),
        "clients": {what: {kind: tidy(value) for kind, value in row.items()} for what, row in run.clients.items()},
    }


def added(sums: Sequence[float], start: float = 0.0) -> float | list[float]:
    """Return what was added to a sum from one number to the next: one value where it was always as much."""
    steps = [tidy(step) for step in np.diff(sums, prepend=start).tolist()]
    same = len(steps) > 0 and np.allclose(steps, steps[0], rtol=1e-5, atol=0)
    return tidy((sums[-1] - start) / len(sums)) if same else steps


def tidy(value: float) -> float:
    """Round to six digits."""
    return float(f"{value:.6g}")


def _merge(cell: Cell, more: Cell) -> None:
    """Add the contents of one dictionary to another, deep down."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(cell.get(key), dict):
            _merge(cell[key], value)
        else:
            cell[key] = value
