import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax.ranks import policies
from autorank_jax.ranks.budgets import (
    DEVICE_LEVELS,
    RESOURCE_PROFILES,
    resource_profile,
    with_budget,
    with_caps,
    with_coverage,
    with_one_ratio,
)
from autorank_jax.ranks.controls import reversed_ranks, shuffled
from autorank_jax.types import ClientStats

KEY = jax.random.key(0)
SIZE = np.array([100, 900, 40, 300, 250, 10])
RATIOS = np.array([0.35, 1.0, 0.2, 0.6, 0.5, 0.1])
PER_LAYER = np.stack([RATIOS, RATIOS[::-1], np.sqrt(RATIOS)], axis=1)
WHERE = np.array([True, True, False, True, True, True])


def client_stats(where=None, max_ratio=None):
    clients = len(SIZE)
    return ClientStats(
        size=jnp.asarray(SIZE),
        label_counts=jnp.ones((clients, 2), jnp.int32),
        epoch_losses=None,
        epochs=None,
        extra=None,
        max_ratio=jnp.ones(clients) if max_ratio is None else jnp.asarray(max_ratio, jnp.float32),
        where=jnp.ones(clients, bool) if where is None else jnp.asarray(where),
    )


@pytest.mark.parametrize(
    "ratios", [RATIOS, PER_LAYER, np.full(6, 0.1), np.full(6, 1.0)], ids=["", "layers", "low", "full"]
)
@pytest.mark.parametrize("weight", ["clients", "examples"])
@pytest.mark.parametrize("mean_ratio", [0.1, 0.3, 0.55, 0.9, 1.0])
def test_budget_is_met_in_order_and_in_range(ratios, weight, mean_ratio):
    budgeted = jax.jit(with_budget(policies.manual(ratios), mean_ratio, weight))
    moved, _ = budgeted(KEY, client_stats(WHERE))
    share = np.where(WHERE, SIZE if weight == "examples" else 1, 0)
    mean = np.average(np.asarray(moved, float).reshape(6, -1).mean(axis=1), weights=share)
    np.testing.assert_allclose(mean, mean_ratio, atol=1e-6)
    assert moved.min() >= np.float32(0.1)
    assert moved.max() <= 1
    before, after = ratios.ravel(), np.asarray(moved).ravel()
    assert (np.diff(after[np.argsort(before)]) >= -1e-7).all()
    if 0.1 < mean_ratio < 1 and len(set(before.tolist())) > 1:
        assert len(np.unique(after[before < 1])) >= len(np.unique(before[before < 1])) - 1


@pytest.mark.parametrize("weight", ["clients", "examples"])
def test_integer_ranks_meet_the_budget_within_one_rank(weight):
    max_ranks = {"a": 160, "b": 100}
    ratios, _ = with_budget(policies.by_size(), 0.4, weight)(KEY, client_stats())
    share = SIZE if weight == "examples" else np.ones(6)
    for path, ranks in policies.ranks_from_ratios(ratios, max_ranks).items():
        assert abs(np.average(ranks, weights=share) - 0.4 * max_ranks[path]) < 1


@pytest.mark.parametrize("weight", ["clients", "examples"])
@pytest.mark.parametrize("mean_ratio", [0.13, 0.4, 0.77, 1.0])
@pytest.mark.parametrize("ratios", [RATIOS, PER_LAYER, np.full(6, 0.5)], ids=["", "layers", "ties"])
def test_whole_ranks_meet_the_budget_within_one_rank_of_one_client(ratios, mean_ratio, weight):
    max_ranks, costs = {"c": 12, "a": 160, "b": 37}, {"a": 784 + 200, "b": 400, "c": 210}
    prices = [max_ranks[path] * costs[path] for path in sorted(max_ranks)]
    policy = with_budget(
        policies.manual(ratios), mean_ratio, weight, min_ratio=0.1, layer_weights=prices, max_ranks=max_ranks
    )
    found, _ = jax.jit(policy)(KEY, client_stats(WHERE))
    ranks = {path: np.asarray(rank, float) for path, rank in policies.ranks_from_ratios(found, max_ranks).items()}
    for layer, path in enumerate(sorted(ranks)):
        np.testing.assert_allclose(found[:, layer] * max_ranks[path], ranks[path], rtol=1e-6)
    share = np.where(WHERE, SIZE if weight == "examples" else 1, 0)
    spent = sum(costs[path] * (share * rank).sum() for path, rank in ranks.items())
    budget = mean_ratio * share.sum() * sum(prices)
    assert -share.max() * max(costs.values()) < spent - budget <= 1e-5 * budget
    by_layer = policies.manual(np.broadcast_to(ratios.reshape(6, -1), (6, 3)))
    real, _ = with_budget(by_layer, mean_ratio, weight, min_ratio=0.1, layer_weights=prices)(KEY, client_stats(WHERE))
    assert (np.abs(found - real) < 1 / np.array([[160, 37, 12]]) + 1e-6).all()
    lost = (np.asarray(real) - np.asarray(found)) * np.array([[160, 37, 12]]) > 1e-3
    price = share[:, None] * np.array([[costs[path] for path in "abc"]])
    assert (price[lost] > (budget - spent) * (1 - 1e-5)).all()  # nobody who lost could still have it


def test_whoever_is_too_dear_is_passed_over():
    stats = client_stats()._replace(size=jnp.array([10, 1, 1, 1, 1, 1]))
    ratios = np.array([0.19, 0.18, 0.17, 0.16, 0.15, 0.14])
    policy = with_budget(policies.manual(ratios), 0.13, "examples", min_ratio=0.1, max_ranks={"a": 10})
    ranks = (
        10 * np.asarray(jax.jit(policy)(KEY, stats)[0])[:, 0]
    )  # 19.5 of them, of examples, and 15 are had by one rank each
    np.testing.assert_allclose(ranks, [1, 2, 2, 2, 2, 1], rtol=1e-5)


@pytest.mark.parametrize("mean_ratio", [0.3, 0.45, 0.8])
def test_ranks_that_everybody_has_are_paid_by_the_others(mean_ratio):
    """Where the least ratio is less than one rank, and there is room."""
    max_ranks = {"a": 4, "b": 8}
    ratios = np.array([0.1, 0.1, 0.1, 0.9, 1.0, 0.1])
    policy = with_budget(policies.manual(ratios), mean_ratio, layer_weights=jnp.array([1.0, 2.0]), max_ranks=max_ranks)
    found = np.asarray(policy(KEY, client_stats())[0], float)
    assert found.min() >= 1 / 8
    spent, one = (found * [1 / 3, 2 / 3]).sum() / 6, 1 / 6 * max(1 / 3 / 4, 2 / 3 / 8)
    assert mean_ratio - one <= spent <= mean_ratio + 1e-6


def test_a_client_has_a_rank_whatever_it_costs():
    policy = with_budget(policies.manual(RATIOS), 0.01, min_ratio=0.01, max_ranks={"a": 10})
    assert policy(KEY, client_stats())[0].tolist() == [[np.float32(0.1)]] * 6
    least = with_budget(policies.manual(RATIOS), 0.6, min_ratio=0.4, max_ranks={"a": 10, "b": 1})
    np.testing.assert_allclose(least(KEY, client_stats())[0][:2], [[0.4, 1], [0.4, 1]], rtol=1e-6)  # 0.7 in the mean
    with pytest.raises(ValueError, match="expected max_ranks by path, got none"):
        with_budget(policies.manual(RATIOS), 0.5, max_ranks={})
    with pytest.raises(ValueError, match="max_ranks: expected 3 of them, as ratios have layers, got 1"):
        with_budget(policies.manual(PER_LAYER), 0.5, max_ranks={"a": 10})(KEY, client_stats())
    with pytest.raises(ValueError, match=r"max_ranks\['a'\]"):
        with_budget(policies.manual(RATIOS), 0.5, max_ranks={"a": 0})


def test_one_ratio_stays_between_the_others():
    """A sum of shares may be a rounding error above 1, and 0 where nobody is present."""
    full = with_one_ratio(policies.uniform())
    for clients in range(1, 60):
        stats = client_stats()._replace(size=jnp.ones(60, jnp.int32), where=jnp.arange(60) < clients)
        assert full(KEY, stats)[0].max() == 1
    assert full(KEY, client_stats(np.zeros(6, bool)))[0].min() == 1


@pytest.mark.parametrize("weight", ["clients", "examples"])
def test_one_ratio_for_all_costs_the_same(weight):
    stats = client_stats(WHERE)
    got, _ = with_one_ratio(policies.manual(RATIOS), weight)(KEY, stats)
    mean = np.average(RATIOS, weights=np.where(WHERE, SIZE if weight == "examples" else 1, 0))
    np.testing.assert_allclose(got, np.full(6, mean), rtol=1e-6)
    shares, prices = np.where(WHERE, SIZE if weight == "examples" else 1, 0), [1.0, 5.0, 2.0]
    got, _ = with_one_ratio(policies.manual(PER_LAYER), weight, layer_weights=prices)(KEY, stats)
    np.testing.assert_allclose(got, np.full((6, 3), np.average(PER_LAYER @ prices, weights=shares) / 8), rtol=1e-6)
    with pytest.raises(ValueError, match=r"weight out of clients, examples, got 'bytes'"):
        with_one_ratio(policies.uniform(), "bytes")


def test_layer_weights_price_the_layers():
    prices = [1.0, 5.0, 2.0]
    ratios, _ = with_budget(policies.manual(PER_LAYER), 0.4, layer_weights=prices)(KEY, client_stats())
    np.testing.assert_allclose(np.average(np.asarray(ratios).mean(axis=0), weights=prices), 0.4, atol=1e-6)


def test_budget_takes_a_traced_mean():
    ratios_at = jax.jit(lambda m: with_budget(policies.manual(RATIOS), m)(KEY, client_stats())[0])
    np.testing.assert_allclose(ratios_at(jnp.float32(0.7)).mean(), 0.7, atol=1e-6)


def test_budget_of_nobody_is_finite():
    ratios, _ = with_budget(policies.manual(RATIOS), 0.5)(KEY, client_stats(np.zeros(6, bool)))
    assert bool(((ratios >= 0.1) & (ratios <= 1)).all())


@pytest.mark.parametrize("ratios", [RATIOS, PER_LAYER])
def test_caps_bind_where_the_device_is_small(ratios):
    caps = np.array([1, 0.5, 0.05, 1, 0.25, 1], np.float32)
    capped, _ = with_caps(policies.manual(ratios))(KEY, client_stats(max_ratio=caps))
    np.testing.assert_allclose(capped, np.minimum(ratios.T, caps).T, rtol=1e-6)


def covered_by_hand(ratios, share, where):
    size = np.where(where, SIZE, 0)
    enough = [r for r in ratios if size[ratios >= r].sum() >= share * size.sum()]
    return np.minimum(ratios, max(enough))


@pytest.mark.parametrize("where", [np.ones(6, bool), WHERE, np.array([True, False, True, True, True, True])])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.6, 0.8, 1.0])
@pytest.mark.parametrize(
    "ratios", [RATIOS, PER_LAYER, np.array([0.5, 0.5, 1.0, 1.0, 0.2, 0.1])], ids=["", "layers", "ties"]
)
def test_every_position_has_owners_with_a_share_of_the_examples(ratios, share, where):
    """The largest ratios are cut to the highest one that enough examples stand behind, layer by layer."""
    covered, _ = jax.jit(with_coverage(policies.manual(ratios), share))(KEY, client_stats(where))
    expected = np.stack([covered_by_hand(r, share, where) for r in ratios.reshape(6, -1).T], axis=1)
    np.testing.assert_allclose(covered, expected.reshape(ratios.shape), rtol=1e-6)


def test_coverage_cuts_nobody_where_the_most_complex_clients_have_the_data():
    ratios, _ = with_coverage(policies.by_size())(KEY, client_stats())  # 900 of 1,600 examples have ratio 1
    np.testing.assert_array_equal(ratios, policies.by_size()(KEY, client_stats())[0])
    exact = client_stats()._replace(size=jnp.array([15, 10, 0, 0, 0, 0]))
    assert with_coverage(policies.manual([1, 0.5, 0.4, 0.3, 0.2, 0.1]), 0.6)(KEY, exact)[0][0] == 1  # 15 of 25
    few, _ = with_coverage(policies.manual([0.2, 0.3, 1.0, 0.9, 0.8, 0.4]))(KEY, client_stats())
    np.testing.assert_allclose(few, [0.2, 0.3, 0.3, 0.3, 0.3, 0.3])  # 600 examples have more, 1,500 this


def test_coverage_of_nobody_changes_nothing():
    ratios, _ = with_coverage(policies.manual(RATIOS))(KEY, client_stats(np.zeros(6, bool)))
    np.testing.assert_allclose(ratios, RATIOS, rtol=1e-6)


@pytest.mark.parametrize("control", [shuffled, reversed_ranks])
@pytest.mark.parametrize("ratios", [RATIOS, PER_LAYER])
def test_controls_deal_the_same_ratios_to_the_clients_present(control, ratios):
    drawn, _ = jax.jit(control(policies.manual(ratios)))(KEY, client_stats(WHERE))
    rows = [tuple(np.atleast_1d(row)) for row in np.asarray(drawn)[WHERE]]
    assert sorted(rows) == sorted(tuple(np.atleast_1d(row)) for row in ratios[WHERE].astype(np.float32))
    np.testing.assert_allclose(drawn[~WHERE], ratios[~WHERE], rtol=1e-6)


def test_reversed_ranks_turn_the_order_round():
    drawn, _ = reversed_ranks(policies.manual(RATIOS))(KEY, client_stats(WHERE))
    np.testing.assert_allclose(drawn, [0.6, 0.1, 0.2, 0.35, 0.5, 1.0], rtol=1e-6)


def test_shuffles_follow_the_key_and_reach_every_place_alike():
    keys = jax.random.split(KEY, 2000)
    shuffle = jax.jit(jax.vmap(lambda key: shuffled(policies.manual(RATIOS))(key, client_stats(WHERE))[0]))
    drawn = np.asarray(shuffle(keys))
    np.testing.assert_array_equal(drawn, shuffle(keys))
    np.testing.assert_allclose(np.mean(drawn[:, WHERE] == 1, axis=0), 1 / 5, atol=0.04)


EXPECTED = {
    "homogeneous": [0, 0, 0, 1],
    "random": [0.25] * 4,
    "heavy_tail_light": [0.85, 0.05, 0.05, 0.05],
    "heavy_tail_strong": [0.05, 0.05, 0.05, 0.85],
    "normal": [0.1345, 0.3655, 0.3655, 0.1345],
}


@pytest.mark.parametrize("name", RESOURCE_PROFILES)
def test_profiles_have_the_documented_distribution(name):
    ratios = np.asarray(resource_profile(name, KEY, 4000))
    np.testing.assert_allclose([np.mean(ratios == level) for level in DEVICE_LEVELS], EXPECTED[name], atol=0.03)


@pytest.mark.parametrize("name", RESOURCE_PROFILES)
def test_profiles_of_more_clients_leave_the_first_as_they_are(name):
    np.testing.assert_array_equal(resource_profile(name, KEY, 50)[:20], resource_profile(name, KEY, 20))


@pytest.mark.parametrize("name", RESOURCE_PROFILES)
def test_profiles_take_any_number_of_levels(name):
    assert set(np.unique(resource_profile(name, KEY, 30, levels=(0.5,)))) == {0.5}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda: with_budget(policies.uniform(), 0.05),
            r"mean_ratio of at least .*0.1, got 0.05.*lower min_ratio",
        ),
        (lambda: with_budget(policies.uniform(), np.float32(0.05)), "mean_ratio of at least .*lower min_ratio"),
        (lambda: with_budget(policies.uniform(), 0.5, min_ratio=jnp.array(0.6)), "mean_ratio of at least"),
        (lambda: with_budget(policies.uniform(), 1.2), "mean_ratio .*got 1.2"),
        (lambda: with_budget(policies.uniform(), 0.5, min_ratio=0), "min_ratio .*got 0"),
        (lambda: with_coverage(policies.uniform(), 50), "share .*got 50"),
        (lambda: with_coverage(policies.uniform(), np.float32(50)), "share .*got 50"),
        (lambda: with_budget(policies.uniform(), 0.5, "bytes"), "weight out of clients, examples, got 'bytes'"),
        (
            lambda: with_budget(policies.uniform(), 0.5, layer_weights=[1, 2])(KEY, client_stats()),
            r"layer_weights: expected 1 of them, got shape \(2,\)",
        ),
        (lambda: resource_profile("heavy", KEY, 3), "resource profile out of .*got 'heavy'"),
        (lambda: resource_profile("random", KEY, 0), "clients >= 1"),
        (lambda: resource_profile("random", KEY, 3, levels=(8, 200)), "levels .*probably ranks"),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mistake()
