"""From a model's leaves to a `Task`: what is frozen, adapted and trained whole. Every front end ends here."""

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from autorank_jax.adapters.lora import init_adapter, key_of, product
from autorank_jax.adapters.low_rank import Form
from autorank_jax.interface import FOREIGN_FAILURES, checked, describe
from autorank_jax.types import Adapter, Array, Base, Batch, Key, Origin, PyTree, Server, Task, TaskReport, Trainable

Flat = dict[str, Array]
"""Leaves of a model by path."""


class Model(NamedTuple):
    """A model as its front end describes it."""

    values: Flat  # every leaf
    weights: dict[str, str]  # by path of the adapted layer, the name of the leaf that is adapted
    forms: dict[str, Form]  # likewise, how that leaf is read as a matrix
    run: Callable[[bool, Flat, dict[str, Adapter], PyTree, Key | None], PyTree]  # training?, leaves, adapters, inputs
    rebuild: Callable[[Flat], Any]  # the user's model, of its leaves
    quantized: Mapping[str, str] = MappingProxyType({})  # by name of leaves of few bits, their format; these stay


class Reading(NamedTuple):
    """How a task feeds the model and reads its outputs."""

    loss: Callable[[Any, Any], Array]  # (outputs, targets) -> (b,)
    preprocess: Callable[[PyTree], PyTree]
    compute_dtype: Any = None  # of arithmetic; kernels, adapters and dense parameters are kept as they are


def make_task(
    model: Model,
    ranks: Mapping[str, int],
    dense: set[str],
    *,
    key: Key,
    reading: Reading,
    unadapted: Mapping[str, str] | None = None,
) -> Task:
    """Make a task: adapters for `ranks`, the parameters named `dense` trained whole, the rest frozen.

    Args:
        model: its weights and forms cover all of `ranks`.
        ranks: maximum rank by path of the layer.
        dense: names of leaves.
        key: of the adapters' start values.
        reading: loss, preprocessing and precision.
        unadapted: by path of layers that hold matrices and have no adapter, why.
    """
    dtype = reading.compute_dtype
    adapters = {path: _start(key_of(key, path), model.forms[path], ranks[path]) for path in sorted(ranks)}
    adapted = {p: name for p, name in model.weights.items() if name not in model.quantized}
    kernels = {p: model.forms[p].matrix(model.values[adapted[p]]) for p in adapters if p in adapted}  # to merge into
    rest = {n: cast(v, dtype) for n, v in model.values.items() if n not in adapted.values() and n not in dense}
    server = Server(Trainable(adapters, {n: model.values[n] for n in sorted(dense)}), Base(kernels, rest))
    model = model._replace(values=without_values(model.values))  # the task's functions hold no second copy

    def apply(
        frozen: Base, trainable: Trainable, batch: tuple[PyTree, PyTree], key: Key | None, *, training: bool
    ) -> PyTree:
        inputs, targets = batch
        kernels = cast(frozen.kernels, dtype)
        matrices = {model.weights[p]: model.forms[p].weight(kernel) for p, kernel in kernels.items()}
        values = {**frozen.rest, **cast(trainable.dense, dtype), **matrices}
        try:
            prepared = cast(reading.preprocess(inputs), dtype)
            outputs = model.run(training, values, cast(trainable.adapters, dtype), prepared, key)
        except FOREIGN_FAILURES as error:
            if "expected" in str(error) and "\n" not in str(error):  # it says what it wants
                raise
            raise ValueError(_refusal(inputs, targets, error)) from error
        return outputs if dtype is None else cast(outputs, jnp.float32)

    def loss(frozen: Base, trainable: Trainable, batch: Batch, key: Key) -> Array:
        return reading.loss(apply(frozen, trainable, batch[:2], key, training=True), batch.targets)

    def predict(frozen: Base, trainable: Trainable, inputs: PyTree, key: Key | None = None) -> PyTree:
        return apply(frozen, trainable, (inputs, None), key, training=key is not None)

    def merge(server: Server) -> Any:
        return model.rebuild(merged_values(model, server))

    sides = {path: (model.forms[path].d_in, model.forms[path].d_out) for path in adapters}
    _warn_of_ranks(ranks, sides)
    frozen = tuple(sorted(rest.keys() - model.quantized.keys()))
    report = TaskReport(
        dict(ranks), tuple(sorted(dense)), frozen, dict(unadapted or {}), sides, dict(sorted(model.quantized.items()))
    )
    return Task(
        server, loss, predict, Origin(merge, {p: model.forms[p].kind for p in adapters}, _shapes(model)), report
    )


def _warn_of_ranks(ranks: Mapping[str, int], sides: Mapping[str, tuple[int, int]]) -> None:
    """Warn of maximum ranks above both sides of their layers."""
    wide = [f"{path!r} ({d_in} × {d_out})" for path, (d_in, d_out) in sides.items() if ranks[path] > max(d_in, d_out)]
    if wide:
        warnings.warn(
            f"maximum ranks above both sides of the layers {', '.join(wide[:5])}{' and more' * (len(wide) > 5)}: "
            "nothing is gained beyond the smaller side; max_rank may be a dict of path patterns",
            stacklevel=4,
        )


def merged_values(model: Model, server: Server) -> Flat:
    """Return the leaves of the model with `W + A B` in place of `W`, in the dtypes the model had."""
    values = {**server.frozen.rest, **server.trainable.dense}
    for path, adapter in server.trainable.adapters.items():
        name = model.weights[path]
        kernel = values[name] if name in model.quantized else server.frozen.kernels[path]
        values[name] = model.forms[path].weight(kernel.astype(adapter.lora_a.dtype) + product(adapter))
    return {
        name: values[name] if values[name].dtype == old.dtype else values[name].astype(old.dtype)
        for name, old in model.values.items()
    }


@checked
def merge(task: Task, server: Server) -> Any:
    """Return the user's own model with the adapters merged into its weights; it needs this package no more.

    Args:
        task: made of a model by one of the `task_from_` functions.
        server: the global model, such as `state.server`.

    Returns:
        What the task was made of: an `nnx.Module` of plain Flax layers, the variables of a Linen module, or the
        parameter tree of a function.

    Raises:
        ValueError: if the task was built by hand, or the server is that of another model.
    """
    return check_server(task, server).merge(server)


def check_server(task: Task, server: Server) -> Origin:
    """Return a task's origin, or raise `ValueError` where it has none, or a server is of another model."""
    if task.origin is None:
        raise ValueError("expected a task made by a task_from_ function, got one built by hand, which has no model")
    if _built(server) != _built(task.server):
        raise ValueError("expected a server of this task, such as state.server, got one of other layers or shapes")
    return task.origin


def _built(server: Server) -> tuple:
    """Return the shapes of a server's arrays but for their rank positions."""
    adapters = {
        path: (a.lora_a.shape[:-1], a.lora_b.shape[:-2], a.lora_b.shape[-1])
        for path, a in server.trainable.adapters.items()
    }
    return adapters, *jax.tree.flatten(jax.tree.map(jnp.shape, (server.trainable.dense, server.frozen)))


def _refusal(inputs: PyTree, targets: PyTree, error: Exception) -> str:
    """Say that a model does not take its inputs, and why it may be so."""
    leaves = jax.tree.leaves(inputs)
    arrays = all(hasattr(leaf, "dtype") for leaf in leaves)
    labels = arrays and len(leaves) == 1 and leaves[0].ndim == 1 and jnp.issubdtype(leaves[0].dtype, jnp.integer)
    swapped = labels and any(jnp.ndim(leaf) > 1 for leaf in jax.tree.leaves(targets))
    cause = ", probably inputs and targets swapped" if swapped else ", probably labels in place of inputs" * labels
    got = ", ".join(map(describe, leaves))
    said = (str(error).strip().splitlines() or [""])[0][:200]
    return f"expected inputs that the model takes, got {got}{cause}; it says {type(error).__name__}: {said}"


def without_values(tree: Any) -> Any:
    """Return the shapes and dtypes of a tree of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """Cast floating-point leaves to a dtype; leave everything where it is None."""
    if dtype is None:
        return tree
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def join(path: str, name: str) -> str:
    """Return the name of a leaf of the layer at a path, which is empty for the model itself."""
    return f"{path}/{name}" if path else name


def _start(key: Key, form: Form, rank: int) -> Adapter:
    """Draw an adapter; rows of an embedding's `lora_a` are looked up one at a time, so their fan-in is 1."""
    fan_in = 1 if form.kind == "embed" else None
    return init_adapter(key, form.d_in, form.d_out, rank, fan_in=fan_in, layers=form.layers)


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    return {path: form.shape for path, form in model.forms.items()}
