"""Learning rates chosen on a tenth of the training examples, with seeds used nowhere else, and runs at these rates.

Every policy and rule tries the same three rates. One whose best is at an end of what it tried goes on along `LADDER`
until a rate beyond is worse. Where a grid has more seeds, the best rate and those close to it have to hold on these,
too: a rate that is best for one seed may end in guessing for another.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from autorank_jax.experiment import Experiment
from autorank_jax.experiment.names import PERSONAL_RULES
from benchmarks.study.cell_file import Cell, CellFile
from benchmarks.study.cells import Bounds, run_cells
from benchmarks.study.runs import GUESSING, Reached, runs_of

FIRST_SEED = 1000
VALIDATION = 0.1
LADDER = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Rates that may be tried."""
TIE = 1.02
"""Times the best rate's share of mistakes, up to which a smaller rate is as good, and farther from falling apart."""
CLOSE = 1.15
"""Times the best rate's share of mistakes, up to which a rate still competes with it."""


class Grid(NamedTuple):
    """What is tried for every policy and rule."""

    rates: tuple[float, ...] = (0.01, 0.03, 0.1)  # by everybody; neighbours on `LADDER`
    more_seeds: int = 0  # beyond the first, for the best rate and those close to it


Scores = dict[float, list[float]]
"""Accuracies on the tuning seeds that were run, by rate."""


class Choice(NamedTuple):
    """The learning rate of one policy under one rule."""

    rate: float
    accuracy: dict[str, float]  # mean over tuning seeds on validation examples, by rate
    edge: bool  # whether a better one may lie beyond the ladder


def choose_rates(experiment: Experiment, grid: Grid, file: CellFile, name: str, bounds: Bounds) -> Mapping[str, Choice]:
    """Choose a learning rate for every policy of an experiment of one rule: the best after as many rounds as are run.

    Fewer rounds would not do: a rate that is best early may end in guessing later.

    Args:
        experiment: what will be run; one aggregator.
        grid: rates to try. Nothing is run where there is one.
        file: of the cells.
        name: begins the names of the cells.
        bounds: of the cells to run.

    Returns:
        Choices by policy, without those whose cells are missing.
    """
    if len(grid.rates) == 1:
        return {policy: Choice(grid.rates[0], {}, False) for policy in experiment.rank_policies}
    trial = dataclasses.replace(
        experiment,
        validation=VALIDATION,
        first_seed=FIRST_SEED,
        seeds=1,
        eval_every=experiment.rounds,
        personal=experiment.aggregators[0] in PERSONAL_RULES,
    )
    tried: dict[str, Scores] = {policy: {} for policy in trial.rank_policies}
    cells = {f"{name}-tune-lr{rate:g}": dataclasses.replace(trial, learning_rate=rate) for rate in grid.rates}
    while cells:
        ran = run_cells(cells, file, bounds)
        for n, one in cells.items():
            for policy in one.rank_policies:
                if n not in ran:
                    tried.pop(policy, None)
                elif policy in tried:
                    tried[policy].setdefault(one.learning_rate, []).extend(_reached(ran[n], policy))
        cells = {
            f"{name}-{policy}-tune-{n}": one
            for policy, scores in tried.items()
            for n, one in _next(_policies(trial, (policy,)), scores, grid.more_seeds).items()
        }
    return {policy: _choice(scores) for policy, scores in tried.items()}


def _next(trial: Experiment, scores: Scores, more_seeds: int) -> dict[str, Experiment]:
    """Return what to try for a policy, by name: a rate beyond its best, else its best rates with more seeds."""
    best = _best(scores)
    place = LADDER.index(best) + {min(scores): -1, max(scores): 1}.get(best, 0)
    beyond = LADDER[place] if 0 <= place < len(LADDER) else best
    if beyond not in scores:
        return {f"lr{beyond:g}": dataclasses.replace(trial, learning_rate=beyond)}
    worst = CLOSE * (1 - _mean(scores[best]))
    close = [rate for rate, one in scores.items() if more_seeds and len(one) == 1 and 1 - one[0] <= worst]
    how = {"first_seed": FIRST_SEED + 1, "seeds": more_seeds}
    return {f"lr{rate:g}-more": dataclasses.replace(trial, learning_rate=rate, **how) for rate in close}


def _policies(experiment: Experiment, policies: tuple[str, ...], **options: Any) -> Experiment:
    """Return an experiment of some of its policies, with the options on top."""
    ratios = experiment.ratios if "manual" in policies else ()
    return dataclasses.replace(experiment, rank_policies=policies, ratios=ratios, **options)


def _reached(cell: Cell, policy: str) -> list[float]:
    """Return a policy's accuracies at the end: the server's, or where there is none the clients' own.

    Clients of a run that diverged have none: they guess.
    """
    runs = runs_of(cell)[policy].values()
    own = [run.clients.get("before", {}).get("mean", GUESSING) for run in runs]
    return [float(mean if run.final is None else run.final) for run, mean in zip(runs, own, strict=True)]


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _best(scores: Scores) -> float:
    """Return the smallest of the rates that are as good as the best."""
    mistakes = {rate: 1 - _mean(accuracies) for rate, accuracies in scores.items()}
    return min(rate for rate, share in mistakes.items() if share <= TIE * min(mistakes.values()))


def _choice(scores: Scores) -> Choice:
    best = _best(scores)
    means = {f"{rate:g}": round(_mean(scores[rate]), 4) for rate in sorted(scores)}
    return Choice(best, means, best in (min(scores), max(scores)))


class Tuned(NamedTuple):
    """One policy under one rule, at its own learning rate."""

    choice: Choice | None  # None until it is known
    runs: dict[int, Reached]  # by seed; those that are there


def run_tuned(
    experiment: Experiment,
    choices: Mapping[str, Choice],
    file: CellFile,
    name: str,
    *,
    seeds: range,
    together: bool,
    bounds: Bounds,
    apart: bool = True,
) -> dict[str, Tuned]:
    """Run every policy of an experiment at its own learning rate.

    Args:
        experiment: of one rule.
        choices: by policy; what has none is not run.
        file: of the cells.
        name: begins the names of the cells.
        seeds: to run.
        together: all seeds in one cell, else a cell for each.
        bounds: of the cells to run.
        apart: a cell for each policy, else policies of one rate share cells, and with them the probe.

    Returns:
        What there is by policy.
    """
    tuned = {p: Tuned(choices.get(p), {}) for p in experiment.rank_policies}
    chosen = {policy: one.choice for policy, one in tuned.items() if one.choice}
    cells = {}
    for first in seeds[:1] if together else seeds:
        for label, policies in _parts(chosen, apart=apart).items():
            cells[f"{name}-{label}-seed{first}"] = _policies(
                experiment,
                policies,
                learning_rate=chosen[policies[0]].rate,
                first_seed=first,
                seeds=len(seeds) if together else 1,
            )
    for cell in run_cells(cells, file, bounds).values():
        for policy, runs in runs_of(cell).items():
            tuned[policy].runs.update(runs)
    return tuned


def _parts(choices: Mapping[str, Choice], *, apart: bool) -> dict[str, tuple[str, ...]]:
    """Return the policies of every cell by its label."""
    if apart:
        return {f"{policy}-lr{choice.rate:g}": (policy,) for policy, choice in choices.items()}
    rates = sorted({choice.rate for choice in choices.values()})
    return {f"lr{rate:g}": tuple(p for p, choice in choices.items() if choice.rate == rate) for rate in rates}
