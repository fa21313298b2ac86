"""Rank policies: who trains at which rank.

A policy is a function `(key, ClientStats) -> (ratios, RankInfo)`. Ratios are in (0, 1], `(clients,)` or
`(clients, layers)`, and `ranks_from_ratios` makes integer ranks of them. Everything is jittable, so that ranks can be
set again in the middle of a simulation. Absent clients get some valid ratio: `min_ratio` where the policy scores, what
the policy says otherwise.

`budgets` adapts policies to budgets and devices, `controls` makes controls of them.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from autorank_jax.interface import check_least, check_name, check_share, check_values, checked, describe
from autorank_jax.ranks import mcda
from autorank_jax.ranks.criteria import (
    CRITERIA,
    NEEDS_LOSSES,
    Criterion,
    check_criteria,
    complexity_matrix,
    criterion_names,
    tell_equals,
)
from autorank_jax.types import Array, ClientStats, Key, Names, RankInfo, RankPolicy

_RANK = "a percentage or a rank"  # what may be above 1 in place of a ratio


@checked
def autorank(
    *,
    criteria: Sequence[str | Criterion] = tuple(CRITERIA),
    min_ratio: float = 0.1,
    normalization: str = "vector",
    benefit: Sequence[bool] | None = None,
) -> RankPolicy:
    """Rank clients by the complexity of their data: CRITIC weights, TOPSIS closeness, min-max, floor.

    `ρ_i = ρ_min + (1 - ρ_min) (C_i - min C) / (max C - min C)`, and 1 for everyone where all scores are equal.

    Args:
        criteria: names in `criteria.CRITERIA` or functions `ClientStats -> (clients,)`; the columns of `stats.extra`
            are appended.
        min_ratio: `ρ_min` in (0, 1], the ratio of the least complex client.
        normalization: of TOPSIS, "vector" or "minmax".
        benefit: False where a criterion is a cost, one per column; all benefits where None.

    Returns:
        A policy of ratios `(clients,)` in [min_ratio, 1]. It does not use its key.

    Raises:
        ValueError: for a bad `min_ratio` or `normalization`, an unknown criterion or one twice, or too few directions;
            when called, for criteria that the stats cannot give.

    Source: arXiv 2412.15553.
    """
    check_share("min_ratio", min_ratio, cause=_RANK)
    check_name("normalization", normalization, mcda.NORMALIZATIONS)
    check_criteria(criteria)
    if benefit is not None and len(benefit) < len(criteria):
        raise ValueError(f"expected benefit of {len(criteria)} criteria, one of each, got {len(benefit)}")

    @checked
    def policy(key: Key, stats: ClientStats) -> tuple[Array, RankInfo]:  # noqa: ARG001
        matrix = complexity_matrix(stats, criteria=criteria)
        weights = mcda.critic_weights(matrix, benefit=benefit, where=stats.where)
        closeness = mcda.topsis(matrix, weights, benefit=benefit, normalization=normalization, where=stats.where)
        ratios = ratios_from_scores(closeness, min_ratio=min_ratio, where=stats.where)
        tell_equals(matrix, stats.where)
        return ratios, RankInfo(matrix, weights, closeness, Names(criterion_names(stats, criteria=criteria)))

    return policy


@checked
def by_size(*, min_ratio: float = 0.1) -> RankPolicy:
    """Rank clients by their number of examples alone: AutoRank with the size as the score.

    Args:
        min_ratio: in (0, 1], the ratio of the smallest client.

    Returns:
        A policy of ratios `(clients,)` in [min_ratio, 1]. Its info has one criterion of weight 1.

    Raises:
        ValueError: for a bad `min_ratio`.
    """
    check_share("min_ratio", min_ratio, cause=_RANK)

    @checked
    def policy(key: Key, stats: ClientStats) -> tuple[Array, RankInfo]:  # noqa: ARG001
        check_values("stats.size", stats.size)
        size = jnp.asarray(stats.size).astype(jnp.result_type(float))
        tell_equals(size[:, None], stats.where)
        ratios = ratios_from_scores(size, min_ratio=min_ratio, where=stats.where)
        score = mcda.min_max(size[:, None], where=stats.where)[0][:, 0]
        closeness = jnp.where(stats.where, score, 0)
        return ratios, RankInfo(size[:, None], jnp.ones(1, size.dtype), closeness, Names(("size",)))

    return policy


@checked
def uniform(ratio: float = 1.0) -> RankPolicy:
    """Give every client the same ratio.

    Args:
        ratio: in (0, 1]; 1 trains everyone at full rank.

    Returns:
        A policy of ratios `(clients,)`.

    Raises:
        ValueError: for a bad `ratio`.
    """
    check_share("ratio", ratio, cause=_RANK)

    @checked
    def policy(key: Key, stats: ClientStats) -> tuple[Array, RankInfo]:  # noqa: ARG001
        return jnp.full(_clients(stats), ratio, jnp.result_type(float)), _no_scores(stats)

    return policy


@checked
def manual(ratios: ArrayLike | Sequence[float] | Sequence[Sequence[float]]) -> RankPolicy:
    """Give every client the ratio that is written down for it.

    Args:
        ratios: `(clients,)` or `(clients, layers)` in (0, 1], layers in sorted order of their paths.

    Returns:
        A policy of these ratios.

    Raises:
        ValueError: for ratios outside (0, 1] or of wrong shape; when called, for another number of clients.
    """
    if not isinstance(ratios, jax.core.Tracer):
        ratios = _numbers("ratios", ratios)
        check_share("ratios", ratios, cause=_RANK)
    given = jnp.asarray(ratios).astype(jnp.result_type(float))
    if given.ndim not in (1, 2):
        raise ValueError(f"ratios: expected shape (clients,) or (clients, layers), got {given.shape}")

    @checked
    def policy(key: Key, stats: ClientStats) -> tuple[Array, RankInfo]:  # noqa: ARG001
        if given.shape[0] != _clients(stats):
            raise ValueError(
                f"manual: expected one ratio for each of {_clients(stats)} clients, got shape {given.shape}"
                + ", probably transposed" * (given.shape[1:] == (_clients(stats),))
            )
        return given, _no_scores(stats)

    return policy


@checked
def ratios_from_scores(scores: ArrayLike, *, min_ratio: float = 0.1, where: ArrayLike | None = None) -> Array:
    """Turn scores into rank ratios, `ρ_i = ρ_min + (1 - ρ_min) (s_i - min s) / (max s - min s)`.

    Args:
        scores: `(clients,)` finite, more means a higher rank.
        min_ratio: `ρ_min` in (0, 1].
        where: `(clients,)` bool, False where a client is absent; all present where None.

    Returns:
        `(clients,)` in [min_ratio, 1]; 1 for everyone where all scores are equal, `min_ratio` for absent clients.

    Raises:
        ValueError: for a bad `min_ratio`, or a `scores` or `where` of wrong shape.

    Source: arXiv 2412.15553 for min-max; the floor and the rule for equal scores are ours.

    Example:
        >>> print(ratios_from_scores(jnp.array([0.2, 0.5, 0.8])))
        [0.1  0.55 1.  ]
    """
    check_share("min_ratio", min_ratio, cause=_RANK)
    scores = jnp.asarray(scores)
    if scores.ndim != 1:
        raise ValueError(f"expected scores of shape (clients,), got {scores.shape}")
    s, varying = mcda.min_max(scores[:, None], where=where)
    s = jnp.where(varying[None, :], s, 1)[:, 0]
    ratios = jnp.minimum(min_ratio + (1 - min_ratio) * s, 1)  # the sum may round beyond it
    return ratios if where is None else jnp.where(where, ratios, min_ratio)


@checked
def ranks_from_ratios(ratios: ArrayLike | Mapping[str, ArrayLike], max_ranks: Mapping[str, int]) -> dict[str, Array]:
    """Return integer ranks, `r_il = max(1, ⌊ρ_i R_l⌋)`, rounded so that a ratio of 0.7 of 10 is 7.

    Float32 holds 0.7 as a little less; a factor of `1 + 1e-6` before the floor is right for every ratio of hundredths
    and `R ≤ 4096`.

    Args:
        ratios: `(clients,)`, or `(clients, layers)` with the layers in sorted order of their paths (as jax walks a dict
            and `max_ranks` lists them), in (0, 1]; within `jit` they are clipped to it. Or by path, `(clients,)`
            or `(clients, *layers)` for the layers of a stack.
        max_ranks: by path, `R_l ≥ 1`.

    Returns:
        By path, int32 in 1..R_l, `(clients,)` or the shape of its ratios.

    Raises:
        ValueError: for ratios of wrong shape or outside (0, 1], or a maximum rank that is not a whole number ≥ 1.

    Example:
        >>> ranks = ranks_from_ratios(jnp.array([0.01, 0.7, 1.0]), {"hidden": 160, "out": 10})
        >>> print(ranks["hidden"], ranks["out"])
        [  1 112 160] [ 1  7 10]
    """
    ranks = {}
    for path, own in _by_path(ratios, sorted(max_ranks)).items():
        R = max_ranks[path]
        check_least(f"max_ranks[{path!r}]", R)
        floor = jnp.floor(own * jnp.float32(R) * jnp.float32(1 + 1e-6))
        ranks[path] = jnp.where(floor >= 1, jnp.minimum(floor, R), 1).astype(jnp.int32)  # 1 for NaN too
    return ranks


def _by_path(ratios: ArrayLike | Mapping[str, ArrayLike], paths: Sequence[str]) -> dict[str, Array]:
    """Return checked float32 ratios of every path, the clients first."""

    def known(own: ArrayLike, name: str) -> Array:
        own = jnp.asarray(own).astype(jnp.float32)
        if not isinstance(own, jax.core.Tracer):  # rounding above 1 is no mistake
            check_share(name, np.where(own <= 1 + 1e-6, np.minimum(own, 1), own), cause=_RANK)
        return own

    if isinstance(ratios, Mapping):
        found = {path: known(own, f"ratios[{path!r}]") for path, own in ratios.items()}
        shapes = {path: own.shape for path, own in found.items()}
        clients = {shape[:1] for shape in shapes.values()}
        if found.keys() != {*paths} or len(clients) > 1 or () in clients:
            raise ValueError(f"ratios: expected those of the same clients for each of {[*paths]}, got {shapes}")
        return {path: found[path] for path in paths}
    whole = known(ratios, "ratios")
    if whole.ndim == 1:
        whole = jnp.broadcast_to(whole[:, None], (whole.shape[0], len(paths)))
    if whole.ndim != 2 or whole.shape[1] != len(paths):
        raise ValueError(
            f"ratios: expected shape (clients,) or (clients, {len(paths)}), got {whole.shape}"
            + ", probably transposed" * (whole.ndim == 2 and whole.shape[0] == len(paths))
        )
    return {path: whole[:, layer] for layer, path in enumerate(paths)}


@checked
def autorank_ranks(
    label_counts: ArrayLike | Sequence[Sequence[int]],
    epoch_losses: ArrayLike | Sequence[Sequence[float]] | None = None,
    *,
    max_rank: int,
    min_ratio: float = 0.1,
) -> tuple[Array, RankInfo]:
    """Return AutoRank's rank for every client, for use with one's own training stack.

    Args:
        label_counts: `(clients, classes)` examples of each class, ≥ 0.
        epoch_losses: `(clients, epochs)` mean training loss per epoch of a probe, ≥ 0. Without it the criterion
            `loss_entropy` is left out.
        max_rank: the rank of the most complex client, ≥ 1.
        min_ratio: in (0, 1], the share of it that the least complex client gets.

    Returns:
        `(clients,)` int32 ranks in 1..max_rank, and the matrix, weights and closeness behind them. Of clients that do
        not differ, or one alone, all get max_rank, and a warning says so.

    Raises:
        ValueError: for wrong shapes, rows of different lengths, negative or non-finite numbers, or a bad `max_rank` or
            `min_ratio`.

    Source: arXiv 2412.15553.

    Example:
        Sizes 10, 10, 40; classes 1, 2, 2; entropies 0, ln 2, ln 2; Gini-Simpson 0, ½, ½. The last three columns agree
        perfectly and have `ρ = ½` with the sizes, all have the same `σ`: `C ∝ 3/2, ½, ½, ½`, `w = ½, ⅙, ⅙, ⅙`. Client 0
        is the worst in everything, client 2 the best; client 1 is `½ · 0.7071` from the best (30 of the norm 42.43) and
        `⅙ √(1/9 + ½ + ½)` from the worst: `0.1757 / 0.5292 = 0.332`, a ratio of 0.399.

        >>> ranks, info = autorank_ranks([[10, 0], [5, 5], [20, 20]], max_rank=10)
        >>> print(ranks, info.weights, info.closeness)
        [ 1  3 10] [0.5    0.1667 0.1667 0.1667] [0.    0.332 1.   ]
    """
    check_least("max_rank", max_rank)
    check_share("min_ratio", min_ratio, cause=_RANK)
    counts = _client_table("label_counts", label_counts)
    _check_counts(counts)
    losses = None if epoch_losses is None else _client_table("epoch_losses", epoch_losses)
    if losses is not None and losses.shape[0] != counts.shape[0]:
        raise ValueError(
            f"epoch_losses: expected {counts.shape[0]} clients, got {losses.shape[0]}"
            + ", probably transposed" * (losses.shape[1] == counts.shape[0])
        )
    criteria = tuple(name for name in CRITERIA if losses is not None or name not in NEEDS_LOSSES)
    ranks, info = _score_and_rank(criteria, float(min_ratio), int(max_rank), counts, losses)
    tell_equals(info.matrix, np.ones(len(counts), bool))
    return ranks, info


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # one program: a hundred small ones would take seconds
def _score_and_rank(
    criteria: Sequence[str], min_ratio: float, max_rank: int, counts: Array, losses: Array | None
) -> tuple[Array, RankInfo]:
    present = jnp.ones(counts.shape[0], bool)
    stats = ClientStats(jnp.sum(counts, axis=1), counts, losses, None, None, present.astype(counts.dtype), present)
    ratios, info = autorank(criteria=criteria, min_ratio=min_ratio)(jax.random.key(0), stats)
    return ranks_from_ratios(ratios, {"rank": max_rank})["rank"], info


def _client_table(name: str, table: ArrayLike | Sequence[Sequence[float]]) -> Array:
    """Check a table with a row per client, as far as it is known yet, and return it in the default float type."""
    if not isinstance(table, jax.core.Tracer):
        table = _numbers(name, table)
        if table.ndim == 2 and not (np.isfinite(table) & (table >= 0)).all():
            bad = table[~(np.isfinite(table) & (table >= 0))][0]
            raise ValueError(f"expected {name} as finite numbers >= 0, got {bad:g} for some client")
    array = jnp.asarray(table).astype(jnp.result_type(float))
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"expected {name} of shape (clients, columns), got {array.shape}")
    return array


def _numbers(name: str, table: ArrayLike | Sequence[Any]) -> np.ndarray:
    try:
        return np.asarray(table, float)
    except (TypeError, ValueError):
        lengths = (
            sorted({len(row) for row in table if isinstance(row, Sequence)}) if isinstance(table, Sequence) else []
        )
        got = f"rows of {' and '.join(map(str, lengths))}" if len(lengths) > 1 else describe(table)
        raise ValueError(f"expected {name} as numbers in rows of one length, got {got}") from None


def _clients(stats: ClientStats) -> int:
    return jnp.shape(stats.size)[0]


def _no_scores(stats: ClientStats) -> RankInfo:
    clients, dtype = _clients(stats), jnp.result_type(float)
    return RankInfo(jnp.zeros((clients, 0), dtype), jnp.zeros(0, dtype), jnp.zeros(clients, dtype))


def _check_counts(counts: Array) -> None:
    """Raise `ValueError` for proportions: they look like clients of one example (or a hundred) each."""
    if isinstance(counts, jax.core.Tracer):
        return
    table = np.asarray(counts)
    whole, total = np.all(table == np.round(table)), table.sum(axis=1)
    if not whole and any(np.allclose(total, one, rtol=1e-3) for one in (1, 100)):
        raise ValueError(
            f"expected label_counts as numbers of examples, got fractions that sum to {total[0]:g} in every row, "
            "probably proportions: multiply each row by the client's number of examples"
        )
