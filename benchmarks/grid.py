"""Grids of experiments: run cell by cell, resumable, each cell a JSON of accuracies by policy, seed and round."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np
from rich.progress import Progress

from autorank_jax.configuration import Experiment, experiment_from
from autorank_jax.experiment import DivergedError, RoundDone, run_experiment
from autorank_jax.results import Results, summarize

Cell = dict[str, Any]


def run_cells(cells: Mapping[str, Experiment], folder: Path) -> dict[str, Cell]:
    """Run the cells that are not there yet, and return all of them.

    Args:
        cells: experiments by a name that is good for a file.
        folder: where each finished cell lies as `NAME.json`; a cell of other options is run again
            (an option that a cell does not name has its default).

    Returns:
        Cells by name: `config`, `summary`, and `accuracy[policy][seed]` by round.
    """
    found = {}
    with Progress() as progress:
        bar = progress.add_task("cells", total=len(cells))
        for name, experiment in cells.items():
            path = folder / f"{name}.json"
            cell = json.loads(path.read_text()) if path.exists() else None
            if cell is None or experiment_from(cell["config"]) != experiment:
                cell = _run(experiment, progress, name)
                harness.write_json(path, cell)
            found[name] = cell
            progress.advance(bar)
    return found


def _run(experiment: Experiment, progress: Progress, name: str) -> Cell:
    runs = len(experiment.rank_policies) * len(experiment.aggregators) * experiment.seeds
    bar = progress.add_task(name, total=runs * experiment.rounds)

    def show(event: Any) -> None:
        if isinstance(event, RoundDone):
            accuracy = event.row.accuracy
            text = name if accuracy is None else f"{name}  {event.row.policy} {100 * accuracy:.1f} %"
            progress.update(bar, advance=1, description=text)

    diverged = None
    try:
        results = run_experiment(experiment, on_event=show)
    except DivergedError as error:
        results, diverged = error.results, str(error)
    progress.remove_task(bar)
    return {
        "config": _plain(experiment),
        "summary": summarize(results)["policies"],
        "accuracy": _accuracies(results),
        "diverged": diverged,
        "versions": harness.versions(),
        "device": harness.device(),
    }


def _plain(experiment: Experiment) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def _accuracies(results: Results) -> dict[str, dict[str, list[float | None]]]:
    table: dict[str, dict[str, list[float | None]]] = {}
    for run in results.runs:
        table.setdefault(run.policy, {})[str(run.seed)] = [row.accuracy for row in run.rows]
    return table


def finals(cell: Cell, policy: str) -> list[float]:
    """Return the last accuracy of each seed; 0.1, that of guessing among ten classes, where a run diverged."""
    seeds = cell["accuracy"].get(policy, {})
    count = cell["config"]["seeds"]
    last = [values[-1] if values and values[-1] is not None else 0.1 for values in seeds.values()]
    return last + [0.1] * (count - len(last))


def mean_sd(values: Sequence[float]) -> str:
    """Write mean ± standard deviation in per cent."""
    sd = np.std(values, ddof=1) if len(values) > 1 else float("nan")
    return f"{100 * np.mean(values):.1f} ± {100 * sd:.1f}"
