"""What goes wrong in a round: clients that drop out, clients that are slow, clients that send nonsense.

A fault changes the cohort that was invited: `fault(key, round, data, cohort) -> cohort`. Draws follow identities, so
that reordering clients or leaving some out changes nobody else's luck.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from autorank_jax.federated.participation import Cohort, Participation
from autorank_jax.interface import check_one, check_share, checked, describe
from autorank_jax.types import Array, Client, FederatedData, Key, LocalState, LocalTraining, Trainable

__all__ = ["drop_out", "drop_out_schedule", "limit_steps", "with_nan_clients"]

Fault = Callable[[Key, Array, FederatedData, Cohort], Cohort]
"""`(key, round, data, cohort) -> cohort`: what becomes of the clients that were invited; `round` counts from 0."""


@checked
def drop_out(probability: float | Array) -> Fault:
    """Let every client of every round drop out with a probability: it sends nothing, as if it had been away.

    Args:
        probability: in 0..1; under jit it may be an argument, so that another one compiles nothing.

    Raises:
        ValueError: for a probability outside 0..1, or one for each client.
    """
    check_one("probability", probability)
    check_share("probability", probability, "[0, 1]")

    def fault(key: Key, number: Array, data: FederatedData, cohort: Cohort) -> Cohort:  # noqa: ARG001
        return cohort._replace(present=cohort.present & ~_struck(key, data, cohort, probability))

    return fault


@checked
def drop_out_schedule(away: ArrayLike) -> Fault:
    """Let clients drop out by a table.

    Args:
        away: `(rounds, clients)` bool, true where the client of that row of the data drops out; nobody does in later
            rounds.

    Raises:
        ValueError: for another shape, or for numbers in place of bools.
    """
    table = np.asarray(away)
    if table.ndim != 2 or table.dtype != bool:
        raise ValueError(
            f"expected a schedule of bools of shape (rounds, clients), got {table.dtype} of shape {table.shape}, "
            "one for each round and client"
        )

    def fault(key: Key, number: Array, data: FederatedData, cohort: Cohort) -> Cohort:  # noqa: ARG001
        clients = data.size.shape[0]
        if table.shape[1] != clients:
            raise ValueError(f"expected a schedule of {clients} clients, got one of {table.shape[1]}")
        gone = jnp.asarray(table).at[number].get(mode="fill", fill_value=False)
        return cohort._replace(present=cohort.present & ~gone[cohort.row])

    return fault


@checked
def limit_steps(max_steps: ArrayLike, *, probability: float = 1.0) -> Fault:
    """Give clients a budget of local steps: a straggler sends what it has when its budget is spent.

    Args:
        max_steps: ≥ 1, one number for all or one for each client, `(clients,)`.
        probability: of a client to be a straggler in a round, in 0..1.

    Raises:
        ValueError: for a budget below one step, or a probability outside 0..1.
    """
    budget = np.asarray(max_steps)
    if budget.dtype.kind not in "iu" or budget.ndim > 1 or budget.size == 0 or budget.min() < 1:
        raise ValueError(
            f"expected max_steps as whole numbers of at least 1, one for all or one per client, got {max_steps!r}"
            + (", probably to drop clients out: use drop_out" if np.any(budget == 0) else "")
        )
    check_share("probability", probability, "[0, 1]")

    def fault(key: Key, number: Array, data: FederatedData, cohort: Cohort) -> Cohort:  # noqa: ARG001
        clients = data.size.shape[0]
        if budget.ndim and budget.shape != (clients,):
            raise ValueError(f"expected a budget for each of {clients} clients, got {budget.size}")
        most = jnp.iinfo(jnp.int32).max
        own = jnp.broadcast_to(jnp.asarray(np.minimum(budget, most), jnp.int32), (clients,))[cohort.row]
        limit = jnp.where(_struck(key, data, cohort, probability), own, most)
        return cohort._replace(max_steps=limit if cohort.max_steps is None else jnp.minimum(limit, cohort.max_steps))

    return fault


@checked
def with_nan_clients(local: LocalTraining, broken: ArrayLike) -> LocalTraining:
    """Let the local training of some clients end in NaN, to see what becomes of the others.

    Args:
        local: local training of one client.
        broken: `(clients,)` bool, by row of the data; clients beyond it are whole.

    Raises:
        ValueError: for anything but a vector of bools.
    """
    flags = np.asarray(broken)
    if flags.ndim != 1 or flags.dtype != bool:
        raise ValueError(f"expected broken as a vector of bools, got {flags.dtype} of shape {flags.shape}")

    def end(state: LocalState, client: Client) -> Trainable:
        spoiled = jnp.asarray(flags).at[client.row].get(mode="fill", fill_value=False)
        trained = local.end(state, client)
        return jax.tree.map(lambda leaf: jnp.where(spoiled, jnp.asarray(jnp.nan, leaf.dtype), leaf), trained)

    return local._replace(end=end)


def round_keys(key: Key, number: Array) -> tuple[Key, Key, Key, Key]:
    """Derive a round's keys: of who is invited, of local training, of the server step, of faults."""
    who, training, server_step, luck = jax.random.split(jax.random.fold_in(key, number), 4)
    return who, training, server_step, luck


def draw_cohort(
    key: Key, number: Array, data: FederatedData, participation: Participation, faults: Sequence[Fault]
) -> tuple[Cohort, Cohort]:
    """Return who is invited to a round, and what becomes of them.

    Args:
        key: the run's.
        number: of the round, from 0.
        data: all clients' examples.
        participation: chooses who is invited.
        faults: what becomes of them.

    Raises:
        TypeError: for one that returns no cohort, or rows that are no integers.
        ValueError: for a cohort of more than all clients, or with other shapes.
    """
    who, _, _, luck = round_keys(key, number)
    invited = _checked_cohort("a participation", participation(who, data), data)
    return invited, apply_faults(faults, luck, number, data, invited)


def _checked_cohort(what: str, cohort: Cohort, data: FederatedData) -> Cohort:
    """Return a cohort as arrays of the round's types."""
    if not isinstance(cohort, Cohort):
        raise TypeError(f"expected {what} that return a Cohort(row, present), got {describe(cohort)}")
    row, present, clients = jnp.asarray(cohort.row), jnp.asarray(cohort.present), data.size.shape[0]
    if not jnp.issubdtype(row.dtype, jnp.integer):
        raise TypeError(f"expected {what} that return rows as integers, got {row.dtype}")
    if row.ndim != 1 or present.shape != row.shape or row.shape[0] > clients:
        raise ValueError(
            f"expected {what} that return row and present of one length of at most all {clients} clients, got "
            f"{row.shape} and {present.shape}"
        )
    return cohort._replace(row=row.astype(jnp.int32), present=present.astype(bool))


def apply_faults(faults: Sequence[Fault], key: Key, number: Array, data: FederatedData, cohort: Cohort) -> Cohort:
    """Apply faults one after another, each with its own key."""
    for fault, own in zip(faults, jax.random.split(key, max(1, len(faults))), strict=False):
        cohort = _checked_cohort("faults", fault(own, number, data, cohort), data)
    return cohort


def _struck(key: Key, data: FederatedData, cohort: Cohort, probability: float | Array) -> Array:
    """Draw who is struck, `(cohort,)` bool."""
    draw = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))
    return draw(data.id[cohort.row]) < probability
