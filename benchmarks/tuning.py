"""Learning rates chosen without the test set: on a tenth of the training examples, with seeds used nowhere else."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from curves import Reached, runs_of
from grid import Bounds, run_cells

from autorank_jax.configuration import PERSONAL_RULES, Experiment

FIRST_SEED = 1000
VALIDATION = 0.1


class Grid(NamedTuple):
    """What is tried for every policy and rule."""

    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    rounds: int = 25
    seeds: int = 2


class Choice(NamedTuple):
    """The learning rate of one policy under one rule."""

    rate: float
    accuracy: dict[str, float]  # mean over tuning seeds on validation examples, by rate
    edge: bool  # whether a better one may lie beyond the grid


def choose_rates(
    experiment: Experiment, grid: Grid, folder: Path, name: str, bounds: Bounds
) -> Mapping[str, Choice] | None:
    """Choose a learning rate for every policy of an experiment of one rule: the best after a few rounds.

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
        rounds=grid.rounds,
        eval_every=grid.rounds,
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


def _score(runs: Sequence[Reached]) -> float:
    """Return the mean accuracy at the end: the server's, or where there is none the clients' own."""
    return float(np.mean([run.final if run.final is not None else run.clients["before"]["mean"] for run in runs]))


def _best(scores: Mapping[float, float]) -> Choice:
    """Return the best rate, the smallest of equals."""
    rates = sorted(scores)
    best = max(rates, key=lambda rate: scores[rate])
    return Choice(best, {f"{rate:g}": round(scores[rate], 4) for rate in rates}, best in (rates[0], rates[-1]))
