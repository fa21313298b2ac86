"""The models to simulate with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from autorank_jax.models import CNN, MLP
from autorank_jax.tasks import task_from_nnx


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


def test_paths_of_the_reference_network():
    task = task_from_nnx(MLP((784, 200, 200, 10), rngs=nnx.Rngs(0)), max_rank={"layers/2": 100, "layers/*": 160})
    shapes = {path: (*a.lora_a.shape, a.lora_b.shape[1]) for path, a in task.server.trainable.adapters.items()}
    assert shapes == {"layers/0": (784, 160, 200), "layers/1": (200, 160, 200), "layers/2": (200, 100, 10)}
    assert sorted(task.server.trainable.dense) == ["layers/0/bias", "layers/1/bias", "layers/2/bias"]
