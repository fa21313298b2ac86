"""Controls: policies with the ratios of another policy and other owners.

What a rank rule is worth shows only against its own ratios given to others: the budget per client stays the same.
"""

import jax
import jax.numpy as jnp

from autorank_jax.interface import checked
from autorank_jax.types import Array, ClientStats, Key, RankInfo, RankPolicy


@checked
def shuffled(policy: RankPolicy) -> RankPolicy:
    """Permute a policy's ratios at random among the clients present: a control that keeps the ranks, not their owners.

    Args:
        policy: whose ratios are shuffled; per-layer ratios move as whole rows. Its info stays as it is.

    Returns:
        A policy with the same ratios among the clients present; it draws the permutation from its key.
    """

    def control(key: Key, stats: ClientStats) -> tuple[Array, RankInfo]:
        policy_key, shuffle_key = jax.random.split(key)
        ratios, info = policy(policy_key, stats)
        draws = jax.random.uniform(shuffle_key, (ratios.shape[0],))
        giver = jnp.argsort(jnp.where(stats.where, draws, jnp.inf))  # the present in random order, then the absent
        taker = jnp.argsort(~stats.where)  # the present, then the absent, both in order
        return jnp.zeros_like(ratios).at[taker].set(ratios[giver]), info

    return control


@checked
def reversed_ranks(policy: RankPolicy) -> RankPolicy:
    """Give the largest ratio to the client that had the smallest, and so on: the control that ought to be worst.

    Args:
        policy: whose ratios are reversed; per-layer ratios move as whole rows, ordered by their mean. Ties
            go by position. Its info stays as it is.

    Returns:
        A policy with the same ratios among the clients present.
    """

    def control(key: Key, stats: ClientStats) -> tuple[Array, RankInfo]:
        ratios, info = policy(key, stats)
        mean = ratios if ratios.ndim == 1 else jnp.mean(ratios, axis=1)
        ascending = jnp.argsort(jnp.where(stats.where, mean, jnp.inf))  # the absent come last
        place = jnp.arange(ratios.shape[0], dtype=ascending.dtype)
        present = jnp.sum(stats.where).astype(ascending.dtype)
        opposite = ascending[jnp.where(place < present, present - 1 - place, place)]
        return jnp.zeros_like(ratios).at[ascending].set(ratios[opposite]), info

    return control
