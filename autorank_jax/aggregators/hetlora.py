"""HetLoRA (arXiv 2401.06432): means weighted by the norms of updates, and ranks that clients prune themselves."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from autorank_jax.adapters.lora import (
    below,
    cut,
    layers_of,
    max_ranks,
    nonzero_positions,
    over_columns,
    over_rows,
    rank_masks,
)
from autorank_jax.aggregators.base import (
    Values,
    compose_rule,
    mean_dense,
    moves,
    need_client_state,
    owned,
    padded_mean,
    read_trainable,
    reported,
    sum_dense,
    weighted,
    widen,
    write_trainable,
)
from autorank_jax.engine.local import LocalLoss, with_penalty
from autorank_jax.interface import checked
from autorank_jax.types import (
    Adapter,
    Aggregator,
    AggState,
    Array,
    Batch,
    Client,
    ClientUpdate,
    Key,
    Penalised,
    Plan,
    PyTree,
    Server,
    ServerStep,
    Trainable,
)


class PathSums(NamedTuple):
    """Sums of one adapter under one choice of weights."""

    weight: Array  # () Σ s_k
    owners: Array  # (..., r) Σ s_k m_kj
    factors: Adapter  # Σ s_k (A_k - A_start), likewise B


class HetSums(NamedTuple):
    """Sums weighted by norms, and by sizes for the case that all norms vanish."""

    weight: Array  # () Σ w_k
    dense: PyTree
    by_norm: dict[str, PathSums]
    by_size: dict[str, PathSums]


@checked
def hetlora(*, per: Literal["model", "layer"] = "model", prune: float | None = None) -> Aggregator:
    """Average padded factors with weights `S_k / Σ_k S_k`, `S_k = ‖A_k B_k‖_F` (HetLoRA, arXiv 2401.06432).

    Sizes enter only through the dense parameters, and where all norms are 0.

    Rank self-pruning: a client whose tail, positions `⌊γ r⌋..r-1`, weighs less after training than before,
    `‖A[:, tail]‖_F ‖B[tail]‖_F`, drops it for good, `r ← max(1, ⌊γ r⌋)`, and sends what is left. Its local loss should
    carry the penalty of `with_tail_penalty`. `State.ranks` stay as they were set; the ranks that clients have pruned
    to are `rule.client_ranks(state.ranks, state.clients)`, which is what costs go by. The engine saves no time: a
    client trains at the rank level of `State.ranks`.

    Args:
        per: one norm over all layers, or one for each; the paper has one adapter.
        prune: γ in (0, 1); no pruning where None.

    Raises:
        ValueError: for another `per` or γ; when traced with pruning, if `State.clients` holds no state.
    """
    if prune is None:
        return compose_rule(lambda update, server, plan: _sum(update, per), _step())  # noqa: ARG005
    _check_share(prune)

    def start(server: Server, state: AggState, client: Client) -> Trainable:  # noqa: ARG001
        need_client_state(client, "hetlora")
        return cut(server.trainable, rank_masks(client.state, max_ranks(server.trainable)))  # what it has not pruned

    def summand(update: ClientUpdate, server: Server, plan: Plan) -> HetSums:  # noqa: ARG001
        masks = _masks(_pruned(update, prune), update.client.masks)
        client = update.client._replace(masks=masks)
        return _sum(ClientUpdate(cut(update.trained, masks), cut(update.start, masks), client), per)

    def keep(update: ClientUpdate, server: Server) -> dict[str, Array]:  # noqa: ARG001
        fresh, before, after = update.client.state, _ranks(update.client), _pruned(update, prune)
        return {path: jnp.where(after[path] < before[path], after[path], fresh[path]) for path in fresh}

    def full(server: Server) -> dict[str, Array]:
        adapters = server.trainable.adapters
        return {p: jnp.full(layers_of(a), a.lora_a.shape[-1], jnp.int32) for p, a in adapters.items()}

    def own(ranks: dict[str, Array], clients: PyTree) -> dict[str, Array]:
        return {path: jnp.minimum(_over_layers(rank, clients[path]), clients[path]) for path, rank in ranks.items()}

    return compose_rule(summand, _step(), start=start, client_init=full, client_keep=keep, client_ranks=own)


@checked
def with_tail_penalty(loss: LocalLoss, shrink: float, strength: float) -> LocalLoss:
    """Add HetLoRA's pull on the last rank positions, `λ Σ_l ‖A[:, ⌊γ r⌋:r]‖_F ‖B[⌊γ r⌋:r]‖_F`, to a local loss.

    Args:
        loss: the local loss to add to (see `autorank_jax.engine.local.LocalLoss`).
        shrink: γ in (0, 1), the same as `hetlora(prune=γ)`.
        strength: λ ≥ 0; 0 is the loss itself.

    Raises:
        ValueError: for γ outside (0, 1), or λ that is negative or not finite.
    """
    _check_share(shrink)
    if not 0 <= strength < float("inf"):
        raise ValueError(f"expected a finite tail penalty >= 0, got {strength}")

    def penalised(frozen: PyTree, trainable: Trainable, start: Trainable, batch: Batch, key: Key) -> Penalised:
        value = with_penalty(loss(frozen, trainable, start, batch, key), jnp.zeros(()))
        for path, (a, b) in start.adapters.items():
            rank = jnp.sum(nonzero_positions(Adapter(a, b)), axis=-1, dtype=jnp.int32)
            value = with_penalty(value, strength * jnp.sum(_tail_score(trainable.adapters[path], rank, shrink)))
        return value

    return penalised


def _check_share(shrink: float) -> None:
    if not 0 < shrink < 1:
        raise ValueError(f"expected the share of ranks that pruning leaves in (0, 1), got {shrink}")


def _tail_start(rank: Array, shrink: float) -> Array:
    """Return `max(1, ⌊γ r⌋)`, robust against γ r falling a rounding error short of an integer."""
    return jnp.maximum(jnp.floor(rank.astype(jnp.float32) * (shrink * (1 + 1e-6))), 1).astype(jnp.int32)


def _tail_score(adapter: Adapter, rank: Array, shrink: float) -> Array:
    """Return `‖A[:, t:r]‖_F ‖B[t:r]‖_F` with `t = max(1, ⌊γ r⌋)` of each layer, `(*layers,)`.

    Its gradient is 0 where a norm is.
    """
    width = adapter.lora_a.shape[-1]
    tail = below(rank, width) & ~below(_tail_start(rank, shrink), width)
    a = jnp.where(over_columns(tail, adapter.lora_a), adapter.lora_a, 0)
    b = jnp.where(over_rows(tail, adapter.lora_b), adapter.lora_b, 0)
    norm_a, norm_b = (_norm(jnp.sum(jnp.square(factor), axis=(-2, -1))) for factor in (a, b))
    return norm_a * norm_b


def _norm(squares: Array) -> Array:
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _ranks(client: Client) -> dict[str, Array]:
    """Return the ranks at which a client trains, `(*layers,)`: its own, or less where it has pruned."""
    handed = {path: jnp.sum(mask > 0, axis=-1, dtype=jnp.int32) for path, mask in client.masks.items()}
    return {path: jnp.minimum(rank, _over_layers(handed[path], rank)) for path, rank in client.state.items()}


def _over_layers(ranks: Array, like: Array) -> Array:
    """Shape ranks, whose last axes may be missing, to broadcast over layers."""
    return ranks.reshape((*ranks.shape, *(1,) * (like.ndim - ranks.ndim)))


def _masks(ranks: dict[str, Array], masks: dict[str, Array]) -> dict[str, Array]:
    return {path: below(rank, masks[path].shape[-1]).astype(masks[path].dtype) for path, rank in ranks.items()}


def _pruned(update: ClientUpdate, shrink: float) -> dict[str, Array]:
    """Return the ranks after self-pruning."""
    ranks = _ranks(update.client)
    for path, rank in ranks.items():
        before, after = update.start.adapters[path], update.trained.adapters[path]
        fell = _tail_score(after, rank, shrink) < _tail_score(before, rank, shrink)
        ranks[path] = jnp.where(fell, _tail_start(rank, shrink), rank)
    return ranks


def _sum(update: ClientUpdate, per: Literal["model", "layer"]) -> HetSums:
    """Return one client's summand under both choices of weights."""
    weight = update.client.weight
    squares = {path: _squared_norm(adapter) for path, adapter in update.trained.adapters.items()}
    whole = sum(squares.values(), jnp.zeros((), weight.dtype))
    norms = {path: _norm(whole if per == "model" else square) for path, square in squares.items()}
    by_norm = {path: _sum_path(update, path, jnp.where(weight > 0, norm, 0)) for path, norm in norms.items()}
    by_size = {path: _sum_path(update, path, weight) for path in norms}
    return HetSums(weight, sum_dense(update), by_norm, by_size)


def _squared_norm(adapter: Adapter) -> Array:
    """Return `‖A B‖_F² = tr((AᵀA)(BBᵀ))`, from matrices of the size of the rank."""
    a, b = map(widen, adapter)
    gram_a, gram_b = a.mT @ a, b @ b.mT
    return jnp.maximum(jnp.sum(gram_a * gram_b), 0).astype(jnp.result_type(float))


def _sum_path(update: ClientUpdate, path: str, weight: Array) -> PathSums:
    moved = moves(update.trained.adapters[path], update.start.adapters[path])
    mask = update.client.masks[path]
    return PathSums(weight, weight.astype(mask.dtype) * mask, weighted(moved, weight))


def _step() -> ServerStep:
    def mean(sums: HetSums, state: AggState, server: Server) -> tuple[Values, Values]:  # noqa: ARG001
        means, seen = {}, {}
        for path, old in server.trainable.adapters.items():
            by_norm, by_size = sums.by_norm[path], sums.by_size[path]
            used = jax.tree.map(lambda n, s, some=by_norm.weight > 0: jnp.where(some, n, s), by_norm, by_size)
            means[path] = padded_mean(old, used.factors, used.owners, used.weight)
            seen[path] = owned(used.owners, old)
        dense = mean_dense(server, sums)
        return Values(dense, means, {}), Values(reported(dense, sums.weight), seen, {})

    return ServerStep(read_trainable, mean, write_trainable)
