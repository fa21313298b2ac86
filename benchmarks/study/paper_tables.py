"""The tables of `paper.py`, in Markdown: a section for every split of every dataset."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.harness import Row, markdown_table
from benchmarks.study.columns import AUTHOR, CONTRASTS, DATASETS
from benchmarks.study.paired import cells, difference, in_points, in_units
from benchmarks.study.runs import MEASURES, Reached, client_values, costs, measured, percent, until, values
from benchmarks.study.tuning import Choice

FIRST = AUTHOR[0]
COSTS = {"rounds": "rounds", "flops": "FLOPs", "bytes": "bytes"}
OWN = {"before": "clients' own", "after": "trained once more"}
"""Clients' own accuracy under the server's model cut to their ranks, and after one more local training."""
NOTES = """# The paper's columns, and controls

- **Uniform rank:** one rank for all clients, at AutoRank's mean ratio over clients (equal bytes) or over examples
  (equal training FLOPs; AutoRank's probe is not counted there).
- **Top ranks capped** (policy `covered`): AutoRank's highest ratios cut to the largest one that clients with half of
  all examples reach. **Shuffled, reversed:** AutoRank's ranks, given to other clients. **By hand:** client i of 10
  has i/10.
- **Clients alone** share nothing; **one client with all data** is training without federation.
- **Learning rate:** the best on validation examples; "edge": a better one may lie beyond those that were tried.
- **Mean ratio:** a client's rank over the maximum rank, mean over clients / over examples. **Label-weighted:**
  accuracy by class of the server's model cut to a client's rank, mixed with the client's label shares. **Clients'
  own:** accuracy of that model on the client's share of the test set, before and after one more local training.
- **At equal FLOPs:** what either had reached when it had spent as much on training, the probe counted: as much as the
  dearer of the two spends in the first fifth of its rounds, or the cheaper one in all.
"""
Pair = tuple[str, "Column", "Column"]
"""A title, and one column minus another."""


class Column(NamedTuple):
    """One policy under one rule, on one split of one dataset."""

    title: str
    choice: Choice | None  # None until it is tuned
    runs: dict[int, Reached]  # by seed; those that are there


def write(dataset: str, split: str, columns: Sequence[Column], *, seeds: int) -> str:
    """Return all tables of one split of one dataset; columns that no seed has reached yet are named.

    Args:
        dataset: its name.
        split: its name.
        columns: in this order.
        seeds: how many there are to be.
    """
    parts = [
        f"## {dataset}, {split}",
        _accuracies(columns, seeds),
        "### To reach an accuracy",
        _targets(dataset, columns),
    ]
    shared = [column for column in columns if values(column.runs, "final")]
    against, further = _against_first(shared), _further(shared)
    if against:
        parts += [
            f"### {FIRST} minus each",
            "In points: mean [95 % t interval over seeds]; for final accuracy, the outcome that counts, p of a paired "
            "t test, Holm-corrected over the rows.",
            _differences(against),
        ]
    if further:
        note = "Corrected among themselves; some were added after other columns had been seen."
        parts += ["### Further differences", note, _differences(further)]
    everything = _against_first([column for column in columns if column.runs])
    if everything or further:
        title = f"{100 * DATASETS[dataset].targets[-1]:g} %"
        parts += [
            "### The same differences in clients' own accuracy, and in what they take",
            f"Own accuracy in points; rounds, training FLOPs and bytes to {title} where all seeds reach it. Not "
            "corrected.",
            _other_differences([(f"{FIRST} minus {name}", *pair) for name, *pair in everything] + further, dataset),
        ]
    author = DATASETS[dataset].author
    if author and split == "staircase":
        parts += [
            "### Beside the author's result files",
            "*Best* accuracy is selected on test data, and is shown for this reason only; theirs are single runs of "
            "other code, data order, local epochs and budgets.",
            _beside_author(columns, author),
        ]
    return "\n\n".join(parts) + "\n"


def _accuracies(columns: Sequence[Column], seeds: int) -> str:
    rows: list[Row] = []
    for column in columns:
        runs = column.runs
        if not runs:
            continue
        ratios = [f"{_mean(r):.2f}" for r in zip(*((x.ratio_by_clients, x.ratio_by_examples) for x in runs.values()),
                                                 strict=True)]  # fmt: skip
        rate = "–" if column.choice is None else f"{column.choice.rate:g}" + (" (edge)" if column.choice.edge else "")
        diverged = sum(run.diverged for run in runs.values())
        row: Row = {
            "": column.title,
            "seeds": f"{len(runs)} of {seeds}" + (f", {diverged} diverged" if diverged else ""),
            "learning rate": rate,
            "mean ratio over clients / examples": " / ".join(ratios) or "–",
            "final accuracy, %": percent(list(values(runs, "final").values())),
            "mean over rounds": percent(list(values(runs, "area").values())),
            "slowest client, GFLOP a round": _slowest(list(runs.values())),
            "label-weighted, worst client": _own(runs, "label_weighted", "worst"),
        }
        for what, title in OWN.items():
            row[f"{title}: mean"] = _own(runs, what, "mean")
            row[f"{title}: worst"] = _own(runs, what, "worst")
        rows.append(row)
    missing = [column.title for column in columns if not column.runs]
    note = f"\n\nNot run yet: {'; '.join(missing)}." if missing else ""
    return markdown_table(rows, list(rows[0])) + note


def _own(runs: Mapping[int, Reached], what: str, kind: str) -> str:
    """Write a measure of the clients' own accuracy; runs that diverged have none, and are counted."""
    found = list(client_values(runs, what, kind).values())
    return percent(found) + (f" ({len(found)} of {len(runs)} seeds)" if 0 < len(found) < len(runs) else "")


def _slowest(runs: Sequence[Reached]) -> str:
    known = [run.slowest for run in runs if not math.isnan(run.slowest)]
    return f"{_mean(known) / 1e9:.1f}" if known else "–"


def _targets(dataset: str, columns: Sequence[Column]) -> str:
    rows: list[Row] = []
    for column in columns:
        runs = {seed: run for seed, run in column.runs.items() if len(run.accuracy)}
        if runs:
            row: Row = {"": column.title}
            for target in DATASETS[dataset].targets:
                for what, title in COSTS.items():
                    row[f"{100 * target:g} %: {title}"] = until(runs, target, what)
            rows.append(row)
    return markdown_table(rows, list(rows[0])) if rows else "–"


def _differences(pairs: Sequence[Pair]) -> str:
    """Return one column minus another in accuracy, a row for each pair."""
    found = [{what: difference(*measured(one.runs, other.runs, what)) for what in MEASURES} for _, one, other in pairs]
    rows = [{**_named(pair), **written} for pair, written in zip(pairs, cells(found, MEASURES), strict=True)]
    return markdown_table(rows, list(rows[0]))


def _other_differences(pairs: Sequence[Pair], dataset: str) -> str:
    """Return one column minus another in clients' own accuracy, and in what it took to reach the highest target."""
    target = DATASETS[dataset].targets[-1]
    rows: list[Row] = []
    for pair in pairs:
        sides = [column.runs for column in pair[1:]]
        row = _named(pair)
        for what, title in OWN.items():
            for kind in ("mean", "worst"):
                found = difference(*(client_values(side, what, kind) for side in sides))
                fewer = found is not None and found.seeds < row["seeds"]
                row[f"{title}: {kind}"] = in_points(found) + (
                    f" ({found.seeds} of {row['seeds']} seeds)" if fewer else ""
                )
        for what, title in COSTS.items():
            row[title] = in_units(difference(*(costs(side, target, what) for side in sides)))
        rows.append(row)
    return markdown_table(rows, list(rows[0]))


def _named(pair: Pair) -> Row:
    title, one, other = pair
    return {"": title, "seeds": len(set(one.runs) & set(other.runs))}


def _against_first(columns: Sequence[Column]) -> list[Pair]:
    """Return the first column beside every other."""
    first = next((column for column in columns if column.title == FIRST), None)
    return [(other.title, first, other) for other in columns if other is not first] if first else []


def _further(columns: Sequence[Column]) -> list[Pair]:
    """Return the pairs of `CONTRASTS` that are there."""
    there = {column.title: column for column in columns}
    return [(f"{a} minus {b}", there[a], there[b]) for a, b in CONTRASTS if a in there and b in there]


def _beside_author(columns: Sequence[Column], author: Sequence[float]) -> str:
    by_title = {column.title: column.runs for column in columns}
    rows: list[Row] = []
    for title, theirs in zip(AUTHOR, author, strict=True):
        runs = by_title.get(title, {})
        best, final = (percent(list(values(runs, what).values())) for what in ("best", "final"))
        rows.append({"": title, "best, %": best, "final, %": final, "author's best, %": f"{theirs:.2f}"})
    return markdown_table(rows, list(rows[0]))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
