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


class Band(NamedTuple):
    """Runs whose share lies in an interval."""

    low: float
    high: float
    runs: Sequence[MixedRun]

    @property
    def name(self) -> str:
        """In words."""
        low, high = (f"{100 * end:g}" for end in self[:2])
        return f"under {high} %" if self.low == 0 else f"{low} % and more" if self.high == 1 else f"{low} to {high} %"

    @property
    def fallen(self) -> int:
        """Runs that end more than `BEHIND` behind."""
        return sum(run.difference < -BEHIND for run in self.runs)


def bands(runs: Sequence[MixedRun]) -> list[Band]:
    """Sort runs into bands of the share."""
    edges = [0.0, *BANDS, 1.0]
    return [
        Band(low, high, [run for run in runs if bisect.bisect(BANDS, run.share) == number])
        for number, (low, high) in enumerate(itertools.pairwise(edges))
    ]


def write(runs: Sequence[MixedRun]) -> list[str]:
    """Return what mixed ranks under RBLA lose against a uniform rank of AutoRank's bytes: in bands, then run by run.

    Args:
        runs: of all splits; no table where there is none.
    """
    if not runs:
        return []
    rows: list[Row] = []
    for band in (band for band in bands(runs) if band.runs):
        differences = [100 * run.difference for run in band.runs]
        row: Row = {"share of all examples": band.name, "runs": len(band.runs)}
        for title, of in (("worst", min), ("median", statistics.median), ("best", max)):
            row[title] = f"{of(differences):+.1f}"
        rows.append(row | {f"more than {100 * BEHIND:g} points behind": band.fallen})
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
