"""How many lanes suit a federation: a host helper that looks at the data, the model and the device."""

import jax
import numpy as np

from autorank_jax.adapters.lora import max_ranks
from autorank_jax.engine.flops import FLOPS_PER_SECOND, FlopModel, platform_of, training_flops
from autorank_jax.engine.footprint import training_footprint
from autorank_jax.federated.checks import check_known
from autorank_jax.interface import check_least, checked
from autorank_jax.types import FederatedData, Task

_CPU_STEP_FLOPS, _MOST_ON_CPU = 2.0**25, 64
_LAUNCHES = 2.4  # for every product of a step: counted in compiled rounds of an MLP, a CNN and a transformer
_LAUNCH_SECONDS = 4e-6
_BUSY = 4  # how many times longer a step is to compute than to launch
_SHARE = 0.8  # of the free memory that lanes may take


@checked
def choose_lanes(
    data: FederatedData,
    task: Task,
    *,
    batch_size: int,
    cohort: int | None = None,
    flops: FlopModel | None = None,
    platform: str | None = None,
    memory: float | None = None,
) -> int:
    """Choose how many clients train side by side.

    Enough lanes for one step of all of them to keep the device busy, but never more than `Σ steps / max steps`: beyond
    that, lanes idle while the longest client trains. On an accelerator a step is to compute four times as long as its
    kernels take to launch, and the lanes together are to fit into 0.8 of the memory, by `training_footprint`.

    Args:
        data: all clients' examples.
        task: the model; its FLOPs per step are counted at full rank.
        batch_size: examples per step of one client; a batch is never larger than the data.
        cohort: clients of a round, where not all take part.
        flops: of the model, for one whose layers run in a loop; counted by `training_flops` where None.
        platform: "cpu", "gpu" or "tpu"; JAX's default device where None.
        memory: bytes that are free on an accelerator; as JAX's default device says where None, no limit where it says
            nothing.

    Returns:
        Lanes, at least 1.

    Raises:
        ValueError: for an unknown platform.
    """
    check_known("choose_lanes", data)
    platform = platform_of(platform)
    check_least("batch_size", batch_size)
    check_least("cohort", 1 if cohort is None else cohort)
    batch_size = min(batch_size, data.order.shape[0])
    flops = flops or training_flops(task, data, batch_size=batch_size)
    per_example = flops.base + sum(
        flops.per_rank[path] * rank for path, rank in max_ranks(task.server.trainable).items()
    )
    per_step = max(per_example * batch_size, 1.0)
    steps = -(-np.asarray(data.size, np.int64) // batch_size)
    share = 1.0 if cohort is None else cohort / len(steps)
    useful = int(share * steps.sum() / steps.max())
    if platform == "cpu":
        return max(1, min(round(_CPU_STEP_FLOPS / per_step), useful, _MOST_ON_CPU))
    step = training_footprint(task, data, batch_size=batch_size)
    memory = free_memory() if memory is None else memory
    fitting = useful if memory is None else int(_SHARE * memory / step.bytes)
    launching = _LAUNCHES * step.products * _LAUNCH_SECONDS
    return max(1, min(round(_BUSY * launching * FLOPS_PER_SECOND[platform] / per_step), useful, fitting))


def free_memory(device: jax.Device | None = None) -> int | None:
    """Return the bytes that are free on a device, JAX's default one where None; None where it does not tell."""
    stats = (device or jax.local_devices()[0]).memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0))
