"""The accountant: equal to dp-accounting's own, below a published bound, and the way back from ε to the noise."""

import sys

import dp_accounting as dp
import pytest

from autorank_jax.evaluation.privacy import calibrated_noise, calibrated_release, spent_epsilon

SETTINGS = [
    (1.0, 100, 1e-5, 0.1),
    (0.7, 10, 1e-5, 0.1),
    (2.0, 1000, 1e-6, 0.05),
    (1.0, 2, 1e-5, 1.0),
    (4.0, 200, 1e-5, 1.0),
    (0.5, 5, 1e-4, 0.01),
    (1.2, 300, 1e-5, 0.02),
    (8.0, 50, 1e-7, 0.5),
    (1.0, 1000, 1e-5, 0.001),
    (3.0, 20, 1e-5, 0.3),
]
CHEAP = (2, 4, 7)


@pytest.mark.parametrize(
    ("noise", "rounds", "delta", "rate"),
    [pytest.param(*s, marks=[pytest.mark.slow] * (n not in CHEAP)) for n, s in enumerate(SETTINGS)],
)
def test_independent_draws_are_accounted_as_the_library_does(noise, rounds, delta, rate):
    accountant = dp.pld.PLDAccountant()
    for part in (rounds // 2, rounds - rounds // 2):
        accountant.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), part)
    found = spent_epsilon(noise, rounds, delta, rate=rate)
    assert found == pytest.approx(accountant.get_epsilon(delta), rel=1e-3, abs=1e-6)


def test_the_moments_accountant_of_its_paper_is_an_upper_bound():
    """Abadi et al. 2016 (arXiv 1607.00133): q = 0.01, σ = 4, δ = 1e-5, 10,000 steps: ε = 1.26."""
    assert 0.8 * 1.26 > spent_epsilon(4.0, 10_000, 1e-5, rate=0.01) > 0.5 * 1.26


def test_a_fixed_cohort_costs_more_than_independent_draws_because_a_client_is_replaced():
    fixed = spent_epsilon(2.0, 50, 1e-5, rate=0.1, clients=1000)
    assert fixed > spent_epsilon(2.0, 50, 1e-5, rate=0.1)
    everyone = spent_epsilon(2.0, 1, 1e-5, rate=1.0, clients=1000)
    assert everyone == pytest.approx(spent_epsilon(1.0, 1, 1e-5, rate=1.0), rel=0.15)  # twice the clip, both whole


@pytest.mark.parametrize(
    ("epsilon", "clients"),
    [(1.0, None), pytest.param(3.0, 1000, marks=pytest.mark.slow)],
)
def test_calibrated_noise_keeps_the_budget_and_no_more(epsilon, clients):
    how = {"rate": 0.1, "clients": clients}
    noise = calibrated_noise(epsilon, 100, 1e-5, **how)
    assert spent_epsilon(noise, 100, 1e-5, **how) <= epsilon
    assert spent_epsilon(0.98 * noise, 100, 1e-5, **how) > epsilon


def test_what_is_released_once_is_composed_with_the_rounds():
    accountant = dp.pld.PLDAccountant()
    accountant.compose(dp.GaussianDpEvent(3.0))
    accountant.compose(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.0)), 20)
    found = spent_epsilon(1.0, 20, 1e-5, rate=0.1, release=3.0)
    assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert spent_epsilon(1.0, 0, 1e-5, rate=0.1, release=3.0) == pytest.approx(
        spent_epsilon(3.0, 1, 1e-5, rate=1.0), rel=1e-3
    )
    assert spent_epsilon(1.0, 20, 1e-5, rate=0.1, release=0.0) == float("inf")


@pytest.mark.parametrize("epsilon", [0.022, 0.015])
def test_small_budgets_of_which_renyi_divergences_say_little_are_kept(epsilon):
    noise = calibrated_release(epsilon, 1e-5)
    assert spent_of_one(noise) <= epsilon < spent_of_one(0.97 * noise)


def spent_of_one(noise):
    accountant = dp.pld.PLDAccountant()
    return accountant.compose(dp.GaussianDpEvent(noise)).get_epsilon(1e-5)


@pytest.mark.slow
def test_a_release_takes_its_part_of_the_budget():
    more = calibrated_noise(3.0, 20, 1e-5, rate=1.0, release=3.0)
    assert more > calibrated_noise(3.0, 20, 1e-5, rate=1.0)
    assert spent_epsilon(more, 20, 1e-5, rate=1.0, release=3.0) <= 3.0


def test_a_release_keeps_its_own_budget():
    whole = calibrated_release(1.0, 1e-5)
    assert spent_epsilon(1.0, 0, 1e-5, rate=0.1, release=whole) <= 1.0
    fixed = calibrated_release(1.0, 1e-5, clients=100)
    assert 0.99 < spent_epsilon(1.0, 0, 1e-5, rate=0.1, clients=100, release=fixed) <= 1.0


@pytest.mark.slow
def test_a_budget_near_the_border_of_the_accountants_is_kept_by_what_counts_it():
    noise = calibrated_noise(28.0, 10, 1e-5, rate=0.5)
    assert spent_epsilon(noise, 10, 1e-5, rate=0.5) <= 28.0


def test_the_ends():
    weak, weaker = (spent_epsilon(noise, 10, 1e-5, rate=0.1) for noise in (0.2, 1e-4))
    assert weak < weaker < float("inf")
    for clients in (None, 1000):
        assert calibrated_noise(1e5, 10, 1e-5, rate=0.1, clients=clients) == 0.2
    assert spent_epsilon(1.0, 0, 1e-5, rate=0.1) == 0
    assert spent_epsilon(0.0, 3, 1e-5, rate=0.1) == float("inf")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spent_epsilon(1.0, -1, 1e-5, rate=0.1), "rounds: "),
        (lambda: spent_epsilon(1.0, 5, 0.0, rate=0.1), "delta: "),
        (lambda: spent_epsilon(1.0, 5, 1e-5, rate=10.0), "expected rate in .*got 10, probably a percentage"),
        (lambda: spent_epsilon(-1.0, 5, 1e-5, rate=0.1), "noise_multiplier: "),
        (lambda: calibrated_noise(float("inf"), 5, 1e-5, rate=0.1), "a finite epsilon"),
        (lambda: calibrated_noise(1e-9, 5, 1e-12, rate=1.0, clients=1000), "too small"),
        (lambda: calibrated_noise(0.5, 1, 1e-5, rate=1.0, release=1.0), "too small"),
    ],
)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_extra_is_named(monkeypatch):
    from autorank_jax.evaluation import privacy  # noqa: PLC0415

    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    privacy._library.cache_clear()
    with pytest.raises(ImportError, match=r"autorank-jax\[privacy\]"):
        spent_epsilon(1.0, 5, 1e-5, rate=0.1)
    privacy._library.cache_clear()
