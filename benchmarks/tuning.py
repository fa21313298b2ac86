"""Learning rates chosen on a tenth of the training examples, with seeds used nowhere else, and runs at these rates."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from curves import Reached, runs_of
from grid import Bounds, Cell, run_cells

from autorank_jax.configuration import PERSONAL_RULES, Experiment

FIRST_SEED = 1000
VALIDATION = 0.1


class Grid(NamedTuple):
    """What is tried for every policy and rule."""

    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    seeds: int = 1


class Choice(NamedTuple):
    """The learning rate of one policy under one rule."""

    rate: float
    accuracy: dict[str, float]  # mean over tuning seeds on validation examples, by rate
    edge: bool  # whether a better one may lie beyond the grid


def choose_rates(
    experiment: Experiment, grid: Grid, folder: Path, name: str, bounds: Bounds
) -> Mapping[str, Choice] | None:
    """Choose a learning rate for every policy of an experiment of one rule: the best after as many rounds as are run.

    Fewer rounds would not do: a rate that is best early may end in guessing later.

    Args:
        experiment: what will be run; one aggregator.
        grid: rates to try. Nothing is run where there is one.
        folder: of the cells.
        name: begins the names of the cells.
        bounds: of the cells to run.

    Returns:
        Choices by policy; None where cells are missing.
    """
    if len(grid.rates) == 1:
        return {policy: Choice(grid.rates[0], {}, False) for policy in experiment.rank_policies}
    trial = dataclasses.replace(
        experiment,
        validation=VALIDATION,
        first_seed=FIRST_SEED,
        seeds=grid.seeds,
        eval_every=experiment.rounds,
        personal=experiment.aggregators[0] in PERSONAL_RULES,
    )
    names = {f"{name}-tune-lr{rate:g}": rate for rate in grid.rates}
    cells = run_cells({n: dataclasses.replace(trial, learning_rate=r) for n, r in names.items()}, folder, bounds)
    if len(cells) < len(names):
        return None
    found = {rate: runs_of(cells[n]) for n, rate in names.items()}
    return {
        p: _best({rate: _score(list(runs[p].values())) for rate, runs in found.items()}) for p in trial.rank_policies
    }


class Tuned(NamedTuple):
    """One policy under one rule, at its own learning rate."""

    choice: Choice | None  # None until it is known
    runs: dict[int, Reached]  # by seed; those that are there


def run_tuned(
    experiment: Experiment,
    choices: Mapping[str, Choice] | None,
    folder: Path,
    name: str,
    *,
    seeds: range,
    together: bool,
    bounds: Bounds,
) -> tuple[dict[str, Tuned], list[Cell]]:
    """Run every policy of an experiment at its own learning rate.

    Args:
        experiment: of one rule.
        choices: by policy; where None nothing is run.
        folder: of the cells.
        name: begins the names of the cells.
        seeds: to run.
        together: all seeds of a policy in one cell, else a cell for each.
        bounds: of the cells to run.

    Returns:
        What there is by policy, and its cells.
    """
    tuned = {p: Tuned(choices[p] if choices else None, {}) for p in experiment.rank_policies}
    if choices is None:
        return tuned, []
    cells = {}
    for first in seeds[:1] if together else seeds:
        for policy in tuned:
            rate = choices[policy].rate
            cells[f"{name}-{policy}-lr{rate:g}-seed{first}"] = dataclasses.replace(
                experiment,
                rank_policies=(policy,),
                ratios=experiment.ratios if policy == "manual" else (),
                learning_rate=rate,
                first_seed=first,
                seeds=len(seeds) if together else 1,
            )
    ran = list(run_cells(cells, folder, bounds).values())
    for cell in ran:
        for policy, runs in runs_of(cell).items():
            tuned[policy].runs.update(runs)
    return tuned, ran


def _score(runs: Sequence[Reached]) -> float:
    """Return the mean accuracy at the end: the server's, or where there is none the clients' own."""
    return float(np.mean([run.final if run.final is not None else run.clients["before"]["mean"] for run in runs]))


def _best(scores: Mapping[float, float]) -> Choice:
    """Return the best rate, the smallest of equals."""
    rates = sorted(scores)
    best = max(rates, key=lambda rate: scores[rate])
    return Choice(best, {f"{rate:g}": round(scores[rate], 4) for rate in rates}, best in (rates[0], rates[-1]))
