"""Sums and finite checks of whole trees in few vectors: a kernel for many leaves, not one for each.

A GPU starts kernels one by one, some microseconds each, whatever they compute; finite checks and sums of many small
leaves are little else. A CPU gains nothing by it, so there leaves stay apart. Vectors are never written to memory where
a compiler fuses the concatenation into what reads it, which takes code for every leaf: hence not too many in one.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from autorank_jax.engine.totals import LEAF_BY_LEAF, Summation, Totals, Turn, add_lanes, add_level, no_loss, zeros
from autorank_jax.types import Array, PyTree, Sums

T = TypeVar("T")

Pack = bool | Literal["auto"]
"""Whether finite checks and sums take whole trees in few vectors; "auto": everywhere but on a CPU."""

_MOST = 16  # leaves in a vector


class PackedTotals(NamedTuple):
    """What the turns of one level are added to."""

    vectors: tuple[Array, ...]  # sums, losses by epoch and examples
    lost: tuple[Array, ...]
    records: Array  # (clients, max_epochs + 2) mean losses by epoch, epochs, 1 where finite
    clients: PyTree


def choose_summation(pack: Pack, mesh: Mesh | None) -> Summation:
    """Return how to add up on the devices of a mesh, or on JAX's default device."""
    if pack == "auto":
        pack = (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform) != "cpu"
    return PACKED if pack else LEAF_BY_LEAF


def pack(tree: PyTree) -> tuple[Array, ...]:
    """Write the leaves of a tree one after the other into vectors, each of one type."""
    leaves = jax.tree.leaves(tree)
    return tuple(jnp.concatenate([leaves[n].reshape(-1) for n in group]) for group in _groups(leaves))


def unpack(vectors: tuple[Array, ...], like: T) -> T:
    """Read a tree out of what `pack` made.

    Args:
        vectors: one dimension each.
        like: arrays or `ShapeDtypeStruct`s in structure, shapes and types of the packed tree.
    """
    leaves, structure = jax.tree.flatten(like)
    found = dict[int, Array]()
    for group, vector in zip(_groups(leaves), vectors, strict=True):
        begin = 0
        for number in group:
            end = begin + math.prod(leaves[number].shape)
            found[number], begin = vector[begin:end].reshape(leaves[number].shape), end
    return jax.tree.unflatten(structure, [found[number] for number in range(len(leaves))])


def _groups(leaves: list) -> Iterator[list[int]]:
    """Yield the numbers of leaves that share a vector."""
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves):
        same = [number for number, leaf in enumerate(leaves) if leaf.dtype == dtype]
        yield from (same[begin : begin + _MOST] for begin in range(0, len(same), _MOST))


def _all_finite(tree: PyTree) -> Array:
    finite = pack(jax.tree.map(jnp.isfinite, tree))
    return jnp.all(jnp.array([jnp.all(vector) for vector in finite], bool))


def _begin(totals: Totals, blank: Sums) -> PackedTotals:
    vectors = pack(zeros(_summed(totals, blank)))
    columns = [totals.epoch_losses, *(column[:, None] for column in (totals.epochs, totals.finite))]
    records = jnp.concatenate([column.astype(totals.epoch_losses.dtype) for column in columns], axis=1)
    return PackedTotals(vectors, no_loss(vectors), records, totals.clients)


def _add(totals: PackedTotals, turn: Turn) -> PackedTotals:
    parts = jax.vmap(pack)((turn.sums, turn.losses, turn.examples))
    vectors, lost = add_lanes(totals.vectors, totals.lost, parts)
    epochs = turn.mean_losses.shape[1]
    columns = [turn.mean_losses, *(column[:, None] for column in (turn.epochs, turn.finite))]
    values = jnp.concatenate([column.astype(totals.records.dtype) for column in columns], axis=1)
    number = jnp.arange(epochs + 2, dtype=jnp.int32)[None, :]
    row = jnp.where(number <= epochs, turn.whole_row[:, None], turn.row[:, None])
    return PackedTotals(
        vectors,
        lost,
        totals.records.at[row, number].set(values, mode="drop"),
        jax.tree.map(lambda a, k: a.at[turn.good_row].set(k, mode="drop"), totals.clients, turn.kept),
    )


def _end(totals: PackedTotals, before: Totals, blank: Sums) -> Totals:
    sums, losses, examples = unpack(totals.vectors, _summed(before, blank))
    return before._replace(
        **add_level(before.sums, sums),
        epoch_losses=totals.records[:, :-2],
        epochs=totals.records[:, -2].astype(before.epochs.dtype),
        clients=totals.clients,
        finite=totals.records[:, -1] > 0,
        loss=before.loss + jnp.sum(losses).astype(before.loss.dtype),
        examples=before.examples + examples,
    )


def _summed(totals: Totals, blank: Sums) -> tuple[Sums, Any, Any]:
    """Return the shapes of what is summed over lanes: summands, losses by epoch, examples."""
    losses = totals.epoch_losses
    by_epoch = jax.ShapeDtypeStruct((losses.shape[1] + 1,), losses.dtype)
    return blank, by_epoch, jax.ShapeDtypeStruct((), totals.examples.dtype)


PACKED = Summation(_all_finite, _begin, _add, _end)
"""Whole trees in few vectors: what suits a GPU."""
