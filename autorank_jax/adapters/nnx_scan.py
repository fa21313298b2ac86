"""Equal blocks that an NNX model keeps in a list, stacked for one scan: programs then do not grow with their number."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from autorank_jax.adapters.nnx_blocks import STACK, ScannedBlocks, name_of
from autorank_jax.adapters.selection import matches
from autorank_jax.interface import describe
from autorank_jax.types import Array


def scan_lists(model: nnx.Module, patterns: str | tuple[str, ...]) -> nnx.Module:
    """Return a model whose lists of blocks run as scans, with `{}` in paths for the number of the block.

    Args:
        model: it is not changed.
        patterns: of the paths of lists; none: the model as it is.

    Raises:
        ValueError: if a pattern matches no list of two blocks or more, or blocks are not equally built, or share
            parameters.
    """
    globs = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not globs:
        return model
    model = nnx.clone(model)
    lists = _lists(model)
    for glob in globs:
        if not any(matches(name_of(path), glob) for path in lists):
            known = sorted(map(name_of, lists))
            raise ValueError(f"expected scan_blocks patterns of lists of blocks, got {glob!r}: there are {known}")
    chosen = [path for path in lists if any(matches(name_of(path), glob) for glob in globs)]
    for path in sorted(chosen, key=len, reverse=True):  # lists inside of other lists first
        _replace(model, path)
    return model


def unstacked(flat: dict[str, Array]) -> dict[str, Array]:
    """Return leaves by the paths that they have without scans: the inverse of stacking."""
    single = {}
    for name, value in flat.items():
        depth = name.split("/").count(STACK)
        counts = jax.tree.leaves(value)[0].shape[:depth]
        for numbers in itertools.product(*map(range, counts)):
            one = jax.tree.map(lambda leaf, numbers=numbers: leaf[numbers] if numbers else leaf, value)
            single[name.format(*numbers) if depth else name] = one
    return single


def with_value(variable: Any, value: Any) -> Any:
    """Return a variable, or what stands in its place, with another value."""
    return variable.replace(value) if isinstance(variable, nnx.Variable) else value


def value_of(variable: Any) -> Any:
    """Return the array of a variable, or the array that stands in its place."""
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _lists(model: nnx.Module) -> dict[tuple, list[Any]]:
    """Return what every list of modules holds, by its path."""
    found = {}
    for path in dict.fromkeys(path[:-1] for path, _ in nnx.iter_modules(model) if path and isinstance(path[-1], int)):
        held = functools.reduce(_child, path, model)
        if isinstance(held, list | tuple | nnx.List):
            found[path] = list(held)
    return found


def _replace(model: nnx.Module, path: tuple) -> None:
    """Put a scan in the place of a list."""
    name = name_of(path)
    parent = functools.reduce(_child, path[:-1], model)
    blocks = list(_child(parent, path[-1]))
    for number, block in enumerate(blocks):
        if not isinstance(block, nnx.Module):
            raise ValueError(_unequal(name, number, describe(block)))
        _forget_number(block, blocks[0])
    parts = [nnx.split(block) for block in blocks]
    flats = [{p: value_of(v) for p, v in nnx.to_flat_state(state)} for _, state in parts]
    for number, (block, flat) in enumerate(zip(blocks, flats, strict=True)):
        _check_equal(name, number, (blocks[0], flats[0]), (block, flat))
        if parts[number][0] != parts[0][0]:
            raise ValueError(_unequal(name, number, _differing(parts[number][0], parts[0][0])))
    before = len(nnx.to_flat_state(nnx.split(model)[1]))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in parts))
    scan = ScannedBlocks(nnx.merge(parts[0][0], stacked), len(blocks), name)
    if hasattr(blocks[0], "qwix_path"):  # under which it looks for its rules while this runs
        _put(scan, "qwix_path", blocks[0].qwix_path[:-1])
    _put(parent, path[-1], scan)
    if len(nnx.to_flat_state(nnx.split(model)[1])) != before - (len(blocks) - 1) * len(flats[0]):
        raise ValueError(
            f"scan_blocks: expected blocks with parameters and random streams of their own, got shared ones in {name!r}"
        )


def _forget_number(block: nnx.Module, first: nnx.Module) -> None:
    """Let modules of a block have what tells nothing but its number, or is equal, as those of the first have it."""
    modules = dict(nnx.iter_modules(first))
    for path, module in nnx.iter_modules(block):
        if path not in modules or block is first:
            continue
        ours = vars(modules[path])
        for name, value in list(vars(module).items()):
            other = ours.get(name)
            noted = name == "qwix_path" or (name == "name" and isinstance(module, ScannedBlocks))
            if other is not None and (noted or (_told(value) is not None and _told(value) == _told(other))):
                _put(module, name, other)


def _told(value: Any) -> Any:
    """Return what a partial function consists of, which compares by identity; None for anything else."""
    return (value.func, value.args, value.keywords) if isinstance(value, functools.partial) else None


def _differing(graph: Any, first: Any) -> str:
    """Return what differs in the settings of a block."""
    for (name, value), (_, other) in zip(graph.attributes, first.attributes, strict=False):
        if value != other and hasattr(value, "value") and hasattr(other, "value"):
            return f"{name} = {value.value!r} for {other.value!r}"
    return "other settings"


def _check_equal(
    name: str, number: int, first: tuple[nnx.Module, dict[Any, Any]], other: tuple[nnx.Module, dict[Any, Any]]
) -> None:
    """Raise `ValueError`, saying where, if a block has other modules or parameters than the first."""
    kinds = [{path: type(module).__name__ for path, module in nnx.iter_modules(block)} for block, _ in (first, other)]
    shapes = [{path: _described(value) for path, value in flat.items()} for _, flat in (first, other)]
    for here, there in (kinds, shapes):
        for path in sorted({**here, **there}, key=len):
            ours, theirs = (some.get(path, "nothing") for some in (here, there))
            if ours != theirs:
                raise ValueError(_unequal(name, number, f"{theirs} for {ours}" + f" at {name_of(path)!r}" * bool(path)))


def _described(value: Any) -> str:
    """Return dtype and shape of an array, or of the parts of a quantised one."""
    return ", ".join(f"{leaf.dtype.name} {np.shape(leaf)}" for leaf in jax.tree.leaves(value))


def _unequal(name: str, number: int, got: str) -> str:
    return f"scan_blocks: expected equal blocks in {name!r}, got block {number} with {got}"


def _child(parent: Any, part: Any) -> Any:
    return parent[part] if isinstance(part, int) or isinstance(parent, Mapping) else getattr(parent, part)


def _put(parent: Any, part: Any, value: Any) -> None:
    if isinstance(part, int):
        parent[part] = value
    else:
        setattr(parent, part, value)
