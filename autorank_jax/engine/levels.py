"""Rank levels: the adapter widths that a round is compiled for, and how many of them pay for their compilation."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from autorank_jax.adapters.lora import level_widths
from autorank_jax.engine.flops import FLOPS_PER_SECOND, FlopModel, platform_of
from autorank_jax.interface import checked

Widths = dict[str, int]
"""Rank positions of each adapter, by path, while one rank level trains."""
RankLevels = int | Literal["auto"] | Sequence[Mapping[str, int]]

_COMPILE_SECONDS = 0.7  # of every adapter in every level, tracing included: of the order of what two CPU cores take
_MOST_LEVELS = 8
_MOST_WIDTHS = 32  # that are looked at


class Workload(NamedTuple):
    """What one run asks of its clients, over all its rounds."""

    ranks: Mapping[str, ArrayLike]  # by path, (clients,) or (clients, *layers)
    steps: ArrayLike  # (clients,) local steps


class LevelChoice(NamedTuple):
    """The rank levels that were chosen, and the estimates behind it."""

    levels: tuple[Widths, ...]  # ascending
    saved: float  # seconds of training that they save against one level; that one more would save where it is one
    paid: float  # seconds of compilation that those beyond the first cost; that one more would where it is one


def resolve_levels(widest: Mapping[str, int], rank_levels: RankLevels) -> list[Widths]:
    """Return the adapter widths of a round's rank levels, ascending.

    Args:
        widest: maximum rank of each adapter, by path.
        rank_levels: how many, `⌈R·q/levels⌉`; "auto": one, as wide as the maximum; or the widths themselves.

    Raises:
        ValueError: for widths of other adapters, out of order, or beyond the maximum.
    """
    if rank_levels == "auto":
        return [dict(widest)]
    if isinstance(rank_levels, int):
        return level_widths(widest, rank_levels)
    levels = [{path: int(widths[path]) for path in sorted(widths)} for widths in rank_levels]
    for widths, wider in zip(levels, [*levels[1:], dict(widest)], strict=True):
        if widths.keys() != widest.keys() or any(not 1 <= widths[p] <= wider[p] for p in widths):
            raise ValueError(f"expected widths of every adapter, ascending from 1 to {dict(widest)}, got {levels}")
    return levels


@checked
def choose_levels(
    workloads: Sequence[Workload],
    flops: FlopModel,
    *,
    batch_size: int,
    lanes: int = 1,
    devices: int = 1,
    platform: str | None = None,
) -> LevelChoice:
    """Choose the rank levels that cost least in all: training in padded adapters against compiling more widths.

    A level of width `w` that trains steps `s_k` takes `batch (base + Σ_l per_rank_l w_l) max(Σ s_k, lanes max s_k)`
    FLOPs of each run, as all lanes wait for the longest client, at 10¹¹ a second and device on a CPU and 10¹³ on a
    GPU or TPU; compiling it takes 0.7 s for every adapter. Among levels that end at a client's ranks the best are
    found by dynamic programming, so that none is empty. Results depend on the choice by rounding only, and the choice
    on nothing that is measured.

    Args:
        workloads: of all runs that the program serves; the last level holds the highest rank of them.
        flops: training FLOPs of the model by rank, from `training_flops`.
        batch_size: examples per local step.
        lanes: clients trained side by side on each device.
        devices: devices that share the clients.
        platform: "cpu", "gpu" or "tpu"; JAX's default device where None.

    Returns:
        The levels, for `make_round(rank_levels=...)`, at most 8, and what was estimated.

    Raises:
        ValueError: for no workload, and an unknown platform.
    """
    platform = platform_of(platform)
    if not workloads:
        raise ValueError("expected at least one workload, got none")
    paths = sorted(workloads[0].ranks)
    if not paths:
        return LevelChoice(({},), 0.0, 0.0)
    widths, lane_steps = _lane_steps(workloads, paths, lanes)
    per_step = batch_size * (flops.base + widths @ np.array([flops.per_rank[path] for path in paths]))
    seconds = lane_steps * per_step / (FLOPS_PER_SECOND[platform] * devices)
    ends, totals = _best_ends(seconds)
    compiling = _COMPILE_SECONDS * len(paths)
    count = int(np.argmin(totals + compiling * np.arange(len(totals))))
    shown = max(count, 1) if len(totals) > 1 else 0
    levels = tuple(dict(zip(paths, map(int, widths[end]), strict=True)) for end in ends[count])
    return LevelChoice(levels, float(totals[0] - totals[shown]), compiling * shown)


def _lane_steps(workloads: Sequence[Workload], paths: Sequence[str], lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the widths at which a level may end, `(n, paths)`, and the lane-steps between any two of them.

    The second, `(n + 1, n)`, holds at `[i, j]` those of a level that begins behind the first `i` widths and ends at the
    `j`-th, of all workloads together.
    """
    own = [[np.asarray(work.ranks[path], np.int64) for path in paths] for work in workloads]
    stacked = [np.stack([rank.reshape(len(rank), -1).max(axis=1) for rank in ranks], axis=1) for ranks in own]
    distinct = np.unique(np.concatenate(stacked), axis=0)
    distinct = distinct[np.argsort(distinct.sum(axis=1), kind="stable")]
    widths = np.maximum.accumulate(distinct)  # whoever is before fits in
    chosen = np.unique(np.linspace(0, len(widths) - 1, min(len(widths), _MOST_WIDTHS)).round().astype(int))
    widths = np.maximum(widths[chosen], 1)
    total = np.zeros((len(widths) + 1, len(widths)))
    for ranks, work in zip(stacked, workloads, strict=True):
        steps = np.asarray(work.steps, np.float64)
        place = np.argmax(np.all(ranks[:, None] <= widths[None], axis=2), axis=1)  # first width that holds the client
        for begin in range(len(widths)):
            for end in range(begin, len(widths)):
                inside = steps[(place >= begin) & (place <= end)]
                total[begin, end] += max(inside.sum(), lanes * inside.max(initial=0.0))
    return widths, total


def _best_ends(seconds: np.ndarray) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Return, for 1, 2, … levels, where they end at best, and the seconds that they train."""
    count = seconds.shape[1]
    best: np.ndarray = seconds[0]
    ends: list[tuple[int, ...]] = [(end,) for end in range(count)]
    found, totals = [ends[-1]], [best[-1]]
    for levels in range(2, min(count, _MOST_LEVELS) + 1):
        before = [best[:end] + seconds[1 : end + 1, end] if end else np.array([np.inf]) for end in range(count)]
        ends = [(*ends[int(np.argmin(b))], end) for end, b in enumerate(before)]
        best = np.array([b.min() for b in before])
        if len(ends[-1]) == levels:
            found.append(ends[-1])
            totals.append(best[-1])
    return found, np.array(totals)
