"""What mixed ranks under RBLA lose where few examples stand behind the highest rank: the runs, and their tables."""

import bisect
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from curves import values
from paper_tables import Column
from plan import AUTHOR, GROUPS

from benchmarks.harness import Row, markdown_table

TITLE = "Mixed ranks under RBLA, by the examples behind the highest rank"
RUNS = "Run by run, with the share of the examples"
"""Title of the widest table."""
BANDS = (0.05, 0.2, 0.4)
"""Where the share of all examples behind the highest rank is cut into bands."""


class MixedRun(NamedTuple):
    """A run of mixed ranks: how many examples stand behind its highest rank, and what became of it."""

    dataset: str
    split: str
    column: str
    seed: int
    share: float  # of all examples, held by the clients of the highest rank
    difference: float  # its final accuracy minus that of one rank of AutoRank's bytes


def mixed_runs(found: Mapping[tuple[str, str], Sequence[Column]]) -> list[MixedRun]:
    """Return every run of mixed ranks under RBLA, beside the run of one rank at AutoRank's bytes of the same seed.

    Args:
        found: columns by dataset and split.
    """
    mixed = {title for group in GROUPS.values() if group.rule == "rbla" for title in group.titles.values()}
    runs = []
    for (dataset, split), columns in found.items():
        one_rank = next((values(column.runs, "final") for column in columns if column.title == AUTHOR[2]), {})
        for column in columns:
            for seed, run in column.runs.items():
                if column.title in mixed and run.behind < 1 and run.final is not None and seed in one_rank:
                    difference = run.final - one_rank[seed]
                    runs.append(MixedRun(dataset, split, column.title, seed, run.behind, difference))
    return runs


def write(runs: Sequence[MixedRun]) -> list[str]:
    """Return what mixed ranks under RBLA lose against one rank of AutoRank's bytes: in bands, then run by run.

    Args:
        runs: of all splits; no table where there is none.
    """
    if not runs:
        return []
    bands = [[r for r in runs if bisect.bisect(BANDS, r.share) == number] for number in range(len(BANDS) + 1)]
    names = [f"under {100 * BANDS[0]:g} %", *(f"{100 * a:g} to {100 * b:g} %" for a, b in itertools.pairwise(BANDS))]
    rows: list[Row] = []
    for name, band in zip([*names, f"{100 * BANDS[-1]:g} % and more"], bands, strict=True):
        if not band:
            continue
        differences = [100 * run.difference for run in band]
        rows.append(
            {
                "examples behind the highest rank": name,
                "runs": len(band),
                "worst": f"{min(differences):+.1f}",
                "median": f"{statistics.median(differences):+.1f}",
                "best": f"{max(differences):+.1f}",
                "more than 5 points behind": sum(difference < -5 for difference in differences),
            }
        )
    text = (
        "A run is a column of mixed ranks and a seed: its final accuracy minus that of one rank of AutoRank's bytes of "
        "the same seed, in points."
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
