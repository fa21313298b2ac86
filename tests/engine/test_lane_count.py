"""How many lanes a federation gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from autorank_jax import federated
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.engine.flops import FlopModel
from autorank_jax.engine.footprint import training_footprint
from autorank_jax.engine.lane_count import choose_lanes
from autorank_jax.models.vision import MLP
from autorank_jax.types import Adapter, Base, Server, Task, Trainable


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
    with pytest.raises(ValueError, match="expected a platform out of"):
        choose_lanes(data, task, batch_size=2, platform="abacus")


def test_a_batch_is_no_larger_than_the_data_and_flops_may_be_given():
    data, task = federation([10] * 40)
    lanes = [choose_lanes(data, task, batch_size=size, platform="gpu", memory=1e9) for size in (400, 10**9)]
    assert lanes[0] == lanes[1] > 1
    counted = FlopModel(1e12, dict.fromkeys(task.server.trainable.adapters, 0.0))
    assert choose_lanes(data, task, batch_size=10, platform="gpu", flops=counted) == 1


def test_lanes_of_an_accelerator_fit_into_its_memory():
    data, task = federation([100] * 40)
    each = training_footprint(task, data, batch_size=10).bytes
    lanes = [choose_lanes(data, task, batch_size=10, platform="gpu", memory=m * each / 0.8) for m in (0, 5.5, 1e9)]
    assert lanes == [1, 5, 40]


def test_a_footprint_leaves_out_what_clients_share_and_counts_loops_as_often_as_they_run():
    width, depth, batch = 64, 6, 2
    adapter = Adapter(jnp.ones((width, 1)), jnp.ones((1, width)))
    base = Base({"a": jnp.ones((width, width))}, ())
    data, _ = federation([8, 8], layers=(width, 4))

    def task(steps, *, keep):
        def loss(frozen, trainable, batch, key):  # noqa: ARG001
            def block(x, _):
                return jnp.tanh(
                    x @ (2 * frozen.kernels["a"]) + (x @ adapter.lora_a) @ trainable.adapters["a"].lora_b
                ), None

            run = block if keep else jax.checkpoint(block)
            return jnp.sum(jax.lax.scan(run, batch.inputs, None, length=steps)[0], axis=1)

        return Task(Server(Trainable({"a": adapter}, ()), base), loss, None)

    one, many, again = (
        training_footprint(task(steps, keep=keep), data, batch_size=batch)
        for steps, keep in ((1, True), (depth, True), (depth, False))
    )
    assert many.products == depth * one.products
    assert 2 * 4 * batch * width * (depth - 1) <= many.bytes - one.bytes  # two activations a block, at least
    assert many.bytes < 4 * width * width  # the shared kernel, and what is made of it, are not a client's
    assert again.bytes < many.bytes
