"""Quick compilation of what runs once or twice."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])
_OPTIONS = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
"""They shorten compilation on a CPU and, unlike level 0, leave the bits of what is computed."""


def jit_once(fn: F) -> F:
    """Compile a function that runs too rarely for its own speed to matter, quickly; values are those of `jax.jit`."""

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        return jitted()(*args)

    @functools.cache
    def jitted() -> Callable[..., Any]:
        return jax.jit(fn, compiler_options=quick_options())

    return run  # type: ignore[return-value]


@functools.cache
def quick_options() -> dict[str, int | bool]:
    """Return compiler options that save time; none on other devices, and where this XLA does not know them."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda x: x, compiler_options=_OPTIONS)(0)
    except jax.errors.JaxRuntimeError:
        return {}
    return dict(_OPTIONS)
