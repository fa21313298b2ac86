"""Functions compiled ahead: the same results, and no copies of what they hand on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autorank_jax as ar
from autorank_jax.engine.ahead import compile_ahead
from tests.models.causal_cases import tiny


def test_what_comes_as_it_was_is_handed_on():
    def function(given, more):
        return {"same": given["a"], "new": given["b"] + more, "twice": (more, given["a"], jnp.zeros(2)), "none": None}

    given, more = {"a": jnp.arange(3.0), "b": jnp.ones(2)}, jnp.full(2, 5.0)
    ahead = compile_ahead(function, given, more)
    for _ in range(2):
        found = ahead(given, more)
        jax.tree.map(np.testing.assert_array_equal, found, function(given, more))
        assert found["same"] is found["twice"][1] is given["a"]
        assert found["twice"][0] is more
        given, more = {"a": given["a"] + 1, "b": given["b"] * 2}, more + 1
    with pytest.raises(TypeError):
        ahead(given, jnp.zeros(3))


def test_arguments_of_other_kinds_become_arrays():
    ahead = compile_ahead(jax.jit(lambda a, b: (a, b + 1)), jnp.ones(3), jnp.ones(2))
    given = np.ones(3)
    same, new = ahead(given, np.ones(2, np.float32))
    given[0] = 9
    assert isinstance(same, jax.Array)
    assert same.dtype == jnp.float32
    np.testing.assert_array_equal(same, np.ones(3))
    np.testing.assert_array_equal(new, np.full(2, 2.0))
    array = jnp.ones(3)
    assert ahead(array, jnp.ones(2))[0] is array  # a jitted function is unwrapped


@pytest.mark.parametrize("rule", ["rbla", "raflora", "flora"])
def test_a_round_copies_no_base(rule):
    model = tiny()
    ids = np.random.default_rng(0).integers(0, model.config.vocabulary, (6, 8))
    data = ar.from_parts(ids, ids, [range(1), range(1, 3), range(3, 6)])
    task = ar.task_from_causal_lm(model, max_rank=4)
    made = ar.aggregators.make_rule(rule)
    state = ar.init_state(task.server, made, {path: jnp.asarray([1, 2, 4]) for path in ar.max_ranks(task)})
    round_fn = ar.make_round(ar.make_local_training(task, optax.sgd(0.1), batch_size=2), made, lanes=2)
    ahead = ar.engine.compile_ahead(round_fn, jax.random.key(1), state, data)
    after, info = ahead(jax.random.key(1), state, data)
    jax.tree.map(np.testing.assert_array_equal, (after, info), jax.jit(round_fn)(jax.random.key(1), state, data))
    merged = {"flora"} & {rule}
    for path, kernel in state.server.frozen.kernels.items():
        assert (after.server.frozen.kernels[path] is kernel) == (not merged)
    for name, value in state.server.frozen.rest.items():
        assert after.server.frozen.rest[name] is value
    results = sum(leaf.nbytes for leaf in jax.tree.leaves((after, info)))
    base = sum(leaf.nbytes for leaf in jax.tree.leaves(state.server.frozen))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(state.server.frozen.rest)) if merged else base
    assert ahead.memory_analysis().output_size_in_bytes < results - kept + 4096
