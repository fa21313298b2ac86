"""Tasks from Flax NNX models: which layers get adapters, what is trained whole, what stays frozen."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from autorank_jax.layers import ADAPTED, Factor
from autorank_jax.lora import init_adapter
from autorank_jax.types import Adapter, Array, Base, Batch, Key, PyTree, Server, Task, Trainable

Flat = dict[str, Array]


def classification_loss(logits: Array, labels: Array) -> Array:
    """Return the softmax cross-entropy of each example.

    Args:
        logits: `(b, classes)`.
        labels: `(b,)` integers.

    Returns:
        `(b,)` nats.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))


def as_float(inputs: PyTree) -> PyTree:
    """Map uint8 leaves (images) to floats in [0, 1]; leave the others."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x, inputs)


def task_from_nnx(
    model: nnx.Module,
    *,
    max_rank: int | Mapping[str, int],
    key: Key | int = 0,
    train_dense: str | tuple[str, ...] = "*/bias",
    loss: Callable[[Array, Any], Array] = classification_loss,
    preprocess: Callable[[PyTree], PyTree] = as_float,
) -> Task:
    """Make a task of an unmodified NNX model: adapters on matching layers, the rest frozen or trained whole.

    Args:
        model: any `nnx.Module` without mutable statistics; it is not changed.
        max_rank: maximum rank of every supported layer, or by path pattern: `{"blocks/*/attn/*": 16}`. The first
            pattern that matches counts; layers that match none stay frozen. `{}`: no adapters at all.
        key: random key of the adapters' start values.
        train_dense: patterns of parameter paths that are trained whole, such as `"*/bias"` or `"head/*"`; `"*"` with
            `max_rank={}` is federated learning of the whole model.
        loss: `(outputs, targets) -> (b,)`.
        preprocess: applied to the inputs of every batch.

    Returns:
        The task. Its `server.frozen` is a `Base`, so rules may merge into it.

    Raises:
        ValueError: if a pattern matches no supported layer or no parameter, or if the model keeps statistics.
    """
    adapted = nnx.clone(model)
    key = jax.random.key(key) if isinstance(key, int) else key
    patterns = {"*": max_rank} if isinstance(max_rank, int) else dict(max_rank)
    ranks = match_layers(adapted, patterns)
    adapters = _insert_adapters(adapted, ranks, key)
    paths, values = _flatten(adapted)
    dense_names = _match_parameters(adapted, (train_dense,) if isinstance(train_dense, str) else train_dense, ranks)
    kernels = {p: values[f"{p}/kernel"].reshape(a.lora_a.shape[0], a.lora_b.shape[1]) for p, a in adapters.items()}
    shapes = {p: values[f"{p}/kernel"].shape for p in adapters}
    inserted = {f"{p}/{name}" for p in adapters for name in ("kernel", "lora_a", "lora_b")}
    rest = {n: v for n, v in values.items() if n not in inserted and n not in dense_names}
    server = Server(Trainable(adapters, {n: values[n] for n in sorted(dense_names)}), Base(kernels, rest))
    graphs = {mode: _graph(adapted, mode) for mode in ("train", "eval")}

    def apply(mode: str, frozen: Base, trainable: Trainable, inputs: PyTree, key: Key | None) -> Array:
        flat = {**frozen.rest, **trainable.dense}
        for path, adapter in trainable.adapters.items():
            flat[f"{path}/kernel"] = frozen.kernels[path].reshape(shapes[path])
            flat[f"{path}/lora_a"], flat[f"{path}/lora_b"] = adapter
        flat = _fresh_randomness(flat, key)
        state = nnx.from_flat_state([(paths[name], value) for name, value in flat.items()])
        return nnx.merge(graphs[mode], state)(preprocess(inputs))

    def batch_loss(frozen: Base, trainable: Trainable, batch: Batch, key: Key) -> Array:
        return loss(apply("train", frozen, trainable, batch.inputs, key), batch.targets)

    def predict(frozen: Base, trainable: Trainable, inputs: PyTree) -> Array:
        return apply("eval", frozen, trainable, inputs, None)

    return Task(server, batch_loss, predict)


def match_layers(model: nnx.Module, patterns: Mapping[str, int]) -> dict[str, int]:
    """Return the maximum rank by path of the supported layers that match, first pattern first."""
    candidates = {_name(path): type(module) for path, module in nnx.iter_modules(model) if type(module) in ADAPTED}
    ranks = {}
    for path in sorted(candidates):
        matching = [rank for pattern, rank in patterns.items() if fnmatchcase(path, pattern)]
        if matching:
            ranks[path] = matching[0]
    for pattern, rank in patterns.items():
        if not any(fnmatchcase(path, pattern) for path in candidates):
            raise ValueError(
                f"expected max_rank patterns that match one of {[t.__name__ for t in ADAPTED]}, got {pattern!r}, "
                f"probably a misspelt path: the candidates are {sorted(candidates)}"
            )
        if rank < 1:
            raise ValueError(f"expected maximum ranks >= 1, got {rank} for {pattern!r}")
    return ranks


def _insert_adapters(model: nnx.Module, ranks: Mapping[str, int], key: Key) -> dict[str, Adapter]:
    adapters = {}
    for path, module in nnx.iter_modules(model):
        name = _name(path)
        if name in ranks:
            number = sorted(ranks).index(name)
            swapped = ADAPTED[type(module)]
            d_in, d_out = swapped.adapter_shape(module)
            adapters[name] = init_adapter(jax.random.fold_in(key, number), d_in, d_out, ranks[name])
            module.__class__ = swapped
            for factor, value in adapters[name]._asdict().items():
                setattr(module, factor, Factor(value))
    return adapters


def _flatten(model: nnx.Module) -> tuple[dict[str, tuple], Flat]:
    state = nnx.to_flat_state(nnx.split(model)[1])
    for path, variable in state:
        if isinstance(variable, nnx.BatchStat):
            raise ValueError(
                f"expected a model without mutable statistics, got {_name(path)!r}, probably from nnx.BatchNorm: "
                "clients with different data have no common statistics; use nnx.GroupNorm or nnx.LayerNorm"
            )
    return {_name(path): path for path, _ in state}, {_name(path): v.get_value() for path, v in state}


def _match_parameters(model: nnx.Module, patterns: tuple[str, ...], ranks: Mapping[str, int]) -> set[str]:
    kernels = {f"{p}/kernel" for p in ranks}
    names = [
        _name(p)
        for p, v in nnx.to_flat_state(nnx.split(model)[1])
        if isinstance(v, nnx.Param) and _name(p) not in kernels
    ]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names) and pattern != "*/bias":
            raise ValueError(
                f"expected train_dense patterns that match a parameter, got {pattern!r}, the candidates are {names}"
            )
    return {name for name in names for pattern in patterns if fnmatchcase(name, pattern)}


def _graph(model: nnx.Module, mode: str) -> Any:
    copy = nnx.clone(model)
    copy.train() if mode == "train" else copy.eval()
    return nnx.split(copy)[0]


def _fresh_randomness(flat: Flat, key: Key | None) -> Flat:
    """Give every random-number stream inside the model its own fresh key, as `nnx.merge` under jit needs."""
    streams = sorted(name for name, value in flat.items() if jnp.issubdtype(value.dtype, jax.dtypes.prng_key))
    if key is None or not streams:
        return flat
    return flat | {name: jax.random.fold_in(key, number) for number, name in enumerate(streams)}


def _name(path: tuple) -> str:
    return "/".join(map(str, path))
