"""Who takes part in a round, and with what weight."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from autorank_jax.types import Array, FederatedData, Key


class Cohort(NamedTuple):
    """Who takes part in a round."""

    row: Array  # (cohort,) int32 rows of `FederatedData`, each at most once
    present: Array  # (cohort,) bool


Participation = Callable[[Key, FederatedData], Cohort]
"""Chooses who takes part. The cohort's length is static."""


def everyone(key: Key, data: FederatedData) -> Cohort:  # noqa: ARG001
    """Let every client take part in every round."""
    clients = data.size.shape[0]
    return Cohort(jnp.arange(clients, dtype=jnp.int32), jnp.ones(clients, bool))


def sample_uniformly(cohort: int) -> Participation:
    """Sample a fixed number of clients without replacement; who is drawn follows identities, not positions.

    Raises:
        ValueError: if the cohort is below 1 or, when traced, above the number of clients.
    """
    if cohort < 1:
        raise ValueError(f"expected a cohort of at least one client, got {cohort}")

    def sample(key: Key, data: FederatedData) -> Cohort:
        clients = data.size.shape[0]
        if cohort > clients:
            raise ValueError(f"expected a cohort of at most all {clients} clients, got {cohort}")
        draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(data.id)
        return Cohort(lax.top_k(draws, cohort)[1].astype(jnp.int32), jnp.ones(cohort, bool))

    return sample


def by_examples(data: FederatedData) -> Array:
    """Weigh clients by their number of examples, `(clients,)`."""
    return data.size.astype(jnp.result_type(float))
