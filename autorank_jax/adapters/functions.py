"""Tasks from a bare function and its parameter tree."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from autorank_jax.adapters.losses import as_float, classification_loss
from autorank_jax.adapters.low_rank import LowRank, linear_form
from autorank_jax.adapters.selection import MaxRank, Where, choose_parameters, choose_ranks, why_unadapted
from autorank_jax.adapters.task import Flat, Model, Reading, make_task
from autorank_jax.interface import checked
from autorank_jax.types import Adapter, Array, Key, PyTree, Task


@checked
def task_from_function(
    apply: Callable[..., PyTree],
    params: PyTree,
    *,
    max_rank: MaxRank,
    where: Where = "*",
    key: Key | int = 0,
    train_dense: str | tuple[str, ...] = (),
    loss: Callable[[Any, Any], Array] = classification_loss,
    preprocess: Callable[[PyTree], PyTree] = as_float,
    compute_dtype: Any = None,
    train_apply: Callable[..., PyTree] | None = None,
    materialize: bool = True,
    stacked: str | tuple[str, ...] = (),
) -> Task:
    """Make a task of `apply(params, inputs)`: adapters on the matching matrices of `params`, the rest frozen.

    With `materialize=True` the function is handed `W + A B` in place of each adapted `W`, which any function can use
    but which costs a matrix of its own for every client that trains at the same time: several times slower, and the
    base is stacked. With `materialize=False` it is handed a `LowRank` in its place, for which `x @ w` is
    `x W + (x A) B`: one large product shared by all clients, as fast as a Flax layer. It knows `@` from the right, and
    nothing else of an array, hence the choice.

    Args:
        apply: `(params, inputs) -> outputs`.
        params: tree of arrays; floating-point leaves `(d_in, d_out)` are the candidates, named by their paths.
        max_rank: maximum rank, or one by path pattern; see `task_from_nnx`, also for what is not told here.
        where: path patterns, or a predicate `(path, array) -> bool`.
        key: random key of the adapters' start values.
        train_dense: patterns of leaves that are trained whole; none by default.
        loss: `(outputs, targets) -> (b,)`.
        preprocess: applied to the inputs of every batch.
        compute_dtype: of the arithmetic; see `task_from_nnx`.
        train_apply: `(params, inputs, key) -> outputs` in training, for functions with dropout; `apply` where None.
        materialize: whether to form `W + A B`.
        stacked: patterns of leaves `(layers, d_in, d_out)` that hold one matrix for each of several layers, such as
            those a function scans over. Each gets one stacked adapter, whose layers share one rank.

    Returns:
        The task. Its `server.frozen` is a `Base`; `merge` gives the parameter tree.

    Raises:
        ValueError: if a pattern matches no matrix or no leaf, or a `stacked` one matches no leaf of three axes.
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    values = {name: jnp.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)}
    stacks = _stacks(values, stacked)
    fit = {n: v for n, v in values.items() if v.ndim == 2 + (n in stacks) and jnp.issubdtype(v.dtype, jnp.floating)}
    ranks = choose_ranks(fit, {n: v for n, v in values.items() if n not in fit}, max_rank, where)
    dense = choose_parameters([name for name in names if name not in ranks], train_dense)

    def rebuild(flat: Mapping[str, Any]) -> PyTree:
        return jax.tree.unflatten(structure, [flat[name] for name in names])

    def run(training: bool, values: Flat, adapters: dict[str, Adapter], inputs: PyTree, key: Key | None) -> PyTree:
        form = _materialized if materialize else LowRank
        adapted = {path: form(values[path], *adapter) for path, adapter in adapters.items()}
        params = rebuild({**values, **adapted})
        if training and train_apply is not None:
            return train_apply(params, inputs, key)
        return apply(params, inputs)

    forms = {path: linear_form(values[path].shape, stacked=int(path in stacks)) for path in ranks}
    model = Model(values, {path: path for path in ranks}, forms, run, rebuild)
    floats = [n for n, v in values.items() if jnp.issubdtype(v.dtype, jnp.floating)]
    wide = [n for n in floats if values[n].ndim > 2 and n not in dense and n not in fit]
    unadapted = why_unadapted({n: values[n] for n in wide}, [f"{n}/" for n in wide], (), wanted=(max_rank, where))
    reading = Reading(loss, preprocess, compute_dtype)
    return make_task(model, ranks, dense, key=key, reading=reading, unadapted=unadapted)


def _stacks(values: Mapping[str, Array], patterns: str | tuple[str, ...]) -> set[str]:
    """Return the names of the leaves that are stacked: matrices, and vectors where patterns take those as well."""
    stacks: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        found = {name for name in values if fnmatchcase(name, pattern)}
        if not any(values[name].ndim == 3 for name in found):
            raise ValueError(
                f"expected stacked patterns that match a leaf (layers, d_in, d_out), got {pattern!r}: the leaves are "
                f"{ {name: value.shape for name, value in values.items()} }"
            )
        stacks |= found
    return stacks


def _materialized(weight: Array, lora_a: Array, lora_b: Array) -> Array:
    return weight + (lora_a @ lora_b).astype(weight.dtype)
