"""Label counts under differential privacy: bound, noise, and the counts that are left without them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax.ranks import policies
from autorank_jax.ranks.private import private_counts
from tests.ranks.test_criteria import client_stats

KEY = jax.random.key(3)


def test_without_noise_and_with_a_large_clip_counts_stay():
    stats = client_stats()
    released = private_counts(KEY, stats, clip=1e6, noise_multiplier=0.0)
    np.testing.assert_array_equal(released.label_counts, stats.label_counts)
    np.testing.assert_array_equal(released.size, stats.size)
    assert released.epoch_losses is None


def test_a_client_moves_its_counts_by_the_clip_at_most():
    huge = client_stats(label_counts=jnp.asarray([[10**6, 5, 0], [3, 4, 0], [0, 0, 0], [1, 0, 0]]))
    released = private_counts(KEY, huge, clip=5.0, noise_multiplier=0.0).label_counts
    norms = np.linalg.norm(released, axis=1)
    np.testing.assert_allclose(norms, [5, 5, 0, 1], rtol=1e-5)


def test_the_noise_has_the_deviation_it_is_said_to_have():
    counts = jnp.full((400, 50), 1000)
    stats = client_stats()._replace(label_counts=counts, size=counts.sum(1))
    clip = 1e5  # beyond all norms
    released = np.asarray(private_counts(KEY, stats, clip=clip, noise_multiplier=1e-3).label_counts)
    noise = released - 1000
    assert np.std(noise) == pytest.approx(100, rel=0.02)
    assert np.mean(noise) == pytest.approx(0, abs=3)
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.2
    other = private_counts(jax.random.key(4), stats, clip=clip, noise_multiplier=1e-3).label_counts
    assert not np.array_equal(released, other)


@pytest.mark.slow
def test_empty_classes_mostly_stay_empty_and_policies_rank_what_is_released():
    counts = jnp.zeros((50, 20)).at[:, 0].set(100 + jnp.arange(50.0))
    stats = client_stats()._replace(
        label_counts=counts, size=counts.sum(1), where=jnp.ones(50, bool), max_ratio=jnp.ones(50)
    )
    released = private_counts(KEY, stats, clip=200.0, noise_multiplier=0.05)
    assert np.mean(np.asarray(released.label_counts[:, 1:]) > 0) < 0.05
    ratios, info = policies.autorank(criteria=("size", "classes", "label_entropy"))(KEY, released)
    assert np.isfinite(ratios).all()
    assert info.matrix.shape == (50, 3)


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"clip": np.inf}, {"noise_multiplier": -1.0}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} as a finite number"):
        private_counts(KEY, client_stats(), **({"clip": 1.0, "noise_multiplier": 1.0} | wrong))
