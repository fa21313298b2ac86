"""The models to simulate with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from autorank_jax.adapters.lora import max_ranks
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.aggregators import rbla
from autorank_jax.datasets import synthetic
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.evaluation.metrics import make_evaluate
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.setup import make_model, make_task
from autorank_jax.federated.data import from_parts
from autorank_jax.models.vision import CNN, MLP, DeepCNN
from autorank_jax.ranks.policies import ranks_from_ratios


def test_mlp_by_hand():
    model = MLP((4, 3, 2), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 2)), jnp.float32)
    one, two = model.layers
    hidden = np.maximum(np.asarray(x).reshape(5, 4) @ np.asarray(one.kernel[...]) + np.asarray(one.bias[...]), 0)
    np.testing.assert_allclose(
        model(x), hidden @ np.asarray(two.kernel[...]) + np.asarray(two.bias[...]), rtol=1e-5, atol=1e-6
    )
    assert (model(10 * x) < 0).any()  # no ReLU at the end


def test_cnn_by_hand():
    model = CNN((2, 3), 4, image=(4, 6), rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 6, 2)), jnp.float32)
    conv = np.maximum(np.asarray(model.convs[0](x)), 0)
    pooled = conv.reshape(5, 2, 2, 3, 2, 3).max((2, 4))
    expected = pooled.reshape(5, -1) @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("image", "channels"), [((28, 28), (1, 4, 8)), ((9, 7), (1, 3))])
def test_cnn_takes_grey_images_without_channels(image, channels):
    model = CNN(channels, 10, image=image, rngs=nnx.Rngs(0))
    x = jax.random.uniform(jax.random.key(0), (2, *image))
    outputs = nnx.jit(model)(x)
    assert outputs.shape == (2, 10)
    np.testing.assert_array_equal(outputs, nnx.jit(model)(x[..., None]))


def test_deep_cnn_by_hand():
    model = DeepCNN((2, 4, 6, 4), 3, groups=2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(5, 4, 6, 2)).astype(np.float32)
    out = x
    for number, (conv, norm) in enumerate(zip(model.convs, model.norms, strict=True)):
        norm.scale[...] = jnp.arange(1.0, 1 + norm.scale.shape[0])
        norm.bias[...] = 0.5 - norm.scale[...] / 10
        values = np.asarray(conv(jnp.asarray(out)))
        grouped = values.reshape(5, -1, 2, values.shape[-1] // 2)  # two groups of channels
        mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
        normed = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(values.shape)
        out = np.maximum(normed * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...]), 0)
        if number == 1:  # after every second
            out = out.reshape(5, 2, 2, 3, 2, 6).max((2, 4))
    expected = out.mean((1, 2)) @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])
    np.testing.assert_allclose(nnx.jit(model)(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_deep_cnn_treats_every_example_alone():
    model = nnx.jit(DeepCNN((3, 8, 8, 12), 4, rngs=nnx.Rngs(0)))
    first, second = jax.random.uniform(jax.random.key(0), (2, 3, 9, 7, 3))
    np.testing.assert_allclose(model(first)[0], model(second.at[0].set(first[0]))[0], rtol=1e-5)
    assert not np.allclose(model(first)[1], model(second)[1], rtol=1e-2)


DEEP = Experiment(model="deep_cnn", hidden=(8,) * 6, max_ranks=(4,))
MODEL_KEY, ADAPTER_KEY = jax.random.split(jax.random.key(0))


@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3)])
def test_adapted_deep_cnn_starts_as_the_original(shape):
    data = synthetic(train=3, test=24, classes=3, shape=shape)
    task = make_task(DEEP, data, model_key=MODEL_KEY, adapter_key=ADAPTER_KEY)
    assert sorted(task.server.trainable.adapters) == [*(f"convs/{n}" for n in range(6)), "head"]
    norms = {f"norms/{n}/{name}" for n in range(6) for name in ("bias", "scale")}
    assert set(task.server.trainable.dense) == norms | {"head/bias"}
    model, _ = make_model(DEEP, shape, 3, rngs=nnx.Rngs(params=MODEL_KEY))
    images = jnp.asarray(data.x_test)
    outputs = jax.jit(task.predict)(task.server.frozen, task.server.trainable, images)
    np.testing.assert_allclose(outputs, nnx.jit(model)(images.astype(jnp.float32) / 255), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_round_lowers_the_loss_of_the_deep_cnn():
    data = synthetic(train=48, test=24, classes=3, shape=(32, 32, 3))
    task = make_task(DEEP, data, model_key=MODEL_KEY, adapter_key=ADAPTER_KEY)
    clients = from_parts(data.x_train, data.y_train, np.split(np.arange(48), 4), classes=3)
    ranks = ranks_from_ratios([0.25, 0.5, 0.75, 1.0], max_ranks(task.server.trainable))
    round_fn = jax.jit(make_round(make_local_training(task, optax.sgd(0.2), batch_size=12), rbla()))
    state = init_state(task.server, rbla(), ranks, local_epochs=6)
    evaluate = jax.jit(make_evaluate(task, data.x_test, data.y_test))
    before = evaluate(state)["loss"]
    state, _ = round_fn(jax.random.key(2), state, clients)
    assert evaluate(state)["loss"] < before - 0.1


def test_paths_of_the_reference_network():
    task = task_from_nnx(MLP((784, 200, 200, 10), rngs=nnx.Rngs(0)), max_rank={"layers/2": 100, "layers/*": 160})
    shapes = {path: (*a.lora_a.shape, a.lora_b.shape[1]) for path, a in task.server.trainable.adapters.items()}
    assert shapes == {"layers/0": (784, 160, 200), "layers/1": (200, 160, 200), "layers/2": (200, 100, 10)}
    assert sorted(task.server.trainable.dense) == ["layers/0/bias", "layers/1/bias", "layers/2/bias"]
