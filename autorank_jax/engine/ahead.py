"""Functions compiled ahead, which do not copy what they hand on."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp

from autorank_jax.interface import checked

T = TypeVar("T")


class Ahead(Generic[T]):
    """A function compiled for arguments of some shapes."""

    def __init__(self, function: Callable[..., T], *arguments: Any) -> None:
        """Compile it."""
        changed, self._whole = without_copies(function)
        self._compiled = jax.jit(changed).lower(*arguments).compile()

    def __call__(self, *arguments: Any) -> T:
        """Run it."""
        arguments = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), arguments)
        return self._whole(arguments, self._compiled(*arguments))

    def memory_analysis(self) -> Any:
        """Return the bytes that the program needs, None where the backend does not tell."""
        return self._compiled.memory_analysis()


@checked
def compile_ahead(function: Callable[..., Any], *arguments: Any) -> "Ahead[Any]":
    """Compile a function, such as a round, for arguments like these.

    A jitted function copies arrays that it returns as they came, unless they are donated: a round of an 8B model its
    base of 16 GB. This one hands on the arrays themselves, so neither arguments nor results may be donated or deleted
    while the others are used.

    Args:
        function: of pytrees of arrays, to pytrees of arrays. One that is jitted is taken without its `jit`, and that
            with its options.
        *arguments: arrays, or a `jax.ShapeDtypeStruct` for each.

    Returns:
        The compiled function, of positional arguments in these shapes, types and structure; its `memory_analysis()`
        tells the bytes of its program. It runs outside of other transformations.

    Raises:
        TypeError: by JAX, when it is called with other arguments.
    """
    if hasattr(function, "lower") and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return Ahead(function, *arguments)


def without_copies(function: Callable[..., T]) -> tuple[Callable[..., list[Any]], Callable[..., T]]:
    """Take apart a function that is traced once: what it makes, and how all that it returns is put together.

    Returns:
        A function of the same arguments that returns the leaves that are no argument as it came, and, once that was
        traced, one of `(arguments, leaves)` that returns what the function does.
    """
    handed: list[int | None] = []  # of each result, the number of the leaf of the arguments that it is
    structure: Any = None

    def changed(*arguments: Any) -> list[Any]:
        nonlocal structure
        numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(arguments))}
        results, structure = jax.tree.flatten(function(*arguments))
        handed[:] = [numbers.get(id(result)) for result in results]
        return [result for result, number in zip(results, handed, strict=True) if number is None]

    def whole(arguments: Any, made: list[Any]) -> T:
        given, new = jax.tree.leaves(arguments), iter(made)
        results = [next(new) if number is None else given[number] for number in handed]
        return jax.tree.unflatten(structure, results)

    return changed, whole
