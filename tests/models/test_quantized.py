"""Matrices in 8 and 4 bits: the slow twin's numbers, their bytes, and decoders that hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax.models.quantized import NORMAL_FLOATS, Quantized, quantize_stack
from tests.reference import quantized as slow

RNG = np.random.default_rng(0)
SHAPES = [(64, 5), (40, 7), (3, 2), (130, 4)]  # blocks that fit, run over outputs, are one, end early


def twin(matrix, form):
    return slow.int8(matrix) if form == "int8" else slow.nf4(matrix, NORMAL_FLOATS)


def quantized(form, shape, layers=2, dtype=jnp.float32):
    matrices = RNG.normal(size=(layers, *shape)).astype(np.float32) * RNG.uniform(0.1, 9, shape[1]).astype(np.float32)
    matrices[0, :, 0] = 0  # of which no number is known
    return matrices, quantize_stack(((str(n), m) for n, m in enumerate(matrices)), form, dtype)


def test_the_numbers_of_nf4_are_their_definition():
    np.testing.assert_allclose(NORMAL_FLOATS, slow.normal_floats(), atol=1e-6)


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_are_those_of_the_slow_twin(form, shape):
    matrices, kept = quantized(form, shape)
    expected = np.stack([twin(matrix, form) for matrix in matrices])
    found = jax.jit(lambda kept: kept.astype(jnp.float32))(kept)
    np.testing.assert_array_equal(found, expected)
    assert (kept.shape, kept.ndim, kept.size, kept.dtype) == (found.shape, 3, found.size, jnp.dtype("float32"))
    np.testing.assert_array_equal(kept.astype(jnp.bfloat16), found.astype(jnp.bfloat16))
    one = jax.tree.map(lambda leaf: leaf[1], kept)
    x = jnp.asarray(RNG.normal(size=(3, shape[0])), jnp.float32)
    np.testing.assert_allclose(x @ one, x @ found[1], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_errors_are_within_the_bounds_of_the_format(form):
    matrices, kept = quantized(form, (192, 6))
    error = np.abs(np.asarray(kept.astype(jnp.float32)) - matrices)
    if form == "int8":
        bound = np.broadcast_to(np.abs(matrices).max(axis=1, keepdims=True) / 127 / 2, matrices.shape)
    else:
        blocks = np.abs(matrices.reshape(2, 3, 64, 6)).max(axis=2, keepdims=True)
        bound = np.broadcast_to(blocks * np.diff(NORMAL_FLOATS).max() / 2, (2, 3, 64, 6)).reshape(matrices.shape)
    assert np.all(error <= bound * (1 + 1e-6))
    assert np.max(error[bound > 0] / bound[bound > 0]) > 0.9


@pytest.mark.parametrize(("form", "expected"), [("int8", 2 * (128 * 6 + 4 * 6)), ("nf4", 2 * (64 * 6 + 4 * 2 * 6))])
def test_bytes_are_those_of_codes_and_scales(form, expected):
    assert quantized(form, (128, 6))[1].nbytes == expected


@pytest.mark.parametrize("form", ["int8", "nf4"])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(form, odd):
    matrix = np.ones((4, 4), np.float32)
    matrix[1, 2] = odd
    with pytest.raises(ValueError, match="expected finite numbers to quantise, got others in 'here'"):
        quantize_stack([("here", matrix)], form, jnp.float32)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_the_backward_pass_keeps_no_floats(form):
    _, kept = quantized(form, (64, 64), layers=3)

    def run(x):
        return jnp.sum(jax.lax.scan(lambda x, m: (jnp.tanh(x @ m), None), x, kept)[0])

    text = str(jax.make_jaxpr(jax.grad(run))(jnp.ones((2, 64))))
    assert "f32[3,2,64]" in text  # activations are kept
    assert "f32[3,64,64]" not in text


def test_a_stack_is_a_pytree_of_its_codes():
    _, kept = quantized("int8", (3, 2))
    assert [leaf.dtype for leaf in jax.tree.leaves(kept)] == [jnp.int8, jnp.float32]
    assert isinstance(jax.tree.map(lambda leaf: leaf, kept), Quantized)
