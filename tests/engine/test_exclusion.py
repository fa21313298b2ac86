"""What must count nowhere: updates whose summand overflows, weights that are no weights; and what must not get lost."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax import aggregators
from autorank_jax.adapters.lora import level_widths
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.engine.totals import _lost, _with_lost
from autorank_jax.types import Adapter, Base, FederatedData, LocalState, LocalTraining, Server, Trainable

CLIENTS, RANK = 4, 3
slow = partial(pytest.param, marks=pytest.mark.slow)


def federation(rule):
    """Clients of one example each; the server's factors are 1."""
    index = jnp.arange(CLIENTS, dtype=jnp.int32)
    data = FederatedData(jnp.zeros((CLIENTS, 1)), index, index, index, jnp.ones_like(index), index)
    adapters = {"a": Adapter(jnp.ones((4, RANK)), jnp.zeros((RANK, 5)))}
    server = Server(Trainable(adapters, {"bias": jnp.zeros(2)}), Base({"a": jnp.zeros((4, 5))}, ()))
    return init_state(server, rule, {"a": np.array([1, 2, 3, 3])}), data


def moving(by_client):
    """Training that adds a number of each client to everything it owns."""

    def end(local, client):
        mask, move = client.masks["a"], jnp.asarray(by_client)[client.row]
        a, b = local.params.adapters["a"]
        adapters = {"a": Adapter(a + move * mask[None, :], b + move * mask[:, None])}
        return Trainable(adapters, {"bias": local.params.dense["bias"] + move})

    return LocalTraining(
        begin=lambda _, start, __: LocalState(start, ()),
        step=lambda *given: (given[2], jnp.ones(1)),
        end=end,
        batch_size=1,
    )


@pytest.mark.parametrize("name", ["rbla", slow("flora"), slow("owner_merge"), slow("flexlora"), slow("raflora")])
def test_a_finite_update_with_an_infinite_summand_is_excluded(name):
    rule = aggregators.make_rule(name)
    state, data = federation(rule)
    huge = jnp.finfo(jnp.float32).max / 2  # its square is not finite, nor is three times it
    key = jax.random.key(0)
    found, info = jax.jit(make_round(moving([0.1, huge, 0.3, 0.2]), rule, weigh=lambda _: jnp.full(CLIENTS, 3.0)))(
        key, state, data
    )
    without = jnp.array([3.0, 0.0, 3.0, 3.0])
    expected, _ = jax.jit(make_round(moving([0.1, 0.0, 0.3, 0.2]), rule, weigh=lambda _: without))(key, state, data)
    assert info.excluded == 1
    for new, old in zip(jax.tree.leaves(found.server), jax.tree.leaves(expected.server), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, slow(np.inf), slow(-1.0)])
def test_a_weight_that_is_no_weight_makes_a_client_absent(bad):
    rule = aggregators.raflora()
    state, data = federation(rule)
    local, key = moving([0.1, 0.2, 0.3, 0.4]), jax.random.key(0)
    found, info = jax.jit(make_round(local, rule, weigh=lambda _: jnp.array([1.0, bad, 1.0, 2.0])))(key, state, data)
    expected, _ = jax.jit(make_round(local, rule, weigh=lambda _: jnp.array([1.0, 0.0, 1.0, 2.0])))(key, state, data)
    assert info.participants == 3
    for new, old in zip(jax.tree.leaves(found.server), jax.tree.leaves(expected.server), strict=True):
        np.testing.assert_array_equal(new, old)


def test_denominators_of_a_million_clients_are_right():
    weight = jnp.float32(37.0)

    def add(carry, _):
        total, lost, plain = carry
        return (_with_lost(total, lost, weight), _lost(total, lost, weight), plain + weight), None

    (total, _, plain), _ = jax.jit(lambda: jax.lax.scan(add, (jnp.float32(0),) * 3, None, length=1_000_000))()
    assert abs(float(plain) / 37e6 - 1) > 1e-3  # what adding alone would give
    np.testing.assert_allclose(total, 37e6, rtol=1e-7)


def test_equal_rank_levels_are_compiled_once():
    assert level_widths({"a": 2}, 4) == [{"a": 1}, {"a": 2}]
    assert level_widths({"a": 4, "b": 1}, 4) == [{"a": q, "b": 1} for q in (1, 2, 3, 4)]


def unweighted():
    """A rule that counts clients in place of weighing them: it adds as much for a weight of 0 as for any other."""
    plain = aggregators.rbla()

    def update(key, sums, state, server):  # noqa: ARG001
        total, count = sums
        mean = jax.tree.map(lambda old, leaf: old + leaf / jnp.maximum(count, 1).astype(leaf.dtype), server[0], total)
        return server._replace(trainable=mean), state

    return plain._replace(
        summand=lambda update, server, plan: (  # noqa: ARG005
            jax.tree.map(lambda new, old: new - old + 1, update.trained, update.start),
            jnp.ones((), jnp.int32),
        ),
        update=update,
    )


@pytest.mark.parametrize("lanes", [2, slow(3)])
def test_lanes_that_are_not_done_count_for_no_rule(lanes):
    state, data = federation(unweighted())
    sizes = jnp.array([1, 3, 2, 1], jnp.int32)
    data = data._replace(
        inputs=jnp.zeros((7, 1)),
        targets=jnp.zeros(7, jnp.int32),
        order=jnp.arange(7, dtype=jnp.int32),
        start=jnp.cumsum(sizes, dtype=jnp.int32) - sizes,
        size=sizes,
    )
    local = moving([0.1, 0.2, 0.3, 0.4])
    one, other = (
        jax.jit(make_round(local, unweighted(), lanes=n))(jax.random.key(0), state, data)[0].server for n in (1, lanes)
    )
    for new, old in zip(jax.tree.leaves(other), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6)
    np.testing.assert_allclose(one.trainable.dense["bias"], 1.25, rtol=1e-6)
