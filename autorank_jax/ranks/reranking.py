"""Ranks that are set anew during a simulation."""

import jax
import jax.numpy as jnp
from jax import lax

from autorank_jax.adapters.lora import max_ranks
from autorank_jax.interface import check_least, checked
from autorank_jax.ranks.policies import ranks_from_ratios
from autorank_jax.types import Array, ClientStats, FederatedData, Key, RankPolicy, RoundFn, RoundInfo, State

_RERANK = 0x72616E6B  # fold_in tag: keys of re-ranking never meet those of a round, whose identities are round numbers


@checked
def with_reranking(round_fn: RoundFn, policy: RankPolicy, stats: ClientStats, *, every: int) -> RoundFn:
    """Set the ranks anew after every `every`-th round, from the loss curves that training records anyway.

    Args:
        round_fn: the round to wrap.
        policy: of the new ranks.
        stats: of the clients; its losses are replaced with those of each client's latest round.
        every: rounds, ≥ 1, from one ranking to the next, counted from the first round of all.

    Returns:
        A round function whose state has the same structure and types as before: where ranks differ within a stack of
        layers, all of its layers get the new one.

    Raises:
        ValueError: for a bad `every`; when called, for stats of another number of clients.
    """
    check_least("every", every)

    def round_then_rank(key: Key, state: State, data: FederatedData) -> tuple[State, RoundInfo]:
        clients, known = state.epochs.shape[0], stats.size.shape[0]
        if clients != known:
            raise ValueError(f"with_reranking: expected stats of {clients} clients, got those of {known}")
        state, info = round_fn(key, state, data)

        def rank_anew() -> dict[str, Array]:
            curves = stats._replace(epoch_losses=state.epoch_losses, epochs=state.epochs)
            ratios, _ = policy(jax.random.fold_in(jax.random.fold_in(key, _RERANK), state.round), curves)
            ranks = ranks_from_ratios(ratios, max_ranks(state.server.trainable))
            return {path: _as_before(rank, state.ranks[path]) for path, rank in ranks.items()}

        ranks = lax.cond(state.round % every == 0, rank_anew, lambda: state.ranks)
        return state._replace(ranks=ranks), info

    return round_then_rank


def _as_before(ranks: Array, before: Array) -> Array:
    """Give every layer of a stack a client's new rank, where each has had its own."""
    return jnp.broadcast_to(ranks.reshape((*ranks.shape, *(1,) * (before.ndim - ranks.ndim))), before.shape)
