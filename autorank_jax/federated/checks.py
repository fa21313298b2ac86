"""Checks of client data on the host. Messages say what was expected, what came, and the likely cause."""

from collections.abc import Sequence

import jax
import numpy as np
from numpy.typing import ArrayLike

from autorank_jax.interface import describe
from autorank_jax.interface.kinds import is_whole
from autorank_jax.types import PyTree

INT32_MAX = int(np.iinfo(np.int32).max)


def check_known(what: str, tree: PyTree) -> None:
    """Raise `TypeError` where arrays have no values yet: this runs on the host, once."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            f"{what}: expected arrays with values, got traced ones, probably inside jit or vmap: call it outside, once"
        )


def looks_one_hot(labels: np.ndarray) -> bool:
    """Return whether every row has one 1 and otherwise zeros."""
    rows = labels.ndim == 2 and labels.shape[1] > 1 and np.isin(labels, (0, 1)).all()
    return bool(rows and (labels.sum(axis=1) == 1).all())


def first_few(numbers: np.ndarray) -> str:
    """Name the first few of many."""
    return ", ".join(map(str, numbers[:5].tolist())) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")


def check_range(values: np.ndarray, end: int, what: str, hint: str = "") -> None:
    """Check that integers lie in 0 .. end-1; the hint is the end of the message."""
    if values.size and (values.min() < 0 or values.max() >= end):
        raise ValueError(f"expected {what} in 0 .. {end - 1}, got {values.min()} .. {values.max()}{hint}")


def check_examples(inputs: PyTree, targets: PyTree, classes: int | None) -> int:
    """Check that inputs and targets are arrays of one length with finite numbers, and return that length."""
    lengths: dict[str, int] = {}
    for what, tree in (("inputs", inputs), ("targets", targets)):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            lengths[what + jax.tree_util.keystr(path)] = check_array(what + jax.tree_util.keystr(path), leaf)
    n = next(iter(lengths.values()), 0)
    if not lengths or not 0 < n <= INT32_MAX:
        raise ValueError(f"expected between 1 and 2³¹-1 examples, got {n}")
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"expected inputs and targets of one length, got {got}")
    if classes is not None and _look_swapped(inputs, targets):
        raise ValueError(
            f"expected inputs, then targets as labels in 0 .. {classes - 1}, got a vector of whole numbers, then "
            f"{describe(jax.tree.leaves(targets)[0])}, probably inputs and targets swapped"
        )
    if classes is not None:
        check_labels(targets, n, classes, "targets")
    return n


def _look_swapped(inputs: PyTree, targets: PyTree) -> bool:
    """Return whether inputs look like labels, and targets do not."""
    first, others = jax.tree.leaves(inputs), jax.tree.leaves(targets)
    labels = len(first) == 1 and first[0].ndim == 1 and first[0].dtype.kind in "iu"
    return labels and max(leaf.ndim for leaf in others) > 1 and not looks_one_hot(np.asarray(others[0]))


def check_array(name: str, leaf: PyTree) -> int:
    """Check one array of numbers and return its length."""
    if not isinstance(leaf, (np.ndarray, jax.Array)) or leaf.ndim == 0:
        cause = "; probably a list: use np.asarray" if isinstance(leaf, list | int | float) else ""
        raise ValueError(f"expected an array at {name}, got {describe(leaf)}{cause}")
    values = np.asarray(leaf)
    check_numbers(name, values)
    if values.dtype.kind not in "biu" and not np.isfinite(values).all():
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        got, cause = ("NaN", "; probably missing values") if np.isnan(values).any() else ("infinity", "")
        raise ValueError(
            f"expected finite numbers at {name}, got {got} in example {first_few(bad)}{cause}: fill them or leave "
            "these examples out"
        )
    _check_width(name, values)
    return len(values)


def check_numbers(name: str, values: np.ndarray) -> None:
    """Raise `ValueError` for text, dates and objects."""
    if values.dtype.kind in "OSUMm":
        first = values.flat[0] if values.size else None
        text = (
            ": encode them, labels by np.unique(labels, return_inverse=True)[1]"
            if isinstance(first, str | bytes)
            else ""
        )
        cause = "; probably ragged rows" if isinstance(first, list | tuple | np.ndarray) else text
        raise ValueError(f"expected numbers at {name}, got {values.dtype}{cause}")


def _check_width(name: str, values: np.ndarray) -> None:
    """Check that 64-bit numbers fit where JAX makes 32-bit ones of them."""
    narrow = jax.dtypes.canonicalize_dtype(values.dtype)
    if narrow == values.dtype or values.dtype.kind not in "iuf" or not values.size:
        return
    limits = np.finfo(narrow) if values.dtype.kind == "f" else np.iinfo(narrow)
    if values.min() < limits.min or values.max() > limits.max:
        hint = "number them, or " if values.dtype.kind in "iu" else ""
        raise ValueError(
            f"expected numbers that fit {narrow} at {name}, got {values.min()} .. {values.max()}; {hint}enable "
            "jax_enable_x64"
        )


def check_labels(labels: ArrayLike, n: int, classes: int | None, what: str) -> np.ndarray:
    """Check that labels are a vector of integers in 0 .. classes-1."""
    labels = np.asarray(labels)
    if labels.shape != (n,):
        cause = "if these are no labels, give groups to count"
        if labels.shape[:1] == (n,) and labels.size == n:
            cause = "reshape(-1) makes a vector of them"
        elif looks_one_hot(labels):
            cause = "probably one-hot: argmax(axis=-1)"
        raise ValueError(f"expected {what} of shape ({n},), one label per example, got {labels.shape}; {cause}")
    if labels.dtype.kind not in "iu":
        whole = labels.dtype.kind == "b" or (labels.dtype.kind == "f" and (labels == np.round(labels)).all())
        cause = "astype(int) makes labels of them" if whole else "if these are no labels, give groups to count"
        if labels.dtype.kind in "SUO":
            cause = "number names with np.unique(names, return_inverse=True)[1]"
        raise ValueError(f"expected {what} as integers, got {labels.dtype}; {cause}")
    if classes is not None and classes < 1:
        raise ValueError(f"expected at least one class, got {classes}")
    if labels.size:
        cause = "; probably labels that count from 1" if labels.min() == 1 and labels.max() == classes else ""
        cause = "; probably a marker of unknown labels" if labels.min() == -1 else cause
        check_range(labels, classes or INT32_MAX, f"{what} as labels", cause)
    return labels


def part_sizes(parts: Sequence[ArrayLike]) -> np.ndarray:
    """Return the number of examples of each client."""
    try:
        size = np.fromiter((len(part) for part in parts), dtype=np.int64)  # type: ignore[arg-type]  # checked here
    except TypeError:
        odd = next(part for part in parts if not hasattr(part, "__len__") or np.ndim(part) == 0)
        cause = ", probably one client number per example: use from_client_ids" if is_whole(odd) else ""
        raise ValueError(
            f"expected parts as one vector of example numbers per client, got {describe(odd)} among them{cause}"
        ) from None
    if not size.any():
        raise ValueError(f"expected at least one example in some client, got {size.size} clients without any")
    return size


def concatenate_parts(parts: Sequence[ArrayLike], size: np.ndarray) -> np.ndarray:
    """Return all parts in one vector of integers."""
    try:
        order = np.concatenate([part for part, count in zip(parts, size, strict=True) if count])
    except ValueError as error:
        order, problem = np.empty(0), str(error)
    else:
        problem = f"{order.dtype} of shape {order.shape}"
    if order.ndim != 1 or order.dtype.kind not in "iu":
        cause = "; probably masks: use np.flatnonzero(mask)" if order.dtype.kind == "b" else ""
        raise ValueError(f"expected parts as vectors of integer example numbers, got {problem}{cause}")
    return order


def check_order(order: np.ndarray, size: np.ndarray, n: int, require_all: bool) -> None:
    """Check that example numbers exist and that no two clients (nor one, twice) hold the same."""
    owner = np.repeat(np.arange(len(size)), size)
    outside = (order < 0) | (order >= n)
    if outside.any():
        raise ValueError(
            f"expected example numbers in 0 .. {n - 1}, got {order[outside][0]} for client {owner[outside][0]}"
        )
    uses = np.bincount(order, minlength=n)
    if (uses > 1).any():
        example = int(np.argmax(uses > 1))
        raise ValueError(
            f"expected every example in one client only, got {np.count_nonzero(uses > 1)} in several places, "
            f"the first is example {example} in clients {first_few(owner[order == example])}"
        )
    if require_all and not uses.all():
        last = order.max()
        cause = "; probably parts of a smaller dataset" if last < n - 1 and uses[: last + 1].all() else ""
        raise ValueError(
            f"expected every example in some client, got {np.count_nonzero(uses == 0)} in none, "
            f"the first is example {np.argmin(uses)}{cause}"
        )


def check_ids(ids: ArrayLike, clients: int) -> np.ndarray:
    """Check that identities are different int32 numbers, one per client."""
    ids = np.asarray(ids)
    if ids.shape != (clients,) or ids.dtype.kind not in "iu":
        raise ValueError(f"expected ids as {clients} integers, one per client, got {ids.dtype} of shape {ids.shape}")
    check_range(ids, INT32_MAX + 1, "ids", ": number clients 0, 1, …")
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"expected different ids, got {first_few(values[counts > 1])} more than once: random numbers follow the "
            "id, so they would be the same"
        )
    return ids
