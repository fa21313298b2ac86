"""Tasks from Flax NNX models: which layers get adapters, what is trained whole, what stays frozen."""

import functools
import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from autorank_jax.adapters.losses import as_float, classification_loss
from autorank_jax.adapters.low_rank import Form
from autorank_jax.adapters.nnx_blocks import STACK, check_outputs, leaves_of, name_of, written_since
from autorank_jax.adapters.nnx_layers import ADAPTED, Factor, adapted_class
from autorank_jax.adapters.nnx_scan import scan_lists, unstacked, value_of, with_value
from autorank_jax.adapters.selection import MaxRank, Where, choose_parameters, choose_ranks, kind_of, why_unadapted
from autorank_jax.adapters.task import Flat, Model, Reading, join, make_task, without_values
from autorank_jax.interface import checked, describe
from autorank_jax.types import Adapter, Array, Key, PyTree, Task


@checked
def task_from_nnx(
    model: nnx.Module,
    *,
    max_rank: MaxRank,
    where: Where = "*",
    key: Key | int = 0,
    train_dense: str | tuple[str, ...] = "*/bias",
    loss: Callable[[Any, Any], Array] = classification_loss,
    preprocess: Callable[[PyTree], PyTree] = as_float,
    compute_dtype: Any = None,
    checkpoint: str | tuple[str, ...] = (),
    frozen_statistics: bool = False,
    scan_blocks: str | tuple[str, ...] = (),
) -> Task:
    """Make a task of an unmodified NNX model: adapters on matching layers, the rest frozen or trained whole.

    Adapted are `nnx.Linear`, `LinearGeneral` (hence `MultiHeadAttention`), `Einsum`, `Conv` and `Embed`, tied or not.
    Layers stacked by `nnx.vmap` along axis 0, and run by `nnx.vmap` or `nnx.scan`, get one stacked adapter each, of one
    rank; the transformation must take every kind of variable along axis 0, as it does by default.

    Args:
        model: any `nnx.Module` that maps one pytree of inputs to outputs; it is not changed.
        max_rank: maximum rank of every layer that `where` takes, or by path pattern: `{"blocks/*/attn/*": 16}`. The
            first pattern that matches counts; layers that match none stay frozen. `{}`: no adapters at all.
        where: path patterns, or a predicate `(path, layer) -> bool`. "*" takes embeddings too.
        key: random key of the adapters' start values.
        train_dense: patterns of parameter paths that are trained whole, such as `"*/bias"` or `"head/*"`; `"*"` with
            `max_rank={}` is federated learning of the whole model.
        loss: `(outputs, targets) -> (b,)`.
        preprocess: applied to the inputs of every batch.
        compute_dtype: of the arithmetic and of what nothing is ever added to, such as `jnp.bfloat16`. What is trained,
            and kernels that rules may merge into, stay as the model has them (float32, or merging rules lose what is
            below their resolution) and are cast in every step. Everything as the model has it where None.
        checkpoint: path patterns of modules whose activations are computed again in the backward pass instead of being
            kept, such as `"blocks/*"`.
        frozen_statistics: accept `nnx.BatchNorm`, with its statistics as they are, in training as in evaluation.
        scan_blocks: path patterns of lists of equal blocks that shall run as one scan, such as `"blocks"`: a program
            is then as long as for one of them. Each layer in them gets one stacked adapter, `blocks/{}/attn/query`,
            which patterns such as `blocks/*/attn/*` take. The model has to hand what a block returns to the next one
            alone (it keeps no hidden states), and all of them the same other arguments.

    Returns:
        The task. Its `server.frozen` is a `Base`, so rules may merge into it.

    Raises:
        ValueError: if a pattern matches no supported layer, list or parameter, if a layer cannot be adapted or shares
            its weight with another, if blocks of a list are not equally built, or if the model keeps statistics. In a
            run: if it treats blocks of a scan differently.
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    graph, state = nnx.split(model)
    check_statistics(state, frozen_statistics)
    shapes = without_values(state)  # functions of the task hold no second copy of the values
    model = scan_lists(model, scan_blocks)
    adapted = nnx.clone(model)
    plain = nnx.split(adapted)[1]
    ranks = match_layers(adapted, max_rank, where)
    values = {name_of(path): _value(path, v) for path, v in nnx.to_flat_state(plain)}
    used: set[str] = set()
    weights, forms = _insert_adapters(adapted, ranks, values, used)
    names = [name_of(p) for p, v in nnx.to_flat_state(plain) if isinstance(v, nnx.Param)]
    dense = choose_parameters([n for n in names if n not in weights.values()], train_dense)
    if compute_dtype is not None:
        _compute_in(adapted, compute_dtype)
    _checkpoint(adapted, checkpoint)
    run = _runner(adapted, frozen_statistics, used)
    built = Model(values, weights, forms, run, lambda flat: nnx.merge(graph, _state(shapes, unstacked(flat))))
    vectors = ("bias", "scale")  # of stacked layers these have two axes as well
    matrices = [n for n in names if values[n].ndim > 1 + n.split("/").count(STACK)]
    matrices = [n for n in matrices if n not in weights.values() and n not in dense]
    matrices = [n for n in matrices if n.rpartition("/")[2] not in vectors]
    modules = {name_of(path): module for path, module in nnx.iter_modules(model)}
    unadapted = why_unadapted(modules, matrices, tuple(ADAPTED), wanted=(max_rank, where))
    reading = Reading(loss, preprocess, compute_dtype)
    return make_task(built, ranks, dense, key=key, reading=reading, unadapted=unadapted)


def _value(path: tuple, variable: Any) -> Any:
    """Return the array of a variable."""
    value = value_of(variable)
    if not isinstance(value, jax.Array | np.ndarray):
        raise ValueError(
            f"expected a model of arrays, got {describe(value)} at {name_of(path)!r}"
            + (
                ", probably of nnx.eval_shape, which makes shapes alone"
                if isinstance(value, jax.ShapeDtypeStruct)
                else ""
            )
        )
    return value


def match_layers(model: nnx.Module, max_rank: MaxRank, where: Where = "*") -> dict[str, int]:
    """Return the maximum rank by path of the supported layers that match, first pattern first."""
    modules = {name_of(path): module for path, module in nnx.iter_modules(model)}
    layers = {path: module for path, module in modules.items() if kind_of(module, ADAPTED)}
    others = {path: module for path, module in modules.items() if path not in layers}
    return choose_ranks(layers, others, max_rank, where)


def _insert_adapters(
    model: nnx.Module, ranks: Mapping[str, int], values: Flat, used: set[str]
) -> tuple[dict[str, str], dict[str, Form]]:
    """Swap the class of the matched layers, which note in `used` that they are; return names and forms of weights."""
    weights, forms = {}, {}
    for path, module in list(nnx.iter_modules(model)):
        name = name_of(path)
        if name not in ranks:
            continue
        swapped = adapted_class(type(module), kind_of(module, ADAPTED))
        shape = getattr(module, swapped.weight).shape
        layers = shape[: len(shape) - _own_axes(module)]
        try:
            forms[name] = swapped.form(_first(module, swapped.weight, len(layers)))._replace(layers=layers)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        weights[name] = join(name, swapped.weight)
        parts = sorted(one for one in values if one.startswith(f"{weights[name]}/"))
        if parts:
            raise ValueError(
                f"expected layers whose {swapped.weight} is one array of floats, got {parts[0]!r} as a part of that of "
                f"{name!r}, probably quantised: adapt what qwix' LoRA gives by task_from_lora_params"
            )
        if weights[name] not in values:
            raise ValueError(
                f"expected layers with weights of their own, got {name!r}, whose {swapped.weight} belongs to another "
                "layer too: share the layer in place of its weight, or leave it out of `where`"
            )
        module.__class__ = swapped
        empty = jnp.zeros((0,))  # factors come from the adapters whenever the model runs
        for factor in Adapter._fields:
            setattr(module, factor, Factor(empty, note=functools.partial(used.add, name)))
    return weights, forms


def _warn_of_unused(adapters: Mapping[str, Adapter], used: set[str]) -> None:
    """Warn, once, of adapters that the model has not read when it ran: they learn nothing."""
    unused = sorted(set(adapters) - used)
    used.update(unused)
    if unused:
        warnings.warn(
            f"adapters that the model does not use: {', '.join(unused[:5])}{' and more' * (len(unused) > 5)}: it does "
            "not call these layers, or reads their weights itself; leave them out of `where`",
            stacklevel=2,
        )


def _own_axes(layer: Any) -> int:
    """Return the axes of one layer's weight; those before them are of layers stacked by `nnx.vmap`."""
    if isinstance(layer, nnx.LinearGeneral):
        return len(layer.in_features) + len(layer.out_features) + len(layer.batch_axis)
    if isinstance(layer, nnx.Einsum):
        return len(layer.kernel_shape)
    return len(layer.kernel_size) + 2 if isinstance(layer, nnx.Conv) else 2


def _first(layer: nnx.Module, weight: str, stacked: int) -> nnx.Module:
    """Return a layer, or the first of stacked ones."""
    if not stacked:
        return layer
    one = nnx.clone(layer)
    variable = getattr(one, weight)
    variable.set_value(variable[...][(0,) * stacked])
    return one


def _runner(model: nnx.Module, frozen_statistics: bool, used: set[str]) -> Callable[..., PyTree]:
    """Return the function that runs the adapted model on given leaves; `used` are the adapters that it has read."""
    graphs = {training: graph_of(model, training, frozen_statistics) for training in (True, False)}
    paths = {name_of(path): path for path, _ in nnx.to_flat_state(nnx.split(model)[1])}

    def run(training: bool, values: Flat, adapters: dict[str, Adapter], inputs: PyTree, key: Key | None) -> PyTree:
        flat = fresh_randomness(values, key)
        for path, adapter in adapters.items():
            for factor, value in adapter._asdict().items():
                flat[join(path, factor)] = value
        merged = nnx.merge(graphs[training], nnx.from_flat_state([(paths[n], v) for n, v in flat.items()]))
        outputs = merged(inputs)
        check_outputs(outputs)
        if training:
            _warn_of_unused(adapters, used)
        return outputs

    return run


def graph_of(model: nnx.Module, training: bool, frozen_statistics: bool) -> Any:
    """Return the static part of a model in training or in evaluation."""
    copy = nnx.clone(model)
    copy.train() if training else copy.eval()
    for _, module in nnx.iter_modules(copy):
        if frozen_statistics and hasattr(module, "use_running_average"):
            module.use_running_average = True
    return nnx.split(copy)[0]


def _state(state: Any, flat: Flat) -> Any:
    return nnx.from_flat_state([(path, with_value(v, flat[name_of(path)])) for path, v in nnx.to_flat_state(state)])


def _compute_in(model: nnx.Module, dtype: Any) -> None:
    """Set the dtype that Flax's layers compute in."""
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "dtype") and hasattr(module, "param_dtype"):
            module.dtype = dtype


def _checkpoint(model: nnx.Module, patterns: str | tuple[str, ...]) -> None:
    """Give the matching modules a class whose call is checkpointed."""
    modules = {name_of(path): module for path, module in nnx.iter_modules(model)}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        matching = [module for path, module in modules.items() if fnmatchcase(path, pattern)]
        if not matching:
            raise ValueError(
                f"expected checkpoint patterns that match a module, got {pattern!r}, the modules are {sorted(modules)}"
            )
        for module in matching:
            if callable(module):  # a list of modules is not
                module.__class__ = _checkpointed(type(module))


def _checkpointed(kind: type) -> type:
    """Return a subclass whose call keeps no activations; what is no array (flags, None) stays static."""

    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        graph, state = nnx.split(self)
        leaves, structure = jax.tree.flatten((args, kwargs))

        def pure(state: Any, arrays: dict[int, Array]) -> Any:
            module = nnx.merge(graph, state)
            before = leaves_of(module)
            given, named = jax.tree.unflatten(structure, [arrays.get(n, leaf) for n, leaf in enumerate(leaves)])
            outputs = kind.__call__(module, *given, **named)
            written = [(p, v) for p, v in nnx.to_flat_state(nnx.state(module)) if p in written_since(before, module)]
            return outputs, nnx.from_flat_state(written)

        arrays = {number: leaf for number, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
        outputs, state = jax.checkpoint(pure)(state, arrays)
        nnx.update(self, state)
        return outputs

    return type(f"Checkpointed{kind.__name__}", (kind,), {"__call__": call})


def check_statistics(state: Any, frozen: bool) -> None:
    """Raise `ValueError` for a model that keeps statistics, unless they shall stay as they are."""
    for path, variable in nnx.to_flat_state(state):
        if isinstance(variable, nnx.BatchStat) and not frozen:
            raise ValueError(
                f"expected a model without mutable statistics, got {name_of(path)!r}, such as nnx.BatchNorm has: "
                "clients with different data have no common statistics; use nnx.GroupNorm or nnx.LayerNorm, or keep "
                "those of a pretrained model with frozen_statistics=True"
            )


def fresh_randomness(flat: Flat, key: Key | None) -> Flat:
    """Give every random-number stream inside the model its own fresh key, as `nnx.merge` under jit needs.

    Streams of stacked layers hold a key for each of them.
    """
    streams = sorted(
        name
        for name, value in flat.items()  # of quantised weights a value is no array
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    )
    if key is None or not streams:
        return dict(flat)
    own = {name: jax.random.fold_in(key, number) for number, name in enumerate(streams)}
    return flat | {n: jax.random.split(one, flat[n].shape) if flat[n].shape else one for n, one in own.items()}
