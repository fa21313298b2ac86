"""Aggregation rules for adapters of mixed rank, each a sum over clients and one server step.

Factor rules sum *differences from the start*: a million float32 summands of 1e-4 around 0.06 lose 1e-4 by values and
1e-12 by differences, and positions that nobody owns stay put by themselves. The engine has already replaced what
non-finite clients sent by their start and set their weight to 0, so no rule has to look.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from autorank_jax.types import (
    Adapter,
    Aggregator,
    AggState,
    Array,
    Client,
    ClientUpdate,
    Key,
    Plan,
    PyTree,
    Server,
    Trainable,
    Trains,
)


class FactorSums(NamedTuple):
    """Weighted sums of differences from the start, with their denominators."""

    adapters: dict[str, Adapter]  # Σ w_k (A_k - A_start), likewise B
    owners: dict[str, Array]  # (r,) Σ w_k m_kj
    dense: PyTree  # Σ w_k (dense_k - dense_start)
    weight: Array  # () Σ w_k


def no_state(server: Server) -> AggState:  # noqa: ARG001
    """Return the state of a rule that has none."""
    return ()


def start_from_server(server: Server, state: AggState, client: Client) -> Trainable:  # noqa: ARG001
    """Hand every client the server's values."""
    return server.trainable


def train_all(state: AggState) -> Trains:  # noqa: ARG001
    """Let clients train both factors and the dense parameters."""
    return Trains()


def sum_factors(update: ClientUpdate, server: Server, plan: Plan) -> FactorSums:  # noqa: ARG001
    """Return one client's summand for rules that average factors."""
    weight = update.client.weight
    difference = jax.tree.map(lambda new, old: weight.astype(new.dtype) * (new - old), update.trained, update.start)
    owners = {path: weight.astype(mask.dtype) * mask for path, mask in update.client.masks.items()}
    return FactorSums(difference.adapters, owners, difference.dense, weight)


def divide(total: Array, weight: Array) -> Array:
    """Return `total / weight`, 0 where the weight is 0, broadcasting the weight."""
    safe = jnp.where(weight > 0, weight, 1).astype(total.dtype)
    return jnp.where(weight > 0, total / safe, 0)


def mean_dense(dense: PyTree, sums: PyTree, weight: Array) -> PyTree:
    """Return `dense + Σ w_k (dense_k - dense_start) / Σ w_k`."""
    return jax.tree.map(lambda old, total: old + divide(total, weight), dense, sums)


def rbla() -> Aggregator:
    """Average each rank position over the clients that own it (RBLA, arXiv 2408.08699).

    `A[:, j] = Σ_k m_kj w_k A_k[:, j] / Σ_k m_kj w_k`, likewise rows of `B`; a position that nobody owns this round
    keeps the server's value. Dense parameters: weighted mean.
    """

    def update(key: Key, sums: FactorSums, state: AggState, server: Server) -> tuple[Server, AggState]:  # noqa: ARG001
        adapters = {}
        for path, old in server.trainable.adapters.items():
            total, owners = sums.adapters[path], sums.owners[path]
            adapters[path] = Adapter(
                old.lora_a + divide(total.lora_a, owners[None, :]), old.lora_b + divide(total.lora_b, owners[:, None])
            )
        dense = mean_dense(server.trainable.dense, sums.dense, sums.weight)
        return server._replace(trainable=Trainable(adapters, dense)), state

    return Aggregator(no_state, start_from_server, train_all, sum_factors, update)


def zero_pad() -> Aggregator:
    """Average the factors padded with zeros: `A = Σ_k w_k A_k diag(m_k) / Σ_k w_k`, likewise `B`.

    With equal ranks this is FedIT's mean of factors (arXiv 2305.05644). A position that nobody owns this round keeps
    the server's value.
    """

    def update(key: Key, sums: FactorSums, state: AggState, server: Server) -> tuple[Server, AggState]:  # noqa: ARG001
        adapters = {}
        for path, old in server.trainable.adapters.items():
            total, owners = sums.adapters[path], sums.owners[path]
            share = jnp.where(owners > 0, divide(owners, sums.weight), 1).astype(old.lora_a.dtype)
            adapters[path] = Adapter(
                old.lora_a * share[None, :] + divide(total.lora_a, sums.weight),
                old.lora_b * share[:, None] + divide(total.lora_b, sums.weight),
            )
        dense = mean_dense(server.trainable.dense, sums.dense, sums.weight)
        return server._replace(trainable=Trainable(adapters, dense)), state

    return Aggregator(no_state, start_from_server, train_all, sum_factors, update)
