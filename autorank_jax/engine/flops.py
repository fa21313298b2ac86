"""Training FLOPs of a model, counted by XLA and linear in the ranks."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from autorank_jax.interface import check_least, check_name, checked
from autorank_jax.types import Adapter, Batch, FederatedData, Task

FLOPS_PER_SECOND = {"cpu": 1e11, "gpu": 1e13, "tpu": 1e13}
"""Of one device, small matrices: what choices of lanes and levels reckon with."""


class FlopModel(NamedTuple):
    """FLOPs of training on one example, linear in the ranks: `base + Σ_l per_rank[l] · r_l`."""

    base: float
    per_rank: dict[str, float]


def platform_of(name: str | None) -> str:
    """Return the platform of JAX's default device, or the one that is named.

    Raises:
        ValueError: for an unknown name.
    """
    platform = name or jax.default_backend()
    check_name("a platform", platform, FLOPS_PER_SECOND)
    return platform


@checked
def training_flops(task: Task, data: FederatedData, *, batch_size: int = 8) -> FlopModel:
    """Count forward and backward FLOPs per example by lowering the gradient at rank 0 and at one rank per layer.

    XLA's own analysis does the counting, so any model will do; but it counts the body of a loop (`lax.scan`,
    `lax.while_loop`) once, however often it runs: unroll such models for counting, or make a `FlopModel` by hand
    (`evaluation.language_flops` for causal decoders). Both
    factors are taken to be trained. Optimiser and aggregation are left out: they do not grow with the examples.

    Args:
        task: the model.
        data: for the shapes of inputs and targets.
        batch_size: examples that are counted together and divided by.

    Returns:
        The linear model.

    Raises:
        RuntimeError: where this version of XLA does not count for this device.
    """
    check_least("batch_size", batch_size)
    count = min(batch_size, jax.tree.leaves(data.inputs)[0].shape[0])
    blank = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape[1:]), leaf.dtype), (data.inputs, data.targets))
    batch = Batch(blank[0], blank[1], jnp.ones(count))  # closed over: preparing inputs is no training
    trained, key = task.server.trainable, jax.random.key(0)

    def flops(ranks: Mapping[str, int]) -> float:
        adapters = {path: _narrow(a, ranks.get(path, 0)) for path, a in trained.adapters.items()}
        gradient = jax.grad(lambda t: jnp.sum(task.loss(task.server.frozen, t, batch, key)))
        cost = jax.jit(gradient).lower(trained._replace(adapters=adapters)).cost_analysis()
        if not cost or "flops" not in cost:
            raise RuntimeError(
                f"expected XLA to count the FLOPs of a gradient, got no count on {jax.default_backend()}: count on a "
                "CPU, or make a FlopModel by hand"
            )
        return float(cost["flops"]) / count

    base = flops({})
    return FlopModel(base, {path: flops({path: 1}) - base for path in sorted(trained.adapters)})


def _narrow(adapter: Adapter, rank: int) -> Adapter:
    lora_a, lora_b = adapter
    shapes = (*lora_a.shape[:-1], rank), (*lora_b.shape[:-2], rank, lora_b.shape[-1])
    return Adapter(*(jax.ShapeDtypeStruct(s, leaf.dtype) for s, leaf in zip(shapes, adapter, strict=True)))  # type: ignore[arg-type]
