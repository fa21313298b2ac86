"""The cost of rounds follows what their clients did: against the counts that the engine reports, and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autorank_jax import aggregators, datasets
from autorank_jax.adapters.lora import max_ranks
from autorank_jax.engine.flops import FlopModel, training_flops
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.round import make_round
from autorank_jax.experiment import costs
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.run import run_experiment
from autorank_jax.experiment.setup import make_federations, start_state
from autorank_jax.federated.faults import with_nan_clients

UNLUCKY = Experiment(
    dataset="synthetic", split="dirichlet_lognormal", clients=8, hidden=(8,), max_ranks=(6, 4), rank_policies=("full",),
    rounds=4, local_epochs=2, batch_size=16, lanes=2, rank_levels=1, participation=0.75, drop_out=0.3, stragglers=0.5,
    straggler_steps=3, first_seed=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def federation():
    return make_federations(UNLUCKY, datasets.load_dataset("synthetic"))[0]


@pytest.mark.parametrize("sampling", [pytest.param("uniform", marks=pytest.mark.slow), "independent"])
def test_rows_are_charged_for_who_was_there_and_what_they_did(federation, sampling):
    infos, experiment = [], dataclasses.replace(UNLUCKY, sampling=sampling)
    results = run_experiment(experiment, on_round=lambda end: infos.append(end.info))
    rows, trainable = results.runs[0].rows, federation.task.server.trainable
    flops = training_flops(federation.task, federation.data)
    per_example = flops.base + sum(flops.per_rank[path] * rank for path, rank in max_ranks(trainable).items())
    per_client = sum(leaf.nbytes for leaf in jax.tree.leaves(trainable))  # everyone at full rank
    assert sum(int(info.dropped) for info in infos) > 0
    assert sum(int(info.cut_short) for info in infos) > 0
    spent = np.diff([0.0, *(row.train_flops for row in rows)])
    np.testing.assert_allclose(spent, [float(info.examples) * per_example for info in infos], rtol=1e-6)
    sent = np.diff([0.0, *(row.bytes for row in rows)])
    down_and_up = [int(info.participants) + int(info.participants - info.dropped) for info in infos]
    np.testing.assert_array_equal(sent, per_client * np.array(down_and_up))


def test_a_calm_round_costs_what_was_expected(federation):
    calm = dataclasses.replace(UNLUCKY, participation=1.0, drop_out=0.0, stragglers=0.0)
    rule, flops = aggregators.flora(), FlopModel(3.0, {"layers/0": 2.0, "layers/1": 1.0})
    state = start_state(calm, federation, rule)
    want = costs.expected_costs(calm, rule, state, federation.data, flops)
    got = costs.make_round_cost(calm, rule, flops)(jax.random.key(0), state, federation.data)
    np.testing.assert_allclose(got, (want.flops, want.bytes_up, want.bytes_down), rtol=1e-12)


def test_pruned_ranks_are_charged(federation):
    calm = dataclasses.replace(UNLUCKY, participation=1.0, drop_out=0.0, stragglers=0.0)
    rule, flops = aggregators.hetlora(prune=0.5), FlopModel(0.0, {"layers/0": 1.0, "layers/1": 0.0})
    state, cost = start_state(calm, federation, rule), costs.make_round_cost(calm, rule, flops)
    before = cost(jax.random.key(0), state, federation.data)
    pruned = state._replace(clients=state.clients | {"layers/0": jnp.full(8, 3, jnp.int32)})
    after = cost(jax.random.key(0), pruned, federation.data)
    assert after.flops == pytest.approx(before.flops / 2)
    width = sum(federation.task.server.trainable.adapters["layers/0"].lora_a.shape[:1]) + 8
    assert before.bytes_up - after.bytes_up == 8 * 3 * width * 4


@pytest.mark.slow
def test_steps_and_examples_leave_excluded_clients_out(federation):
    sizes = np.asarray(federation.data.size)
    broken = np.arange(8) == int(np.argmax(sizes))
    local = make_local_training(federation.task, lambda h: optax.sgd(h["learning_rate"]), batch_size=16)
    for rule in (aggregators.rbla(), aggregators.owner_merge()):  # the latter trains again without the broken
        state = start_state(UNLUCKY, federation, rule)
        round_fn = jax.jit(make_round(with_nan_clients(local, broken), rule, lanes=2))
        _, info = round_fn(jax.random.key(0), state, federation.data)
        assert int(info.excluded) == 1
        assert int(info.steps) == 2 * int(np.sum(-(-sizes[~broken] // 16)))
        assert float(info.examples) == 2 * sizes[~broken].sum()
