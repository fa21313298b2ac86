"""Rules that average the factors of adapters, and the plain average of whole weights."""

from collections.abc import Callable

import jax.numpy as jnp

from autorank_jax.aggregators.base import (
    ClientSums,
    Values,
    compose_rule,
    make_summand,
    mean_dense,
    mean_factors,
    owned,
    read_trainable,
    reported,
    train_all,
    write_trainable,
)
from autorank_jax.interface import checked
from autorank_jax.types import Adapter, Aggregator, AggState, Array, Server, ServerStep, Traffic, Trains, Travels


def factor_step(
    *,
    owners: bool,
    averages: Callable[[AggState], Trains] = train_all,
    advance: Callable[[AggState], AggState] | None = None,
) -> ServerStep:
    """Make the server step that averages factors.

    Args:
        owners: divide each position by the weight of its owners, not of all clients.
        averages: which factors are averaged; the other stays as the server has it.
        advance: of the rule's state.
    """

    def mean(sums: ClientSums, state: AggState, server: Server) -> tuple[Values, Values]:
        gates, means, seen = averages(state), mean_factors(server, sums, owners=owners), {}
        for path, old in server.trainable.adapters.items():
            new, anyone = means[path], owned(sums.owners[path], old)
            means[path] = Adapter(
                jnp.where(gates.lora_a, new.lora_a, old.lora_a), jnp.where(gates.lora_b, new.lora_b, old.lora_b)
            )
            seen[path] = Adapter(gates.lora_a & anyone.lora_a, gates.lora_b & anyone.lora_b)
        dense = mean_dense(server, sums)
        return Values(dense, means, {}), Values(reported(dense, sums.weight), seen, {})

    step = ServerStep(read_trainable, mean, write_trainable)
    return step if advance is None else step._replace(advance=advance)


def zero_pad() -> Aggregator:
    """Average the factors padded with zeros: `A = Σ_k w_k A_k diag(m_k) / Σ_k w_k`, likewise `B`.

    With equal ranks this is FedIT's mean of factors (arXiv 2305.05644). A position that nobody owns this round keeps
    the server's value. Dense parameters: weighted mean, here as in every other rule.
    """
    return compose_rule(make_summand(factors=True), factor_step(owners=False))


def rbla() -> Aggregator:
    """Average each rank position over the clients that own it (RBLA, arXiv 2408.08699).

    `A[:, j] = Σ_k m_kj w_k A_k[:, j] / Σ_k m_kj w_k`, likewise rows of `B`; a position that nobody owns this round
    keeps the server's value. Not invariant to a change of LoRA basis, and `mean(A) mean(B) ≠ mean(A B)`.
    """
    return compose_rule(make_summand(factors=True), factor_step(owners=True))


@checked
def ffa_lora(*, owners: bool = False) -> Aggregator:
    """Freeze `lora_a` at its start and average `lora_b` (FFA-LoRA, arXiv 2403.12313).

    `B = Σ_k w_k diag(m_k) B_k / Σ_k w_k`: all clients share the (nested) columns of `A`, so the product of means is
    the mean product.

    Args:
        owners: average each position over its owners alone, as RBLA does; then it is not the mean product.
    """

    def only_b(state: AggState) -> Trains:  # noqa: ARG001
        return Trains(lora_a=False)

    step, only = factor_step(owners=owners, averages=only_b), Travels(lora_a=0)
    return compose_rule(make_summand(factors=True), step, trains=only_b, traffic=Traffic(only, only))


@checked
def rolora(*, owners: bool = False) -> Aggregator:
    """Train and average `lora_b` in rounds 0, 2, 4 and `lora_a` in rounds 1, 3, 5 (RoLoRA, arXiv 2502.01755).

    The factor at rest is the same for everybody, so that the product of means is the mean product.

    Args:
        owners: average each position over its owners alone, as RBLA does; then it is not the mean product.
    """

    def alternate(rounds: Array) -> Trains:
        even = rounds % 2 == 0
        return Trains(lora_a=~even, lora_b=even)

    step, half = factor_step(owners=owners, averages=alternate, advance=lambda n: n + 1), Travels(0.5, 0.5)
    return compose_rule(
        make_summand(factors=True),
        step,
        init=lambda server: jnp.zeros((), jnp.int32),  # noqa: ARG005
        trains=alternate,
        traffic=Traffic(half, half),
    )


def fedavg() -> Aggregator:
    """Average the dense parameters and leave adapters alone: `v = Σ_k w_k v_k / Σ_k w_k` (arXiv 1602.05629).

    The baseline of whole weights, for a task without adapters whose weights are all dense.
    """

    def neither(state: AggState) -> Trains:  # noqa: ARG001
        return Trains(lora_a=False, lora_b=False)

    def mean(sums: ClientSums, state: AggState, server: Server) -> tuple[Values, Values]:  # noqa: ARG001
        dense = mean_dense(server, sums)
        return Values(dense, {}, {}), Values(reported(dense, sums.weight), {}, {})

    step = ServerStep(
        read=lambda server: Values(server.trainable.dense, {}, {}),
        mean=mean,
        write=lambda key, values, state, server: server._replace(  # noqa: ARG005
            trainable=server.trainable._replace(dense=values.dense)
        ),
    )
    dense = Travels(lora_a=0, lora_b=0)
    return compose_rule(make_summand(), step, trains=neither, traffic=Traffic(dense, dense))
