"""Trees of arrays in few vectors: what is done to every leaf alike then takes one kernel, not one for each leaf.

A GPU starts kernels one by one, some microseconds each, whatever they compute; finite checks and sums of many small
leaves are little else. A CPU gains nothing by it and reads everything once more, so there leaves stay apart.
"""

import math
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from autorank_jax.types import Array, PyTree

T = TypeVar("T")

Pack = bool | Literal["auto"]
"""Whether finite checks and sums take whole trees in one vector; "auto": everywhere but on a CPU."""


def resolve_pack(pack: Pack, mesh: Mesh | None) -> bool:
    """Return whether to pack on the devices of a mesh, or on JAX's default device."""
    if pack != "auto":
        return pack
    return (jax.default_backend() if mesh is None else mesh.devices.flat[0].platform) != "cpu"


def pack(tree: PyTree) -> dict[str, Array]:
    """Write the leaves of a tree one after the other, a vector for each type."""
    leaves = jax.tree.leaves(tree)
    types = list(dict.fromkeys(str(leaf.dtype) for leaf in leaves))
    return {name: _join([leaf for leaf in leaves if str(leaf.dtype) == name]) for name in types}


def unpack(packed: dict[str, Array], like: T) -> T:
    """Read a tree out of what `pack` made.

    Args:
        packed: vectors by type.
        like: a tree of arrays or `ShapeDtypeStruct`s with the structure, shapes and types of the packed one.
    """
    leaves, structure = jax.tree.flatten(like)
    ends, found = dict.fromkeys(packed, 0), []
    for leaf in leaves:
        name = str(leaf.dtype)
        begin, ends[name] = ends[name], ends[name] + math.prod(leaf.shape)
        found.append(packed[name][begin : ends[name]].reshape(leaf.shape))
    return jax.tree.unflatten(structure, found)


def all_finite(tree: PyTree, *, packed: bool) -> Array:
    """Return whether every number of a tree is finite, () bool."""
    finite = [jnp.isfinite(leaf) for leaf in jax.tree.leaves(tree)]
    if packed and finite:
        return jnp.all(_join(finite))
    return jnp.all(jnp.array([jnp.all(leaf) for leaf in finite], bool))


def _join(leaves: list[Array]) -> Array:
    return jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
