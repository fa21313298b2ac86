"""What public functions are given: a mistake of kind is told at once, in one line, from the annotations that are there.

`checked` around a function holds every argument against its annotation before the function runs: `rounds="5"`, a rule
that was not called, a task in place of its server, a seed in place of a key, a local loss of four arguments in place of
five. What annotations do not say (ranges, shapes) functions check themselves, `check_least` for instance.
"""

import collections.abc
import difflib
import functools
import inspect
import numbers
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from autorank_jax.interface.kinds import KEY, LOOKED_AT, Kind, is_traced, is_whole, kinds_of, takes

F = TypeVar("F", bound=Callable[..., Any])
MOST_SHOWN = 60  # characters of a value in a message

ORIGINS = {
    "client_ids": "number names with np.unique(names, return_inverse=True)[1]",
    "max_ranks": "ar.max_ranks(task) makes them",
    "ranks": "ranks_from_ratios(ratios, ar.max_ranks(task)) makes them",
}
"""By name of the argument, where it comes from."""


def checked(function: F) -> F:
    """Check the kinds of a function's arguments against its annotations whenever it is called.

    Args:
        function: annotated. `Any`, annotations in quotes and type variables are not looked at.

    Returns:
        The same function, which raises `TypeError` or, for a name that is none of a `Literal`, `ValueError`.
    """
    signature = inspect.signature(function)
    kinds = {name: kinds_of(p.annotation, name) for name, p in signature.parameters.items()}
    options = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)

    def check(args: tuple, kwargs: dict[str, Any]) -> None:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return  # which the call itself tells
        named = given.pop(options, {}) if options else {}
        for name, value in {**given, **named}.items():
            check_kind(name, value, kinds.get(name, kinds.get(options or "", ())))

    def call(*args: Any, **kwargs: Any) -> Any:
        check(args, kwargs)
        return function(*args, **kwargs)

    same = types.FunctionType(call.__code__, function.__globals__, function.__name__, closure=call.__closure__)
    return functools.wraps(function)(same)  # type: ignore[return-value]  # of the function's module, for doctest


def check_kind(name: str, value: Any, kinds: tuple[Kind, ...]) -> None:
    """Raise an error unless a value is of one of these kinds, or there are none."""
    if not kinds or any(kind.fits(value) for kind in kinds):
        return
    words = " or ".join(kind.words for kind in kinds)
    cause, origin = next(_causes(value, words), ""), ORIGINS.get(name, _first_origin(kinds))
    message = f"expected {words if any(kind.origin for kind in kinds) else f'{name} as {words}'}, got {describe(value)}"
    message += f", probably {cause}" if cause else f"; {origin}" if origin else ""
    raise (ValueError if isinstance(value, str) and "one of" in words else TypeError)(message)


def _first_origin(kinds: tuple[Kind, ...]) -> str:
    return next((kind.origin for kind in kinds if kind.origin), "")


def check_key(key: Any) -> None:
    """Raise `TypeError` unless something is a random key."""
    check_kind("key", key, (KEY,))


def check_least(name: str, value: float, least: int = 1) -> None:
    """Raise `ValueError` unless a number is at least so much."""
    if not value >= least:
        raise ValueError(f"expected {name} >= {least}, got {value}")


def check_counts(name: str, values: collections.abc.Sequence[int], least: int = 1) -> None:
    """Raise `ValueError` unless there are so many numbers and each is at least 1."""
    if len(values) < least or not all(is_whole(value) and value >= 1 for value in values):
        raise ValueError(f"expected {name} as {least} or more whole numbers >= 1, got {describe(values)}")


def check_one(name: str, value: Any) -> None:
    """Raise `ValueError` for an array of several numbers, traced or not."""
    if getattr(value, "shape", ()):
        raise ValueError(f"expected one {name}, got an array of shape {value.shape}")


def check_values(
    name: str,
    values: Any,
    fits: Callable[[np.ndarray], np.ndarray] = lambda known: (known >= 0) & (known < np.inf),
    words: str = "finite numbers >= 0",
) -> None:
    """Raise `ValueError` for numbers that do not fit, as far as they are known yet."""
    if is_traced(values):
        return
    known = np.asarray(values, float)
    bad = known[~fits(known)]
    if bad.size:
        raise ValueError(f"expected {name} as {words}, got {bad.flat[0]:g}")


def check_share(name: str, value: Any, within: str = "(0, 1]", cause: str = "a percentage") -> None:
    """Raise `ValueError` unless a number lies between 0 and 1, as far as it is known yet.

    Args:
        name: of the argument.
        value: a number or an array.
        within: which of the ends belong to it.
        cause: why it may be above 1.
    """
    if hasattr(value, "dtype") and not isinstance(value, np.ndarray | np.generic) and is_traced(value):
        return
    known = np.asarray(value, float)
    low = known >= 0 if within[0] == "[" else known > 0
    high = known <= 1 if within[-1] == "]" else known < 1
    bad = known[~(low & high)]  # NaN too
    if bad.size:
        hint = f", probably {cause}" if 1 < bad.flat[0] < np.inf else ""
        raise ValueError(f"expected {name} in {within}, got {bad.flat[0]:g}{hint}")


def check_name(name: str, value: Any, names: collections.abc.Iterable[str]) -> None:
    """Raise `ValueError` unless something is one of the names, and tell which of them is close."""
    known = list(names)
    if isinstance(value, str) and value in known:
        return
    close = difflib.get_close_matches(value, known, n=1) if isinstance(value, str) else []
    hint = f", probably {close[0]!r}" if close else ""
    raise ValueError(f"expected {name} out of {', '.join(known)}, got {describe(value)}{hint}")


FOREIGN_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What models, optimisers and rules of somebody's own raise on arguments that they were not made for."""


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says, at most 200 letters of it."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['nothing'])[0][:200]}"


def describe(value: Any) -> str:
    """Say in a few words what a value is."""
    if hasattr(value, "dtype") and hasattr(value, "shape") and not isinstance(value, np.generic):
        return f"an array {value.dtype}{list(value.shape)}"
    if value is None or isinstance(value, numbers.Number | str | bytes) or _is_plain(value):
        text = repr(value)
        return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
    if isinstance(value, dict | list | set) or type(value) is tuple:
        return f"a {type(value).__name__} of {len(value)}"
    name = getattr(value, "__name__", None)
    kind = "class" if isinstance(value, type) else type(value).__name__
    return f"the {kind} {name!r}" if name else f"{'an' if kind[0] in 'AEIOUaeio' else 'a'} {kind}"


def _is_plain(value: Any) -> bool:
    """Return whether something is a short collection of numbers and texts."""
    if not (isinstance(value, dict | list | set) or type(value) is tuple) or len(value) > LOOKED_AT:
        return False
    inside = [*value, *value.values()] if isinstance(value, dict) else value
    return all(one is None or isinstance(one, numbers.Number | str) for one in inside)


def _causes(value: Any, words: str) -> Iterator[str]:
    """Yield guesses why a value is not what it should be, from what it is, the likeliest first."""
    numeric = "number" in words and "array" not in words
    if isinstance(value, type):
        yield f"the class itself: {value.__name__}(...)"
    if callable(value) and hasattr(value, "__name__") and ("function" not in words or takes(value, 0)):
        yield f"not called: {value.__name__}()"
    if type(value).__name__ == "Task" and "a server" in words:
        yield "the task itself: task.server"
    if "a random key" in words and is_whole(value):
        yield f"a seed: jax.random.key({value})"
    if "a random key" in words and str(getattr(value, "dtype", "")).startswith("key<"):
        yield "several: one key is wanted"
    if "a random key" in words and getattr(value, "shape", None) == ():
        yield "a seed: jax.random.key(seed)"
    if isinstance(value, str) and "a sequence" in words:
        yield f"one name alone: ({value!r},)"
    if isinstance(value, str) and numeric and value.replace(".", "", 1).isdecimal():
        yield f"text that was not converted: {float(value) if '.' in value else int(value)}"
    if isinstance(value, float) and numeric and value.is_integer():
        yield f"a quotient: {int(value)}, as // gives it"
    if hasattr(value, "dtype") and numeric and value.shape == () and is_traced(value):
        yield "inside jit, vmap or grad: it must be known outside"
    if isinstance(value, list) and words == "an array":
        yield "a list: np.asarray makes an array of it"
