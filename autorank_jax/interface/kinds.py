"""Kinds of values, as annotations ask for them. Nothing here knows JAX, so that everything may use it."""

import collections.abc
import inspect
import numbers
import operator
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NOUNS: dict[str, tuple[str, str]] = {
    "Aggregator": ("an aggregation rule", "aggregators.rbla() is one"),
    "ClientStats": ("statistics of clients", "client_stats(data) makes them"),
    "FederatedData": ("clients' data", "from_parts(inputs, targets, parts) makes them"),
    "FlopModel": ("a FlopModel", "training_flops(task, data) makes it"),
    "Instructions": ("instructions", "load_instructions(path) loads them"),
    "LocalTraining": ("local training", "make_local_training(task, optimizer, batch_size=...) makes it"),
    "Mesh": ("a mesh of devices", "sharding.client_mesh() makes it"),
    "Module": ("a Flax module", ""),
    "Server": ("a server", "task.server is one"),
    "State": ("a state", "init_state(task.server, rule, ranks) makes it"),
    "Task": ("a task", "task_from_nnx(model, max_rank=...) makes one"),
}
"""By name of the class, what it is called and where it comes from."""

LOOKED_AT = 100
"""Elements of a sequence or a mapping whose kind is looked at."""


class Kind(NamedTuple):
    """What an annotation asks for."""

    words: str
    fits: Callable[[Any], bool]
    origin: str = ""


def kinds_of(annotation: Any, name: str = "") -> tuple[Kind, ...]:
    """Return the kinds that an annotation allows; none where everything is allowed."""
    members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    if name == "key" and any(map(_is_array, members)):
        return (KEY, SIMPLE[int]) if int in members else (KEY,)
    known: list[Kind] = []
    if len(members) > 1 and any(m is np.ndarray or _is_of_numpy(m) for m in members):  # an ArrayLike, JAX's or NumPy's
        known, members = [ARRAY_LIKE], tuple(m for m in members if not _is_of_arrays(m))
    kinds = [_kind(member) for member in members]
    return () if None in kinds else (*known, *(kind for kind in kinds if kind is not None))


def _is_of_arrays(annotation: Any) -> bool:
    """Return whether something is a part of an ArrayLike, NumPy's with its text, or a sequence of numbers."""
    origin = typing.get_origin(annotation) or annotation
    numeric = isinstance(origin, type) and issubclass(origin, np.generic | numbers.Number | str | bytes)
    return numeric or _is_array(annotation) or _is_of_numpy(annotation) or origin in (collections.abc.Sequence, list)


def _kind(annotation: Any) -> Kind | None:
    """Return the kind of an annotation that is no union, None where anything goes."""
    origin, of = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if annotation in SIMPLE:
        return SIMPLE[annotation]
    if of and origin in MAKERS:
        return MAKERS[origin](*of)
    if _is_array(annotation):
        return ARRAY
    if (
        annotation in (Any, inspect.Parameter.empty)
        or not isinstance(origin, type)
        or origin.__module__ == "typing"  # IO: an interface, not a class of its files
        or getattr(origin, "_is_protocol", False)
    ):
        return None
    words, source = NOUNS.get(origin.__name__, (f"a {origin.__name__}", ""))
    return Kind(words, lambda value: isinstance(value, origin), source)


def _literal(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def _function(parameters: Any, _: Any = None) -> Kind:
    if parameters is ...:
        return Kind("a function", callable)
    many = len(parameters)
    return Kind(
        f"a function of {many} argument{'s' * (many != 1)}", lambda value: callable(value) and takes(value, many)
    )


def takes(function: Callable, arguments: int) -> bool:
    """Return whether a function can be called with so many arguments, as far as it says."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin
        return True
    try:
        signature.bind(*range(arguments))
    except TypeError:
        return False
    return True


def _sequence(element: Any, *_: Any) -> Kind:
    return _collection("sequence", _is_sequence, "each", kinds_of(element))


def _mapping(_: Any, value: Any) -> Kind:
    return _collection("dict", lambda given: isinstance(given, collections.abc.Mapping), "each value", kinds_of(value))


def _collection(word: str, is_one: Callable[[Any], bool], each: str, inner: tuple[Kind, ...]) -> Kind:
    def fits(value: Any) -> bool:
        if not is_one(value):
            return False
        elements = list(value.values() if isinstance(value, collections.abc.Mapping) else value[:LOOKED_AT])
        return not inner or all(any(kind.fits(one) for kind in inner) for one in elements[:LOOKED_AT])

    return Kind(f"a {word}" + (f", {each} {' or '.join(kind.words for kind in inner)}" if inner else ""), fits)


def _is_sequence(value: Any) -> bool:
    if hasattr(value, "ndim"):
        return value.ndim > 0
    return isinstance(value, collections.abc.Sequence) and not isinstance(value, str | bytes)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _is_array(annotation: Any) -> bool:
    return annotation is np.ndarray or getattr(annotation, "__name__", "").rpartition(".")[2] == "Array"


def _is_of_numpy(annotation: Any) -> bool:
    return "numpy._typing" in repr(annotation)


def is_whole(value: Any) -> bool:
    """Return whether something is a whole number whose value is known, and no bool."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Return whether something is a number whose value is known, and no bool."""
    if isinstance(value, bool | np.bool_):
        return False
    if hasattr(value, "dtype"):
        return value.shape == () and not is_traced(value) and is_array_like(value)
    return isinstance(value, numbers.Real)


def is_array_like(value: Any) -> bool:
    """Return whether something is numbers, or lists of them; what is inside arrays of objects is not looked at."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _is_numeric(value)
    if isinstance(value, list | tuple | range):
        return all(map(is_array_like, value[:LOOKED_AT]))
    return isinstance(value, numbers.Number)


def _is_numeric(value: Any) -> bool:
    return getattr(getattr(value, "dtype", None), "kind", "U") not in "US"


def whole_to_float(value: Any) -> Any:
    """Return whole numbers as floats, as JAX wraps those beyond 32 bits; anything else, its arrays too, as it is."""
    on_device = hasattr(value, "dtype") and not isinstance(value, np.ndarray | np.generic)
    if on_device or is_traced(value):
        return value
    array = np.asarray(value)
    return array.astype(float) if array.dtype.kind in "iu" else value


def is_traced(value: Any) -> bool:
    """Return whether an array has no values yet."""
    try:
        np.asarray(value)
    except TypeError:
        return True
    except ValueError:  # rows of several lengths
        return False
    return False


def _is_key(value: Any) -> bool:
    if str(getattr(value, "dtype", "")).startswith("key<"):
        return value.shape == ()
    return getattr(value, "dtype", None) == np.uint32 and value.shape in ((2,), (4,))


SIMPLE: dict[Any, Kind] = {
    int: Kind("a whole number", is_whole),
    float: Kind("a number", is_real),
    bool: Kind("True or False", lambda value: isinstance(value, bool | np.bool_)),
    str: Kind("text", lambda value: isinstance(value, str)),
    None: Kind("None", lambda value: value is None),
    type(None): Kind("None", lambda value: value is None),
    Path: Kind("a path", lambda value: isinstance(value, Path)),
}
KEY = Kind("a random key", _is_key)
ARRAY_LIKE = Kind("an array of numbers", is_array_like)
ARRAY = Kind("an array", lambda value: hasattr(value, "shape") and _is_numeric(value))
MAKERS: dict[Any, Callable[..., Kind]] = {
    typing.Literal: _literal,
    collections.abc.Callable: _function,
    collections.abc.Sequence: _sequence,
    list: _sequence,
    tuple: _sequence,
    collections.abc.Mapping: _mapping,
    dict: _mapping,
}
