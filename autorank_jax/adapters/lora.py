"""Algebra of adapters: start values, rank masks, cutting, widths, products, merging.

A client of rank `r` holds matrices whose positions `r..max_rank-1` are zero in *both* factors. Such a position has
exactly zero gradient in both factors (`∂A_j ∝ B_j = 0`, `∂B_j ∝ x A_j = 0`), so training zero-padded matrices is
training truncated ones, and ranks are data that never change a shape.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from autorank_jax.interface import checked
from autorank_jax.types import Adapter, Array, Base, Key, PyTree, Server, Task, Trainable

T = TypeVar("T")


def init_adapter(
    key: Key,
    d_in: int,
    d_out: int,
    max_rank: int,
    dtype: jnp.dtype | None = None,
    *,
    fan_in: int | None = None,
    layers: tuple[int, ...] = (),
) -> Adapter:
    """Draw the start of one adapter: `lora_a ~ U(-1/√d_in, 1/√d_in)`, `lora_b = 0`.

    The bound is Kaiming-uniform with `a = √5`, as LoRA's reference implementation has it (arXiv 2106.09685).

    Args:
        key: random key.
        d_in: input features; `kh·kw·c_in` for a convolution.
        d_out: output features.
        max_rank: rank positions.
        dtype: of the factors, JAX's default float where None.
        fan_in: inputs that are non-zero at a time, in place of `d_in` in the bound: 1 for an embedding.
        layers: leading axes of stacked layers.

    Returns:
        An adapter of shapes `(*layers, d_in, max_rank)` and `(*layers, max_rank, d_out)` whose product is zero.
    """
    dtype = dtype or jnp.result_type(float)
    bound = 1.0 / math.sqrt(fan_in or d_in)
    lora_a = jax.random.uniform(key, (*layers, d_in, max_rank), dtype, -bound, bound)
    return Adapter(lora_a, jnp.zeros((*layers, max_rank, d_out), dtype))


def key_of(key: Key, path: str) -> Key:
    """Derive the key of one adapter from its path: other layers may come and go without changing its numbers."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


@checked
def max_ranks(trainable: Trainable | Server | Task) -> dict[str, int]:
    """Return the number of rank positions of each adapter, by path in sorted order.

    Args:
        trainable: of a model, or the server or the task that it is in.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(trainable, Task):
        trainable = trainable.server
    if isinstance(trainable, Server):
        trainable = trainable.trainable
    return {path: trainable.adapters[path].lora_a.shape[-1] for path in sorted(trainable.adapters)}


def equal_ranks(widest: Mapping[str, int], clients: int, ratio: float = 1.0) -> dict[str, Array]:
    """Return one ratio of the maximum ranks for all clients, by path, `(clients,)` each.

    Rounded down, to 1 at least; a ratio of hundredths is exact, as in `ranks.ranks_from_ratios`.
    """
    factor = ratio * (1 + 1e-6)
    return {path: jnp.full(clients, max(1, int(factor * width)), jnp.int32) for path, width in widest.items()}


def level_widths(widest: Mapping[str, int], levels: int) -> list[dict[str, int]]:
    """Return the adapter widths of each rank level, `⌈R·q/levels⌉` for `q = 1..levels`, each once."""
    ladder = [{path: -(-rank * q // levels) for path, rank in widest.items()} for q in range(1, levels + 1)]
    return [widths for widths, wider in zip(ladder, [*ladder[1:], None], strict=True) if widths != wider]


def rank_level(ranks: Mapping[str, Array], levels: Sequence[Mapping[str, int]], clients: int) -> Array:
    """Return the number of the first level that is wide enough for clients' ranks in every layer, `(clients,)`."""
    level = jnp.zeros(clients, jnp.int32)
    for path, rank in ranks.items():
        edges = jnp.array([widths[path] for widths in levels[:-1]], jnp.int32)
        own = jnp.searchsorted(edges, most_of_layers(rank), side="left")
        level = jnp.maximum(level, own.astype(jnp.int32))
    return level


def layers_of(adapter: Adapter) -> tuple[int, ...]:
    """Return the leading axes of an adapter of stacked layers, `()` for one layer's."""
    return adapter.lora_a.shape[:-2]


def most_of_layers(ranks: Array) -> Array:
    """Return the largest rank of each client in a stack of layers, `(clients,)`."""
    return jnp.max(ranks, axis=tuple(range(1, ranks.ndim))) if ranks.ndim > 1 else ranks


def rank_masks(ranks: Mapping[str, Array], widths: Mapping[str, int]) -> dict[str, Array]:
    """Return `m[j] = 1[j < rank]` for each adapter.

    Args:
        ranks: by path, integer scalars, or `(*layers,)` where those of a stack differ.
        widths: by path, the length of the mask.

    Returns:
        By path, `(width,)` or `(*layers, width)` in the default float type.
    """
    return {p: below(ranks[p], widths[p]).astype(jnp.result_type(float)) for p in ranks}


def below(ranks: Array, width: int) -> Array:
    """Return which of so many rank positions lie below ranks of any shape, `(..., width)` bools."""
    positions = jax.lax.broadcasted_iota(jnp.int32, (*jnp.shape(ranks), width), jnp.ndim(ranks))
    return positions < jnp.expand_dims(ranks, -1)


def over_columns(values: Array, lora_a: Array) -> Array:
    """Shape a number per rank position, `(r,)` or `(*layers, r)`, to broadcast over the columns of `lora_a`."""
    *layers, r = values.shape
    return values.reshape((*layers, *(1,) * (lora_a.ndim - 1 - len(layers)), r))


def over_rows(values: Array, lora_b: Array) -> Array:
    """Shape a number per rank position, `(r,)` or `(*layers, r)`, to broadcast over the rows of `lora_b`."""
    *layers, r = values.shape
    return values.reshape((*layers, *(1,) * (lora_b.ndim - 2 - len(layers)), r, 1))


def per_layer(function: Callable[..., T], *operands: PyTree) -> T:
    """Apply a function of one layer's matrices to those of stacked layers, `(*layers, rows, columns)` each."""
    for _ in range(jax.tree.leaves(operands)[0].ndim - 2):
        function = jax.vmap(function)
    return function(*operands)


def cut(trainable: Trainable, masks: Mapping[str, Array]) -> Trainable:
    """Zero the rank positions of both factors that a client does not own; dense parameters stay."""
    adapters = {
        p: Adapter(
            a.lora_a * over_columns(masks[p].astype(a.lora_a.dtype), a.lora_a),
            a.lora_b * over_rows(masks[p].astype(a.lora_b.dtype), a.lora_b),
        )
        for p, a in trainable.adapters.items()
    }
    return trainable._replace(adapters=adapters)


def narrow(trainable: Trainable, widths: Mapping[str, int]) -> Trainable:
    """Keep the first `widths[path]` rank positions of each adapter: a static slice."""
    adapters = {
        p: Adapter(a.lora_a[..., : widths[p]], a.lora_b[..., : widths[p], :]) for p, a in trainable.adapters.items()
    }
    return trainable._replace(adapters=adapters)


def pad_like(tree: T, template: PyTree) -> T:
    """Append zeros to every axis that is shorter than in `template` (a tree of arrays or `ShapeDtypeStruct`s)."""

    def pad(leaf: Array, target: jax.ShapeDtypeStruct) -> Array:
        if leaf.shape == target.shape:
            return leaf
        return jnp.pad(leaf, [(0, wide - thin) for thin, wide in zip(leaf.shape, target.shape, strict=True)])

    return jax.tree.map(pad, tree, template)


def product(adapter: Adapter) -> Array:
    """Return `ΔW = lora_a @ lora_b`, `(..., d_in, d_out)`."""
    return adapter.lora_a @ adapter.lora_b


def nonzero_positions(adapter: Adapter) -> Array:
    """Return at which rank positions any number of either factor is not 0, `(..., r)` bools."""
    return jnp.any(adapter.lora_a != 0, axis=-2) | jnp.any(adapter.lora_b != 0, axis=-1)


def check_mergeable(server: Server, rule: str) -> None:
    """Raise `ValueError` unless every adapter has a base kernel into which its product can be added."""
    kernels = server.frozen.kernels if isinstance(server.frozen, Base) else {}
    missing = sorted(set(server.trainable.adapters) - set(kernels))
    if missing:
        raise ValueError(
            f"{rule} merges adapters into the base: expected server.frozen to be a Base with a kernel for every "
            f"adapter, got none for {missing} (autorank_jax.types.Base holds them; a quantised base has none)"
        )
