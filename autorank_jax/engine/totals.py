"""What a round adds up: sums over clients, without what rounding would take from them, and what is noted of each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from autorank_jax.adapters.lora import pad_like
from autorank_jax.engine.packing import pack, unpack
from autorank_jax.types import Array, PyTree, State, Sums


class Totals(NamedTuple):
    """What a round adds up; while a level of a packed round trains, `sums` are vectors that hold the tally too."""

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


class Tally(NamedTuple):
    """How much was trained: of each lane, `(lanes, ...)`, or of all."""

    losses: Array  # (..., max_epochs + 1) summed losses by epoch
    examples: Array
    steps: Array


def no_totals(blank: Sums, state: State) -> Totals:
    """Return the totals of nobody.

    Args:
        blank: shapes of a client's summand.
        state: before the round.
    """
    dtype = jnp.result_type(float)
    return Totals(
        sums=(nothing := zeros(blank)),
        lost=_no_loss(nothing),
        epoch_losses=state.epoch_losses,
        epochs=state.epochs,
        clients=state.clients,
        finite=jnp.ones(state.epochs.shape, bool),
        loss=jnp.zeros((), dtype),
        examples=jnp.zeros((), dtype),
        steps=jnp.zeros((), jnp.int32),
        lane_steps=jnp.zeros((), jnp.int32),
    )


def open_level(totals: Totals, blank: Sums, *, packed: bool) -> Totals:
    """Return the same totals with sums of nobody, in the shapes of a level's summands."""
    nothing = zeros(blank)
    if packed:
        nothing = pack((nothing, zeros(_tally_like(totals))))
    return totals._replace(sums=nothing, lost=_no_loss(nothing))


def close_level(totals: Totals, before: Totals, blank: Sums, *, packed: bool) -> Totals:
    """Return the totals after a level, whose sums are added to those `before`, padded with zeros."""
    sums = totals.sums
    if packed:
        sums, tally = unpack(totals.sums, (blank, _tally_like(totals)))
        totals = _count(totals, tally)
    total = jax.tree.map(jnp.add, before.sums, pad_like(sums, before.sums))
    return totals._replace(sums=total, lost=_no_loss(total))


def add_lanes(totals: Totals, sums: Sums, tally: Tally, *, packed: bool) -> Totals:
    """Add summands and tallies of lanes, zeros where a lane counts nothing."""
    if packed:
        sums = jax.vmap(pack)((sums, tally))
    else:
        totals = _count(totals, tally)
    sums = jax.tree.map(lambda s: jnp.sum(s, axis=0, dtype=s.dtype), sums)
    summed, lost = (jax.tree.map(part, totals.sums, totals.lost, sums) for part in (_with_lost, _lost))
    return totals._replace(sums=summed, lost=lost)


def zeros(shapes: PyTree, *leading: int) -> PyTree:
    """Return zeros in the shapes of a tree, with leading axes before them."""
    return jax.tree.map(lambda s: jnp.zeros((*leading, *s.shape), s.dtype), shapes)


def _tally_like(totals: Totals) -> Tally:
    losses = totals.epoch_losses
    columns = jax.ShapeDtypeStruct((losses.shape[1] + 1,), losses.dtype)
    return Tally(columns, *(jax.ShapeDtypeStruct((), leaf.dtype) for leaf in (totals.examples, totals.steps)))


def _count(totals: Totals, tally: Tally) -> Totals:
    return totals._replace(
        loss=totals.loss + jnp.sum(tally.losses).astype(totals.loss.dtype),
        examples=totals.examples + jnp.sum(tally.examples),
        steps=totals.steps + jnp.sum(tally.steps, dtype=jnp.int32),
    )


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


def _no_loss(sums: Sums) -> Sums:
    return jax.tree.map(lambda total: jnp.zeros_like(total) if total.ndim <= 1 else jnp.zeros((), total.dtype), sums)
