"""Blocks of an NNX model's list that run as one scan, as the model's own loop sees them.

The loop stays as it is: its last block runs the scan over all of them, and those before return what stands for their
outputs, `Handed`, which nothing but the next block takes. So a loop has to hand each block what the one before
returned, and nothing else that differs.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from autorank_jax.interface import FOREIGN_FAILURES, describe
from autorank_jax.types import Array

STACK = "{}"
"""Stands in paths where the number of a block was."""


class _Call(NamedTuple):
    """What a block is called with."""

    carried: Any  # its first argument
    rest: list[Any]  # leaves of all others
    structure: Any  # of the others, as they were when it was called
    rebuild: Callable[[Any], tuple[tuple, dict]]  # arguments of a call with another first one


class Handed:
    """Stands for an array that one scanned block hands to the next: it is there only inside of the scan."""

    def __init__(self, run: "_Run", number: int, place: int) -> None:
        self._run, self._number, self._place = run, number, place

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the array has."""
        return tuple(self._run.shapes[self._place].shape)

    @property
    def dtype(self) -> Any:
        """The type that its numbers have."""
        return self._run.shapes[self._place].dtype

    @property
    def ndim(self) -> int:
        """The number of its axes."""
        return len(self.shape)

    def refusal(self) -> ValueError:
        """Return what to raise where it is used otherwise."""
        return self._run.blocks.refusal("hands what a block returns to the next one alone", "another use of it")

    def __getattr__(self, name: str) -> Any:
        raise self.refusal()


def _refuse(self: Handed, *_: Any, **__: Any) -> Any:
    raise self.refusal()


_OPERATIONS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_USES = (
    "neg",
    "pos",
    "abs",
    "invert",
    "lt",
    "le",
    "gt",
    "ge",
    "getitem",
    "iter",
    "len",
    "bool",
    "float",
    "int",
    "complex",
)
for _name in (*_OPERATIONS, *(f"r{name}" for name in _OPERATIONS), *_USES, "index", "array", "jax_array"):
    setattr(Handed, f"__{_name}__", _refuse)


class _Run(NamedTuple):
    """One pass of the model's loop over its blocks."""

    blocks: "ScannedBlocks"
    call: _Call  # of the first block
    structure: Any  # of what a block returns
    shapes: list[Any]  # of its leaves


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
        """Call a block: the last runs all of them, those before hand on what stands for their outputs."""
        call = _parts(args, kwargs, self)
        run = self._begin(call) if number == 0 else self._go_on(number, call)
        if number == self.count - 1:
            return self._scan(run)
        handed = [Handed(run, number, place) for place in range(len(run.shapes))]
        return jax.tree.unflatten(run.structure, handed)

    def refusal(self, expected: str, got: str) -> ValueError:
        """Return what to raise for a model, or blocks, that a scan would change."""
        return ValueError(f"scan_blocks: expected a model that {expected}, got {got} in {self.name!r}: leave it out")

    def _begin(self, call: _Call) -> _Run:
        """Find out what a block returns."""
        if any(isinstance(leaf, Handed) for leaf in jax.tree.leaves(call.carried)):
            raise self.refusal("calls its blocks in order, each once", "number 0 after another")
        graph, state = nnx.split(getattr(self, STACK))
        found: list[Any] = []

        def first(carry: Any, state: Any) -> list[Any]:
            args, kwargs = call.rebuild(carry)
            outputs, structure = jax.tree.flatten(self._call(graph, state, args, kwargs)[0])
            found.append(structure)
            return outputs

        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), state)
        shapes = jax.eval_shape(lambda carry, state: self._arrays(first(carry, state)), call.carried, one)
        taken, given = ([(x.shape, x.dtype.name) for x in leaves] for leaves in (self._taken(call), shapes))
        if taken != given:
            said = ["; ".join(f"{dtype} {shape}" for shape, dtype in leaves) or "nothing" for leaves in (given, taken)]
            raise self.refusal("has blocks that return what they take as their first argument", " for ".join(said))
        return _Run(self, call, found[-1], shapes)

    def _go_on(self, number: int, call: _Call) -> _Run:
        """Return the loop that a later block is called in."""
        handed = jax.tree.leaves(call.carried)
        first = next((leaf for leaf in handed if isinstance(leaf, Handed)), None)
        if first is None or first._run.blocks.name != self.name:
            raise self.refusal("hands each block what the one before returned", f"something else for number {number}")
        run, places = first._run, [first._number, *range(len(first._run.shapes))]
        if [number - 1, *(h._place for h in handed if isinstance(h, Handed) and h._run is run)] != places:
            raise self.refusal("calls its blocks in order, each once", f"number {number} after {first._number}")
        if not _same(call, run.call):
            raise self.refusal("hands all blocks the same other arguments", "some that differ")
        return run

    def _scan(self, run: _Run) -> Any:
        block = getattr(self, STACK)
        graph, state = nnx.split(block)
        structure = jax.tree.structure(run.call.carried)

        def body(carry: list[Array], state: Any) -> tuple[list[Array], Any]:
            args, kwargs = run.call.rebuild(jax.tree.unflatten(structure, carry))
            outputs, counts = self._call(graph, state, args, kwargs)
            return jax.tree.leaves(outputs), counts

        try:
            outputs, counts = lax.scan(body, self._taken(run.call), state, length=self.count)
        except FOREIGN_FAILURES as error:  # what a block alone does not raise
            said = (str(error).strip().splitlines() or [""])[0][:200]
            if said.startswith("scan_blocks"):
                raise
            raise self.refusal("has blocks that can run in a scan", f"{type(error).__name__} ({said})") from error
        nnx.update(block, counts)
        return jax.tree.unflatten(run.structure, outputs)

    def _call(self, graph: Any, state: Any, args: tuple, kwargs: dict) -> tuple[Any, Any]:
        """Call one block; return what it returns, and how far its random streams have come."""
        block = nnx.merge(graph, state)
        before = leaves_of(block)
        outputs = block(*args, **kwargs)
        counts = nnx.state(block, nnx.RngCount)
        written = written_since(before, block) - {path for path, _ in nnx.to_flat_state(counts)}
        if written:
            raise self.refusal("has blocks that keep no state", f"{name_of(min(written, key=str))!r} written")
        return outputs, counts

    def _taken(self, call: _Call) -> list[Array]:
        return self._arrays(jax.tree.leaves(call.carried))

    def _arrays(self, leaves: list[Any]) -> list[Array]:
        odd = [leaf for leaf in leaves if isinstance(leaf, Handed | str) or callable(leaf)]
        if odd:
            raise self.refusal("hands its blocks arrays", describe(odd[0]))
        return [jnp.asarray(leaf) for leaf in leaves]


class _Place:
    """One of the scanned blocks, as the model's loop sees it."""

    def __init__(self, blocks: ScannedBlocks, number: int) -> None:
        vars(self).update(_blocks=blocks, _number=number)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """What it stands for, so that `isinstance` says so."""
        return type(getattr(vars(self)["_blocks"], STACK))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._blocks.run(self._number, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return a setting, which all blocks share; their parts are stacked, and no block's own."""
        block = getattr(self._blocks, STACK)
        value = vars(block)[name] if name in vars(block) else inspect.getattr_static(type(block), name)
        if value is not None and not isinstance(value, bool | int | float | str):
            raise self._refusal(f"{name!r}")
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        raise self._refusal(f"{name!r} set")

    def __iter__(self) -> Iterator[Any]:
        raise self._refusal("a loop over the parts")

    def __getitem__(self, number: Any) -> Any:
        raise self._refusal("parts")

    def _refusal(self, got: str) -> ValueError:
        return self._blocks.refusal("only calls its blocks", f"{got} of block {self._number}")


def check_outputs(outputs: Any) -> None:
    """Raise `ValueError` if a model returns what a scanned block handed to nobody."""
    for leaf in jax.tree.leaves(outputs):
        if isinstance(leaf, Handed):
            raise leaf.refusal()


def leaves_of(module: nnx.Module) -> dict[tuple, list[Any]]:
    """Return the arrays of a module's variables by path."""
    return {path: jax.tree.leaves(variable) for path, variable in nnx.to_flat_state(nnx.state(module))}


def written_since(before: dict[tuple, list[Any]], module: nnx.Module) -> set[tuple]:
    """Return the paths of variables that hold other arrays than before, or were not there."""
    return {
        path
        for path, leaves in leaves_of(module).items()
        if [id(leaf) for leaf in leaves] != [id(leaf) for leaf in before.get(path, [None])]
    }


def name_of(path: tuple) -> str:
    """Return the path of a variable or module as text."""
    return "/".join(map(str, path))


def _parts(args: tuple, kwargs: dict[str, Any], blocks: ScannedBlocks) -> _Call:
    """Take the first argument from the others."""
    if any(isinstance(leaf, nnx.Rngs) for leaf in jax.tree.leaves((args, kwargs), is_leaf=_is_rngs)):
        raise blocks.refusal("lets its blocks keep their random streams", "an nnx.Rngs as argument")
    if not args and not kwargs:
        raise blocks.refusal("calls its blocks with an argument", "none")
    name = "" if args else next(iter(kwargs))
    rest, structure = jax.tree.flatten((args[1:], {key: value for key, value in kwargs.items() if key != name}))
    if name:
        return _Call(kwargs[name], rest, (structure, name), lambda carried: ((), {**kwargs, name: carried}))
    return _Call(args[0], rest, (structure, name), lambda carried: ((carried, *args[1:]), kwargs))


def _is_rngs(value: Any) -> bool:
    return isinstance(value, nnx.Rngs)


def _same(call: _Call, first: _Call) -> bool:
    """Say whether other arguments are the same arrays and equal settings."""
    return call.structure == first.structure and all(
        one is other or (not hasattr(one, "shape") and not hasattr(other, "shape") and one == other)
        for one, other in zip(call.rest, first.rest, strict=True)
    )
