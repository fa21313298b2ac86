"""A federation over many rounds: one `lax.scan`, jittable whole."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from autorank_jax.adapters.lora import equal_ranks, layers_of, max_ranks
from autorank_jax.engine.checks import check_goes_on, check_within, strong, why_no_ranks
from autorank_jax.interface import check_least, check_values, checked
from autorank_jax.types import (
    Aggregator,
    Array,
    EvaluateFn,
    FederatedData,
    Key,
    RoundFn,
    RoundInfo,
    Server,
    State,
)

Schedule = Callable[[Array], Array]
"""Of a hyper-parameter by the number of the round, from 0, as optax makes them."""


class History(NamedTuple):
    """What happened, stacked over rounds: scalars only, never per-client arrays."""

    info: RoundInfo  # leaves (rounds, ...)
    metrics: dict[str, Array]  # leaves (rounds, ...), from `evaluate`


@checked
def init_state(
    server: Server,
    aggregator: Aggregator,
    ranks: Mapping[str, Array] | None,
    *,
    learning_rate: ArrayLike | Schedule | None = None,
    local_epochs: int = 1,
    max_epochs: int = 5,
    clients: int | None = None,
    **hparams: float | Array | Schedule,
) -> State:
    """Make the state before the first round.

    Args:
        server: the start, usually `task.server`.
        aggregator: the rule, for what it remembers.
        ranks: by adapter path, `(clients,)` integers in `1..max_rank`, or `(clients, *layers)` for the layers of a
            stack; None: everybody's are the maximum.
        learning_rate: for an optimiser made of `hparams`, 0.01 where None; or a schedule, a function of the number of
            the round from 0, such as `optax.cosine_decay_schedule(0.1, 100)`. Another number compiles nothing, another
            schedule does.
        local_epochs: passes over its data that a client makes each round, ≥ 1.
        max_epochs: epochs per round whose mean loss is kept for every client.
        clients: how many there are; needed only where there are no ranks to tell.
        **hparams: further numbers that the optimiser is made of, or schedules. A round refuses those that it does not
            ask for.

    Returns:
        A state without weakly typed leaves, so that the next round finds the same types.

    Raises:
        TypeError: for what is no server or no rule.
        ValueError: if ranks are missing, no integers, have unequal lengths, or lie outside `1..max_rank`, if
            local_epochs is below 1, for a learning rate that is negative or not finite, or a number that is NaN.
    """
    for name, value in {"local_epochs": local_epochs, "max_epochs": max_epochs, "clients": clients}.items():
        if value is not None:
            check_least(name, value)
    if ranks is None:
        if clients is None:
            raise ValueError("expected clients=, got none: there are no ranks to count them by")
        ranks = equal_ranks(max_ranks(server), clients)
    clients = _check_ranks(server, ranks, clients)
    dtype = jnp.result_type(float)
    numbers = hparams if learning_rate is None else {"learning_rate": learning_rate, **hparams}
    for name, number in numbers.items():
        if name == "learning_rate" and not callable(number):
            check_values(name, number)
        elif not callable(number):
            check_values(name, number, lambda known: ~np.isnan(known), "numbers")
    server = strong("a server", server)
    kept = strong("the rule's client_init", aggregator.client_init(server))
    return State(
        server=server,
        aggregator=strong("the rule's init", aggregator.init(server)),
        ranks={path: jnp.asarray(ranks[path], jnp.int32) for path in sorted(ranks)},
        round=jnp.zeros((), jnp.int32),
        hparams={n: Partial(v) if callable(v) else jnp.asarray(v, dtype) for n, v in numbers.items()}
        | {"local_epochs": jnp.asarray(local_epochs, jnp.int32)},
        epoch_losses=jnp.zeros((clients, max_epochs), dtype),
        epochs=jnp.zeros(clients, jnp.int32),
        clients=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (clients, *jnp.shape(leaf))), kept),
    )


def _check_ranks(server: Server, ranks: Mapping[str, Array], clients: int | None) -> int:
    adapters = server.trainable.adapters
    if set(ranks) != set(adapters):
        raise ValueError(f"expected ranks for the adapters {sorted(adapters)}, got {sorted(ranks)}")
    if clients is None:
        if not ranks:
            raise ValueError("expected clients=, got none: there are no ranks to count them by")
        clients = (*jnp.shape(next(iter(ranks.values()))), 1)[0]
    shapes = {path: jnp.shape(rank) for path, rank in ranks.items()}
    if any(shape != (clients,) and shape != (clients, *layers_of(adapters[path])) for path, shape in shapes.items()):
        stacks = ", or (clients, *layers) for a stack" * any(map(layers_of, adapters.values()))
        raise ValueError(f"expected ranks of shape (clients,) = ({clients},) for every adapter{stacks}, got {shapes}")
    check_least("clients", clients)
    for path, rank in ranks.items():
        widest = adapters[path].lora_a.shape[-1]
        if not jnp.issubdtype(jnp.result_type(rank), jnp.integer):
            raise ValueError(f"expected integer ranks, got {jnp.result_type(rank)} for {path!r}{why_no_ranks(rank)}")
        check_within(path, rank, widest)
    return clients


@checked
def simulate(
    key: Key,
    round_fn: RoundFn,
    state: State,
    data: FederatedData,
    *,
    rounds: int,
    evaluate: EvaluateFn | None = None,
) -> tuple[State, History]:
    """Run many rounds in one compiled loop.

    Args:
        key: the run's key; round numbers are folded into it, so running 3 rounds and then 2 equals running 5.
        round_fn: from `make_round`.
        state: from `init_state`, or from an earlier run.
        data: all clients' examples.
        rounds: how many to run, ≥ 1, static.
        evaluate: `state -> scalars`, called after every round.

    Returns:
        The last state, and the history of these rounds.

    Raises:
        ValueError: if rounds is below 1.
        TypeError: where a rule's state is built otherwise after a round than before.
    """
    check_least("rounds", rounds)
    measure: Callable[[State], dict[str, Array]] = evaluate or (lambda _: {})

    def one(state: State, _: None) -> tuple[State, History]:
        after, info = round_fn(key, state, data)
        check_goes_on(state, after)
        return after, History(info, measure(after))

    return lax.scan(one, state, None, length=rounds)
