"""What a round adds up: sums over clients, without what rounding would take from them, and what is noted of each.

How it is added up is a `Summation`: leaf by leaf here, whole trees at once in `packing`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from autorank_jax.adapters.lora import pad_like
from autorank_jax.types import Array, PyTree, State, Sums


class Totals(NamedTuple):
    """What a round adds up."""

    sums: Sums
    lost: Sums  # what rounding took from the small leaves of `sums`, given back with the next summand
    epoch_losses: Array  # (clients, max_epochs)
    epochs: Array  # (clients,)
    clients: PyTree
    finite: Array  # (clients,) bool
    loss: Array
    examples: Array
    steps: Array
    lane_steps: Array


class Turn(NamedTuple):
    """What one turn of the lanes adds, every leaf `(lanes, ...)`; rows beyond the clients go nowhere."""

    sums: Sums  # zeros where a lane has nothing to add, here and in losses and examples
    losses: Array  # (lanes, max_epochs + 1) summed losses by epoch
    examples: Array
    row: Array  # of clients that are done
    good_row: Array  # of those that are finite
    whole_row: Array  # of those with a whole epoch
    mean_losses: Array  # (lanes, max_epochs)
    epochs: Array
    finite: Array
    kept: PyTree


class Summation(NamedTuple):
    """How finite checks and sums go over the leaves of a tree."""

    all_finite: Callable[[PyTree], Array]  # of one lane: () bool
    begin: Callable[[Totals, Sums], PyTree]  # totals, shapes of a level's summands -> what its turns are added to
    add: Callable[[PyTree, Turn], PyTree]
    end: Callable[[PyTree, Totals, Sums], Totals]  # what turns were added to, totals before the level, shapes


def no_totals(blank: Sums, state: State) -> Totals:
    """Return the totals of nobody.

    Args:
        blank: shapes of a client's summand.
        state: before the round.
    """
    dtype = jnp.result_type(float)
    return Totals(
        sums=(nothing := zeros(blank)),
        lost=no_loss(nothing),
        epoch_losses=state.epoch_losses,
        epochs=state.epochs,
        clients=state.clients,
        finite=jnp.ones(state.epochs.shape, bool),
        loss=jnp.zeros((), dtype),
        examples=jnp.zeros((), dtype),
        steps=jnp.zeros((), jnp.int32),
        lane_steps=jnp.zeros((), jnp.int32),
    )


def zeros(shapes: PyTree, *leading: int) -> PyTree:
    """Return zeros in the shapes of a tree, with leading axes before them."""
    return jax.tree.map(lambda s: jnp.zeros((*leading, *s.shape), s.dtype), shapes)


def add_lanes(sums: PyTree, lost: PyTree, parts: PyTree) -> tuple[PyTree, PyTree]:
    """Add the parts of all lanes to running sums, and return them with what they lost."""
    parts = jax.tree.map(lambda part: jnp.sum(part, axis=0), parts)
    summed, lost = (jax.tree.map(function, sums, lost, parts) for function in (_with_lost, _lost))
    return summed, lost


def add_level(total: Sums, sums: Sums) -> dict[str, Sums]:
    """Return the sums of all levels with those of one more, padded with zeros, as fields of `Totals`."""
    total = jax.tree.map(jnp.add, total, pad_like(sums, total))
    return {"sums": total, "lost": no_loss(total)}


def no_loss(sums: Sums) -> Sums:
    """Return what sums lost that are exact."""
    return jax.tree.map(lambda total: jnp.zeros_like(total) if total.ndim <= 1 else jnp.zeros((), total.dtype), sums)


def _with_lost(total: Array, lost: Array, summand: Array) -> Array:
    """Add to a running total what it lost before (Kahan 1965): a million float32 weights of 37 would lose 1.5 %.

    Only leaves up to a vector are worth it: denominators. Matrices hold differences of either sign.
    """
    return total + (summand - lost) if total.ndim <= 1 else total + summand


def _lost(total: Array, lost: Array, summand: Array) -> Array:
    if total.ndim > 1:
        return lost
    corrected = summand - lost
    return ((total + corrected) - total) - corrected


def _all_finite(tree: PyTree) -> Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)], bool))


def _begin(totals: Totals, blank: Sums) -> Totals:
    nothing = zeros(blank)
    return totals._replace(sums=nothing, lost=no_loss(nothing))


def _add(totals: Totals, turn: Turn) -> Totals:
    sums, lost = add_lanes(totals.sums, totals.lost, turn.sums)
    return totals._replace(
        sums=sums,
        lost=lost,
        epoch_losses=totals.epoch_losses.at[turn.whole_row].set(turn.mean_losses, mode="drop"),
        epochs=totals.epochs.at[turn.whole_row].set(turn.epochs, mode="drop"),
        clients=jax.tree.map(lambda a, k: a.at[turn.good_row].set(k, mode="drop"), totals.clients, turn.kept),
        finite=totals.finite.at[turn.row].set(turn.finite, mode="drop"),
        loss=totals.loss + jnp.sum(turn.losses).astype(totals.loss.dtype),
        examples=totals.examples + jnp.sum(turn.examples),
    )


def _end(totals: Totals, before: Totals, blank: Sums) -> Totals:  # noqa: ARG001
    return totals._replace(**add_level(before.sums, totals.sums))


LEAF_BY_LEAF = Summation(_all_finite, _begin, _add, _end)
"""Every leaf by itself: what suits a CPU."""
