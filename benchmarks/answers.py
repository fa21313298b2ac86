"""The questions of `study.py`, answered from its cells: differences paired over seeds, with intervals."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from curves import MEASURES, Reached, measured, values
from paired import Difference, cells, corrected, difference

from benchmarks.harness import Row, markdown_table

ALL = "all criteria"
BEYOND = 0.05
"""Corrected p below which a difference is shown."""


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
        Question("AutoRank minus one rank at equal bytes", against("uniform_bytes")),
        Question("AutoRank minus one rank at equal FLOPs (the probe not counted)", against("uniform")),
        Question("AutoRank minus its own ranks shuffled", against("shuffled")),
        Question("AutoRank minus ranks by size at equal bytes", against("by_size_bytes")),
        Question("AutoRank with another setting minus AutoRank with all criteria", changed({"setting": ALL})),
        Question("AutoRank minus one rank at equal bytes, by setting", changed({"policy": "uniform_bytes"})),
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


def answer(table: Table, question: Question, splits: Sequence[str], seeds: int) -> str:
    """Return the table of one question, and what it says in a sentence; empty where nothing is there."""
    asked = list(_differences(table, question, splits))
    if not asked:
        return ""
    rows: list[Row] = []
    for (name, one, other), there, differences in asked:
        label = name if one.split != "all" else f"{name.removesuffix('all')}mean of {len(there)} splits"
        number = f"{differences['final'].seeds} of {seeds}"
        rows.append({"": label, "seeds": number, **_budgets(table, (one, other), there)})
    found = [differences for *_, differences in asked]
    rows = [{**row, **written} for row, written in zip(rows, cells(found, MEASURES), strict=True)]
    verdict = _sentence([str(row[""]) for row in rows], [row["final"] for row in found], corrected(found, "final"))
    return f"### {question.title}\n\n{verdict}\n\n{markdown_table(rows, list(rows[0]))}\n"


Asked = tuple[Contrast, list[str], dict[str, Difference | None]]
"""A row of a question, the splits on which both sides have runs, and one minus the other in each measure."""


def _differences(table: Table, question: Question, splits: Sequence[str]) -> Iterator[Asked]:
    """Yield the rows that have an answer."""
    for contrast in question.rows:
        _, one, other = contrast
        there = shared_splits(table, one, other, splits)
        if one.split not in ("all", *there) or (one.split == "all" and len(there) < 2):
            continue
        differences = {what: difference(*sides(table, one, other, what, there)) for what in MEASURES}
        if differences["final"]:
            yield contrast, there, differences


def shown(table: Table, question: Question, splits: Sequence[str]) -> set[tuple[Point, Point]]:
    """Return the rows of a question, as one and other, whose final accuracies differ beyond chance after correction."""
    asked = list(_differences(table, question, splits))
    ps = corrected([differences for *_, differences in asked], "final")
    return {(one, other) for ((_, one, other), *_), p in zip(asked, ps, strict=True) if p is not None and p < BEYOND}


def _budgets(table: Table, points: Sequence[Point], splits: Sequence[str]) -> Row:
    """Return what both sides of a comparison may spend and spend, and how many of their runs diverged."""
    runs = [_runs_at(table, point, splits) for point in points]
    diverged = [sum(run.diverged for run in side) for side in runs]
    return {
        "ratios over clients": _beside(runs, lambda run: run.ratio_by_clients),
        "over examples": _beside(runs, lambda run: run.ratio_by_examples),
        "examples behind the highest rank": _beside(runs, lambda run: run.behind),
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


def _sentence(names: Sequence[str], found: Sequence[Difference | None], ps: Sequence[float | None]) -> str:
    """Say where final accuracy differs beyond chance, after correction."""
    higher: list[str] = []
    lower: list[str] = []
    for name, one, p in zip(names, found, ps, strict=True):
        if one is not None and p is not None and p < BEYOND:
            (higher if one.mean > 0 else lower).append(name)
    parts = [f"{what} {'; '.join(rows)}" for what, rows in (("Higher on", higher), ("lower on", lower)) if rows]
    if len(higher) + len(lower) < len(names):
        where = "the others" if parts else "any"
        parts.append(f"no difference shown (corrected p ≥ 0.05, or too few seeds) on {where}")
    text = "; ".join(parts)
    return f"Final accuracy: {text[0].lower()}{text[1:]}."


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
        "first rule. The best of many is flattered by chance: `--confirm` runs it on fresh seeds, and with it the "
        "best pair with AutoRank's ranks."
    )
    return f"### Best pair\n\n{note}\n\n{markdown_table(rows, list(rows[0]))}\n"


def grid_of(table: Table, rows: Sequence[tuple[Point, Point]], splits: Sequence[str]) -> np.ndarray:
    """Return one minus other of every row, in points of final accuracy, `(rows, splits)`; NaN where it is not there."""
    result = np.full((len(rows), len(splits)), np.nan)
    for y, row in enumerate(rows):
        for x, split in enumerate(splits):
            found = difference(*(values(table.get(point._replace(split=split), {}), "final") for point in row))
            result[y, x] = np.nan if found is None else 100 * found.mean
    return result
