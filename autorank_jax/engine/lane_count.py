"""How many lanes suit a federation: a host helper that looks at the data, the model and the device."""

import jax
import numpy as np

from autorank_jax.adapters.lora import max_ranks
from autorank_jax.arguments import check_least, check_name, checked
from autorank_jax.engine.flops import training_flops
from autorank_jax.federated.checks import check_known
from autorank_jax.types import FederatedData, Task

_STEP_FLOPS = {"cpu": 2.0**25, "gpu": 2.0**34, "tpu": 2.0**34}
_MOST = {"cpu": 64, "gpu": 1024, "tpu": 1024}


@checked
def choose_lanes(
    data: FederatedData, task: Task, *, batch_size: int, cohort: int | None = None, platform: str | None = None
) -> int:
    """Choose how many clients train side by side.

    Enough lanes for one step of all of them to keep the device busy, but never more than `Σ steps / max steps`: beyond
    that, lanes idle while the longest client trains.

    Args:
        data: all clients' examples.
        task: the model; its FLOPs per step are counted at full rank.
        batch_size: examples per step of one client.
        cohort: clients of a round, where not all take part.
        platform: "cpu", "gpu" or "tpu"; JAX's default device where None.

    Returns:
        Lanes, at least 1.

    Raises:
        ValueError: for an unknown platform.
    """
    check_known("choose_lanes", data)
    platform = platform or jax.default_backend()
    check_name("a platform", platform, _STEP_FLOPS)
    check_least("batch_size", batch_size)
    check_least("cohort", 1 if cohort is None else cohort)
    flops = training_flops(task, data, batch_size=batch_size)
    per_example = flops.base + sum(
        flops.per_rank[path] * rank for path, rank in max_ranks(task.server.trainable).items()
    )
    wanted = _STEP_FLOPS[platform] / max(per_example * batch_size, 1.0)
    steps = -(-np.asarray(data.size, np.int64) // batch_size)
    share = 1.0 if cohort is None else cohort / len(steps)
    useful = share * steps.sum() / steps.max()
    return max(1, min(round(wanted), int(useful), _MOST[platform]))
