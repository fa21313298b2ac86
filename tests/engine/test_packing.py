"""Whole trees in few vectors: the same rounds as leaf by leaf, by rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax.engine import packing
from autorank_jax.engine.totals import LEAF_BY_LEAF
from tests.engine.device_cases import all_rules, assert_same_round, make_data, run_rounds


def many_leaves():
    types = (jnp.float32, jnp.bfloat16, jnp.int32)
    return [jnp.asarray(np.arange(n + 1)[None].astype(types[n % 3])) for n in range(3 * packing._MOST + 4)]


def test_a_tree_of_many_types_comes_back_as_it_was():
    tree = {"many": many_leaves(), "none": (), "one": jnp.array(3.5)}
    vectors = jax.jit(packing.pack)(tree)
    assert len(vectors) == 6  # two for each type: too many leaves for one
    assert all(vector.ndim == 1 for vector in vectors)
    shapes = jax.eval_shape(lambda: tree)
    back = jax.jit(lambda vectors: packing.unpack(vectors, shapes))(vectors)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("how", [packing.PACKED, LEAF_BY_LEAF], ids=["packed", "leaf by leaf"])
@pytest.mark.parametrize("where", [0, -2])
def test_one_number_that_is_not_finite_is_found_anywhere(how, where):
    leaves, all_finite = [leaf for leaf in many_leaves() if leaf.dtype != jnp.int32], jax.jit(how.all_finite)
    assert all_finite(leaves)
    leaves[where] = leaves[where].at[0, -1].set(jnp.nan)
    assert not all_finite(leaves)
    assert all_finite(())


def test_vectors_are_for_other_devices_than_cpus():
    assert packing.choose_summation("auto", None) is LEAF_BY_LEAF  # tests run on a CPU
    assert packing.choose_summation(True, None) is packing.PACKED
    assert packing.choose_summation(False, None) is LEAF_BY_LEAF


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize(
    "names", [("rbla", "fedsa_lora"), pytest.param(tuple(all_rules()), marks=pytest.mark.slow)], ids=["two", "all"]
)
def test_a_packed_round_is_the_same_with_levels_and_an_excluded_client(names):
    rules, data = {name: all_rules()[name] for name in names}, make_data(broken=True)
    apart, packed = (run_rounds(rules, data, lanes=3, update=False, pack=pack) for pack in (False, True))
    assert (apart[1].excluded, packed[1].lane_steps) == (1, apart[1].lane_steps)
    assert_same_round(packed, apart)
