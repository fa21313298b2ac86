"""Tasks from models that carry adapters already: `nnx.LoRA`, `nnx.LoRALinear`, or what qwix put into any NNX module."""

import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from autorank_jax.adapters.losses import as_float, classification_loss
from autorank_jax.adapters.nnx import check_statistics, fresh_randomness, graph_of
from autorank_jax.adapters.nnx_blocks import STACK, check_outputs, name_of
from autorank_jax.adapters.nnx_scan import scan_lists, unstacked, value_of, with_value
from autorank_jax.adapters.selection import choose_parameters
from autorank_jax.adapters.task import without_values
from autorank_jax.interface import FOREIGN_FAILURES, check_least, checked
from autorank_jax.types import Adapter, Array, Base, Batch, Key, Origin, PyTree, Server, Task, TaskReport, Trainable


@checked
def task_from_lora_params(
    model: nnx.Module,
    *,
    train_dense: str | tuple[str, ...] = (),
    loss: Callable[[Any, Any], Array] = classification_loss,
    preprocess: Callable[[PyTree], PyTree] = as_float,
    frozen_statistics: bool = False,
    scan_blocks: str | tuple[str, ...] = (),
) -> Task:
    """Make a task of an NNX model that carries its adapters, as pairs of `nnx.LoRAParam`s `*lora_a` and `*lora_b`.

    The model runs as it is: what its adapters multiply, their scale and a quantised base are its own business. So any
    matrix that qwix can reach is adapted, whatever the class of its layer. Factors are `(..., r)` and `(r, ...)`, read
    as matrices, or `(layers, d_in, r)` and `(layers, r, d_out)`, read as stacks. A rank is a mask on `r`.

    Args:
        model: any `nnx.Module` that maps one pytree of inputs to outputs; it is not changed.
        train_dense: patterns of parameter paths that are trained whole.
        loss: `(outputs, targets) -> (b,)`.
        preprocess: applied to the inputs of every batch.
        frozen_statistics: as in `task_from_nnx`.
        scan_blocks: as in `task_from_nnx`.

    Returns:
        The task; the adapter of `layer/kernel_lora_a` is `layer/kernel`, that of `layer/lora_a` is `layer`, and their
        start is that of the model. `merge` gives the model with trained adapters in it, beside its base: rules that
        merge into the base (`flora`) are refused.

    Raises:
        ValueError: if there is no adapter, a factor lacks the other, or it cannot be told where their rank is; if a
            pattern matches no parameter, or the model keeps statistics.
    """
    graph, state = nnx.split(model)
    check_statistics(state, frozen_statistics)
    blank = without_values(state)
    model = scan_lists(model, scan_blocks)
    state = nnx.split(model)[1]
    variables = {name_of(path): variable for path, variable in nnx.to_flat_state(state)}
    paths = {name_of(path): path for path, _ in nnx.to_flat_state(state)}
    values = {name: value_of(variable) for name, variable in variables.items()}
    pairs = _pairs([name for name, variable in variables.items() if isinstance(variable, nnx.LoRAParam)])
    adapters = {path: _adapter(path, *(values[name] for name in names)) for path, names in pairs.items()}
    factors = {name: path for path, names in pairs.items() for name in names}
    others = [n for n, v in variables.items() if n not in factors and type(v) is nnx.Param]
    dense = choose_parameters(others, train_dense)
    rest = {name: value for name, value in values.items() if name not in factors and name not in dense}
    server = Server(Trainable(adapters, {name: values[name] for name in sorted(dense)}), Base({}, rest))
    graphs = {training: graph_of(model, training, frozen_statistics) for training in (True, False)}
    shapes = {name: values[name].shape for name in factors}

    def flat(server: Server) -> dict[str, Any]:
        given = {**server.frozen.rest, **server.trainable.dense}
        for path, names in pairs.items():
            for name, factor in zip(names, server.trainable.adapters[path], strict=True):
                given[name] = factor.reshape(shapes[name])
        return given

    def apply(training: bool, server: Server, inputs: PyTree, key: Key | None) -> PyTree:
        given = fresh_randomness(flat(server), key)
        state = nnx.from_flat_state([(paths[name], value) for name, value in given.items()])
        merged = nnx.merge(graphs[training], state)
        outputs = merged(preprocess(inputs))
        check_outputs(outputs)
        return outputs

    def task_loss(frozen: Base, trainable: Trainable, batch: Batch, key: Key) -> Array:
        return loss(apply(True, Server(trainable, frozen), batch.inputs, key), batch.targets)

    def predict(frozen: Base, trainable: Trainable, inputs: PyTree, key: Key | None = None) -> PyTree:
        return apply(key is not None, Server(trainable, frozen), inputs, key)

    def merge(server: Server) -> nnx.Module:
        given = unstacked(flat(server))
        state = [(path, with_value(v, given[name_of(path)])) for path, v in nnx.to_flat_state(blank)]
        return nnx.merge(graph, nnx.from_flat_state(state))

    ranks = {path: adapter.lora_a.shape[-1] for path, adapter in adapters.items()}
    report = TaskReport(ranks, tuple(sorted(dense)), tuple(sorted(rest)), {})
    return Task(server, task_loss, predict, Origin(merge, dict.fromkeys(adapters, "own"), {}), report)


@checked
def with_qwix(
    model: nnx.Module,
    inputs: PyTree,
    *,
    rank: int,
    where: str = ".*",
    key: Key | int = 0,
    quantize: Literal["int8", "nf4"] | None = None,
) -> nnx.Module:
    """Give an NNX model an adapter for every matrix that it multiplies by, whatever the class of the layer.

    For models whose layers `task_from_nnx` does not know: qwix runs the model once, finds its products, and puts
    `nnx.LoRAParam`s beside their parameters, `A` He-uniform and `B` zero, with scale 1. The rest is
    `task_from_lora_params(with_qwix(model, inputs, rank=8))` and, in `export_peft`, `scale=1`.

    Args:
        model: any NNX module; it is not changed.
        inputs: what the model is called with, of any batch size.
        rank: the maximum rank of all adapters.
        where: a regular expression that the whole path of a module has to match, such as `layers/.*`.
        key: random key of the adapters' start values.
        quantize: hold the matrices that are adapted in few bits.

    Returns:
        The model with its adapters.

    Raises:
        ImportError: without the package qwix.
        ValueError: if nothing matches, or the model does not take the inputs.
    """
    check_least("rank", rank)
    try:
        import qwix  # noqa: PLC0415  optional
    except ImportError as error:
        raise ImportError("expected the package 'qwix' for this, got none: pip install 'autorank-jax[qwix]'") from error
    key = jax.random.key(key) if isinstance(key, int) else key
    try:
        re.compile(where)
    except re.error as error:
        raise ValueError(f"expected where as a regular expression, got {where!r}: {error}") from error
    provider = qwix.LoraProvider(module_path=where, rank=rank, alpha=float(rank), weight_qtype=quantize)
    try:
        with jax.numpy_dtype_promotion("standard"):
            carrying = qwix.apply_lora_to_model(model, provider, inputs, rngs=nnx.Rngs(key))
    except FOREIGN_FAILURES as error:
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise ValueError(
            f"expected inputs that the model takes, and products that qwix knows, got {type(error).__name__}: {said}"
        ) from error
    if not jax.tree.leaves(nnx.state(carrying, nnx.LoRAParam)):
        raise ValueError(f"expected where as a regular expression for the path of some module, got {where!r}")
    return carrying


def _pairs(names: list[str]) -> dict[str, tuple[str, str]]:
    """Return the names of both factors by the adapter's path, in sorted order."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        stem, factor = name[: -len("lora_a")], name[-len("lora_a") :]
        if factor not in Adapter._fields:
            raise ValueError(f"expected nnx.LoRAParams named *lora_a and *lora_b, got {name!r}")
        found.setdefault(stem.rstrip("_/"), {})[factor] = name
    if not found:
        raise ValueError(
            "expected a model that carries nnx.LoRAParams, got one without; task_from_nnx gives it adapters"
        )
    alone = [names for names in found.values() if len(names) < 2]
    if alone:
        raise ValueError(f"expected both factors of every adapter, got {next(iter(alone[0].values()))!r} alone")
    return {path: (found[path]["lora_a"], found[path]["lora_b"]) for path in sorted(found)}


def _adapter(path: str, lora_a: Array, lora_b: Array) -> Adapter:
    """Read both factors as matrices, or as stacks of them."""
    depth = path.split("/").count(STACK)
    if depth:
        one = jax.eval_shape(lambda a, b: _adapter("", a, b), *(f[(0,) * depth] for f in (lora_a, lora_b)))
        return Adapter(*(f.reshape(f.shape[:depth] + o.shape) for f, o in zip((lora_a, lora_b), one, strict=True)))
    rank, layers = lora_a.shape[-1], lora_a.shape[:-2]
    plain = lora_b.shape[0] == rank
    stacked = lora_a.ndim == lora_b.ndim > 2 and lora_b.shape[:-2] == layers and lora_b.shape[-2] == rank
    if plain == stacked:
        raise ValueError(
            f"adapter {path!r}: expected factors (..., r) and (r, ...), or stacks (layers, d_in, r) and (layers, r, "
            f"d_out), got {lora_a.shape} and {lora_b.shape}" + ", which are both: choose another rank" * plain
        )
    if stacked:
        return Adapter(lora_a, lora_b)
    return Adapter(jnp.reshape(lora_a, (-1, rank)), jnp.reshape(lora_b, (rank, -1)))
