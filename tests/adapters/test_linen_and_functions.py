"""Tasks from Linen modules and from bare functions: start, merge, randomness, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from autorank_jax.adapters.functions import task_from_function
from autorank_jax.adapters.linen import task_from_linen
from autorank_jax.adapters.task import merge
from autorank_jax.types import Batch
from tests.adapters.test_adapted_models import IMAGES, moved, predict, with_trainable


class LinenModel(nn.Module):
    """Every Linen layer that can be adapted."""

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2)(images[..., None]))
        x = x.reshape(x.shape[0], -1, 3)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=3)(x)
        x = nn.DenseGeneral((2, 2))(x)
        x = nn.Einsum((2, 2, 3), "btho,hoz->btz", use_bias=False)(x)
        embed = nn.Embed(5, 3)
        x = x + embed(jnp.arange(x.shape[1], dtype=jnp.int32) % 5)[None]
        return nn.Dense(4)(jnp.mean(embed.attend(x), axis=1))


def test_linen_modules_are_adapted_in_place():
    module = LinenModel()
    variables = jax.jit(module.init)(jax.random.key(0), IMAGES)
    task = task_from_linen(module, variables, IMAGES, max_rank=2, training={"train": True})
    assert set(task.origin.kinds.values()) == {"linear", "conv", "embed"}
    assert len(task.server.trainable.adapters) == 9
    original = jax.jit(module.apply)(variables, IMAGES)
    np.testing.assert_allclose(predict(task, task.server, IMAGES), original, rtol=1e-6)
    server = with_trainable(task, moved(task.server.trainable))
    adapted = predict(task, server, IMAGES)
    np.testing.assert_allclose(jax.jit(module.apply)(merge(task, server), IMAGES), adapted, rtol=1e-5, atol=1e-5)
    assert np.abs(adapted - predict(task, task.server, IMAGES)).max() > 0.01
    batch = Batch(IMAGES, jnp.array([0, 1, 2]), jnp.ones(3))
    by_key = [jax.jit(task.loss)(server.frozen, server.trainable, batch, jax.random.key(s)) for s in (0, 0, 1)]
    np.testing.assert_array_equal(by_key[0], by_key[1])
    assert not np.array_equal(by_key[0], by_key[2])


def test_linen_mistakes():
    module = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    x = jnp.ones((2, 4))
    variables = module.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"batch_stats.*frozen_statistics=True"):
        task_from_linen(module, variables, x, max_rank=2)
    assert task_from_linen(module, variables, x, max_rank=2, frozen_statistics=True).server.trainable.adapters
    with pytest.raises(ValueError, match="probably the params alone"):
        task_from_linen(module, variables["params"], x, max_rank=2)
    with pytest.raises(ValueError, match=r"'layers_1' \(BatchNorm\)|'layers_1', which matches"):
        task_from_linen(module, variables, x, max_rank={"layers_1": 2}, frozen_statistics=True)


def two_layers(params, x):
    return jax.nn.relu(x @ params["first"]["w"] + params["first"]["b"][None]) @ params["second"]


PARAMS = {"first": {"w": jax.random.normal(jax.random.key(1), (8, 5)), "b": jnp.zeros(5)}, "second": jnp.ones((5, 2))}


@pytest.mark.parametrize("materialize", [True, False])
def test_functions_are_adapted_by_path(materialize):
    task = task_from_function(
        two_layers, PARAMS, max_rank={"first/*": 3, "second": 2}, train_dense="*/b", materialize=materialize
    )
    x = IMAGES[:, 0]
    np.testing.assert_array_equal(predict(task, task.server, x), two_layers(PARAMS, x))
    server = with_trainable(task, moved(task.server.trainable))
    merged = merge(task, server)
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    np.testing.assert_allclose(two_layers(merged, x), predict(task, server, x), rtol=1e-5, atol=1e-5)


def test_low_rank_functions_form_no_matrix_per_client():
    def largest(materialize):
        task = task_from_function(two_layers, PARAMS, max_rank=1, materialize=materialize)
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 6), task.server.trainable)
        run = jax.vmap(lambda t: task.predict(task.server.frozen, t, IMAGES[:1, 0]))
        return [tuple(v.aval.shape) for e in jax.make_jaxpr(run)(stacked).eqns for v in e.outvars]

    assert (6, 8, 5) in largest(True)
    assert (6, 8, 5) not in largest(False)


def test_functions_take_a_key_in_training():
    def noisy(params, x, key):
        return two_layers(params, x) + jax.random.normal(key, (1, 2))

    task = task_from_function(two_layers, PARAMS, max_rank=1, train_apply=noisy)
    batch = Batch(IMAGES[:, 0], jnp.array([0, 1, 1]), jnp.ones(3))
    a, b = (task.loss(task.server.frozen, task.server.trainable, batch, jax.random.key(s)) for s in (0, 1))
    assert not np.array_equal(a, b)


def test_hand_made_tasks_cannot_be_merged():
    task = task_from_function(two_layers, PARAMS, max_rank=1)
    with pytest.raises(ValueError, match="built by hand"):
        merge(task._replace(origin=None), task.server)
