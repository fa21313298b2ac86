"""The questions of `policies_by_rules.py`, answered from its cells: differences paired over seeds, with intervals."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.harness import Row, markdown_table
from benchmarks.study.paired import Difference, cells, corrected, difference
from benchmarks.study.runs import MEASURES, Reached, measured

ALL = "all criteria"
BEYOND = 0.05
"""Corrected p below which a difference is shown."""


GAIN = "AutoRank minus a uniform rank at equal bytes"
CHANGED = "AutoRank with another setting minus AutoRank with all criteria"


class Point(NamedTuple):
    """One place in the grid."""

    policy: str
    rule: str
    setting: str
    split: str


Table = dict[Point, dict[int, Reached]]
"""Runs by seed."""


Contrast = tuple[str, Point, Point]
"""A name, and one point minus another; the split "all" pools those that are there."""


class Question(NamedTuple):
    """What is asked, and one minus another for every row."""

    title: str
    rows: tuple[Contrast, ...]


def questions(rules: Sequence[str], settings: Sequence[str], splits: Sequence[str]) -> list[Question]:
    """Return what is asked of the grid."""
    places = (*splits, "all")

    def against(other: str) -> tuple[Contrast, ...]:
        return tuple(
            (f"{rule}, {s}", Point("autorank", rule, ALL, s), Point(other, rule, ALL, s))
            for rule in rules
            for s in places
        )

    def changed(other: Mapping[str, str]) -> tuple[Contrast, ...]:
        rows = []
        for rule, setting, s in itertools.product(rules, (name for name in settings if name != ALL), places):
            one = Point("autorank", rule, setting, s)
            rows.append((f"{setting}, {rule}, {s}", one, one._replace(**other)))
        return tuple(rows)

    return [
        Question(GAIN, against("uniform_bytes")),
        Question("AutoRank minus a uniform rank at equal FLOPs (the probe not counted)", against("uniform")),
        Question("AutoRank minus its own ranks shuffled", against("shuffled")),
        Question("AutoRank minus ranks by size at equal bytes", against("by_size_bytes")),
        Question(CHANGED, changed({"setting": ALL})),
        Question("AutoRank minus a uniform rank at equal bytes, by setting", changed({"policy": "uniform_bytes"})),
    ]


def sides(
    table: Table, one: Point, other: Point, what: str, splits: Sequence[str]
) -> tuple[dict[int, float], dict[int, float]]:
    """Return a measure by seed at two points; the split "all" is the mean over splits, of seeds that have them all."""
    if one.split != "all":
        return measured(table.get(one, {}), table.get(other, {}), what)
    each = [sides(table, one._replace(split=s), other._replace(split=s), what, splits) for s in splits]
    first, second = (_mean_over([pair[side] for pair in each]) for side in (0, 1))
    return first, second


def _mean_over(each: Sequence[Mapping[int, float]]) -> dict[int, float]:
    seeds = set.intersection(*(set(one) for one in each)) if each else set()
    return {seed: float(np.mean([one[seed] for one in each])) for seed in sorted(seeds)}


def shared_splits(table: Table, one: Point, other: Point, splits: Sequence[str]) -> list[str]:
    """Return the splits on which both sides have runs."""
    return [s for s in splits if table.get(one._replace(split=s)) and table.get(other._replace(split=s))]


class Answer(NamedTuple):
    """A row of a question."""

    name: str
    one: Point
    other: Point
    splits: Sequence[str]  # on which both sides have runs
    differences: Mapping[str, Difference | None]  # one minus other, by measure
    p: float | None  # of final accuracy, Holm-corrected over the rows

    @property
    def shown(self) -> bool:
        """Whether final accuracies differ beyond chance."""
        return self.p is not None and self.p < BEYOND


def answers(table: Table, question: Question, splits: Sequence[str]) -> list[Answer]:
    """Return the rows of a question that have an answer."""
    found = []
    for name, one, other in question.rows:
        there = shared_splits(table, one, other, splits)
        if one.split in there or (one.split == "all" and len(there) > 1):
            differences = {what: difference(*sides(table, one, other, what, there)) for what in MEASURES}
            if differences["final"]:
                label = f"{name.removesuffix('all')}mean of {len(there)} splits" if one.split == "all" else name
                found.append(Answer(label, one, other, there, differences, None))
    ps = corrected([row.differences for row in found], "final")
    return [row._replace(p=p) for row, p in zip(found, ps, strict=True)]


def answer(table: Table, question: Question, splits: Sequence[str], seeds: int) -> str:
    """Return the table of one question, and what it says in a sentence; empty where nothing is there."""
    found = answers(table, question, splits)
    if not found:
        return ""
    written = cells([row.differences for row in found], MEASURES)
    rows: list[Row] = [
        {"": row.name, "seeds": f"{row.differences['final'].seeds} of {seeds}"}
        | _budgets(table, (row.one, row.other), row.splits)
        | differences
        for row, differences in zip(found, written, strict=True)
    ]
    return f"### {question.title}\n\n{_sentence(found)}\n\n{markdown_table(rows, list(rows[0]))}\n"


def _budgets(table: Table, points: Sequence[Point], splits: Sequence[str]) -> Row:
    """Return what both sides of a comparison may spend and spend, and how many of their runs diverged."""
    runs = [_runs_at(table, point, splits) for point in points]
    diverged = [sum(run.diverged for run in side) for side in runs]
    return {
        "ratios over clients": _beside(runs, lambda run: run.ratio_by_clients),
        "over examples": _beside(runs, lambda run: run.ratio_by_examples),
        "examples of the highest rank's clients": _beside(runs, lambda run: run.behind),
        "training, TFLOP": _beside(runs, lambda run: run.spent / 1e12),
        "slowest client, GFLOP a round": _beside(runs, lambda run: run.slowest / 1e9),
        "diverged": " / ".join(map(str, diverged)) if any(diverged) else "–",
    }


def _beside(runs: Sequence[Sequence[Reached]], what: Callable[[Reached], float]) -> str:
    """Write the mean of a property over the runs of either side, a dash where none has it."""
    known = [[value for run in side if np.isfinite(value := what(run))] for side in runs]
    return " / ".join(f"{np.mean(side):.2f}" if side else "–" for side in known)


def _runs_at(table: Table, point: Point, splits: Sequence[str]) -> list[Reached]:
    """Return all runs at a point; the split "all" is all splits."""
    places = splits if point.split == "all" else [point.split]
    return [run for s in places for run in table.get(point._replace(split=s), {}).values()]


def _sentence(found: Sequence[Answer]) -> str:
    """Say where final accuracy differs beyond chance, after correction."""
    shown = [row for row in found if row.shown]
    sides = {"higher on": [], "lower on": []}
    for row in shown:
        sides["higher on" if row.differences["final"].mean > 0 else "lower on"].append(row.name)
    parts = [f"{what} {'; '.join(names)}" for what, names in sides.items() if names]
    if len(shown) < len(found):
        where = "the others" if parts else "any"
        parts.append(f"no difference shown (corrected p ≥ {BEYOND:g}, or too few seeds) on {where}")
    return f"Final accuracy: {'; '.join(parts)}."


def best_pairs(table: Table, rules: Sequence[str], splits: Sequence[str], seeds: int) -> list[tuple[Point, float]]:
    """Return pairs of policy and rule that send no more than AutoRank under the first rule, best final accuracy first.

    Only those count that are complete: every seed on every split.
    """
    found = []
    policies = dict.fromkeys(point.policy for point in table)
    budget = _sent(table, Point("autorank", rules[0], ALL, "all"), splits, seeds)
    for policy, rule in itertools.product(policies, rules):
        point = Point(policy, rule, ALL, "all")
        sent = _sent(table, point, splits, seeds)
        if budget is not None and sent is not None and sent <= budget * 1.05:  # ranks are whole numbers
            found.append((point, float(np.mean([run.final for run in _runs_at(table, point, splits)]))))
    return sorted(found, key=lambda pair: -pair[1])


def _sent(table: Table, point: Point, splits: Sequence[str], seeds: int) -> float | None:
    """Return the bytes that a point sent, mean over splits and seeds; None where it is not complete."""
    there = [table.get(point._replace(split=s), {}) for s in splits]
    if any(len(runs) < seeds for runs in there):
        return None
    return float(np.nanmean([run.bytes[-1] for runs in there for run in runs.values()]))


def best_text(table: Table, pairs: Sequence[tuple[Point, float]], splits: Sequence[str]) -> str:
    """Return the ten best pairs as a table."""
    if not pairs:
        return "### Best pair\n\nNo pair is complete yet.\n"
    rows: list[Row] = [
        {
            "policy": point.policy,
            "rule": point.rule,
            "final accuracy, %": f"{100 * value:.2f}",
            "training, TFLOP": _beside([_runs_at(table, point, splits)], lambda run: run.spent / 1e12),
        }
        for point, value in pairs[:10]
    ]
    note = (
        f"Mean over {', '.join(splits)}; all criteria; at most 1.05 times the bytes that AutoRank sends under the "
        "first rule. The best of many is flattered by chance: `--confirm` runs it on fresh seeds, see below, and "
        "with it the best pair with AutoRank's ranks."
    )
    return f"### Best pair\n\n{note}\n\n{markdown_table(rows, list(rows[0]))}\n"
