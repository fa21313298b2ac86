"""How many lanes a federation gets."""

import numpy as np
import pytest
from flax import nnx

from autorank_jax import federated
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.engine.lane_count import choose_lanes
from autorank_jax.models.vision import MLP


def federation(sizes, layers=(16, 4)):
    total = sum(sizes)
    order = np.split(np.arange(total), np.cumsum(sizes)[:-1])
    inputs = np.zeros((total, layers[0]), np.float32)
    data = federated.from_parts(inputs, np.zeros(total, np.int32), order)
    return data, task_from_nnx(MLP(layers, rngs=nnx.Rngs(0)), max_rank=2)


def test_lanes_never_idle_behind_the_longest_client():
    data, task = federation([100, 10, 10, 10])
    assert choose_lanes(data, task, batch_size=10, platform="gpu") == 1  # 13 steps, of which the longest has 10
    data, task = federation([100, 100, 100, 100])
    assert choose_lanes(data, task, batch_size=10, platform="gpu") == 4
    assert choose_lanes(data, task, batch_size=10, cohort=2, platform="gpu") == 2


def test_few_lanes_keep_a_cpu_busy_with_a_large_model():
    large, large_task = federation([10] * 200, layers=(512, 512, 4))
    small, small_task = federation([10] * 200)
    assert choose_lanes(small, small_task, batch_size=10, platform="cpu") == 64
    assert 1 <= choose_lanes(large, large_task, batch_size=10, platform="cpu") <= 8


def test_an_unknown_platform_is_refused():
    data, task = federation([4, 4])
    with pytest.raises(ValueError, match="expected a platform among"):
        choose_lanes(data, task, batch_size=2, platform="abacus")
