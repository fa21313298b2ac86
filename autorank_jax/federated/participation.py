"""Who takes part in a round, and with what weight."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from autorank_jax.interface import check_share, checked
from autorank_jax.types import Array, FederatedData, Key


class Cohort(NamedTuple):
    """Who takes part in a round."""

    row: Array  # (cohort,) int32 rows of `FederatedData`, each at most once
    present: Array  # (cohort,) bool
    max_steps: Array | None = None  # (cohort,) int32 budget of local steps, ≥ 1; None: as many as the epochs take


Participation = Callable[[Key, FederatedData], Cohort]
"""Chooses who takes part. The cohort's length is static."""


def everyone(key: Key, data: FederatedData) -> Cohort:  # noqa: ARG001
    """Let every client take part in every round.

    Args:
        key: not looked at.
        data: all clients' examples.
    """
    clients = data.size.shape[0]
    return Cohort(jnp.arange(clients, dtype=jnp.int32), jnp.ones(clients, bool))


@checked
def sample_uniformly(cohort: int) -> Participation:
    """Sample a fixed number of clients without replacement; who is drawn follows identities, not positions.

    Args:
        cohort: clients in a round, 1 .. clients.

    Raises:
        ValueError: if the cohort is below 1 or, when traced, above the number of clients.
    """
    _check_cohort(cohort)
    return lambda key, data: _take_largest(_draw(key, data), cohort)


@checked
def sample_by_size(cohort: int) -> Participation:
    """Sample a fixed number of clients without replacement, each next one in proportion to its examples.

    The clients with the largest `ln u_i / n_i` are taken (Efraimidis, Spirakis 2006); those without examples come last.
    Weighing by examples as well favours large clients twice: give `make_round` equal weights, `weigh=equally`.

    Args:
        cohort: clients in a round, 1 .. clients.

    Raises:
        ValueError: if the cohort is below 1 or, when traced, above the number of clients.
    """
    _check_cohort(cohort)

    def sample(key: Key, data: FederatedData) -> Cohort:
        size = data.size.astype(jnp.result_type(float))
        draws = jnp.log(jnp.maximum(_draw(key, data), jnp.finfo(jnp.float32).tiny)) / jnp.maximum(size, 1)
        return _take_largest(jnp.where(size > 0, draws, -jnp.inf), cohort)

    return sample


@checked
def sample_independently(probability: float) -> Participation:
    """Let every client take part with a probability, whatever the others do: the cohort's size is random, even 0.

    Args:
        probability: in (0, 1].

    Raises:
        ValueError: for a probability that is not above 0 and at most 1.
    """
    check_share("probability", probability)

    def sample(key: Key, data: FederatedData) -> Cohort:
        return Cohort(jnp.arange(data.size.shape[0], dtype=jnp.int32), _draw(key, data) < probability)

    return sample


def _check_cohort(cohort: int) -> None:
    if cohort < 1:
        raise ValueError(f"expected a cohort of at least one client, got {cohort}")


def _draw(key: Key, data: FederatedData) -> Array:
    """Draw a number in 0..1 for every client by its identity."""
    return jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(data.id)


def _take_largest(draws: Array, cohort: int) -> Cohort:
    clients = draws.shape[0]
    if cohort > clients:
        raise ValueError(f"expected a cohort of at most all {clients} clients, got {cohort}")
    return Cohort(lax.top_k(draws, cohort)[1].astype(jnp.int32), jnp.ones(cohort, bool))


def by_examples(data: FederatedData) -> Array:
    """Weigh clients by their number of examples, `(clients,)`.

    Args:
        data: all clients' examples.
    """
    return data.size.astype(jnp.result_type(float))


def equally(data: FederatedData) -> Array:
    """Weigh all clients that have examples alike, `(clients,)`.

    Args:
        data: all clients' examples.
    """
    return (data.size > 0).astype(jnp.result_type(float))
