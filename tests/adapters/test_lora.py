"""The algebra of adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax.adapters.lora import (
    check_mergeable,
    cut,
    init_adapter,
    max_ranks,
    narrow,
    pad_like,
    product,
    rank_masks,
)
from autorank_jax.types import Adapter, Base, Server, Trainable


def random_adapter(seed, d_in, d_out, rank):
    rng = np.random.default_rng(seed)
    return Adapter(
        jnp.asarray(rng.normal(size=(d_in, rank)), jnp.float32),
        jnp.asarray(rng.normal(size=(rank, d_out)), jnp.float32),
    )


TRAINABLE = Trainable(
    {"b": random_adapter(0, 5, 4, 3), "a": random_adapter(1, 6, 2, 4)},
    {"a/bias": jnp.ones(2), "head": jnp.ones((2, 7))},
)


def test_start_is_kaiming_uniform_times_zero():
    adapter = init_adapter(jax.random.key(0), 16, 3, 2000)
    assert adapter.lora_a.shape == (16, 2000)
    assert adapter.lora_b.shape == (2000, 3)
    assert (product(adapter) == 0).all()
    assert float(jnp.abs(adapter.lora_a).max()) <= 1 / 4
    assert float(jnp.abs(adapter.lora_a).max()) > 0.99 / 4
    assert float(jnp.mean(adapter.lora_a)) == pytest.approx(0, abs=0.005)
    assert float(jnp.var(adapter.lora_a)) == pytest.approx(1 / (3 * 16), rel=0.02)  # b²/3 with b = 1/√16


def test_start_takes_dtype_and_fan_in():
    adapter = init_adapter(jax.random.key(0), 100, 3, 50, jnp.bfloat16, fan_in=1)
    assert {leaf.dtype for leaf in adapter} == {jnp.dtype(jnp.bfloat16)}
    assert float(jnp.abs(adapter.lora_a).max()) > 0.9


def test_max_ranks_come_sorted():
    assert list(max_ranks(TRAINABLE).items()) == [("a", 4), ("b", 3)]


def test_masks_mark_the_first_positions():
    masks = rank_masks({"a": jnp.array(2), "b": jnp.array(3)}, {"a": 4, "b": 3})
    assert masks["a"].tolist() == [1, 1, 0, 0]
    assert masks["b"].tolist() == [1, 1, 1]
    assert masks["a"].dtype == jnp.float32


def test_cutting_zeroes_both_factors_and_equals_truncation():
    masks = rank_masks({"a": jnp.array(2), "b": jnp.array(3)}, max_ranks(TRAINABLE))
    cut_a, whole = cut(TRAINABLE, masks).adapters["a"], TRAINABLE.adapters["a"]
    np.testing.assert_array_equal(cut_a.lora_a[:, :2], whole.lora_a[:, :2])
    np.testing.assert_array_equal(cut_a.lora_b[:2], whole.lora_b[:2])
    assert (cut_a.lora_a[:, 2:] == 0).all()
    assert (cut_a.lora_b[2:] == 0).all()
    np.testing.assert_allclose(product(cut_a), whole.lora_a[:, :2] @ whole.lora_b[:2], rtol=1e-6)
    assert cut(TRAINABLE, masks).dense is TRAINABLE.dense


def test_narrowing_and_padding_are_inverse_on_cut_adapters():
    masks = rank_masks({"a": jnp.array(2), "b": jnp.array(1)}, max_ranks(TRAINABLE))
    small = cut(TRAINABLE, masks)
    thin = narrow(small, {"a": 2, "b": 1})
    assert max_ranks(thin) == {"a": 2, "b": 1}
    jax.tree.map(np.testing.assert_array_equal, pad_like(thin, small), small)
    shapes = jax.eval_shape(lambda: small)
    jax.tree.map(np.testing.assert_array_equal, pad_like(thin, shapes), small)


def test_products_are_batched():
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), random_adapter(0, 5, 4, 3), random_adapter(1, 5, 4, 3))
    np.testing.assert_allclose(product(stacked)[1], product(random_adapter(1, 5, 4, 3)), rtol=1e-6)


SERVER = Server(TRAINABLE, Base({"a": jnp.ones((6, 2)), "b": jnp.ones((5, 4), jnp.bfloat16)}, {"c": jnp.zeros(1)}))


def test_merging_needs_kernels():
    check_mergeable(SERVER, "flora")
    check_mergeable(Server(Trainable({}, {}), ()), "flora")
    for frozen in (Base({"a": jnp.ones((6, 2))}, {}), {"kernel": 1}):
        with pytest.raises(ValueError, match=r"flora merges adapters .* got none for \[.*'b'\]"):
            check_mergeable(SERVER._replace(frozen=frozen), "flora")
