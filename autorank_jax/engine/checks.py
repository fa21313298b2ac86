"""Checks of what a round is given, when it is made or traced: of types and shapes alone."""

from typing import Any

import jax
import jax.numpy as jnp

from autorank_jax.types import Aggregator, FederatedData, LocalTraining, PyTree, Server, State


def check_rule(rule: Any) -> None:
    """Raise `TypeError` unless something is an aggregation rule."""
    if isinstance(rule, Aggregator):
        return
    name = getattr(rule, "__name__", type(rule).__name__)
    cause = f"a rule that was not called: {name}()" if callable(rule) else "an argument in the wrong place"
    raise TypeError(f"expected an aggregation rule, got {_kind(rule)}, probably {cause}")


def check_local(local: Any) -> None:
    """Raise `TypeError` unless something is local training."""
    if not isinstance(local, LocalTraining):
        raise TypeError(
            f"expected local training, got {_kind(local)}, probably the task or an optimizer: "
            "make_local_training(task, optimizer, batch_size=...)"
        )


def check_server(server: Any) -> None:
    """Raise `TypeError` unless something is a server."""
    if not isinstance(server, Server):
        raise TypeError(f"expected a server, got {_kind(server)}, probably the task itself: task.server")


def _kind(value: Any) -> str:
    if isinstance(value, jax.Array):
        return f"an array {value.dtype}{list(value.shape)}"
    name = getattr(value, "__name__", None)
    return f"the {type(value).__name__} {name!r}" if name else f"a {type(value).__name__}"


def check_round(key: Any, state: Any, data: Any, rule: Aggregator) -> None:
    """Raise an error unless key, state and data are those of a round under a rule."""
    if not isinstance(state, State) or not isinstance(data, FederatedData):
        raise TypeError(
            f"expected a round of (key, state, data), got {_kind(state)} for the state and {_kind(data)} for the data, "
            "probably in another order"
        )
    if not isinstance(key, jax.Array) or not (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.dtype == jnp.uint32
    ):
        raise TypeError(f"expected a random key, got {_kind(key)}, probably a seed: jax.random.key(seed)")
    _check_clients(state, data)
    _check_rule_state(state, rule)


def _check_clients(state: State, data: FederatedData) -> None:
    adapters, clients = state.server.trainable.adapters, data.size.shape[0]
    if set(state.ranks) != set(adapters):
        raise ValueError(f"expected ranks of the adapters {sorted(adapters)}, got {sorted(state.ranks)}")
    columns = {f"ranks[{path!r}]": rank for path, rank in state.ranks.items()}
    for name, column in {**columns, "epochs": state.epochs, "epoch_losses": state.epoch_losses}.items():
        if column.shape[:1] != (clients,):
            raise ValueError(
                f"expected a state of the {clients} clients of the data, got {name} of shape {column.shape}, probably "
                "ranks made for another split"
            )
    for path, rank in state.ranks.items():
        if not jnp.issubdtype(rank.dtype, jnp.integer):
            raise ValueError(
                f"expected integer ranks, got {rank.dtype} for {path!r}, probably ratios: ranks_from_ratios makes "
                "ranks of them"
            )


def _check_rule_state(state: State, rule: Aggregator) -> None:
    expected, kept = jax.eval_shape(lambda server: (rule.init(server), rule.client_init(server)), state.server)
    clients = state.epochs.shape
    _check_like("State.aggregator", state.aggregator, expected)
    _check_like(
        "State.clients",
        state.clients,
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((*clients, *leaf.shape), leaf.dtype), kept),
    )


def _check_like(name: str, found: PyTree, expected: PyTree) -> None:
    same = bool(jax.tree.structure(found) == jax.tree.structure(expected))  # type: ignore[operator]
    if same and all(map(_same_shape, jax.tree.leaves(found), jax.tree.leaves(expected))):
        return
    raise ValueError(
        f"expected {name} as this rule makes it, got that of another rule or of another model, probably a state made "
        "for another rule: init_state(server, rule, ranks) with the rule of the round"
    )


def _same_shape(found: Any, expected: Any) -> bool:
    return jnp.shape(found) == expected.shape


def check_losses(losses: Any, examples: int, what: str) -> None:
    """Raise `ValueError` unless there is one loss for every example."""
    shape = jnp.shape(losses)
    if shape != (examples,):
        cause = "a mean over the batch: leave it out" if shape == () else "a loss that keeps more axes: take their mean"
        raise ValueError(f"expected {what} of every example, shape ({examples},), got {shape}, probably {cause}")
