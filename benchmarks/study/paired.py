"""Statistics of paired comparisons: t intervals over seeds, and Holm's correction for many of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from autorank_jax.experiment.results import si_scale


class Difference(NamedTuple):
    """One thing minus another, paired over seeds; nothing but mean and number where there are fewer than `FEWEST`."""

    mean: float
    low: float | None
    high: float | None
    p: float | None  # of no difference, two-sided paired t test
    seeds: int


LEVEL = 0.95
"""Of the intervals."""
FEWEST = 3
"""Seeds below which there is no interval and no test: two that happen to agree would look certain."""


def difference(one: Mapping[Any, float], other: Mapping[Any, float]) -> Difference | None:
    """Compare two sets of values paired by key.

    `d̄ ± t_{0.975, n-1} s_d / √n` over the keys that both have.

    Args:
        one: values by key, such as final accuracies by seed.
        other: likewise.

    Returns:
        `one - other`; None where they share no key.
    """
    shared = sorted(set(one) & set(other), key=str)
    if not shared:
        return None
    d = np.array([one[key] - other[key] for key in shared])
    n, mean = len(d), float(d.mean())
    if n < FEWEST:
        return Difference(mean, None, None, None, n)
    error = float(d.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    return Difference(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Correct p values for their number (Holm 1979): the k-th smallest of m by `m - k + 1`, then made monotone.

    Args:
        ps: where None there was no test; it counts nowhere.
    """
    order = sorted((p, place) for place, p in enumerate(ps) if p is not None)
    corrected: list[float | None] = [None] * len(ps)
    most = 0.0
    for rank, (p, place) in enumerate(order):
        most = max(most, min(1.0, (len(order) - rank) * p))
        corrected[place] = most
    return corrected


def in_points(found: Difference | None, p_value: float | None = None) -> str:
    """Write a difference of accuracies in percentage points, with its 95 % interval."""
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{100 * found.mean:+.1f} (n = {found.seeds})"
    p = "" if p_value is None else f", p {p_value:.2g}"
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]{p}"


def in_units(found: Difference | None) -> str:
    """Write a difference of rounds, FLOPs or bytes with its 95 % interval, all in the unit of the largest."""
    if found is None:
        return "–"
    known = [x for x in found[:3] if x is not None]
    scale, prefix = si_scale(max(map(abs, known)))
    mean, *interval = [f"{x / scale:+.1f}" for x in known]
    spread = f"[{', '.join(interval)}]" if interval else f"(n = {found.seeds})"
    return f"{mean} {spread}{prefix}"


def corrected(found: Sequence[Mapping[str, Difference | None]], what: str) -> list[float | None]:
    """Return Holm's p values of one measure over the rows of a table."""
    ps = [row[what] for row in found]
    return holm([None if one is None else one.p for one in ps])


def cells(found: Sequence[Mapping[str, Difference | None]], titles: Mapping[str, str]) -> list[dict[str, str]]:
    """Write the differences of a table: a dictionary by title for every row.

    Args:
        found: by measure, of every row; Holm's correction is over the rows of the first measure, the one that counts.
        titles: of the measures.
    """
    first = next(iter(titles))
    return [
        {title: in_points(row[what], p if what == first else None) for what, title in titles.items()}
        for row, p in zip(found, corrected(found, first), strict=True)
    ]
