"""Equal blocks that an NNX model keeps in a list, run as one scan: programs then do not grow with their number.

`scan_lists` puts `ScannedBlocks` in place of the list. The model's own loop stays as it is: its first block runs the
scan over all of them, and the others hand on what that returned. So the loop has to hand each block what the one before
returned, and nothing else that differs; this is checked whenever the model runs.
"""

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from autorank_jax.adapters.selection import matches
from autorank_jax.types import Array

STACK = "{}"
"""Stands in paths where the number of a block was."""


class _Call(NamedTuple):
    """What a block is called with."""

    carried: Any  # its first argument
    rest: Any  # all others
    rebuild: Callable[[Any], tuple[tuple, dict]]  # arguments of a call with another first one


class _Progress(NamedTuple):
    """How far the loop of a model has come."""

    number: int  # of the block that was called last
    outputs: Any  # of the scan
    rest: Any  # what the first block was called with, but for its first argument


_progress: "weakref.WeakKeyDictionary[ScannedBlocks, _Progress]" = weakref.WeakKeyDictionary()


class ScannedBlocks(nnx.Module):
    """Stands where a model kept a list of blocks, and runs them in one scan over their stacked parameters."""

    def __init__(self, block: nnx.Module, count: int, name: str) -> None:
        setattr(self, STACK, block)
        self.count = count
        self.name = name

    def __len__(self) -> int:
        """Return the number of blocks."""
        return self.count

    def __getitem__(self, number: int | slice) -> Any:
        """Return a block, or a list of them."""
        places = range(self.count)[number]
        return [_Place(self, one) for one in places] if isinstance(places, range) else _Place(self, places)

    def __iter__(self) -> Iterator[Any]:
        """Return the blocks, in order."""
        return iter(self[:])

    def run(self, number: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a block: the first runs all of them."""
        call = _parts(args, kwargs)
        if number == 0:
            _progress[self] = _Progress(0, self._scan(call), call.rest)
        else:
            before = self._check_call(number, call)
            _progress[self] = before._replace(number=number)
        return _progress[self].outputs

    def check_end(self) -> None:
        """Raise `ValueError` if the model has called some of its blocks and not others."""
        progress = _progress.get(self)
        if progress is not None and progress.number != self.count - 1:
            raise self._refusal(f"calls all {self.count} blocks", f"{progress.number + 1} calls")

    def _scan(self, call: _Call) -> Any:
        graph, state = nnx.split(getattr(self, STACK))
        given, structure = jax.tree.flatten(call.carried)
        returned: list[Any] = []

        def body(carry: list[Array], state: Any) -> tuple[list[Array], None]:
            args, kwargs = call.rebuild(jax.tree.unflatten(structure, carry))
            outputs, built = jax.tree.flatten(nnx.merge(graph, state)(*args, **kwargs))
            returned.append(built)
            self._check_outputs(carry, outputs)
            return outputs, None

        outputs, _ = lax.scan(body, [jnp.asarray(leaf) for leaf in given], state)
        return jax.tree.unflatten(returned[-1], outputs)

    def _check_outputs(self, taken: list[Array], outputs: list[Any]) -> None:
        before, after = ([(jnp.shape(x), jnp.result_type(x).name) for x in leaves] for leaves in (taken, outputs))
        if before != after:
            said = ["; ".join(f"{dtype} {shape}" for shape, dtype in leaves) for leaves in (after, before)]
            raise self._refusal("has blocks that return what they take as their first argument", " for ".join(said))

    def _check_call(self, number: int, call: _Call) -> _Progress:
        """Raise `ValueError` unless a block is called as one in a scan is; return what was before."""
        before = _progress.get(self)
        if before is None or before.number != number - 1:
            last = "no other" if before is None else f"number {before.number}"
            raise self._refusal("calls its blocks in order, each once", f"number {number} after {last}")
        if not _same(call.carried, jax.tree.leaves(before.outputs)):
            got = "something else, probably changed in between"
            raise self._refusal("hands each block what the one before returned", got)
        if not _same(call.rest, jax.tree.leaves(before.rest)):
            raise self._refusal("hands all blocks the same other arguments", "some that differ")
        return before

    def _refusal(self, expected: str, got: str) -> ValueError:
        return ValueError(f"scan_blocks: expected a model that {expected}, got {got} in {self.name!r}: leave it out")


class _Place:
    """One of the scanned blocks, as the model's loop sees it."""

    def __init__(self, blocks: ScannedBlocks, number: int) -> None:
        self._blocks, self._number = blocks, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._blocks.run(self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return a setting, which all blocks share; their parts are stacked, and no block's own."""
        value = getattr(getattr(self._blocks, STACK), name)
        if value is not None and not isinstance(value, bool | int | float | str):
            raise self._blocks._refusal("only calls its blocks", f"{name!r} of block {self._number}")
        return value


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


def check_scans(model: nnx.Module) -> None:
    """Raise `ValueError` if a model that has run left out some blocks of a scan."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, ScannedBlocks):
            module.check_end()


def name_of(path: tuple) -> str:
    """Return the path of a variable or module as text."""
    return "/".join(map(str, path))


def _lists(model: nnx.Module) -> dict[tuple, list[nnx.Module]]:
    """Return the blocks of every list by its path."""
    found: dict[tuple, dict[int, nnx.Module]] = {}
    for path, module in nnx.iter_modules(model):
        if path and isinstance(path[-1], int):
            found.setdefault(path[:-1], {})[path[-1]] = module
    return {path: [some[n] for n in sorted(some)] for path, some in found.items() if len(some) > 1}


def _replace(model: nnx.Module, path: tuple) -> None:
    """Put a scan in the place of a list."""
    name = name_of(path)
    parent = functools.reduce(_child, path[:-1], model)
    blocks = list(_child(parent, path[-1]))
    for block in blocks[1:]:
        _forget_number(block, blocks[0])
    parts = [nnx.split(block) for block in blocks]
    flats = [{p: v.get_value() for p, v in nnx.to_flat_state(state)} for _, state in parts]
    for number, (block, flat) in enumerate(zip(blocks, flats, strict=True)):
        _check_equal(name, number, (blocks[0], flats[0]), (block, flat))
        if parts[number][0] != parts[0][0]:
            raise ValueError(_unequal(name, number, _differing(parts[number][0], parts[0][0])))
    before = len(nnx.to_flat_state(nnx.split(model)[1]))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in parts))
    scan = ScannedBlocks(nnx.merge(parts[0][0], stacked), len(blocks), str(path[-1]))
    if hasattr(blocks[0], "qwix_path"):  # under which it looks for its rules while this runs
        _put(scan, "qwix_path", blocks[0].qwix_path[:-1])
    _put(parent, path[-1], scan)
    if len(nnx.to_flat_state(nnx.split(model)[1])) != before - (len(blocks) - 1) * len(flats[0]):
        raise ValueError(f"scan_blocks: expected blocks with parameters of their own, got shared ones in {name!r}")


def _forget_number(block: nnx.Module, first: nnx.Module) -> None:
    """Let modules of a block have the paths that qwix notes in those of the first."""
    paths = {path: vars(module).get("qwix_path") for path, module in nnx.iter_modules(first)}
    for path, module in nnx.iter_modules(block):
        if paths.get(path) is not None:
            _put(module, "qwix_path", paths[path])


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
    return parent[part] if isinstance(part, int) else getattr(parent, part)


def _put(parent: Any, part: Any, value: Any) -> None:
    if isinstance(part, int):
        parent[part] = value
    else:
        setattr(parent, part, value)


def _parts(args: tuple, kwargs: dict[str, Any]) -> _Call:
    """Take the first argument from the others."""
    if args:
        return _Call(args[0], (args[1:], kwargs), lambda carried: ((carried, *args[1:]), kwargs))
    if not kwargs:
        raise ValueError("scan_blocks: expected blocks that are called with an argument, got none")
    name = next(iter(kwargs))
    return _Call(kwargs[name], (name, {**kwargs, name: None}), lambda carried: ((), {**kwargs, name: carried}))


def _same(given: Any, others: list[Any]) -> bool:
    """Say whether leaves are the same arrays and equal settings."""
    leaves = jax.tree.leaves(given)
    return len(leaves) == len(others) and all(
        one is other or (not hasattr(one, "shape") and not hasattr(other, "shape") and one == other)
        for one, other in zip(leaves, others, strict=True)
    )
