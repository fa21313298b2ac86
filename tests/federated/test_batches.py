"""Shuffles: bijections that look uniform, differ by epoch and key, and use every example once per epoch."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax.federated.batches import permuted, steps_per_epoch, take_batch
from autorank_jax.types import FederatedData

COUNT = 24_000
WORDS = jax.random.bits(jax.random.key(0), (COUNT, 2), jnp.uint32)


@jax.jit
def orders(positions, sizes, words, epochs):
    """Permute the same positions for each of several sizes, keys and epochs."""
    return jax.vmap(lambda n, w, e: permuted(positions, n, w, e))(sizes, words, epochs)


def shuffles(n, positions, epoch=0):
    """Return where `COUNT` keys send up to eight positions, `(COUNT, positions)`."""
    eight = jnp.asarray([*positions, *[0] * (8 - len(positions))], jnp.int32)
    sizes, epochs = jnp.full(COUNT, n, jnp.int32), jnp.full(COUNT, epoch, jnp.int32)
    return np.asarray(orders(eight, sizes, WORDS, epochs))[:, : len(positions)]


def assert_uniform(counts):
    """Fail where χ² = Σ (count - mean)² / mean is more than five standard deviations above its mean."""
    freedom = counts.size - 1
    chi_square = np.sum((counts - counts.mean()) ** 2) / counts.mean()
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("epoch", [0, 3])
def test_bijection_for_every_small_size(epoch):
    sizes = jnp.arange(1, 301)
    got = np.asarray(orders(jnp.arange(300), sizes, WORDS[:300], jnp.full(300, epoch)))
    for n, order in zip(range(1, 301), got, strict=True):
        np.testing.assert_array_equal(np.sort(order[:n]), np.arange(n))
        assert (order >= 0).all()
        assert (order < n).all()


@pytest.mark.parametrize("n", [2**17, 100_003])
def test_bijection_for_large_sizes(n):
    order = np.asarray(jax.jit(permuted)(jnp.arange(n), jnp.array(n), WORDS[0], jnp.array(1)))
    assert np.bincount(order, minlength=n).tolist() == [1] * n


@pytest.mark.parametrize("n", [2**31 - 1, 2**31 - 2, 2**30 + 1])
def test_no_overflow_at_the_largest_sizes(n):
    positions = np.unique(np.random.default_rng(0).integers(0, n, 200_100))[:200_000]
    images = np.asarray(orders(jnp.asarray(positions, jnp.int32), jnp.array([n]), WORDS[:1], jnp.array([0])))[0]
    assert images.dtype == np.int32
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(positions)
    assert_uniform(np.bincount(images // (n // 64 + 1), minlength=64))


def exactly_permuted(x, n, words, epoch):
    """Do the same in Python's integers, which do not overflow."""

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
        return x ^ (x >> 16)

    tweak = mix(words[1] ^ mix(epoch))
    for number in range(24):
        key = mix(words[0] ^ mix((tweak + number) % 2**32))
        salt = mix(tweak ^ mix((words[0] + number + 24) % 2**32))
        partner = (key - x) % n
        if mix(max(x, partner) ^ salt) % 2 == 1:
            x = partner
    return x


@pytest.mark.parametrize("n", [1, 2, 1000, 2**31 - 1, 2**31 - 2, 2**30 + 1])
def test_arithmetic_is_exact(n):
    positions = np.random.default_rng(1).integers(0, n, 8)
    got = shuffles(n, positions, epoch=2)[:20]
    words = np.asarray(WORDS[:20]).tolist()
    assert got.tolist() == [[exactly_permuted(x, n, w, 2) for x in positions.tolist()] for w in words]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_permutation_is_equally_likely(n):
    every = {order: number for number, order in enumerate(itertools.permutations(range(n)))}
    drawn = [every[tuple(order)] for order in shuffles(n, range(n)).tolist()]
    assert_uniform(np.bincount(drawn, minlength=len(every)))


@pytest.mark.parametrize("n", [7, 64, 100])
def test_every_position_goes_everywhere_equally_often(n):
    order = shuffles(n, [0, 1, n // 2, n - 1])
    for images in order.T:
        assert_uniform(np.bincount(images, minlength=n))
    assert_uniform(np.bincount((order[:, 1] - order[:, 0]) % n, minlength=n)[1:])  # neighbours
    assert_uniform(np.bincount((order[:, 3] - order[:, 0]) % n, minlength=n)[1:])


def test_epochs_and_keys_are_unrelated():
    first, second = shuffles(8, [0, 5], epoch=0), shuffles(8, [0, 5], epoch=1)
    for one, other in ((first, second), (first[1:], first[:-1])):
        for image in (other[:, 0], other[:, 1]):
            pairs = np.bincount(8 * one[:, 0] + image, minlength=64)
            assert_uniform(pairs)


def test_steps_include_the_short_batch():
    assert steps_per_epoch(jnp.array([0, 1, 3, 4, 5, 8, 9]), 4).tolist() == [0, 1, 1, 1, 2, 2, 3]


# -------------------------------------------------------------------------------------------------------------- batches

SIZES = np.array([9, 3, 4, 1], np.int32)


def client_data():
    """Build four clients whose examples are scattered; an example's input is its number, its target twice that."""
    order = np.random.default_rng(0).permutation(17).astype(np.int32)
    start = (np.cumsum(SIZES) - SIZES).astype(np.int32)
    inputs, targets = {"x": np.arange(20, dtype=np.uint8)}, 2 * np.arange(20, dtype=np.int32)
    data = FederatedData(inputs, targets, order, start, SIZES, np.arange(4, dtype=np.int32))
    return jax.tree.map(jnp.asarray, data)


DATA = client_data()
get_batch = jax.jit(lambda data, row, words, step: take_batch(data, row, words, step, 4))


@pytest.mark.parametrize("row", range(4))
def test_every_example_exactly_once_per_epoch(row):
    own = np.asarray(DATA.order)[int(DATA.start[row]) :][: SIZES[row]]
    steps, seen = -(-int(SIZES[row]) // 4), []
    for epoch in range(3):
        examples = []
        for number in range(steps):
            batch, got_epoch = get_batch(DATA, row, WORDS[0], epoch * steps + number)
            assert got_epoch == epoch
            used = np.asarray(batch.weight) == 1
            assert used.sum() == min(4, SIZES[row] - 4 * number)
            assert set(np.asarray(batch.weight)[~used]) <= {0}
            assert batch.inputs["x"].dtype == jnp.uint8
            np.testing.assert_array_equal(batch.targets, 2 * batch.inputs["x"].astype(np.int32))
            assert np.isin(batch.inputs["x"], own).all()  # padding repeats own examples, with weight 0
            examples += np.asarray(batch.inputs["x"])[used].tolist()
        np.testing.assert_array_equal(np.sort(examples), np.sort(own))
        seen.append(examples)
    assert SIZES[row] < 9 or len({tuple(order) for order in seen}) == 3


def test_order_depends_on_the_clients_own_examples_only():
    rows = np.array([2, 0])
    moved = DATA._replace(start=DATA.start[rows], size=DATA.size[rows], id=DATA.id[rows])
    for step in range(6):
        one, _ = get_batch(DATA, 0, WORDS[0], step)
        other, _ = get_batch(moved, 1, WORDS[0], step)
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_clients_without_examples_give_empty_batches():
    empty = DATA._replace(size=DATA.size.at[1].set(0))
    batch, _ = get_batch(empty, 1, WORDS[0], 0)
    assert batch.weight.tolist() == [0] * 4
