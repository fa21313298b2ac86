"""The rows of `text_finetune.py` that are published, and their tables, in Markdown."""

from collections.abc import Sequence

import numpy as np

from benchmarks import script
from benchmarks.harness import Row, markdown_table
from benchmarks.study.options import RESULTS
from benchmarks.study.paired import difference, holm, in_points

COLUMNS = (
    "rule",
    "policy",
    "rate",
    "seed",
    "accuracy",
    "loss",
    "mean ratio",
    "ratio by examples",
    "MB up",
    "TFLOP",
    "seconds",
)
MEANS = ("rule", "policy", "rate", "accuracy, %", "minus head alone", "minus uniform, equal bytes", "loss")
POLICIES = ("autorank", "uniform, equal bytes", "uniform, equal FLOPs", "by size, equal bytes")
NAME = "text_finetune"
"""Of this study in the result file."""
ALONE = "head alone"
TUNING_SEED = 1000


def published() -> list[Row]:
    """Return the rows of the published file."""
    return script.read(RESULTS / "texts.json")[NAME]["rows"]


def tables(rows: Sequence[Row]) -> str:
    """Return all rows, and their means."""
    return f"{markdown_table(rows, COLUMNS)}\n\n{markdown_table(means(rows), MEANS)}"


def by_seed(rows: Sequence[Row], rule: str, policy: str, what: str = "accuracy") -> dict[int, float]:
    """Return a number of the runs of a policy under a rule, without the one that tunes."""
    own = [row for row in rows if (row["rule"], row["policy"]) == (rule, policy) and row["seed"] != TUNING_SEED]
    return {row["seed"]: row[what] for row in own}


def means(rows: Sequence[Row]) -> list[Row]:
    """Return mean ± sample sd over seeds by rule and policy; differences are paired over seeds, with t intervals.

    p values are Holm's, for all policies minus the uniform rank of their rule.
    """

    def over_seeds(values: Sequence[float], digits: int) -> str:
        return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")

    places = list(dict.fromkeys((row["rule"], row["policy"]) for row in rows if row["seed"] != TUNING_SEED))
    against = {
        (rule, policy): difference(by_seed(rows, rule, policy), by_seed(rows, rule, POLICIES[1]))
        for rule, policy in places
        if policy not in (POLICIES[1], ALONE)
    }
    ps = dict(zip(against, holm([one and one.p for one in against.values()]), strict=True))
    found = []
    for rule, policy in places:
        own, losses = by_seed(rows, rule, policy), list(by_seed(rows, rule, policy, "loss").values())
        row = {"rule": rule, "policy": policy, "rate": next(iter(by_seed(rows, rule, policy, "rate").values()))}
        row |= {"accuracy, %": over_seeds([100 * value for value in own.values()], 1), "loss": over_seeds(losses, 3)}
        if policy != ALONE:
            row["minus head alone"] = in_points(difference(own, by_seed(rows, "–", ALONE)))
        if (rule, policy) in against:
            row["minus uniform, equal bytes"] = in_points(against[rule, policy], ps[rule, policy])
        found.append(row)
    return found
