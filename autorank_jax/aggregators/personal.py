"""Rules under which clients keep something between rounds: one factor, or everything."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from autorank_jax.adapters.lora import over_columns, over_rows
from autorank_jax.aggregators.base import (
    Values,
    compose_rule,
    make_summand,
    need_client_state,
    start_from_server,
)
from autorank_jax.aggregators.factors import factor_step
from autorank_jax.interface import checked
from autorank_jax.types import (
    Adapter,
    Aggregator,
    AggState,
    Array,
    Client,
    ClientUpdate,
    Plan,
    Server,
    ServerStep,
    Traffic,
    Trainable,
    Trains,
    Travels,
)


class Nothing(NamedTuple):
    """The sums of a rule that aggregates nothing."""

    weight: Array  # () Σ w_k


@checked
def fedsa_lora(*, owners: bool = True) -> Aggregator:
    """Share and average `lora_a`; `lora_b` stays with its client (FedSA-LoRA, arXiv 2410.01463).

    `A[:, j] = Σ_k m_kj w_k A_k[:, j] / Σ_k m_kj w_k`. A client starts from the shared `lora_a` and its own `lora_b`, at
    first the server's, which never changes. Positions beyond a client's present rank keep what it had there before.

    Args:
        owners: average each position over its owners; padded with zeros where False.

    Raises:
        ValueError: when traced, if `State.clients` holds no state.
    """

    def start(server: Server, state: AggState, client: Client) -> Trainable:
        need_client_state(client, "fedsa_lora")
        own = start_from_server(server, state, client)
        return own._replace(adapters={path: Adapter(a.lora_a, client.state[path]) for path, a in own.adapters.items()})

    def keep(update: ClientUpdate, server: Server) -> dict[str, Array]:  # noqa: ARG001
        kept = {}
        for path, adapter in update.trained.adapters.items():
            mask = over_rows(update.client.masks[path], adapter.lora_b)
            kept[path] = merge_owned(mask, adapter.lora_b, update.client.state[path])
        return kept

    return compose_rule(
        make_summand(factors=True),
        factor_step(owners=owners, averages=lambda state: Trains(lora_b=False)),  # noqa: ARG005
        start=start,
        client_init=lambda server: {path: a.lora_b for path, a in server.trainable.adapters.items()},
        client_keep=keep,
        traffic=Traffic(Travels(lora_b=0), Travels(lora_b=0)),
    )


def local_only() -> Aggregator:
    """Aggregate nothing: every client goes on from its own model, the server stays as it is.

    Positions beyond a client's present rank keep what it had there before.

    Raises:
        ValueError: when traced, if `State.clients` holds no state.
    """

    def start(server: Server, state: AggState, client: Client) -> Trainable:  # noqa: ARG001
        need_client_state(client, "local_only")
        return client.state

    def keep(update: ClientUpdate, server: Server) -> Trainable:  # noqa: ARG001
        return keep_owned(update.trained, update.client.state, update.client.masks)

    def summand(update: ClientUpdate, server: Server, plan: Plan) -> Nothing:  # noqa: ARG001
        return Nothing(update.client.weight)

    nothing = Values({}, {}, {})
    step = ServerStep(
        read=lambda server: nothing,  # noqa: ARG005
        mean=lambda sums, state, server: (nothing, nothing),  # noqa: ARG005
        write=lambda key, values, state, server: server,  # noqa: ARG005
    )
    silence = Travels(0, 0, 0)
    return compose_rule(
        summand,
        step,
        start=start,
        client_init=lambda server: server.trainable,
        client_keep=keep,
        traffic=Traffic(silence, silence),
    )


def keep_owned(trained: Trainable, before: Trainable, masks: Mapping[str, Array]) -> Trainable:
    """Return what a client has trained, with the rank positions that it does not own as they were before."""
    adapters = {}
    for path, (a, b) in trained.adapters.items():
        mask, old = masks[path], before.adapters[path]
        adapters[path] = Adapter(
            merge_owned(over_columns(mask, a), a, old.lora_a), merge_owned(over_rows(mask, b), b, old.lora_b)
        )
    return Trainable(adapters, trained.dense)


def merge_owned(mask: Array, new: Array, before: Array) -> Array:
    """Write what a client owns, at the width of its rank level, over what it had before, at full width."""
    corner = tuple(slice(0, size) for size in new.shape)
    return before.at[corner].set(jnp.where(mask > 0, new, before[corner]))
