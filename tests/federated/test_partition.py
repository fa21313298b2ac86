"""Splits: exactly once, nobody empty, deterministic, in bounded time; and each split's own promise."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autorank_jax.datasets import ENVIRONMENT_VARIABLE, cache_folder, load_dataset
from autorank_jax.federated.partition import (
    SPLITS,
    dirichlet,
    dirichlet_lognormal,
    holdout,
    iid,
    partition,
    quantity,
    shards,
    staircase,
)

ANY_SIZE = [name for name in SPLITS if name != "staircase"]  # that one dictates the number of clients
EXTREMES = [1e-310, 1e-6, 0.1, 1.0, 1e6, 1e300]


def assert_exactly_once(parts, n, clients):
    assert len(parts) == clients
    assert min(len(part) for part in parts) >= 1
    assert sum(len(part) for part in parts) == n
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(n))


def label_counts(labels, parts):
    width = labels.max() + 1
    return np.stack([np.bincount(labels[part], minlength=width) for part in parts])


@st.composite
def federations(draw):
    labels = draw(st.lists(st.integers(0, 5), min_size=1, max_size=80))
    clients = draw(st.integers(1, len(labels)))
    alpha = draw(st.sampled_from(EXTREMES) | st.floats(1e-3, 1e3))
    sigma = draw(st.sampled_from([0.0, 1.0, 1e6, 1.7e308]) | st.floats(0, 10))
    return np.array(labels), clients, alpha, sigma, draw(st.integers(0, 2**32))


@pytest.mark.parametrize("name", ANY_SIZE)
@settings(deadline=None, max_examples=60)
@given(federation=federations())
def test_every_example_once_nobody_empty_and_deterministic(name, federation):
    labels, clients, alpha, sigma, seed = federation
    options = {"alpha": alpha, "sigma": sigma, "classes_per_client": len(np.unique(labels))}
    parts = partition(name, labels, clients, seed=seed, **options)
    assert_exactly_once(parts, labels.size, clients)
    again = partition(name, labels, clients, seed=seed, **options)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(deadline=None)
@given(classes=st.integers(1, 7), extra=st.lists(st.integers(0, 6), max_size=60), seed=st.integers(0, 2**32))
def test_staircase_every_example_once(classes, extra, seed):
    labels = np.array([c for c in range(classes) for _ in range(classes)] + [c for c in extra if c < classes])
    parts = staircase(labels, seed=seed)
    assert_exactly_once(parts, labels.size, classes)
    for i, part in enumerate(parts):
        assert set(labels[part]) == set(range(i + 1))


@pytest.mark.parametrize("name", SPLITS)
def test_another_seed_is_another_split_and_a_generator_moves_on(name):
    labels = np.arange(300) % 5
    seeds = [partition(name, labels, 5, seed=seed) for seed in (0, 1)]
    assert any(not np.array_equal(a, b) for a, b in zip(*seeds, strict=True))
    rng = np.random.default_rng(0)
    drawn = [partition(name, labels, 5, seed=rng) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(drawn[0], seeds[0], strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(*drawn, strict=True))


@pytest.mark.parametrize("alpha", EXTREMES)
@pytest.mark.parametrize("sigma", [0.0, 1.0, 1e6])
def test_ends_for_ten_thousand_clients_and_a_hundred_classes(alpha, sigma):
    labels = np.random.default_rng(0).integers(0, 100, 60_000)
    begin = time.perf_counter()
    assert_exactly_once(dirichlet_lognormal(labels, 10_000, alpha=alpha, sigma=sigma, seed=0), 60_000, 10_000)
    assert_exactly_once(dirichlet(labels, 10_000, alpha=alpha, seed=0), 60_000, 10_000)
    assert time.perf_counter() - begin < 20  # takes 0.2 s on one core


def test_time_is_linear_in_examples_and_clients():
    def seconds(n, clients):
        labels = np.random.default_rng(0).integers(0, 20, n)
        begin = time.perf_counter()
        dirichlet_lognormal(labels, clients, alpha=0.1, sigma=1.0, seed=0)
        return time.perf_counter() - begin

    seconds(1_000, 100)
    small = min(seconds(20_000, 2_000) for _ in range(3))
    assert min(seconds(200_000, 20_000) for _ in range(2)) < 10 * 4 * small + 1.0


def test_iid_is_even():
    sizes = [len(part) for part in iid(np.zeros(103, int), 10, seed=0)]
    assert sorted(sizes) == [10] * 7 + [11] * 3


def test_quantity_follows_the_log_normal():
    labels = np.arange(1_000_000) % 2
    assert {len(part) for part in quantity(labels, 1_000, sigma=0.0, seed=0)} == {1_000}
    sizes = np.array([len(part) for part in quantity(labels, 1_000, sigma=1.0, seed=0)])
    assert np.log(sizes).std() == pytest.approx(1.0, abs=0.1)
    shares = label_counts(labels, quantity(labels, 10, sigma=1.0, seed=0))
    np.testing.assert_allclose(shares[:, 0] / shares.sum(1), 0.5, atol=0.02)


def test_dirichlet_shares_have_the_moments_of_the_distribution():
    """`q_ci` has mean 1/clients and variance `(clients - 1) / (clients² (clients α + 1))`."""
    labels = np.repeat(np.arange(400), 1_000)
    clients, alpha = 5, 0.5
    shares = label_counts(labels, dirichlet(labels, clients, alpha=alpha, seed=0)) / 1_000
    assert shares.mean() == pytest.approx(1 / clients)
    assert shares.var() == pytest.approx((clients - 1) / (clients**2 * (clients * alpha + 1)), rel=0.1)


def test_dirichlet_extremes_are_one_owner_per_class_and_even_shares():
    labels = np.repeat(np.arange(10), 1_000)
    counts = label_counts(labels, dirichlet(labels, 5, alpha=1e-6, seed=0))
    assert (counts.max(axis=0) >= 1_000 - 5).all()  # five may have gone to clients left empty
    counts = label_counts(labels, dirichlet(labels, 5, alpha=1e6, seed=0))
    np.testing.assert_allclose(counts, 200, atol=5)


def test_shards_gives_the_asked_number_of_classes_evenly():
    labels = np.repeat(np.arange(10), 600)
    counts = label_counts(labels, shards(labels, 25, classes_per_client=2, seed=0))
    assert ((counts > 0).sum(axis=1) == 2).all()
    assert ((counts > 0).sum(axis=0) == 5).all()
    assert set(counts[counts > 0]) == {120}


def test_shards_do_not_pair_the_same_classes_always():
    labels = np.repeat(np.arange(10), 600)
    held = label_counts(labels, shards(labels, 50, classes_per_client=2, seed=0)) > 0
    assert len({tuple(row) for row in held}) > 20


def test_shards_promise_holds_where_examples_are_scarce():
    labels = np.array([0] * 3 + [1] * 40)
    counts = label_counts(labels, shards(labels, 10, classes_per_client=1, seed=0))
    assert ((counts > 0).sum(axis=1) == 1).all()


def test_staircase_cuts_each_class_evenly_with_extras_to_later_clients():
    labels = np.array([9] * 5 + [4] * 5 + [7] * 4)  # not consecutive: 4, 7, 9 in order
    counts = label_counts(labels, staircase(labels, 3, seed=0))[:, [4, 7, 9]]
    np.testing.assert_array_equal(counts, [[1, 0, 0], [2, 2, 0], [2, 2, 5]])


@pytest.mark.skipif(
    not (cache_folder() / "mnist.npz").is_file(), reason=f"needs the full MNIST: ${ENVIRONMENT_VARIABLE}/mnist.npz"
)
def test_staircase_on_the_full_mnist():
    sizes = [len(part) for part in staircase(load_dataset("mnist").y_train, seed=0)]
    assert sizes[0] == 592
    assert sizes[-1] == pytest.approx(17_462, abs=9)  # nine classes, each cut to within one example
    assert sizes == sorted(sizes)
    assert sum(sizes) == 60_000


def test_dirichlet_lognormal_meets_amounts_and_mixes():
    labels = np.arange(1_000_000) % 10
    sizes = np.array([len(part) for part in dirichlet_lognormal(labels, 1_000, alpha=1.0, sigma=1.0, seed=0)])
    assert np.log(sizes).std() == pytest.approx(1.0, abs=0.1)
    counts = label_counts(labels, dirichlet_lognormal(labels, 1_000, alpha=1.0, sigma=0.0, seed=0))
    assert (counts.sum(axis=1) == 1_000).all()
    shares = counts / 1_000  # Dir(1, …, 1) over ten classes: variance 9 / (100 · 11)
    assert shares.var() == pytest.approx(9 / 1_100, rel=0.15)


def test_dirichlet_lognormal_keeps_mixes_as_pure_as_drawn_for_first_and_last_clients():
    """The largest share of `Dir(0.01, …)` over ten classes is 0.946 on average; nobody is always served last."""
    labels = np.arange(10_000) % 10
    largest = [
        label_counts(labels, dirichlet_lognormal(labels, 100, alpha=0.01, sigma=0.0, seed=seed)).max(axis=1) / 100
        for seed in range(40)
    ]
    mean = np.mean(largest, axis=0)
    assert mean.mean() == pytest.approx(0.946, abs=0.03)
    assert mean[:20].mean() == pytest.approx(mean[-20:].mean(), rel=0.03)


@pytest.mark.parametrize("name", SPLITS)
def test_which_examples_of_a_class_go_where_is_random(name):
    """Even where all amounts are fixed: one class, or for the staircase the two clients of class 0."""
    clients = 2
    labels = np.arange(40) % 2 if name == "staircase" else np.zeros(40, int)
    options = {"alpha": 1e12, "sigma": 0.0, "classes_per_client": 1}
    first, second = (partition(name, labels, clients, seed=seed, **options)[0] for seed in (0, 1))
    assert len(first) == len(second)
    assert not np.array_equal(first, second)


def test_shards_leave_extra_examples_to_any_holder():
    labels = np.repeat(np.arange(10), 7)  # five holders each, so two get one more
    sizes = np.mean([[len(p) for p in shards(labels, 10, classes_per_client=5, seed=s)] for s in range(40)], axis=0)
    np.testing.assert_allclose(sizes, 7, atol=0.7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("staircas", [0, 1], 2, {}), "expected a split out of iid, dirichlet, .*, got 'staircas'"),
        (("iid", [0, 1], 2, {"beta": 1}), "expected options out of alpha, classes_per_client, sigma, got beta"),
        (("iid", [0, 1], 0, {}), "expected clients >= 1, got 0"),
        (("iid", [0, 1], 1.5, {}), "expected clients as a whole number, got 1.5"),
        (("iid", [0, 1], True, {}), "expected clients as a whole number, got True"),
        (("iid", [0, 1], 3, {}), "one example for each of 3 clients, got 2 examples"),
        (("iid", [[0, 1]], 1, {}), r"expected labels as a vector, got shape \(1, 2\); probably one-hot"),
        (("iid", [], 1, {}), "got 0 examples"),
        (("dirichlet", [0.5, 1], 2, {}), r"expected integer labels, got float64; bins\(targets\) makes some"),
        (("dirichlet", [0, 1], 2, {"alpha": 0.0}), "expected alpha above 0 and finite, got 0.0"),
        (("dirichlet_lognormal", [0, 1], 2, {"alpha": float("nan")}), "expected alpha above 0 and finite, got nan"),
        (("dirichlet_lognormal", [0, 1], 2, {"alpha": float("inf")}), "expected alpha above 0 and finite, got inf"),
        (("dirichlet_lognormal", [0, 1], 2, {"sigma": -1.0}), "expected sigma of at least 0 and finite, got -1.0"),
        (("quantity", [0, 1], 2, {"sigma": float("nan")}), "expected sigma of at least 0 and finite, got nan"),
        (("shards", [0, 1, 2], 3, {"classes_per_client": 4}), "expected classes_per_client in 1 .. 3 .*, got 4"),
        (("shards", [0, 1, 2, 3], 2, {"classes_per_client": 1}), "in 2 .. 4 for 4 classes and 2 clients, got 1"),
        (("staircase", [0, 1, 2], 2, {}), "expected 3 clients for 3 classes on the staircase, got 2; .*dirichlet_log"),
        (("staircase", [0, 1, 1], 2, {}), "expected at least 2 examples of class 0, .* got 1"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    name, labels, clients, options = arguments
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        partition(name, labels, clients, seed=0, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 1.5, None, True])
def test_bad_seed(seed):
    with pytest.raises((ValueError, TypeError), match="expected seed"):
        iid([0, 1], 2, seed=seed)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8), percent=st.integers(0, 99), seed=st.integers(0, 99))
def test_holdout_splits_every_client_by_its_share(sizes, percent, seed):
    parts = np.split(np.random.default_rng(1).permutation(sum(sizes)), np.cumsum(sizes)[:-1])
    train, held = holdout(parts, percent / 100, seed=seed)
    for part, stays, out in zip(parts, train, held, strict=True):
        assert len(out) == percent * len(part) // 100
        np.testing.assert_array_equal(np.sort(np.concatenate([stays, out])), np.sort(part))


def test_holdout_counts_in_hundredths_whatever_rounding_says():
    assert 0.29 * 100 < 29
    assert len(holdout([np.arange(100)], 0.29, seed=0)[1][0]) == 29


def test_holdout_is_random_but_deterministic():
    parts = [np.arange(100), np.arange(100, 200)]
    first, again, other = (holdout(parts, 0.3, seed=seed)[1][0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
    assert first.max() > 50  # not simply the first thirty


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 20])
def test_holdout_refuses_a_fraction_outside_its_range(fraction):
    with pytest.raises(ValueError, match=r"expected fraction in \[0, 1\), got"):
        holdout([[0, 1]], fraction, seed=0)
