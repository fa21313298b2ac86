"""Who takes part: without replacement, uniformly, and by identity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax.federated.participation import by_examples, everyone, sample_uniformly
from autorank_jax.types import FederatedData


def clients(sizes, ids):
    size, start = jnp.array(sizes, jnp.int32), jnp.zeros(len(sizes), jnp.int32)
    return FederatedData((), (), start, start, size, jnp.array(ids, jnp.int32))


DATA = clients([3, 1, 4, 1, 5, 9], [10, 7, 42, 0, 3, 8])


def test_everyone_takes_part():
    cohort = everyone(jax.random.key(0), DATA)
    assert cohort.row.tolist() == list(range(6))
    assert cohort.present.all()


def draw(cohort, count, data=DATA):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.vmap(lambda key: sample_uniformly(cohort)(key, data).row)(keys))


@pytest.mark.parametrize("cohort", [2, 6])
def test_cohorts_have_their_size_and_no_one_twice(cohort):
    rows = draw(cohort, 15_000)
    assert rows.shape == (15_000, cohort)
    assert rows.dtype == np.int32
    assert all(len(set(row)) == cohort for row in rows.tolist())
    assert rows.min() >= 0
    assert rows.max() < 6


def test_every_pair_is_equally_likely():
    pairs = np.sort(draw(2, 15_000), axis=1)
    counts = np.bincount(pairs @ [6, 1], minlength=36).reshape(6, 6)[np.triu_indices(6, 1)]
    assert counts.sum() == 15_000
    assert np.sum((counts - 1000) ** 2 / 1000) < 14 + 5 * np.sqrt(28)  # χ² of 15 pairs


def test_the_draw_follows_identities():
    order = np.array([3, 5, 0, 2, 4, 1])
    moved = clients(np.asarray(DATA.size)[order], np.asarray(DATA.id)[order])
    one, other = draw(3, 50), draw(3, 50, moved)
    for rows, moved_rows in zip(one, other, strict=True):
        assert set(np.asarray(DATA.id)[rows]) == set(np.asarray(moved.id)[moved_rows])


def test_leaving_out_those_who_were_not_drawn_changes_nothing():
    for seed in range(20):
        key = jax.random.key(seed)
        drawn = np.sort(np.asarray(sample_uniformly(3)(key, DATA).row))
        fewer = clients(np.asarray(DATA.size)[drawn], np.asarray(DATA.id)[drawn])
        assert set(np.asarray(sample_uniformly(2)(key, DATA).row)) <= set(drawn)
        two = np.asarray(fewer.id)[np.asarray(sample_uniformly(2)(key, fewer).row)]
        assert set(two) == set(np.asarray(DATA.id)[np.asarray(sample_uniformly(2)(key, DATA).row)])


@pytest.mark.parametrize(
    ("cohort", "message"),
    [(0, "expected a cohort of at least one client, got 0"), (7, "expected a cohort of at most all 6 clients, got 7")],
)
def test_impossible_cohorts_are_refused(cohort, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sample_uniformly(cohort)(jax.random.key(0), DATA)


def test_examples_are_weights():
    assert by_examples(DATA).tolist() == [3, 1, 4, 1, 5, 9]
    assert by_examples(DATA).dtype == jnp.float32
