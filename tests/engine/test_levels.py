"""Rank levels: those that are chosen cost least, hold everybody, and change nothing but rounding."""

import itertools

import jax
import numpy as np
import optax
import pytest

from autorank_jax.engine import FlopModel, Workload, choose_levels, init_state
from autorank_jax.engine.levels import resolve_levels
from autorank_jax.experiment.config import Experiment
from tests.engine.cases import CLIENTS, both_rules, jit_round, mlp_federation, mlp_local

FLOPS = FlopModel(2e6, {"a": 3e4, "b": 1e4})
STEPS = np.array([90, 10, 40, 20, 70, 30])


def workload(ratios, rounds):
    ranks = np.maximum(1, (np.asarray(ratios)[:, None] * [40, 12]).astype(int))
    return Workload({"a": ranks[:, 0], "b": ranks[:, 1]}, STEPS * rounds)


def seconds(levels, workloads, lanes):
    """Price levels by hand: 1e11 FLOP/s, two adapters of 0.7 s each."""
    total = 1.4 * len(levels)
    for work in workloads:
        held = [min(i for i, w in enumerate(levels) if all(work.ranks[p][k] <= w[p] for p in w)) for k in range(6)]
        for number, widths in enumerate(levels):
            mine = work.steps[np.array(held) == number]
            per_step = 8 * (FLOPS.base + sum(FLOPS.per_rank[p] * w for p, w in widths.items()))
            total += per_step * max(mine.sum(), lanes * mine.max(initial=0)) / 1e11
    return total


@pytest.mark.parametrize(("rounds", "lanes", "count"), [(1, 1, 1), (300, 1, 2), (900, 5, None), (100_000, 1, 6)])
def test_no_other_levels_cost_less(rounds, lanes, count):
    work = [workload([0.1, 0.3, 0.5, 0.5, 0.8, 1.0], rounds), workload([0.4] * 6, rounds)]
    choice = choose_levels(work, FLOPS, batch_size=8, lanes=lanes, platform="cpu")
    widths = sorted({(a, b) for w in work for a, b in zip(w.ranks["a"], w.ranks["b"], strict=True)})
    possible = [{"a": int(a), "b": int(b)} for a, b in widths]
    ladders = [
        [*below, possible[-1]] for n in range(len(possible)) for below in itertools.combinations(possible[:-1], n)
    ]
    best = min(seconds(ladder, work, lanes) for ladder in ladders)
    assert seconds(list(choice.levels), work, lanes) == pytest.approx(best)
    assert count in (None, len(choice.levels))
    if len(choice.levels) > 1:
        one = seconds([possible[-1]], work, lanes)
        assert one - best == pytest.approx(choice.saved - choice.paid)


def test_a_stack_is_as_wide_as_its_widest_layer():
    mixed = np.array([[3, 1, 2], [1, 1, 1], [2, 9, 4]])
    by_layer, of_one = ({"a": ranks} for ranks in (mixed, mixed.max(axis=1)))
    flops = FlopModel(1e9, {"a": 1e9})
    chosen = [
        choose_levels([Workload(ranks, [900, 500, 70])], flops, batch_size=8, lanes=1, platform="cpu")
        for ranks in (by_layer, of_one)
    ]
    assert len(chosen[0].levels) > 1
    assert chosen[0] == chosen[1]


def test_the_last_level_ends_at_the_highest_rank_there_is():
    assert choose_levels([workload([0.5] * 6, 1)], FLOPS, batch_size=8).levels == ({"a": 20, "b": 6},)
    assert choose_levels([Workload({}, STEPS)], FlopModel(1.0, {}), batch_size=8).levels == ({},)


@pytest.mark.parametrize("levels", [[{"a": 4}], [{"a": 5, "b": 3}, {"a": 4, "b": 3}], [{"a": 9, "b": 1}]])
def test_levels_that_do_not_fit_are_refused(levels):
    with pytest.raises(ValueError, match="ascending from 1 to"):
        resolve_levels({"a": 8, "b": 3}, levels)


def test_auto_is_one_level():
    assert resolve_levels({"a": 8, "b": 3}, "auto") == [{"a": 8, "b": 3}]
    assert Experiment().rank_levels == "auto"


def test_clients_beyond_the_last_level_are_absent():
    federation, rule = mlp_federation("float32"), both_rules()
    state = init_state(federation.task.server, rule, federation.ranks, learning_rate=0.1, max_epochs=3)
    narrow = {path: int(ranks.max()) - 1 for path, ranks in federation.ranks.items()}
    fits = np.all([ranks <= narrow[path] for path, ranks in federation.ranks.items()], axis=0)
    assert 0 < fits.sum() < CLIENTS
    train = jit_round(
        mlp_local(federation, lambda h: optax.sgd(h["learning_rate"])), rule, lanes=2, rank_levels=[narrow]
    )
    after, info = train(jax.random.key(0), state, federation.data)
    assert int(info.participants) == fits.sum()
    np.testing.assert_array_equal(np.asarray(after.epochs) > 0, fits)
