"""Many rounds: resuming, many seeds at once, one compilation for everything that is data."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from autorank_jax import aggregators
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.engine import local
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import History, init_state, simulate
from autorank_jax.federated import faults
from autorank_jax.federated.participation import sample_by_size, sample_uniformly
from autorank_jax.models.vision import MLP
from autorank_jax.types import Server, Task, Trainable
from tests.engine.cases import BATCH, CLIENTS, SIZES, fast_compilation, make_federation
from tests.reference import training

RULE = aggregators.rbla()


@cache
def federation():
    """One linear layer."""
    model = MLP((6, 3), rngs=nnx.Rngs(0))
    return make_federation(model, training.mlp(["layers/0"]), (6,), max_rank=4, dtype="float32")


@cache
def round_fn():
    trained = local.make_local_training(federation().task, lambda h: optax.sgd(h["learning_rate"]), batch_size=BATCH)
    return make_round(trained, RULE, lanes=2, rank_levels=2, participation=sample_uniformly(4))


def start(**options):
    options = {"learning_rate": 0.01} | options
    return init_state(federation().task.server, RULE, federation().ranks, max_epochs=2, **options)


def measure(state):
    return {"round": state.round, "size": jnp.sum(jnp.square(state.server.trainable.adapters["layers/0"].lora_a))}


def compiled(fn):
    return jax.jit(fn, compiler_options=fast_compilation())


@cache
def run(rounds):
    return compiled(
        lambda key, state: simulate(key, round_fn(), state, federation().data, rounds=rounds, evaluate=measure)
    )


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.slow
def test_two_and_three_rounds_are_five():
    key = jax.random.key(0)
    after_two, first = run(2)(key, start())
    after_five, rest = run(3)(key, after_two)
    whole, history = run(5)(key, start())
    assert_same(after_five, whole)
    assert_same(jax.tree.map(lambda a, b: np.concatenate([a, b]), first, rest), history)
    assert whole.round == 5
    assert len(set(np.asarray(history.metrics["size"]).tolist())) == 5


def test_history_is_scalars_per_round():
    state, history = run(5)(jax.random.key(0), start())
    assert isinstance(history, History)
    assert {leaf.shape for leaf in jax.tree.leaves(history)} == {(5,)}
    assert history.metrics["round"].tolist() == [1, 2, 3, 4, 5]
    assert history.metrics["size"][-1] == measure(state)["size"]
    assert history.info.participants.tolist() == [4] * 5


@pytest.mark.slow
@pytest.mark.parametrize("mapped", ["lax.map", "vmap"])
def test_many_seeds_at_once_equal_separate_runs(mapped):
    keys = jax.random.split(jax.random.key(1), 3)
    step, initial, data = round_fn(), start(), federation().data  # outside the trace: others use them
    one = lambda key: simulate(key, step, initial, data, rounds=2, evaluate=measure)  # noqa: E731
    many = compiled(jax.vmap(one) if mapped == "vmap" else lambda keys: jax.lax.map(one, keys))(keys)
    for number, key in enumerate(keys):
        separate = run(2)(key, start())
        got = jax.tree.map(lambda leaf: leaf[number], many)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, separate)


def test_whatever_is_data_compiles_nothing():
    """Ranks, seeds, rounds, cohorts, sizes, learning rates and local epochs are data."""
    chex.clear_trace_counter()
    step = compiled(chex.assert_max_traces(round_fn(), n=1))
    data, key = federation().data, jax.random.key(0)
    usual, info = step(key, start(), data)
    sizes = np.array(SIZES[::-1], np.int32)
    other_data = data._replace(size=sizes, start=np.cumsum(sizes, dtype=np.int32) - sizes)
    changed = {
        "seed": step(jax.random.key(1), start(), data),
        "round": step(key, usual, data),
        "ranks": step(key, start()._replace(ranks={"layers/0": jnp.full(CLIENTS, 1, jnp.int32)}), data),
        "learning rate": step(key, start(learning_rate=0.5), data),
        "epochs": step(key, start(local_epochs=3), data),
        "sizes": step(key, start(), jax.tree.map(jnp.asarray, other_data)),
        "server": step(key, start()._replace(server=jax.tree.map(jnp.zeros_like, start().server)), data),
    }
    for what, (state, _) in changed.items():
        bias = state.server.trainable.dense["layers/0/bias"]
        assert (bias != usual.server.trainable.dense["layers/0/bias"]).any(), f"{what} changed nothing"
    assert changed["epochs"][1].examples == 3 * info.examples
    assert set(np.flatnonzero(changed["seed"][0].epochs)) != set(np.flatnonzero(usual.epochs))


def test_states_have_no_weak_types():
    weak = [leaf for leaf in jax.tree.leaves(start(momentum=0.9, local_epochs=2)) if leaf.weak_type]
    assert weak == []


def test_servers_with_weak_types_compile_once():
    chex.clear_trace_counter()
    dense = {"gain": jnp.asarray(2.0), "offset": 0.5}
    frozen = {"scale": jnp.asarray(3.0), "stream": jax.random.key(1)}
    server = Server(Trainable({}, dense), frozen)

    def loss(frozen, trainable, batch, key):  # noqa: ARG001
        shift = sum(trainable.dense.values())
        return (jnp.sum(batch.inputs, axis=1) - frozen["scale"] * shift) ** 2

    trained = local.make_local_training(Task(server, loss, lambda *_: None), optax.sgd(1e-3), batch_size=BATCH)
    rule = aggregators.local_only()
    state = init_state(server, rule, {}, clients=CLIENTS)
    assert [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "weak_type", False)] == []
    step = compiled(chex.assert_max_traces(make_round(trained, rule), n=1))
    for _ in range(3):
        state, _ = step(jax.random.key(0), state, federation().data)
    assert (state.clients.dense["gain"] != 2).all()


@pytest.mark.slow
def test_random_numbers_are_used_once():
    """The key checker of JAX finds no key that is used twice: dropout inside, sampling, faults and a random restart."""

    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = nnx.Linear(6, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
            self.drop, self.again = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.again(self.two(self.drop(self.one(x))))

    task = task_from_nnx(Dropping(nnx.Rngs(0)), max_rank=2)
    trained = local.make_local_training(task, optax.sgd(0.1), batch_size=BATCH)
    ranks = {path: np.ones(CLIENTS, int) for path in task.server.trainable.adapters}
    rule = aggregators.flora(restart="fresh")
    state = init_state(task.server, rule, ranks)
    unlucky = (faults.drop_out(0.3), faults.limit_steps(2, probability=0.5))
    step = make_round(trained, rule, lanes=2, participation=sample_by_size(4), faults=unlucky)
    with jax.debug_key_reuse(True):
        state, info = compiled(step)(jax.random.key(0), state, federation().data)
        assert info.participants == 4
        with pytest.raises(jax.errors.KeyReuseError):
            compiled(lambda key: jax.random.normal(key) + jax.random.normal(key))(jax.random.key(0))


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        ({}, {}, r"expected ranks for the adapters \['layers/0'\], got \[\]"),
        ({"layer": [1]}, {}, r"expected ranks for the adapters \['layers/0'\], got \['layer'\]"),
        ({"layers/0": [[1], [2]]}, {}, r"expected ranks of shape \(clients,\) = \(2,\) .* got .*\(2, 1\)"),
        ({"layers/0": [1, 2]}, {"clients": 3}, r"expected ranks of shape \(clients,\) = \(3,\) .* got .*\(2,\)"),
        ({"layers/0": [1, 0]}, {}, r"expected ranks of 'layers/0' in 1..4, got 0..1$"),
        ({"layers/0": [1, 5]}, {}, r"expected ranks of 'layers/0' in 1..4, got 1..5, probably ranks made for a larger"),
        ({"layers/0": [1, 2]}, {"local_epochs": 0}, "expected local_epochs >= 1, got 0"),
    ],
)
def test_impossible_states_are_refused(ranks, options, message):
    with pytest.raises(ValueError, match=message):
        init_state(federation().task.server, RULE, {p: np.array(r) for p, r in ranks.items()}, **options)


def test_adapters_need_ranks_of_one_length():
    task = task_from_nnx(MLP((6, 5, 3), rngs=nnx.Rngs(0)), max_rank=2)
    with pytest.raises(ValueError, match=r"expected ranks of shape .* for every adapter, got .*\(3,\)"):
        init_state(task.server, RULE, {"layers/0": np.ones(2, int), "layers/1": np.ones(3, int)})


def test_the_learning_rate_of_a_state_may_be_an_array_inside_jit():
    server = federation().task.server
    made = jax.jit(lambda rate: init_state(server, RULE, None, clients=CLIENTS, learning_rate=rate).hparams)(0.25)
    assert made["learning_rate"] == 0.25


def test_whole_models_train_without_adapters():
    """`max_rank={}` and `train_dense="*"` is federated averaging of the whole model."""
    task = task_from_nnx(MLP((6, 3), rngs=nnx.Rngs(0)), max_rank={}, train_dense="*")
    with pytest.raises(ValueError, match="expected clients=, got none: there are no ranks"):
        init_state(task.server, RULE, {})
    state = init_state(task.server, RULE, {}, clients=CLIENTS, learning_rate=0.1)
    trained = local.make_local_training(task, lambda h: optax.sgd(h["learning_rate"]), batch_size=BATCH)
    step = compiled(make_round(trained, RULE, lanes=2))
    new, info = step(jax.random.key(0), state, federation().data)
    assert info.participants == CLIENTS
    assert (new.server.trainable.dense["layers/0/kernel"] != state.server.trainable.dense["layers/0/kernel"]).all()
