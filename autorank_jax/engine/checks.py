"""Checks of what a round is given, when it is made or traced: of types and shapes alone."""

import inspect
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autorank_jax.adapters.lora import layers_of
from autorank_jax.interface import check_key, check_kind, describe
from autorank_jax.interface.kinds import kinds_of
from autorank_jax.types import Aggregator, Array, FederatedData, PyTree, State, Trains


def check_round(key: Any, state: Any, data: Any, rule: Aggregator) -> None:
    """Raise an error unless key, state and data are those of a round under a rule."""
    if not isinstance(state, State) or not isinstance(data, FederatedData):
        swapped = any(isinstance(one, State) for one in (key, data)) or isinstance(state, FederatedData)
        raise TypeError(
            f"expected a round of (key, state, data), got {describe(state)} for the state and {describe(data)} for the "
            "data" + ", probably in another order" * swapped
        )
    check_key(key)
    if "local_epochs" not in state.hparams:
        raise ValueError(f"expected hparams with local_epochs, got {sorted(state.hparams)}: state.hparams | {{...}}")
    _check_epochs(state.hparams["local_epochs"])
    _check_clients(state, data)
    _check_rule_state(state, rule)


def _check_epochs(epochs: Any) -> None:
    if callable(epochs):  # a schedule
        return
    whole, known = jnp.shape(epochs) == (), not isinstance(epochs, jax.core.Tracer)
    whole = whole and jnp.issubdtype(jnp.result_type(epochs), jnp.integer)
    if not whole or (known and epochs < 1):
        got = epochs if known and jnp.shape(epochs) == () else describe(epochs)
        raise ValueError(f"expected local_epochs of hparams as one whole number >= 1, got {got}")


def check_rule(rule: Aggregator) -> None:
    """Raise `TypeError` unless every field of a rule is of its kind, such as a function of so many arguments."""
    for name, annotation in inspect.get_annotations(Aggregator).items():
        check_kind(f"the rule's {name}", getattr(rule, name), kinds_of(annotation))


def _check_clients(state: State, data: FederatedData) -> None:
    adapters, clients = state.server.trainable.adapters, data.size.shape[0]
    if set(state.ranks) != set(adapters):
        raise ValueError(f"expected ranks of the adapters {sorted(adapters)}, got {sorted(state.ranks)}")
    columns = {f"ranks[{path!r}]": rank for path, rank in state.ranks.items()}
    for name, column in {**columns, "epochs": state.epochs, "epoch_losses": state.epoch_losses}.items():
        if column.shape[:1] != (clients,):
            raise ValueError(
                f"expected a state of the {clients} clients of the data, got {name} of shape {column.shape}"
            )
    for path, rank in state.ranks.items():
        if not jnp.issubdtype(rank.dtype, jnp.integer):
            raise ValueError(f"expected integer ranks, got {rank.dtype} for {path!r}{why_no_ranks(rank)}")
        whole = (clients, *layers_of(adapters[path]))
        if rank.shape not in ((clients,), whole):
            raise ValueError(f"expected ranks of {path!r} of shape {(clients,)} or {whole}, got {rank.shape}")
        check_within(path, rank, adapters[path].lora_a.shape[-1])


def check_within(path: str, ranks: Any, widest: int) -> None:
    """Raise `ValueError` for ranks outside `1..widest`, where they are known."""
    if isinstance(ranks, jax.core.Tracer):
        return
    known = np.asarray(ranks)  # in NumPy: under jit, JAX would trace ranks that are known
    least, most = known.min(), known.max()
    if least < 1 or most > widest:
        raise ValueError(
            f"expected ranks of {path!r} in 1..{widest}, got {least}..{most}"
            + (", probably ranks made for a larger max_rank" if most > widest else "")
        )


def why_no_ranks(ranks: Any) -> str:
    """Guess why ranks are no integers, from their values where these are known."""
    known = None if isinstance(ranks, jax.core.Tracer) else np.asarray(ranks)
    if known is not None and known.size and (known > 0).all() and (known <= 1).all():
        return ", probably ratios: ranks_from_ratios makes ranks of them"
    if known is not None and np.all(known == np.round(known)):
        return ", probably ranks that were computed: .astype(int)"
    return ""


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
    if _same_structure(found, expected) and all(map(_same_shape, jax.tree.leaves(found), jax.tree.leaves(expected))):
        return
    raise ValueError(
        f"expected {name} as this rule makes it, got that of another rule or of another model: init_state(server, "
        "rule, ranks) with the rule of the round makes it"
    )


def _same_shape(found: Any, expected: Any) -> bool:
    return jnp.shape(found) == expected.shape


def summable(sums: PyTree) -> PyTree:
    """Return a summand as arrays whose sums have their types: bools and small integers become int32.

    Raises:
        TypeError: for a leaf that is no array of numbers.
    """

    def one(leaf: Any) -> Array:
        if not isinstance(leaf, jax.Array | np.ndarray | int | float) or _is_key(leaf):
            raise TypeError(f"expected a summand of arrays of numbers, got {describe(leaf)} in it")
        array = jnp.asarray(leaf)
        small = not jnp.issubdtype(array.dtype, jnp.inexact) and array.dtype.itemsize < 4
        return array.astype(jnp.int32) if small else array

    return jax.tree.map(one, sums)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _same_structure(one: PyTree, other: PyTree) -> bool:
    return bool(jax.tree.structure(one) == jax.tree.structure(other))  # type: ignore[operator]


def check_update(updated: Any, state: State) -> None:
    """Raise `TypeError` unless a rule's `update` returned a server and a state of shapes and types as before.

    A state of another structure may end a round: `check_goes_on` refuses it where rounds follow.
    """
    if type(updated) is not tuple or len(updated) != 2:
        raise TypeError(f"expected the rule's update to return (server, state), got {describe(updated)}")
    if not _same_structure(state.server, updated[0]):
        raise TypeError(
            f"expected the rule's update to return a server built like that before, got {describe(updated[0])}"
        )
    for name, before, after in zip(("server", "state"), (state.server, state.aggregator), updated, strict=True):
        pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=False)
        for old, new in pairs if _same_structure(before, after) else ():
            if jnp.shape(old) != jnp.shape(new) or jnp.result_type(old) != jnp.result_type(new):
                raise TypeError(
                    f"expected the rule's update to leave shapes and dtypes of the {name} as they are, got "
                    f"{describe(jnp.asarray(new))} in place of {describe(old)}"
                )


def check_goes_on(before: State, after: State) -> None:
    """Raise `TypeError` where a rule's state is built otherwise after a round, so that no loop can carry it."""
    if not _same_structure(before.aggregator, after.aggregator):
        raise TypeError(
            f"expected the rule's update to return a state built like that before, got {describe(after.aggregator)}"
        )


def check_built_like(
    what: str, found: PyTree, expected: PyTree, *, dtypes: bool = False, cut: Collection[tuple[int, int]] = ()
) -> None:
    """Raise `TypeError` unless what somebody's function returned is built like something.

    Args:
        what: the function.
        found: what it returned.
        expected: of the same structure and shapes.
        dtypes: whether types must be the same too.
        cut: lengths of axes that may be shorter, each with the whole length.
    """
    if not _same_structure(found, expected):
        same = describe(found) == describe(expected)
        raise TypeError(
            f"expected {what} to return what is built like {describe(expected)}, got {describe(found)}"
            + " of another structure" * same
        )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        shape, whole = jnp.shape(one), jnp.shape(other)
        fits = len(shape) == len(whole) and all(a == b or (a, b) in cut for a, b in zip(shape, whole, strict=True))
        if not fits or (dtypes and jnp.result_type(one) != jnp.result_type(other)):
            raise TypeError(
                f"expected {what} to return shapes and dtypes as they are, got {jnp.result_type(one)}{list(shape)} in "
                f"place of {jnp.result_type(other)}{list(whole)}"
            )


def check_trains(trains: Any) -> None:
    """Raise `TypeError` unless a rule said what it trains in a `Trains`, or in a tree of them for an own training."""
    leaves = jax.tree.leaves(trains, is_leaf=lambda part: isinstance(part, Trains))
    if not leaves or not all(isinstance(leaf, Trains) for leaf in leaves):
        raise TypeError(f"expected the rule's trains to return a Trains(...), got {describe(trains)}")


def strong(what: str, tree: PyTree) -> PyTree:
    """Make arrays of all leaves, none weakly typed: the result of a round would be strong, and the next retrace.

    Raises:
        TypeError: for a leaf that is no array of numbers.
    """

    def one(leaf: Any) -> Array:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
            raise TypeError(f"expected {what} of arrays, got {describe(leaf)} in it")
        array = jnp.asarray(leaf)
        return lax.convert_element_type(array, array.dtype) if getattr(array, "weak_type", False) else array

    return jax.tree.map(one, tree)


def check_losses(losses: Any, examples: int, what: str, penalty: Any = 0) -> None:
    """Raise `ValueError` unless there is one loss for every example, and one penalty."""
    if not hasattr(losses, "dtype"):
        raise TypeError(f"expected {what} as an array, got {describe(losses)}; a penalty is added by with_penalty")
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ValueError(f"expected {what} as floats, got {losses.dtype}, which have no gradient")
    if jnp.shape(penalty):
        raise ValueError(f"expected a penalty of shape (), got {jnp.shape(penalty)}: take its sum or mean")
    shape = jnp.shape(losses)
    if shape != (examples,):
        mean = ", probably a mean over the batch: leave it out" if shape == () else ""
        cause = ": take the mean over the other axes" if shape[:1] == (examples,) else mean
        raise ValueError(f"expected {what} of every example, shape ({examples},), got {shape}{cause}")
