"""The round: equal to the slow twin, complete, repeatable, blind to who else is there, safe against failing clients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autorank_jax import aggregators
from autorank_jax.adapters.lora import level_widths
from autorank_jax.engine import local
from autorank_jax.engine.round import make_plan
from autorank_jax.engine.simulation import init_state
from autorank_jax.federated.participation import Cohort, sample_uniformly
from autorank_jax.types import Adapter, FederatedData, Trainable
from tests.engine.cases import (
    BATCH,
    BOTH_RULES,
    CLIENTS,
    RECORDED,
    assert_server,
    both_rules,
    cnn_federation,
    jit_round,
    mlp_federation,
    mlp_local,
    mlp_round,
    oracle_round,
    record_round,
    recorded_batches,
    sgd_or_adamw,
    some_rows,
    start_state,
    to_oracle,
)
from tests.reference import training

SAMPLED = sample_uniformly(5)
OPTIMIZERS = {
    "sgd": ({"adam": 0.0, "decay": 0.0}, lambda: training.sgd(0.1, 0.5)),
    "adam": ({"adam": 1.0, "decay": 0.0}, lambda: training.adam(0.1)),
    "adamw": ({"adam": 1.0, "decay": 0.2}, lambda: training.adamw(0.1, 0.2)),
}
slow = partial(pytest.param, marks=pytest.mark.slow)
in_64_bit = pytest.mark.usefixtures("x64", "standard_promotion")


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), one, other)


def assert_twin(federation, state, new, batches, *, servers, epochs=2, tolerance=1e-9, **options):
    """Compare a round with the oracle's: servers `{rule: server}` and every participant's losses."""
    who = np.flatnonzero(new.epochs)
    for rule, server in servers.items():
        expected, losses = oracle_round(
            federation, to_oracle(state.server), batches, who, rule, epochs=epochs, **options
        )
        assert_server(server, expected, tolerance)
    for row in who:
        np.testing.assert_allclose(new.epoch_losses[row, :epochs], losses[row], rtol=0, atol=tolerance)
    return who


# ------------------------------------------------------------------------------------------------------ the slow twin


@in_64_bit
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("lanes", "rank_levels"), [slow(5, 4), slow(5, 1), slow(3, 4), (3, 1), slow(1, 4), slow(1, 1)])
def test_round_equals_the_slow_twin(lanes, rank_levels, optimizer):
    federation = mlp_federation()
    hparams, make_optimizer = OPTIMIZERS[optimizer]
    state, seen = start_state(federation, both_rules(), **hparams), set()
    for seed in (0, 1):
        key = jax.random.key(seed)
        new, _ = mlp_round(lanes, rank_levels, SAMPLED)(key, state, federation.data)
        servers = dict(zip(BOTH_RULES, new.aggregator, strict=True))
        batches = recorded_batches(key, federation.data)
        who = assert_twin(federation, state, new, batches, servers=servers, optimizer=make_optimizer())
        assert len(who) == 5
        seen |= set(who.tolist())
    assert 1 in seen, "the client smaller than one batch never took part: choose other seeds"


@pytest.mark.slow
@in_64_bit
def test_convolution_round_equals_the_slow_twin():
    federation, key = cnn_federation(), jax.random.key(2)
    state = start_state(federation, both_rules())
    new, _ = jit_round(mlp_local(federation), both_rules(), lanes=2, rank_levels=3)(key, state, federation.data)
    servers = dict(zip(BOTH_RULES, new.aggregator, strict=True))
    batches = recorded_batches(key, federation.data)
    who = assert_twin(federation, state, new, batches, servers=servers, optimizer=training.sgd(0.1, 0.5))
    assert len(who) == CLIENTS


@pytest.mark.slow
@in_64_bit
def test_proximal_scaled_round_equals_the_slow_twin():
    federation, key = mlp_federation(), jax.random.key(3)
    pulled = local.with_proximal_term(local.from_task_loss(federation.task.loss), 0.7)
    trained = local.make_local_training(
        federation.task, sgd_or_adamw, batch_size=BATCH, loss=pulled, scale=local.alpha_over_sqrt_rank(3.0)
    )
    state = start_state(federation, aggregators.zero_pad())
    new, _ = jit_round(trained, aggregators.zero_pad(), lanes=3, rank_levels=2)(key, state, federation.data)
    options = {"proximal": 0.7, "scale": ("alpha/sqrt(rank)", 3.0)}
    batches, servers = recorded_batches(key, federation.data), {"zero_pad": new.server}
    assert_twin(federation, state, new, batches, servers=servers, optimizer=training.sgd(0.1, 0.5), **options)


@pytest.mark.slow
def test_one_step_in_float32_equals_the_slow_twin():
    federation, key = mlp_federation("float32", (4, 3, 2, 4, 1, 4, 2)), jax.random.key(4)
    state = start_state(federation, both_rules(), local_epochs=1)
    state = state._replace(hparams={name: state.hparams[name] for name in ("local_epochs", "learning_rate")})
    trained = mlp_local(federation, lambda h: optax.sgd(h["learning_rate"], 0.5))
    new, info = jit_round(trained, both_rules(), lanes=3, rank_levels=2)(key, state, federation.data)
    assert info.steps == CLIENTS
    assert new.server.trainable.dense["layers/0/bias"].dtype == jnp.float32
    servers = dict(zip(BOTH_RULES, new.aggregator, strict=True))
    batches = recorded_batches(key, federation.data, epochs=1)
    options = {"optimizer": training.sgd(0.1, 0.5), "epochs": 1, "tolerance": 1e-5}
    assert_twin(federation, state, new, batches, servers=servers, **options)


# ----------------------------------------------------------------------------------------------------- unused positions


@in_64_bit
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_positions_that_nobody_owns_stay_bit_for_bit(optimizer):
    federation = mlp_federation()
    ranks = {"layers/0": np.array([1, 2, 3, 1, 2, 3, 1]), "layers/1": np.array([1, 1, 2, 2, 1, 2, 1])}
    state = start_state(federation, both_rules(), ranks=ranks, **OPTIMIZERS[optimizer][0])
    new, _ = mlp_round(5, 4, SAMPLED)(jax.random.key(0), state, federation.data)
    who = np.flatnonzero(new.epochs)
    for server in new.aggregator:
        for path, old in state.server.trainable.adapters.items():
            used, got = ranks[path][who].max(), server.trainable.adapters[path]
            np.testing.assert_array_equal(got.lora_a[:, used:], old.lora_a[:, used:])
            np.testing.assert_array_equal(got.lora_b[used:], old.lora_b[used:])
            assert (got.lora_a[:, :used] != old.lora_a[:, :used]).all()
            assert (got.lora_b[:used] != old.lora_b[:used]).all()


# --------------------------------------------------------------------------------------------------------- the queue


def queue_data(sizes, ids):
    """Make clients with consecutive examples out of 63, some perhaps without any."""
    sizes, examples = np.array(sizes, np.int32), np.arange(63, dtype=np.int32)
    start = np.cumsum(sizes, dtype=np.int32) - sizes
    return FederatedData(examples, examples, examples, start, sizes, np.array(ids, np.int32))


@pytest.mark.slow
@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    shape=st.sampled_from([(1, 1), (2, 3), (5, 4), (9, 2)]),
    clients=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7), st.integers(1, 3)), min_size=7, max_size=7),
    epochs=st.integers(1, 5),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_step_of_every_client_happens_exactly_once(shape, clients, epochs, seed):
    (lanes, rank_levels), (sizes, *ranks) = shape, np.array(clients, np.int32).T
    data = queue_data(sizes, np.random.default_rng(seed).choice(2**31 - 1, CLIENTS, replace=False))
    ranks = dict(zip(RECORDED, ranks, strict=True))
    options = {"epochs": epochs, "ranks": ranks, "lanes": lanes, "rank_levels": rank_levels}
    state, info = record_round(jax.random.key(seed), data, participation=some_rows, **options)
    record, steps = state.aggregator, [epochs * -(-size // BATCH) for size in sizes]
    present = np.flatnonzero(state.epochs)
    levels = level_widths(RECORDED, rank_levels)
    for row in range(CLIENTS):
        if row not in present:
            assert all((leaf[row] == 0).all() for leaf in record)
            continue
        np.testing.assert_array_equal(record.runs[row], np.arange(len(record.runs[row])) < steps[row])
        given_out = record.examples[row, : steps[row]].reshape(epochs, -1)
        own = 1 + data.order[data.start[row] :][: sizes[row]]
        for epoch in given_out:
            np.testing.assert_array_equal(np.sort(epoch[epoch > 0]), own)
        smallest = next(w["a"] for w in levels if w["a"] >= ranks["a"][row] and w["b"] >= ranks["b"][row])
        assert record.level[row] == smallest
        np.testing.assert_array_equal(state.epoch_losses[row], np.arange(3) < epochs)
        assert state.epochs[row] == min(epochs, 3)
    noise = record.noise[record.runs > 0]
    assert len(set(noise)) == len(noise)
    assert (info.participants, info.excluded) == (len(present), 0)
    assert info.steps == sum(steps[row] for row in present)
    assert info.examples == epochs * sum(sizes[row] for row in present)
    np.testing.assert_equal(float(info.loss), 1.0 if len(present) else np.nan)
    assert info.steps <= info.lane_steps <= lanes * max(info.steps, 0)
    assert lanes > 1 or info.lane_steps == info.steps


def test_some_rows_leave_out_and_take_in():
    """The property above is about full, empty and mixed cohorts."""
    data = queue_data([1] * CLIENTS, list(range(CLIENTS)))
    present = jax.vmap(lambda key: some_rows(key, data).present)(jax.random.split(jax.random.key(0), 2000))
    assert set(present.sum(1).tolist()) == set(range(CLIENTS + 1))


@pytest.mark.slow
def test_lanes_take_the_longest_clients_first():
    """Clients of 1, 1, 3, 1 steps on two lanes: one trains the long one, the other the rest. Shortest first takes 4."""
    data = queue_data([1, 4, 12, 2, 0, 0, 0], range(CLIENTS))
    _, info = record_round(jax.random.key(0), data, epochs=1, lanes=2, rank_levels=3)
    assert (info.steps, info.lane_steps) == (6, 6)


# --------------------------------------------------------------------------------- random numbers follow the identity


def whole_record(data, **options):
    return record_round(jax.random.key(5), data, epochs=2, **options)[0].aggregator


def rows_of(data, rows):
    rows = np.asarray(rows)
    return data._replace(start=data.start[rows], size=data.size[rows], id=data.id[rows])


def test_reordering_clients_changes_no_random_number():
    data, order = mlp_federation().data, np.array([4, 2, 6, 0, 1, 5, 3])
    record, reordered = whole_record(data), whole_record(rows_of(data, order))
    assert_same(jax.tree.map(lambda leaf: leaf[order], record), reordered)


def test_leaving_clients_out_changes_no_random_number():
    data, kept = mlp_federation().data, np.array([6, 1, 4])
    record, fewer = whole_record(data), whole_record(rows_of(data, kept))
    assert_same(jax.tree.map(lambda leaf: leaf[kept], record), fewer)


def test_rounds_keys_and_identities_change_random_numbers():
    data = mlp_federation().data
    record = whole_record(data)
    other_ids, other_round = whole_record(data._replace(id=data.id + 100)), whole_record(data, rounds_done=1)
    for changed in (other_ids, other_round):
        assert not np.isin(changed.noise[changed.runs > 0], record.noise).any()
        assert (changed.examples != record.examples).any((1, 2)).all()


@in_64_bit
@pytest.mark.slow
def test_reordering_clients_gives_the_same_round():
    federation, order = mlp_federation(), np.array([4, 2, 6, 0, 1, 5, 3])
    state, key = start_state(federation, both_rules()), jax.random.key(6)
    ranks = {path: values[order] for path, values in federation.ranks.items()}
    train = mlp_round(3, 4, SAMPLED)
    one, _ = train(key, state, federation.data)
    other, _ = train(key, start_state(federation, both_rules(), ranks=ranks), rows_of(federation.data, order))
    assert_close(one.aggregator, other.aggregator)
    assert_close((one.epoch_losses[order], one.epochs[order]), (other.epoch_losses, other.epochs))


@in_64_bit
@pytest.mark.parametrize(("lanes", "rank_levels"), [slow(1, 4), slow(3, 4), (5, 1)])
def test_repeating_a_round_gives_the_same_bits(lanes, rank_levels):
    federation = mlp_federation()
    state, key = start_state(federation, both_rules()), jax.random.key(7)
    train = mlp_round(lanes, rank_levels, SAMPLED)
    assert_same(train(key, state, federation.data), train(key, state, federation.data))


# ---------------------------------------------------------------------------------------------------- failing clients


def spoil(data, rows, value=np.nan):
    """Put a number into one example of each of the given clients."""
    inputs = np.array(data.inputs)
    for row in rows:
        inputs[np.asarray(data.order)[int(data.start[row]) + int(data.size[row]) // 2]] = value
    return data._replace(inputs=jnp.asarray(inputs))


def without(data, rows):
    """Take all examples from the given clients, which makes them absent."""
    return data._replace(size=data.size.at[np.asarray(rows)].set(0))


@in_64_bit
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("lanes", [1, 3])
def test_failing_clients_count_as_absent(lanes, value):
    federation, key = mlp_federation(), jax.random.key(8)
    state, train = start_state(federation, both_rules()), mlp_round(lanes, 4, SAMPLED)
    whole, _ = train(key, state, federation.data)
    bad = np.flatnonzero(whole.epochs)[[1, 3]]
    got, info = train(key, state, spoil(federation.data, bad, value))
    expected, other = train(key, state, without(federation.data, bad))
    assert (info.participants, info.excluded, other.participants, other.excluded) == (5, 2, 3, 0)
    compare = assert_same if lanes == 1 else assert_close
    compare(got._replace(server=(), aggregator=()), expected._replace(server=(), aggregator=()))
    compare(got.aggregator, expected.aggregator)
    assert (got.epochs[bad] == 0).all()
    assert_close((info.loss, info.examples), (other.loss, other.examples))


@in_64_bit
def test_a_round_where_everyone_fails_leaves_the_server():
    federation = mlp_federation()
    state = start_state(federation, both_rules())
    new, info = mlp_round(3, 4, SAMPLED)(jax.random.key(9), state, spoil(federation.data, range(CLIENTS)))
    for server in new.aggregator:
        assert_same(server, state.server)
    assert (info.participants, info.excluded) == (5, 5)
    assert np.isnan(info.loss)
    assert new.round == 1


def planned_rbla():
    """RBLA with the denominators taken from the plan, `A += Σ_k (w_k m_k / N) ΔA_k`: right only for a right plan."""

    def summand(update, server, plan):  # noqa: ARG001
        moved = jax.tree.map(jnp.subtract, update.trained, update.start)
        adapters = {}
        for path, delta in moved.adapters.items():
            owners = plan.owners[path]
            share = jnp.where(owners > 0, update.client.weight / jnp.where(owners > 0, owners, 1), 0)
            share = share * update.client.masks[path]
            adapters[path] = Adapter(delta.lora_a * share[None, :], delta.lora_b * share[:, None])
        weight = update.client.weight / jnp.maximum(plan.weight, 1)
        return Trainable(adapters, jax.tree.map(lambda leaf: leaf * weight, moved.dense))

    def update(key, sums, state, server):  # noqa: ARG001
        return server._replace(trainable=jax.tree.map(jnp.add, server.trainable, sums)), state

    return aggregators.rbla()._replace(summand=summand, update=update, exact_plan=True)


@in_64_bit
def test_rules_with_an_exact_plan_rerun_without_failing_clients():
    federation, key = mlp_federation(), jax.random.key(8)
    train = jit_round(mlp_local(federation), planned_rbla(), lanes=3, rank_levels=1, participation=SAMPLED)
    state, twin = start_state(federation, planned_rbla()), start_state(federation, both_rules())
    whole, info = train(key, state, federation.data)
    reference, _ = mlp_round(3, 1, SAMPLED)(key, twin, federation.data)
    assert info.excluded == 0
    assert_close(whole.server, reference.aggregator[0])
    bad = np.flatnonzero(whole.epochs)[[0, 2]]
    got, info = train(key, state, spoil(federation.data, bad))
    reference, _ = mlp_round(3, 1, SAMPLED)(key, twin, without(federation.data, bad))
    assert (info.participants, info.excluded) == (5, 2)
    assert_close(got.server, reference.aggregator[0])
    assert_close((got.epochs, got.epoch_losses), (reference.epochs, reference.epoch_losses))
    new, info = train(key, state, spoil(federation.data, range(CLIENTS)))
    assert_same(new.server, state.server)
    assert info.excluded == 5


def test_plan_sums_the_weights_of_owners():
    state = init_state(
        mlp_federation().task.server,
        aggregators.rbla(),
        {"layers/0": np.array([1, 3, 5, 2]), "layers/1": np.array([3, 1, 1, 2])},
    )
    cohort = Cohort(jnp.array([2, 0, 3]), jnp.array([True, True, False]))
    plan = make_plan(state, cohort, jnp.array([10.0, 1.0, 0.0]), jnp.array(15.0))
    np.testing.assert_array_equal(plan.owners["layers/0"], [11, 10, 10, 10, 10])
    np.testing.assert_array_equal(plan.owners["layers/1"], [11, 1, 1])
    assert (plan.weight, plan.total) == (11, 15)


# ----------------------------------------------------------------------------------------------------- arguments, keys


def test_level_widths_end_at_the_maximum():
    assert level_widths({"a": 10, "b": 3}, 4) == [
        {"a": 3, "b": 1},
        {"a": 5, "b": 2},
        {"a": 8, "b": 3},
        {"a": 10, "b": 3},
    ]
    assert level_widths({"a": 2}, 3) == [{"a": 1}, {"a": 2}]  # none twice
