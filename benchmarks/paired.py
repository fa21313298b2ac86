"""Statistics of paired comparisons: t intervals over seeds, and Holm's correction for many of them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Difference(NamedTuple):
    """One thing minus another, paired over seeds; nothing but mean and seeds where there is one seed."""

    mean: float
    low: float | None
    high: float | None
    p: float | None  # of no difference, two-sided paired t test
    seeds: int


def difference(one: Mapping[Any, float], other: Mapping[Any, float], level: float = 0.95) -> Difference | None:
    """Compare two sets of values paired by key.

    `d̄ ± t_{(1+level)/2, n-1} s_d / √n` over the keys that both have.

    Args:
        one: values by key, such as final accuracies by seed.
        other: likewise.
        level: of the interval.

    Returns:
        `one - other`; None where they share no key.
    """
    shared = sorted(set(one) & set(other), key=str)
    if not shared:
        return None
    d = np.array([one[key] - other[key] for key in shared])
    n, mean = len(d), float(d.mean())
    if n == 1:
        return Difference(mean, None, None, None, 1)
    error = float(d.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
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


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation, None for one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def in_points(found: Difference | None, corrected: float | None = None) -> str:
    """Write a difference of accuracies in percentage points, with its 95 % interval."""
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{100 * found.mean:+.1f} (one seed)"
    p = "" if corrected is None else f", p {corrected:.2g}"
    return f"{100 * found.mean:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]{p}"
