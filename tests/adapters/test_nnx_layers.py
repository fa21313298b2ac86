"""Patches are what a convolution sees, whatever its strides, dilation, padding and size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from autorank_jax.adapters.low_rank import patches
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.adapters.nnx_layers import ADAPTED, Factor
from autorank_jax.models import convolution

CASES = [  # size of the inputs, kernel, strides, dilation, padding
    ((5, 7), (3, 3), (1, 1), (1, 1), "SAME"),
    ((5, 7), (3, 3), (1, 1), (1, 1), "VALID"),
    ((6, 7), (2, 4), (1, 1), (1, 1), "SAME"),
    ((7, 8), (3, 2), (2, 3), (1, 1), "SAME"),
    ((7, 8), (3, 2), (2, 3), (1, 1), "VALID"),
    ((9, 8), (3, 3), (1, 1), (2, 3), "SAME"),
    ((9, 11), (3, 2), (2, 2), (2, 3), "VALID"),
    ((9, 11), (3, 2), (2, 3), (3, 2), "SAME"),
    ((4, 5), (3, 3), (1, 1), (1, 1), ((2, 1), (0, 3))),
    ((5,), (4,), (2,), (1,), "SAME"),
    ((3, 4, 5), (2, 1, 3), (1, 2, 1), (1, 1, 2), "SAME"),
    ((6, 6), (1, 1), (2, 2), (1, 1), "SAME"),
]


def convolve(inputs, kernel, strides, dilation, padding):
    letters = "DHW"[3 - len(strides) :]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    return lax.conv_general_dilated(
        inputs, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=numbers, precision="highest"
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_patches_times_a_matrix_is_a_convolution(case):
    spatial, size, strides, dilation, padding = case
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(2, *spatial, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*size, 3, 4)), jnp.float32)
    expected = convolve(inputs, kernel, strides, dilation, padding)
    cols = patches(inputs, size, strides, dilation, padding)
    assert cols.shape == (*expected.shape[:-1], 3 * np.prod(size))
    np.testing.assert_allclose(cols @ kernel.reshape(-1, 4), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_our_convolution_is_that_of_jax_and_so_are_its_gradients(case):
    spatial, size, strides, dilation, padding = case
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(2, *spatial, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*size, 3, 4)), jnp.float32)
    letters = "DHW"[3 - len(size) :]
    how = {"rhs_dilation": dilation, "dimension_numbers": (f"N{letters}C", f"{letters}IO", f"N{letters}C")}

    def both(function):
        def weighted(inputs, kernel):
            out = function(inputs, kernel, strides, padding, **how)
            return jnp.sum(out * jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)), out

        return jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(inputs, kernel)

    ((_, expected), gradients), ((_, got), got_gradients) = both(lax.conv_general_dilated), both(convolution.convolve)
    np.testing.assert_array_equal(got, expected)
    for mine, theirs in zip(got_gradients, gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", [{"feature_group_count": 2}, {}, {"lhs_dilation": (2, 2)}], ids=str)
def test_grouped_dilated_and_channels_first_convolutions_keep_the_gradient_of_jax(how):
    rng = np.random.default_rng(1)
    inputs = jnp.asarray(rng.normal(size=(2, 4, 6, 6)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(4, 2 if "feature_group_count" in how else 4, 3, 3)), jnp.float32)

    def gradient(function):
        return jax.grad(lambda x: jnp.sum(jnp.square(function(x, kernel, (1, 1), ((1, 1), (2, 0)), **how))))(inputs)

    expected = gradient(lax.conv_general_dilated)
    np.testing.assert_allclose(gradient(convolution.convolve), expected, rtol=1e-5, atol=1e-4)


def test_adapted_convolutions_have_that_gradient():
    task = task_from_nnx(nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0)), max_rank=2)
    gradient = jax.grad(lambda x: jnp.sum(task.predict(task.server.frozen, task.server.trainable, x)))
    assert "optimization_barrier" in jax.jit(gradient).lower(jnp.ones((4, 6, 6, 2))).as_text()


def test_patches_keep_their_numbers():
    """Of a 2×2 image every patch is written out: rows first, then columns, then channels; zeros outside."""
    image = jnp.arange(1.0, 9).reshape(1, 2, 2, 2)
    got = patches(image, (2, 2), None, None, "SAME")[0]
    assert got[0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert got[0, 1].tolist() == [3, 4, 0, 0, 7, 8, 0, 0]
    assert got[1, 1].tolist() == [7, 8, 0, 0, 0, 0, 0, 0]


def test_no_grouped_convolution_under_vmap():
    """Clients with adapters of their own share the convolution of the base; theirs are matrix products."""
    conv = nnx.Conv(2, 3, (3, 3), rngs=nnx.Rngs(0))
    task = task_from_nnx(conv, max_rank=2)
    clients = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), task.server.trainable)
    images = jnp.ones((4, 5, 6, 6, 2))
    lowered = jax.jit(jax.vmap(task.predict, (None, 0, 0))).lower(task.server.frozen, clients, images).as_text()
    assert lowered.count("stablehlo.convolution") == 1
    assert "feature_group_count = 1 " in lowered


def test_every_adapted_class_extends_its_layer():
    for plain, adapted in ADAPTED.items():
        assert issubclass(adapted, plain)
        assert callable(adapted.form)
        assert isinstance(adapted.weight, str)
    assert issubclass(Factor, nnx.Variable)
    assert not issubclass(Factor, nnx.Param)  # or it would be trained whole
