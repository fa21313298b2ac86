"""Tasks from Flax Linen modules: an interceptor adds the update to the outputs of the matched layers.

Where a module is scanned or mapped, so must be its adapters: those of stacked layers lie beside their kernels among the
parameters, where the transformation takes both apart.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from autorank_jax.adapters.losses import as_float, classification_loss
from autorank_jax.adapters.low_rank import (
    Form,
    attend_update,
    check_convolution,
    conv_form,
    conv_update,
    einsum_form,
    einsum_update,
    embed_form,
    embed_update,
    general_update,
    linear_form,
    linear_update,
    make_window,
)
from autorank_jax.adapters.selection import MaxRank, Where, choose_parameters, choose_ranks, kind_of, why_unadapted
from autorank_jax.adapters.task import Flat, Model, Reading, join, make_task
from autorank_jax.interface import FOREIGN_FAILURES, checked
from autorank_jax.types import Adapter, Array, Key, PyTree, Task

WEIGHTS: dict[type, str] = {
    nn.Dense: "kernel",
    nn.DenseGeneral: "kernel",
    nn.Einsum: "kernel",
    nn.Conv: "kernel",
    nn.Embed: "embedding",
}
"""The layers that can be adapted, and the parameter of each that is."""


@checked
def task_from_linen(
    module: nn.Module,
    variables: Mapping[str, Any],
    inputs: PyTree,
    *,
    max_rank: MaxRank,
    where: Where = "*",
    key: Key | int = 0,
    train_dense: str | tuple[str, ...] = "*/bias",
    loss: Callable[[Any, Any], Array] = classification_loss,
    preprocess: Callable[[PyTree], PyTree] = as_float,
    compute_dtype: Any = None,
    frozen_statistics: bool = False,
    training: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> Task:
    """Make a task of a Linen module: adapters on matching layers, the rest frozen or trained whole.

    Adapted are `nn.Dense`, `DenseGeneral` (hence attention), `Einsum`, `Conv` and `Embed`. Layers inside `nn.scan`,
    `nn.remat_scan` or `nn.vmap`, whose kernels are stacked along their first axes (`variable_axes={"params": 0}`), get
    one stacked adapter each, of one rank.

    Args:
        module: called as `module.apply(variables, inputs, **flags)` with one pytree of inputs.
        variables: `{"params": ...}`, as `module.init` returns them.
        inputs: a batch of examples, for their shapes alone: Linen knows its layers only while it runs.
        max_rank: maximum rank, or one by path pattern; see `task_from_nnx`, also for what is not told here.
        where: path patterns, or a predicate `(path, layer) -> bool`.
        key: random key of the adapters' start values.
        train_dense: patterns of parameter paths that are trained whole.
        loss: `(outputs, targets) -> (b,)`.
        preprocess: applied to the inputs of every batch.
        compute_dtype: of the arithmetic; see `task_from_nnx`.
        frozen_statistics: accept collections besides "params", such as "batch_stats", and keep them as they are; the
            flags for training must then ask for running averages.
        training: flags of the module's call in training, such as `{"deterministic": False}`.
        evaluation: likewise in evaluation.

    Returns:
        The task. Its `server.frozen` is a `Base`; `merge` gives the variables.

    Raises:
        ValueError: if a pattern matches no supported layer or no parameter, if a layer cannot be adapted, or if the
            module keeps statistics.
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    _check_collections(variables, frozen_statistics)
    flags = {True: dict(training or {}), False: dict(evaluation or {})}
    values = traverse_util.flatten_dict(dict(variables), sep="/")
    abstract = functools.partial(_call_abstractly, module, inputs=preprocess(inputs), flags=flags[False])
    layers, shapes = _find_layers(abstract, variables)
    kinds = {path: kind for path, layer in layers.items() if (kind := kind_of(layer, WEIGHTS))}
    fit = {path: layers[path] for path in kinds}
    ranks = choose_ranks(fit, {p: layer for p, layer in layers.items() if p not in fit}, max_rank, where)
    weights = {path: join("params", join(path, WEIGHTS[kinds[path]])) for path in ranks}
    forms = {path: _form(path, fit[path], values[weights[path]].shape, shapes[path]) for path in ranks}
    _check_stacks(abstract, values, {path: form.layers for path, form in forms.items() if form.layers})
    names = {n.removeprefix("params/"): n for n in values if n.startswith("params/") and n not in weights.values()}
    dense = {names[name] for name in choose_parameters(names, train_dense)}
    matrices = [n for n, name in names.items() if values[name].ndim > 1 and name not in dense]
    matrices = [n for n in matrices if n.rpartition("/")[2] not in ("bias", "scale")]  # of two axes where stacked
    unadapted = why_unadapted(layers, matrices, tuple(WEIGHTS), wanted=(max_rank, where))
    run = _runner(module, forms, flags)
    model = Model(values, weights, forms, run, lambda flat: traverse_util.unflatten_dict(flat, sep="/"))
    reading = Reading(loss, preprocess, compute_dtype)
    return make_task(model, ranks, dense, key=key, reading=reading, unadapted=unadapted)


def _check_collections(variables: Mapping[str, Any], frozen_statistics: bool) -> None:
    if "params" not in variables:
        alone = any(isinstance(value, Mapping) for value in variables.values())
        raise ValueError(
            f'expected variables {{"params": ...}}, got {list(variables)}' + ", probably the params alone" * alone
        )
    others = sorted(set(variables) - {"params"})
    if others and not frozen_statistics:
        remedy = (
            "clients with different data have no common statistics; use nn.GroupNorm or nn.LayerNorm in place of "
            "nn.BatchNorm, or keep those of a pretrained module with frozen_statistics=True"
            if "batch_stats" in others
            else 'give {"params": variables["params"]} if it works without them, or keep them as they are with '
            "frozen_statistics=True"
        )
        raise ValueError(f"expected a module without mutable statistics, got the collections {others}: {remedy}")


def _call_abstractly(
    module: nn.Module, note: Callable, variables: Mapping[str, Any], *, inputs: PyTree, flags: Mapping[str, Any]
) -> None:
    """Run the module without numbers under an interceptor."""
    with nn.intercept_methods(note):
        jax.eval_shape(lambda v, x: module.apply(v, x, **flags), variables, inputs)


def _find_layers(
    abstract: Callable[..., None], variables: Mapping[str, Any]
) -> tuple[dict[str, nn.Module], dict[str, tuple[int, ...]]]:
    """Return which layers the module calls, and the shape of the weight that one call has of those to be adapted."""
    layers: dict[str, nn.Module] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def note(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name in ("__call__", "attend"):
            layer, path = context.module, "/".join(context.module.path)
            layers[path] = layer.clone(parent=None)
            if kind := kind_of(layer, WEIGHTS):
                shapes[path] = jnp.shape(layer.get_variable("params", WEIGHTS[kind]))
        return call(*args, **kwargs)

    abstract(note, variables)
    return layers, shapes


def _check_stacks(abstract: Callable[..., None], values: Flat, stacks: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `ValueError` unless layers are stacked along the first axes of their weights.

    Whatever lies beside a weight is taken apart as it is; along any axis but the first ones, a probe has other lengths.
    """
    if not stacks:
        return
    probes = {
        join("params", join(path, "lora_a")): jax.ShapeDtypeStruct((*layers, 1 + max(layers)), jnp.float32)
        for path, layers in stacks.items()
    }
    try:
        abstract(_call_unchanged, traverse_util.unflatten_dict({**values, **probes}, sep="/"))
    except FOREIGN_FAILURES as error:
        raise ValueError(
            "expected layers that are stacked along the first axis, as nn.scan(variable_axes={'params': 0}) does, got "
            f"others among {', '.join(sorted(stacks))}: leave them out of `where`"
        ) from error


def _call_unchanged(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:  # noqa: ARG001
    return call(*args, **kwargs)


def _runner(
    module: nn.Module, forms: Mapping[str, Form], flags: Mapping[bool, Mapping[str, Any]]
) -> Callable[..., PyTree]:
    """Return the function that runs the module under the interceptor."""

    def run(training: bool, values: Flat, adapters: dict[str, Adapter], inputs: PyTree, key: Key | None) -> PyTree:
        def adapt(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            layer, path = context.module, "/".join(context.module.path)
            outputs = call(*args, **kwargs)
            if path not in adapters or context.method_name not in ("__call__", "attend"):
                return outputs
            adapter = adapters[path]
            if forms[path].layers:  # of which this is one
                adapter = Adapter(*(layer.get_variable("params", factor) for factor in Adapter._fields))
            update = _update(layer, context.method_name, args[0], adapter, forms[path])
            return outputs + update.astype(outputs.dtype)

        streams = {"dropout": key} if key is not None else {}
        flat = dict(values)
        for path, adapter in adapters.items():
            if forms[path].layers:
                flat |= {join("params", join(path, factor)): value for factor, value in adapter._asdict().items()}
        with nn.intercept_methods(adapt):
            return module.apply(traverse_util.unflatten_dict(flat, sep="/"), inputs, rngs=streams, **flags[training])

    return run


def _form(path: str, layer: Any, whole: tuple[int, ...], one: tuple[int, ...]) -> Form:
    """Return how the weight of a layer, `one` of the `whole` stack, is read as a matrix."""
    try:
        return _form_of(layer, one)._replace(layers=whole[: len(whole) - len(one)])
    except ValueError as error:
        raise ValueError(f"layer {path!r}: {error}") from error


def _form_of(layer: Any, shape: tuple[int, ...]) -> Form:
    if isinstance(layer, nn.Embed):
        return embed_form(shape)
    if isinstance(layer, nn.Dense):
        return linear_form(shape)
    if isinstance(layer, nn.Einsum):
        return einsum_form(layer.einsum_str, shape)
    if isinstance(layer, nn.Conv):
        check_convolution(layer.feature_group_count, layer.input_dilation, layer.mask)
        make_window(layer.kernel_size, layer.strides, layer.kernel_dilation, layer.padding)
        return conv_form(shape)
    if layer.batch_dims:
        raise ValueError(f"expected a DenseGeneral without batch_dims, got {layer.batch_dims}: leave it out of `where`")
    return linear_form(shape, len(_axes(layer.axis)))


def _update(layer: Any, method: str, inputs: Array, adapter: Adapter, form: Form) -> Array:
    """Return what an adapter adds to the outputs of a layer."""
    if isinstance(layer, nn.Embed):
        return (attend_update if method == "attend" else embed_update)(inputs, *adapter)
    if isinstance(layer, nn.Dense):
        return linear_update(inputs, *adapter)
    if isinstance(layer, nn.Einsum):
        return einsum_update(layer.einsum_str, inputs, *adapter, form)
    if isinstance(layer, nn.Conv):
        window = make_window(layer.kernel_size, layer.strides, layer.kernel_dilation, layer.padding)
        return conv_update(inputs, *adapter, window)
    return general_update(inputs, *adapter, _axes(layer.axis), form)


def _axes(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
