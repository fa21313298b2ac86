"""Faults: clients that drop out or send NaN count as absent under every rule; budgets of steps; the draws."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax import aggregators
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.federated import faults
from autorank_jax.federated.participation import Cohort, equally, everyone, sample_by_size, sample_independently
from autorank_jax.types import Client, FederatedData, LocalTraining
from tests.aggregators.cases import BATCH, FAST, SHAPES, Union, fake_training, make_server, to_jax, to_numpy
from tests.engine.cases import both_rules, mlp_federation, mlp_local, start_state

in_64_bit = pytest.mark.usefixtures("x64", "standard_promotion")
CLIENTS = 40
KEY = jax.random.key(3)


def clients(sizes, ids=None):
    size = np.asarray(sizes, np.int32)
    start = np.concatenate([[0], np.cumsum(size)[:-1]]).astype(np.int32)
    n = int(size.sum())
    ids = np.arange(len(size), dtype=np.int32) if ids is None else np.asarray(ids, np.int32)
    order, targets = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    return jax.tree.map(jnp.asarray, FederatedData(targets, targets, order, start, size, ids))


def invite(count, ids=None):
    data = clients(np.ones(count), ids)
    return data, everyone(KEY, data)


def test_drop_out_strikes_the_given_share():
    data, cohort = invite(2000)
    assert (cohort.present & True).all()
    hit = [~faults.drop_out(0.3)(jax.random.key(s), jnp.int32(0), data, cohort).present for s in range(5)]
    share = np.mean(hit)
    assert abs(share - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 10_000)
    assert len({tuple(np.flatnonzero(row)[:5].tolist()) for row in np.asarray(hit)}) == 5
    for probability, everyone_stays in ((0, True), (1, False)):
        present = faults.drop_out(probability)(KEY, jnp.int32(0), data, cohort).present
        assert (np.asarray(present) == everyone_stays).all()


def test_luck_follows_identities():
    data, cohort = invite(50)
    order = np.random.default_rng(0).permutation(50).astype(np.int32)[:30]
    moved, fewer = invite(30, order)
    for fault in (faults.drop_out(0.4), faults.limit_steps(2, probability=0.4)):
        one, other = (fault(KEY, jnp.int32(0), *both) for both in ((data, cohort), (moved, fewer)))
        for field in ("present", "max_steps"):
            if getattr(one, field) is not None:
                np.testing.assert_array_equal(getattr(one, field)[order], getattr(other, field))


def test_schedule():
    data, _ = invite(4)
    cohort = Cohort(jnp.array([3, 1]), jnp.array([True, True]))
    fault = faults.drop_out_schedule([[False, False, False, True], [False, True, False, False]])
    present = [fault(KEY, jnp.int32(number), data, cohort).present.tolist() for number in range(3)]
    assert present == [[False, True], [True, False], [True, True]]


def test_budgets_join():
    data, cohort = invite(3)
    both = faults.apply_faults([faults.limit_steps(5), faults.limit_steps([9, 2, 7])], KEY, jnp.int32(0), data, cohort)
    assert both.max_steps.tolist() == [5, 2, 5]
    never = faults.limit_steps(2, probability=0)(KEY, jnp.int32(0), data, cohort)
    assert (never.max_steps == np.iinfo(np.int32).max).all()


def test_sampling_by_size_and_independently():
    sizes = np.array([1, 2, 3, 4, 0])
    data = clients(sizes)
    keys = jax.random.split(KEY, 20_000)
    first = np.asarray(jax.vmap(lambda k: sample_by_size(1)(k, data).row[0])(keys))
    assert np.sum((np.bincount(first, minlength=5)[:4] - 2000 * sizes[:4]) ** 2 / (2000 * sizes[:4])) < 20  # χ², 3 dof
    rows = np.asarray(jax.vmap(lambda k: sample_by_size(4)(k, data).row)(keys[:100]))
    assert (np.sort(rows, axis=1) == [0, 1, 2, 3]).all()
    present = np.asarray(jax.vmap(lambda k: sample_independently(0.25)(k, data).present)(keys))
    np.testing.assert_allclose(present.mean(axis=0), 0.25, atol=0.02)
    assert abs(np.corrcoef(present[:, 0], present[:, 1])[0, 1]) < 0.05
    assert equally(data).tolist() == [1, 1, 1, 1, 0]


# ------------------------------------------------------------------------------------------- every rule, 30 % and 10 %

GROUPS = {"lora_a": ("ffa_lora",), "none": ("fedavg",), "rolora": ("rolora",)}
GROUPS |= {name: (name,) for name in ("fedsa_lora", "local_only", "hetlora", "flora", "owner_merge")}
GROUPS["server"] = tuple(n for n in aggregators.RULES if n not in {m for names in GROUPS.values() for m in names})


def sizes_and_ranks():
    rng = np.random.default_rng(0)
    ranks = {path: rng.integers(1, width + 1, CLIENTS) for path, (_, _, width) in SHAPES.items()}
    return rng.integers(1, 7, CLIENTS), ranks


@pytest.mark.slow
@in_64_bit
def test_every_rule_counts_lost_clients_as_absent(monkeypatch):
    """30 % drop out and 10 % send NaN: the round equals the one to which only the others were invited."""
    rules = Union({group: {name: aggregators.make_rule(name) for name in names} for group, names in GROUPS.items()})
    assert sum(len(names) for names in GROUPS.values()) == len(aggregators.RULES)
    sizes, ranks = sizes_and_ranks()
    data, away = clients(sizes), faults.drop_out(0.3)
    broken = np.random.default_rng(1).permutation(CLIENTS) < CLIENTS // 10
    seen = []

    def spying(key, number, data, cohort):
        cohort = away(key, number, data, cohort)
        jax.debug.callback(lambda present: seen.append(np.asarray(present)), cohort.present)
        return cohort

    def run(participation, struck, nan):
        monkeypatch.setattr("tests.aggregators.cases.RANKS", ranks)
        monkeypatch.setattr("tests.aggregators.cases.WEIGHTS", np.asarray(sizes, float))
        state, local = rules.start(), fake_training()
        local = faults.with_nan_clients(local, broken) if nan else local
        train = make_round(local, rules.rule, lanes=1, rank_levels=1, participation=participation, faults=struck)
        state, info = jax.jit(train, compiler_options=FAST)(KEY, state, data)
        servers, _, _ = rules.step(jax.random.key(2), state.aggregator[1], state.aggregator[0], state.server)
        jax.effects_barrier()
        return servers, state.clients, info

    got, kept, info = run(everyone, [spying], nan=True)
    present = seen[0]
    left = present & ~broken
    counts = (int(info.participants), int(info.dropped), int(info.excluded))
    assert counts == (CLIENTS, (~present).sum(), (present & broken).sum())
    assert 6 <= counts[1] <= 18
    assert counts[2] >= 2
    only = lambda key, data: everyone(key, data)._replace(present=jnp.asarray(left))  # noqa: E731
    want, want_kept, info = run(only, (), nan=False)
    assert (int(info.participants), int(info.dropped), int(info.excluded)) == (left.sum(), 0, 0)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    start = to_numpy(to_jax(make_server()))
    for name in aggregators.RULES:
        jax.tree.map(partial(close, err_msg=name), to_numpy(got[name]), to_numpy(want[name]))
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), to_numpy(got[name]), start)
        assert name == "local_only" or any(jax.tree.leaves(moved)), name
    jax.tree.map(close, kept, want_kept)


@in_64_bit
@pytest.mark.parametrize("fault", [faults.drop_out(1.0), faults.drop_out_schedule(np.ones((1, 40), bool))])
def test_a_round_to_which_nobody_comes_changes_nothing(fault):
    sizes, ranks = sizes_and_ranks()
    rule = aggregators.with_norm_clipping(aggregators.raflora(), 1.0)
    state = init_state(to_jax(make_server()), rule, ranks, broken=np.zeros(CLIENTS))
    train = jax.jit(make_round(fake_training(), rule, faults=[fault]), compiler_options=FAST)
    new, info = train(KEY, state, clients(sizes))
    jax.tree.map(np.testing.assert_array_equal, new.server, state.server)
    assert (int(info.participants), int(info.dropped), int(info.excluded)) == (CLIENTS, CLIENTS, 0)
    assert (int(info.steps), int(new.round)) == (0, 1)
    assert np.isnan(info.loss), "no loss of nobody"


def test_clients_beyond_those_that_are_told_are_whole():
    local = LocalTraining(None, None, lambda state, client: jnp.ones(()), 1)  # noqa: ARG005
    spoiled = faults.with_nan_clients(local, np.array([False, True]))
    sent = [spoiled.end((), Client(jnp.int32(row), {}, jnp.ones(()), ())) for row in range(4)]
    np.testing.assert_array_equal(sent, [1, np.nan, 1, 1])


@in_64_bit
@pytest.mark.slow
def test_stragglers_send_their_first_steps():
    """A budget of two steps equals a client that never had more than two batches, in one epoch."""
    ranks = {path: np.full(3, width) for path, (_, _, width) in SHAPES.items()}
    rule = aggregators.rbla()
    state = init_state(to_jax(make_server()), rule, ranks, broken=np.zeros(3), max_epochs=1)
    state = state._replace(epochs=jnp.array([0, 1, 0], jnp.int32), epoch_losses=jnp.array([[0.0], [7.0], [0.0]]))
    few, many = clients([2, 2 * BATCH, 3]), clients([2, 5 * BATCH, 3])
    train = partial(make_round, fake_training(), rule, weigh=equally)
    short, info = jax.jit(train(faults=[faults.limit_steps(2)]))(KEY, state, many)
    want, other = jax.jit(train())(KEY, state, few)
    by_rounding = partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-13)  # two programs
    jax.tree.map(by_rounding, short.server, want.server)
    assert (int(info.cut_short), int(other.cut_short)) == (1, 0)
    assert (int(info.steps), int(other.steps)) == (5, 5)
    assert float(info.examples) == float(other.examples) == 2 + 2 * BATCH + 3
    assert short.epochs.tolist() == [1, 1, 1]  # no whole epoch: the straggler's older curve stays
    assert short.epoch_losses[1] == 7


@pytest.mark.slow
@in_64_bit
def test_nan_clients_in_a_model():
    federation = mlp_federation()
    state = start_state(federation, both_rules())
    count = len(federation.data.size)
    broken = np.arange(count) % 3 == 0
    train = make_round(faults.with_nan_clients(mlp_local(federation), broken), both_rules())
    new, info = jax.jit(train, compiler_options=FAST)(KEY, state, federation.data)
    trained = np.asarray(federation.data.size) > 0
    assert int(info.excluded) == (broken & trained).sum() > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new.aggregator))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: faults.drop_out(30), "expected probability in .0, 1., got 30, probably a percentage"),
        (lambda: faults.drop_out(float("nan")), "got nan"),
        (lambda: faults.drop_out_schedule([[0, 1]]), "expected a schedule of bools"),
        (lambda: faults.drop_out_schedule([True]), r"of shape \(1,\)"),
        (lambda: faults.limit_steps(0), "whole numbers of at least 1"),
        (lambda: faults.limit_steps(1.5), "got 1.5"),
        (lambda: faults.limit_steps(3, probability=2), "probably a percentage"),
        (lambda: faults.limit_steps([1, 2])(KEY, jnp.int32(0), *invite(3)), "expected a budget for each of 3 clients"),
        (lambda: faults.drop_out_schedule([[True]])(KEY, jnp.int32(0), *invite(3)), "expected a schedule of 3 clients"),
        (lambda: faults.with_nan_clients(fake_training(), [1, 0]), "expected broken as a vector of bools"),
        (lambda: sample_by_size(0), "expected a cohort of at least one client, got 0"),
        (lambda: sample_by_size(4)(KEY, invite(3)[0]), "expected a cohort of at most all 3 clients, got 4"),
        (lambda: sample_independently(0), "expected probability in .0, 1"),
    ],
)
def test_impossible_faults_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
