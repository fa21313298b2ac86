"""What the runs of a cell reached, and what it took them: the numbers behind tables and figures."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from autorank_jax.experiment.names import PERSONAL_RULES
from autorank_jax.experiment.results import behind_highest, si
from benchmarks.study.cell_file import Cell
from benchmarks.study.cells import due

GUESSING = 0.1
"""Accuracy of guessing among ten classes: what a run that diverged is given from there on."""
EARLY = 5
"""The first rounds are one in so many."""


MEASURES: Mapping[str, str] = {
    "final": "final accuracy",
    "early": "first fifth of the rounds",
    "area": "mean over rounds",
    "early_flops": "dearer one's first fifth, at equal FLOPs",
    "final_flops": "cheaper one's end, at equal FLOPs",
}
"""In what runs are compared, with titles: after as many rounds, and after as much training, probes counted."""


class Reached(NamedTuple):
    """One run: one policy and seed under one rule."""

    rounds: np.ndarray  # (evaluations,) counted from 1
    accuracy: np.ndarray  # (evaluations,) of the server on the test set; none where there is no server model
    flops: np.ndarray  # (evaluations,) of training so far, with the probe
    bytes: np.ndarray  # (evaluations,) sent so far, up and down
    clients: Mapping[str, Mapping[str, float]]  # their own accuracy after the last round, if all trained to the end
    ratio_by_clients: float
    ratio_by_examples: float
    behind: float  # share of all examples whose clients have the highest ratio
    probe: float  # training FLOPs before the first round
    slowest: float  # training FLOPs a round of the client that has most of them
    diverged: bool

    @property
    def final(self) -> float | None:
        """Accuracy after the last round."""
        return float(self.accuracy[-1]) if len(self.accuracy) else None

    @property
    def best(self) -> float | None:
        """Best accuracy of any round: chosen on the test set, so no estimate of anything."""
        return float(self.accuracy.max()) if len(self.accuracy) else None

    @property
    def area(self) -> float | None:
        """Mean accuracy over the evaluated rounds."""
        return float(self.accuracy.mean()) if len(self.accuracy) else None

    @property
    def early(self) -> float | None:
        """Mean accuracy over the first fifth of the rounds."""
        first = self.accuracy[: max(1, len(self.accuracy) // EARLY)]
        return float(first.mean()) if len(first) else None

    @property
    def spent(self) -> float:
        """Training FLOPs of all rounds, and of the probe."""
        return float(np.nanmax(self.flops, initial=0.0))

    def at_flops(self, spent: np.ndarray) -> np.ndarray:
        """Return accuracies after other sums of training FLOPs: interpolated, held after the last round.

        A run guesses until its probe is paid for, and one that diverged from there on.
        """
        known = np.isfinite(self.flops)
        steps = np.concatenate([[self.probe], self.flops[known]])
        right = GUESSING if self.diverged else None
        return np.interp(spent, steps, np.concatenate([[GUESSING], self.accuracy[known]]), right=right)

    def until(self, target: float, what: str) -> float | None:
        """Return the `rounds`, `flops` or `bytes` until an accuracy was first seen; None if never."""
        there = np.flatnonzero(self.accuracy >= target)
        return float(getattr(self, what)[there[0]]) if len(there) else None


def runs_of(cell: Cell) -> dict[str, dict[int, Reached]]:
    """Return the runs of a cell by policy and seed; a run that diverged guesses from there on."""
    options = cell["options"]
    seeds = range(options["first_seed"], options["first_seed"] + options["seeds"])
    return {policy: {seed: _run(cell, policy, str(seed)) for seed in seeds} for policy in options["rank_policies"]}


def _run(cell: Cell, policy: str, seed: str) -> Reached:
    options, run, size = cell["options"], cell["runs"][policy][seed], np.array(cell["size"][seed])
    rounds, ratios = np.array(due(options)), np.array(run["ratios"])
    trained = run.get("rounds", options["rounds"])
    done = int(np.searchsorted(rounds, trained, side="right"))
    served = options["aggregators"][0] not in PERSONAL_RULES
    accuracy = [*run["accuracy"], *[None] * (len(rounds) - len(run["accuracy"]))] if served else []
    spent = []
    for what, start in (("flops", run["probe"]), ("bytes", 0.0)):
        sums = start + np.cumsum(np.broadcast_to(run[what], done))
        spent.append(np.concatenate([sums, np.full(len(rounds) - done, np.nan)]))
    return Reached(
        rounds,
        np.array([GUESSING if value is None else value for value in accuracy]),
        *spent,
        {what: row for what, row in run.get("clients", {}).items() if not row.get("diverged")},
        float(ratios.mean()),
        float((ratios * size).sum() / size.sum()),
        behind_highest(ratios, size),
        run["probe"],
        run["slowest"],
        trained < options["rounds"],
    )


def values(runs: Mapping[int, Reached], what: str) -> dict[int, float]:
    """Return a property of the runs by seed, without seeds that have none."""
    found = {seed: getattr(run, what) for seed, run in runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def measured(
    ones: Mapping[int, Reached], others: Mapping[int, Reached], what: str
) -> tuple[dict[int, float], dict[int, float]]:
    """Return one of `MEASURES` by seed, of both sides of a comparison."""
    if not what.endswith("_flops"):
        return values(ones, what), values(others, what)
    found: tuple[dict[int, float], dict[int, float]] = {}, {}
    for seed in sorted(set(ones) & set(others)):
        pair = ones[seed], others[seed]
        if all(len(run.accuracy) for run in pair):
            spent = _same_flops(*pair, early=what == "early_flops")
            for run, side in zip(pair, found, strict=True):
                side[seed] = float(run.at_flops(spent).mean())
    return found


def _same_flops(one: Reached, other: Reached, *, early: bool) -> np.ndarray:
    """Return what the dearer of two spends in its first fifth of the rounds, else what the cheaper spends in all."""
    if not early:
        return np.array([min(one.spent, other.spent)])
    first = max(1, len(one.flops) // EARLY)
    return np.fmax(one.flops[:first], other.flops[:first])


def client_values(runs: Mapping[int, Reached], what: str, kind: str) -> dict[int, float]:
    """Return a measure of the clients' own accuracy by seed, without seeds that have none."""
    return {seed: run.clients[what][kind] for seed, run in runs.items() if what in run.clients}


def costs(runs: Mapping[int, Reached], target: float, what: str) -> dict[int, float]:
    """Return the `rounds`, `flops` or `bytes` until an accuracy was first seen, by seed; nothing unless all saw it."""
    found = {seed: run.until(target, what) for seed, run in runs.items()}
    known = {seed: value for seed, value in found.items() if value is not None and np.isfinite(value)}
    return known if len(known) == len(found) else {}


def percent(found: Sequence[float]) -> str:
    """Write mean ± sample standard deviation over seeds in per cent, a dash for none."""
    if not found:
        return "–"
    sd = f" ± {100 * np.std(found, ddof=1):.1f}" if len(found) > 1 else ""
    return f"{100 * np.mean(found):.1f}{sd}"


def until(runs: Mapping[int, Reached], target: float, what: str) -> str:
    """Write mean ± sd of what it took to reach an accuracy; how many seeds got there where not all did."""
    reached = [run.until(target, what) for run in runs.values()]
    known = np.array([value for value in reached if value is not None])
    if not len(known) or np.isnan(known).any():
        return "–"
    if len(known) < len(reached):
        return f"{len(known)} of {len(reached)} seeds"
    return si(known.mean()) + (f" ± {si(known.std(ddof=1), 2)}" if len(known) > 1 else "")
