"""Tasks from NNX models: what is adapted, trained whole and frozen; randomness; preprocessing; losses.

Every kind of layer, and mistakes, are in `test_adapting.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from autorank_jax.adapters.lora import max_ranks
from autorank_jax.adapters.losses import as_float, classification_loss, regression_loss, token_loss
from autorank_jax.adapters.nnx import match_layers, task_from_nnx
from autorank_jax.models.vision import CNN, MLP
from autorank_jax.types import Base, Batch


class Dropping(nnx.Module):
    """Two linear layers with dropout behind each."""

    def __init__(self, *, rngs):
        self.one, self.two = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.drop, self.again = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.again(self.two(self.drop(self.one(x))))


X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
BATCH = Batch(X, jnp.zeros(8, jnp.int32), jnp.ones(8))


def outputs(task, key):
    """Return the outputs in training of a task whose loss is the sum of its outputs."""
    return task.loss(task.server.frozen, task.server.trainable, BATCH, key)


@pytest.fixture(scope="module")
def dropping():
    return task_from_nnx(Dropping(rngs=nnx.Rngs(0)), max_rank=2, loss=lambda outputs, targets: outputs)  # noqa: ARG005


def test_evaluation_drops_nothing(dropping):
    model = Dropping(rngs=nnx.Rngs(0))
    model.eval()
    got = dropping.predict(dropping.server.frozen, dropping.server.trainable, X)
    np.testing.assert_array_equal(got, model(X))
    assert (got != 0).all()


def test_training_drops_by_key(dropping):
    one, again, other = (outputs(dropping, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert 0.2 < (one == 0).mean() < 0.8
    assert ((one == 0) != (other == 0)).any()


def test_lanes_drop_differently(dropping):
    keys = jax.random.split(jax.random.key(2), 4)
    lanes = jax.jit(jax.vmap(lambda key: outputs(dropping, key)))(keys)
    for lane, key in zip(lanes, keys, strict=True):
        np.testing.assert_array_equal(lane == 0, outputs(dropping, key) == 0)
    assert len({np.asarray(lane == 0).tobytes() for lane in lanes}) == 4


def test_layers_drop_differently():
    class Twice(nnx.Module):
        def __init__(self, *, rngs):
            self.one, self.two = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return jnp.stack([self.one(x), self.two(x)])

    identity = lambda outputs, targets: outputs  # noqa: ARG005, E731
    one, two = outputs(task_from_nnx(Twice(rngs=nnx.Rngs(0)), max_rank={}, loss=identity), jax.random.key(0))
    assert ((one == 0) != (two == 0)).any()


# ------------------------------------------------------------------------------------------- adapted, whole, frozen


def test_parts_of_a_model_are_told_apart():
    model = CNN((1, 2, 3), 4, image=(8, 8), rngs=nnx.Rngs(0))
    task = task_from_nnx(model, max_rank={"convs/*": 3}, train_dense=("head/*", "convs/1/bias"))
    trainable, frozen = task.server
    assert max_ranks(trainable) == {"convs/0": 3, "convs/1": 3}
    assert sorted(trainable.dense) == ["convs/1/bias", "head/bias", "head/kernel"]
    assert isinstance(frozen, Base)
    assert {path: kernel.shape for path, kernel in frozen.kernels.items()} == {"convs/0": (9, 2), "convs/1": (18, 3)}
    assert sorted(frozen.rest) == ["convs/0/bias"]
    np.testing.assert_array_equal(trainable.dense["head/kernel"], model.head.kernel[...])


def test_adapters_start_alike_whichever_other_layers_there_are():
    model = MLP((5, 5, 5, 5), rngs=nnx.Rngs(0))
    alone, all_ = (task_from_nnx(model, max_rank=3, where=w).server.trainable.adapters for w in ("layers/1", "*"))
    np.testing.assert_array_equal(alone["layers/1"].lora_a, all_["layers/1"].lora_a)
    assert len({adapter.lora_a.tobytes() for adapter in all_.values()}) == 3


def test_everything_may_be_trained_whole():
    task = task_from_nnx(MLP((6, 5, 3), rngs=nnx.Rngs(0)), max_rank={}, train_dense="*")
    assert task.server.trainable.adapters == {}
    assert len(task.server.trainable.dense) == 4
    assert task.server.frozen == Base({}, {})


def test_first_pattern_counts():
    model = MLP((6, 5, 4, 3), rngs=nnx.Rngs(0))
    assert match_layers(model, {"layers/1": 7, "layers/*": 2}) == {"layers/0": 2, "layers/1": 7, "layers/2": 2}
    assert match_layers(model, {"layers/[02]": 4}) == {"layers/0": 4, "layers/2": 4}


def test_the_model_itself_is_not_changed():
    model = MLP((6, 5, 3), rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    task_from_nnx(model, max_rank=2)
    assert [type(layer) for layer in model.layers] == [nnx.Linear, nnx.Linear]
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_adapters_start_by_key_and_by_layer():
    model = MLP((5, 5, 5), rngs=nnx.Rngs(0))
    starts = [task_from_nnx(model, max_rank=2, key=key).server.trainable for key in (0, jax.random.key(0), 1)]
    jax.tree.map(np.testing.assert_array_equal, starts[0], starts[1])
    first, other = starts[0].adapters, starts[2].adapters
    assert (first["layers/0"].lora_a != other["layers/0"].lora_a).all()
    assert (first["layers/0"].lora_a != first["layers/1"].lora_a).all()


# --------------------------------------------------------------------------------------------- preprocessing, losses


def test_images_become_floats_and_nothing_else_does():
    leaves = {"image": jnp.array([0, 51, 255], jnp.uint8), "ids": jnp.arange(3), "x": jnp.ones(2)}
    got = as_float(leaves)
    np.testing.assert_allclose(got["image"], [0, 0.2, 1], rtol=1e-6)
    assert got["image"].dtype == jnp.float32
    assert got["ids"] is leaves["ids"]
    assert got["x"] is leaves["x"]


def test_inputs_are_preprocessed_in_training_and_evaluation():
    model = MLP((6, 3), rngs=nnx.Rngs(0))
    images = jnp.arange(48, dtype=jnp.uint8).reshape(8, 6)
    task, plain = (task_from_nnx(model, max_rank=2, preprocess=p) for p in (as_float, lambda x: x))
    frozen, trainable = task.server.frozen, task.server.trainable
    scaled = images.astype(jnp.float32) / 255
    np.testing.assert_array_equal(task.predict(frozen, trainable, images), plain.predict(frozen, trainable, scaled))
    one = task.loss(frozen, trainable, BATCH._replace(inputs=images), jax.random.key(0))
    other = plain.loss(frozen, trainable, BATCH._replace(inputs=scaled), jax.random.key(0))
    np.testing.assert_array_equal(one, other)


class Reading(nnx.Module):
    """Reads the weight of one layer, and never calls another."""

    def __init__(self):
        self.called, self.read, self.idle = (nnx.Linear(3, 3, rngs=nnx.Rngs(k)) for k in range(3))

    def __call__(self, x):
        return self.called(x) @ self.read.kernel[...]


def test_adapters_that_a_model_does_not_use_are_told_once():
    task = task_from_nnx(Reading(), max_rank=2)
    frozen, trainable = task.server.frozen, task.server.trainable
    batch = Batch(jnp.ones((2, 3)), jnp.array([0, 1]), jnp.ones(2))
    with pytest.warns(UserWarning, match="that the model does not use: idle, read: it does not call these"):
        jax.eval_shape(task.loss, frozen, trainable, batch, jax.random.key(0))
    jax.eval_shape(task.loss, frozen, trainable, batch, jax.random.key(0))


def test_labels_without_an_output_have_no_loss():
    losses = classification_loss(jnp.zeros((4, 3)), jnp.array([-1, 0, 2, 3]))
    np.testing.assert_allclose(losses, [np.nan, np.log(3), np.log(3), np.nan], rtol=1e-6)


class Failing(nnx.Module):
    def __init__(self, error):
        self.layer, self.error = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), error

    def __call__(self, _):
        raise self.error


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), ZeroDivisionError("no"), TypeError("no\nit expected\nsomething else")]
)
def test_whatever_a_model_raises_is_one_line(error):
    task = task_from_nnx(Failing(error), max_rank=2)
    with pytest.raises(ValueError, match=f"the model takes, .*it says {type(error).__name__}: no") as caught:
        task.predict(task.server.frozen, task.server.trainable, jnp.ones((2, 4)))
    assert "\n" not in str(caught.value)


def test_losses_are_per_example():
    logits = jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0]]))
    np.testing.assert_allclose(classification_loss(logits, jnp.array([0, 1], jnp.uint8)), np.log([4, 2]), rtol=1e-6)
    got = regression_loss(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [3.0, 4.0]]))
    assert got.tolist() == [2.5, 12.5]
    assert regression_loss(jnp.array([[1.0], [2.0]]), jnp.array([3.0, 2.0])).tolist() == [4, 0]
    tokens = token_loss(jnp.stack([logits, logits]), jnp.array([[0, 1], [-1, 1]]))
    np.testing.assert_allclose(tokens, [(np.log(4) + np.log(2)) / 2, np.log(2)], rtol=1e-6)
