"""What mixed ranks lose under RBLA where the clients of the highest rank hold few examples: runs and tables."""

import bisect
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.harness import Row, markdown_table
from benchmarks.study.columns import AUTHOR, GROUPS
from benchmarks.study.paper_tables import Column
from benchmarks.study.runs import values

TITLE = "Mixed ranks under RBLA, by the share of examples that the clients of the highest rank hold"
RUNS = "Run by run, with this share"
BEHIND = 0.05
"""Accuracy lost from which a run counts as fallen behind."""
BANDS = (0.05, 0.2, 0.4)
"""Where this share is cut into bands."""


class MixedRun(NamedTuple):
    """A run of mixed ranks: how many examples the clients of its highest rank hold, and what became of it."""

    dataset: str
    split: str
    column: str
    seed: int
    share: float  # of all examples, held by the clients of the highest rank
    difference: float  # its final accuracy minus that of a uniform rank of AutoRank's bytes


def mixed_runs(found: Mapping[tuple[str, str], Sequence[Column]]) -> list[MixedRun]:
    """Return every run of mixed ranks under RBLA, beside the run of a uniform rank of the same bytes and seed.

    Args:
        found: columns by dataset and split.
    """
    mixed = {title for group in GROUPS.values() if group.rule == "rbla" for title in group.titles.values()}
    runs = []
    for (dataset, split), columns in found.items():
        uniform = next((values(column.runs, "final") for column in columns if column.title == AUTHOR[2]), {})
        for column in columns:
            for seed, run in column.runs.items():
                if column.title in mixed and run.behind < 1 and run.final is not None and seed in uniform:
                    difference = run.final - uniform[seed]
                    runs.append(MixedRun(dataset, split, column.title, seed, run.behind, difference))
    return runs


def bands(runs: Sequence[MixedRun]) -> dict[str, list[MixedRun]]:
    """Sort runs into bands of the share, by their names; without empty bands."""
    names = [f"under {100 * BANDS[0]:g} %", *(f"{100 * a:g} to {100 * b:g} %" for a, b in itertools.pairwise(BANDS))]
    found: dict[str, list[MixedRun]] = {name: [] for name in (*names, f"{100 * BANDS[-1]:g} % and more")}
    for run in runs:
        list(found.values())[bisect.bisect(BANDS, run.share)].append(run)
    return {name: band for name, band in found.items() if band}


def fallen(runs: Sequence[MixedRun]) -> int:
    """Count the runs that end more than `BEHIND` behind."""
    return sum(run.difference < -BEHIND for run in runs)


def write(runs: Sequence[MixedRun]) -> list[str]:
    """Return what mixed ranks under RBLA lose against a uniform rank of AutoRank's bytes: in bands, then run by run.

    Args:
        runs: of all splits; no table where there is none.
    """
    if not runs:
        return []
    rows: list[Row] = []
    for name, band in bands(runs).items():
        differences = [100 * run.difference for run in band]
        row: Row = {"share of all examples": name, "runs": len(band)}
        for title, of in (("worst", min), ("median", statistics.median), ("best", max)):
            row[title] = f"{of(differences):+.1f}"
        rows.append(row | {f"more than {100 * BEHIND:g} points behind": fallen(band)})
    text = (
        "A run is a column of mixed ranks and a seed: its final accuracy minus that of a uniform rank of AutoRank's "
        "bytes of the same seed, in points."
    )
    return [f"## {TITLE}\n\n{text}\n\n{markdown_table(rows, list(rows[0]))}\n\n### {RUNS}\n\n{_run_by_run(runs)}\n"]


def _run_by_run(runs: Sequence[MixedRun]) -> str:
    """Return a row for every column of every split, with difference and share of each seed."""
    seeds = sorted({run.seed for run in runs})
    rows: dict[tuple[str, str], Row] = {}
    for run in runs:
        place = f"{run.dataset}, {run.split}"
        row = rows.setdefault((place, run.column), {"": run.column, "split": place, **dict.fromkeys(map(_seed, seeds))})
        row[_seed(run.seed)] = f"{100 * run.difference:+.1f} ({100 * run.share:.2g} %)"
    return markdown_table(list(rows.values()), ["", "split", *map(_seed, seeds)])


def _seed(number: int) -> str:
    return f"seed {number}"
