"""Adapters for other libraries: the layout of Hugging Face PEFT."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.adapters.lora import layers_of, max_ranks
from autorank_jax.adapters.task import check_server
from autorank_jax.interface import checked, describe
from autorank_jax.models.causal_checkpoint import causal_name
from autorank_jax.types import Adapter, Array, Server, Task

T = TypeVar("T")
Names = Callable[[str], str | None]
"""Path of a layer -> name of the module in PyTorch, None for what the PyTorch model does not have."""


@checked
def export_peft(
    path: str | Path,
    task: Task,
    server: Server,
    *,
    ranks: Mapping[str, int | Array] | None = None,
    names: Names | None = None,
    base_model: str | Path | None = None,
    scale: float | Mapping[str, float] | None = None,
) -> Path:
    """Write the adapters as `adapter_model.safetensors` and `adapter_config.json`, as Hugging Face PEFT reads them.

    Where ranks differ, every module has its own through `rank_pattern`, and the same number as its alpha: PEFT's scale
    `alpha / r` is 1: updates here are in units of the weights. Biases and heads that were trained whole go along under
    the names of the base model, which `PeftModel.from_pretrained` loads too. Adapters of a quantised base are as any
    others, and load on the base in any form; the metadata of the file of tensors have the form that they were trained
    on as `base_quantization`.

    Args:
        path: of a folder, made where it does not exist.
        task: made of an NNX model with linear, convolutional and embedding layers.
        server: the global model, such as `state.server`; for a model of a client's own, `state.server` with its
            `trainable`.
        ranks: by adapter path, the rank in 1..max_rank to which the factors are cut, as a client trains them:
            `{path: ranks[client] for path, ranks in state.ranks.items()}`; of a stack one number, or one for each
            layer. Whole where None.
        names: module names in PyTorch, such as `models.bert.bert_name`; the path with dots where None. Where it gives
            None for a layer that was trained whole, that is left out. Of stacked layers, the name with `{}` where the
            number of the layer goes, such as `models.causal_name`, with which the config says "CAUSAL_LM".
        base_model: name or path of the base model, for the config.
        scale: needed for models that carry their own adapters, and for them alone: the factor by which they multiply
            `A B` (1 in `nnx.LoRA`, alpha / rank in qwix), one for all, or one for each adapter by its path;
            `lora_B` is written times it. Their factors are read as matrices, inputs first.

    Returns:
        The folder.

    Raises:
        ImportError: without the package safetensors.
        TypeError: for names that are no text.
        ValueError: if the task was built by hand, if the rule has changed the base weights, if two layers get one name,
            if a parameter trained whole has no counterpart, for ranks of other layers or out of range, and without
            `scale` where it is needed.
    """
    try:
        from safetensors.numpy import save  # noqa: PLC0415  optional
    except ImportError as error:
        message = "expected the package 'safetensors' for this, got none: pip install 'autorank-jax[text]'"
        raise ImportError(message) from error
    _check(task, server)
    widths = _widths(server, ranks)
    server = _scaled(server, task, scale)
    given, names = names, _of_text(names or _paths_of(task))
    modules = _module_names(server, names)
    tensors, pattern, targets = {}, {}, []
    for layer, adapter in server.trainable.adapters.items():
        for module, (one, width) in _unstack(modules[layer], (adapter, widths[layer])):
            targets.append(module)
            pattern[f"^{re.escape(module)}"] = rank = int(width)
            own = Adapter(one.lora_a[:, :rank], one.lora_b[:rank])
            tensors.update(_factors(f"base_model.model.{module}", own, task.origin, layer))
    dense = _dense(server, names)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    base = None if base_model is None else str(base_model)
    config = _config(sorted(targets), pattern, any(name.endswith("bias") for name in dense), base)
    config |= {"task_type": "CAUSAL_LM"} if given is causal_name else {}  # by which some readers choose a class
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    forms = sorted(set(task.report.quantized.values())) if task.report else []
    metadata = {"format": "pt"} | ({"base_quantization": ",".join(forms)} if forms else {})
    (folder / "adapter_model.safetensors").write_bytes(save(tensors | dense, metadata=metadata))
    return folder


def _check(task: Task, server: Server) -> None:
    check_server(task, server)
    if not server.trainable.adapters:
        raise ValueError("expected a server with adapters, got one without")
    start, now = task.server.frozen.kernels, server.frozen.kernels
    changed = sorted(path for path in start if not bool(jnp.array_equal(start[path], now[path])))
    if changed:
        raise ValueError(
            f"expected the base weights that the task began with, got others for {changed}: where a rule merges into "
            "the base, the adapters alone are not the model, use merge"
        )


def _scaled(server: Server, task: Task, scale: float | Mapping[str, float] | None) -> Server:
    """Return the adapters of a model that carries its own in units of its weights."""
    carried = _carries(task)
    if not carried and scale is not None:
        raise ValueError(f"expected no scale, as updates here are in units of the weights, got {describe(scale)}")
    if not carried:
        return server
    paths = server.trainable.adapters.keys()
    scales = scale if isinstance(scale, Mapping) else dict.fromkeys(paths, scale)
    if scales.keys() != paths:
        raise ValueError(f"scale: expected one for each of {sorted(paths)}, got {sorted(scales, key=str)}")
    adapters = {
        p: Adapter(a, b * _factor(scales[p], f" of {p!r}" * isinstance(scale, Mapping)))
        for p, (a, b) in server.trainable.adapters.items()
    }
    return server._replace(trainable=server.trainable._replace(adapters=adapters))


def _factor(scale: Any, whose: str) -> float:
    if not isinstance(scale, Real) or not 0 < abs(float(scale)) < np.inf:
        raise ValueError(
            "expected scale=, the factor by which the model multiplies the adapters that it carries (1 in nnx.LoRA, "
            f"alpha / rank in qwix), got {describe(scale)}{whose}"
        )
    return float(scale)


def _carries(task: Task) -> bool:
    """Return whether the model carries its own adapters."""
    return task.origin is not None and "own" in task.origin.kinds.values()


def _paths_of(task: Task) -> Names:
    """Return the names that are paths with dots; the layer that carries an adapter is the one around it."""

    def around(path: str) -> str:
        layer, _, own = path.rpartition("/")
        if own not in ("kernel", "lora") or not layer:
            raise ValueError(f"expected names=, as no module in PyTorch is known for the parameter {path!r}, got none")
        return layer.replace("/", ".")

    return around if _carries(task) else lambda path: path.replace("/", ".")


def _of_text(names: Names) -> Names:
    """Return the same names, held to be text or None."""

    def name(layer: str) -> str | None:
        module = names(layer)
        if module is not None and not isinstance(module, str):
            raise TypeError(f"expected names that return text or None, got {describe(module)} for {layer!r}")
        return module

    return name


def _widths(server: Server, ranks: Mapping[str, int | Array] | None) -> dict[str, np.ndarray]:
    """Return how many rank positions of every adapter are written, `(*layers,)`: all where no ranks are given."""
    adapters = server.trainable.adapters
    ranks = max_ranks(server) if ranks is None else ranks
    if ranks.keys() != adapters.keys():
        raise ValueError(f"ranks: expected one for each of {sorted(adapters)}, got {sorted(ranks)}")
    widths = {}
    for path, adapter in adapters.items():
        rank, largest, layers = np.asarray(ranks[path]), adapter.lora_a.shape[-1], layers_of(adapter)
        whole = rank.shape in ((), layers) and np.issubdtype(rank.dtype, np.integer)
        if not whole or not np.all((rank >= 1) & (rank <= largest)):
            cause = ", probably the ranks of all clients" if rank.ndim == len(layers) + 1 else ""
            several = f", or {layers[0]} of them" if layers else ""
            raise ValueError(
                f"ranks[{path!r}]: expected a whole number in 1..{largest}{several}, got {describe(ranks[path])}{cause}"
            )
        widths[path] = np.broadcast_to(rank, layers)
    return widths


def _module_names(server: Server, names: Names) -> dict[str, str]:
    modules: dict[str, str] = {}
    for layer in sorted(server.trainable.adapters):
        module = names(layer)
        if not module or module in modules.values():
            raise ValueError(f"expected one module name for each adapted layer, got {module!r} for {layer!r}")
        if ("{}" in module) != (server.trainable.adapters[layer].lora_a.ndim == 3):
            raise ValueError(f"expected a name with {{}} for stacked layers alone, got {module!r} for {layer!r}")
        modules[layer] = module
    return modules


def _unstack(name: str, tree: T) -> Iterator[tuple[str, T]]:
    """Return the names of stacked layers, `{}` being their number, with what each of them has."""
    if "{}" not in name:
        yield name, tree
        return
    for number in range(jax.tree.leaves(tree)[0].shape[0]):
        yield name.format(number), jax.tree.map(lambda leaf, n=number: leaf[n], tree)


def _factors(prefix: str, adapter: Adapter, origin: Any, layer: str) -> dict[str, np.ndarray]:
    """Return both factors as PyTorch lays them out: outputs first."""
    lora_a, lora_b = (np.asarray(factor, np.float32) for factor in adapter)
    if origin.kinds[layer] == "embed":
        tensors = {"lora_embedding_A": lora_a.T, "lora_embedding_B": lora_b.T}
    elif origin.kinds[layer] == "conv":
        *window, channels, _ = origin.shapes[layer]
        kernel = lora_a.T.reshape(-1, *window, channels)  # (r, *window, c_in)
        ones = (1,) * len(window)
        tensors = {
            "lora_A.weight": np.moveaxis(kernel, -1, 1),
            "lora_B.weight": lora_b.T.reshape(-1, len(lora_b), *ones),
        }
    else:
        tensors = {"lora_A.weight": lora_a.T, "lora_B.weight": lora_b.T}
    return {f"{prefix}.{name}": np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _dense(server: Server, names: Names) -> dict[str, np.ndarray]:
    """Return what was trained whole under the names of the base model."""
    tensors = {}
    for path, value in server.trainable.dense.items():
        layer = path.rpartition("/")[0]
        module = names(layer)
        if module is None:
            continue
        inner = "base_layer." if layer in server.trainable.adapters else ""
        for name, one in _unstack(module, value):
            leaf_name, array = _as_torch(path, np.asarray(one, np.float32))
            tensors[f"base_model.model.{name}.{inner}{leaf_name}"] = np.ascontiguousarray(array)
    return tensors


def _as_torch(path: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """Return a parameter as PyTorch names it and lays it out."""
    layer, _, leaf = path.rpartition("/")
    if leaf == "kernel" and array.ndim == 2:
        return "weight", array.T
    if leaf in ("scale", "embedding"):
        return "weight", array
    if leaf == "bias":
        return "bias", array.reshape(-1)
    raise ValueError(
        f"expected kernels of linear layers, embeddings, scales and biases among what is trained whole, got {path!r}: "
        f"let names return None for {layer!r}, or use merge"
    )


def _config(modules: list[str], ranks: dict[str, int], biases: bool, base_model: str | None) -> dict[str, Any]:
    widest = max(ranks.values())
    own = ranks if len(set(ranks.values())) > 1 else {}  # some readers know no patterns
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "target_modules": modules,
        "r": widest,
        "lora_alpha": widest,
        "rank_pattern": own,
        "alpha_pattern": own,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
