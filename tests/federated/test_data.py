"""Client data: what is built, what is counted, and what is refused with which words."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autorank_jax.federated.data import client_stats, from_client_ids, from_parts
from autorank_jax.federated.partition import holdout, partition

INPUTS = np.arange(12, dtype=np.uint8).reshape(6, 2)
TARGETS = np.array([0, 1, 2, 0, 1, 1])
PARTS = [np.array([4, 0]), np.array([1, 2, 5])]


def examples_of(data, client):
    start, size = int(data.start[client]), int(data.size[client])
    return data.order[start : start + size].tolist()


def test_parts_are_kept_client_by_client():
    data = from_parts(INPUTS, TARGETS, PARTS)
    assert [examples_of(data, client) for client in range(2)] == [[4, 0], [1, 2, 5]]
    assert data.id.tolist() == [0, 1]
    assert data.inputs.dtype == jnp.uint8
    assert {array.dtype for array in (data.order, data.start, data.size, data.id)} == {jnp.dtype("int32")}
    np.testing.assert_array_equal(data.inputs, INPUTS)
    np.testing.assert_array_equal(data.targets, TARGETS)


def test_ids_follow_the_client():
    assert from_parts(INPUTS, TARGETS, PARTS, ids=[7, 3]).id.tolist() == [7, 3]


def test_pytrees_of_tokens_and_masks():
    inputs = {"tokens": np.ones((6, 3), np.int32), "mask": np.ones((6, 3), bool)}
    data = from_parts(inputs, (np.zeros((6, 3), np.int32), np.zeros(6, np.float32)), PARTS)
    assert data.inputs["mask"].dtype == bool
    assert data.targets[1].shape == (6,)


@settings(deadline=None, max_examples=50)
@given(ids=st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 3), min_size=1, max_size=40))
def test_client_ids_equal_the_slow_grouping(ids):
    n = len(ids)
    data = from_client_ids(np.zeros((n, 1), np.uint8), np.zeros(n, np.int32), ids)
    assert data.id.tolist() == sorted(set(ids))
    for client, number in enumerate(sorted(set(ids))):
        assert examples_of(data, client) == [example for example in range(n) if ids[example] == number]


def test_both_constructors_agree():
    parts = partition("quantity", TARGETS, 3, seed=0)
    owner = np.empty(6, int)
    for client, part in enumerate(parts):
        owner[part] = client
    for a, b in zip(from_parts(INPUTS, TARGETS, parts), from_client_ids(INPUTS, TARGETS, owner), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gaps_are_fine_unless_refused():
    assert from_parts(INPUTS, TARGETS, PARTS).order.size == 5
    with pytest.raises(ValueError, match="every example in some client, got 1 in none, the first is example 3"):
        from_parts(INPUTS, TARGETS, PARTS, require_all=True)
    assert from_parts(INPUTS, TARGETS, [*PARTS, [3]], require_all=True).order.size == 6


def test_held_out_data_may_have_clients_without_examples():
    _, held = holdout(PARTS, 0.4, seed=0)
    data = from_parts(INPUTS, TARGETS, held, allow_empty=True)
    assert data.size.tolist() == [0, 1]
    assert client_stats(data, classes=3).label_counts.sum(axis=1).tolist() == [0, 1]


def test_million_clients_in_seconds():
    n, clients = 2_000_000, 1_000_000
    parts = list(np.random.default_rng(0).permutation(n).reshape(clients, 2))
    inputs, targets = np.zeros((n, 1), np.uint8), np.arange(n, dtype=np.int32) % 10
    begin = time.perf_counter()
    data = from_parts(inputs, targets, parts, require_all=True)
    other = from_client_ids(inputs, targets, np.arange(n) // 2)
    stats = client_stats(data, classes=10)
    assert time.perf_counter() - begin < 20  # takes 1.5 s on one core
    assert int(stats.size.sum()) == int(stats.label_counts.sum()) == n
    assert other.size.shape == (clients,)


def bad(inputs=INPUTS, targets=TARGETS, parts=PARTS, **options):
    return lambda: from_parts(inputs, targets, parts, **options)


NAN = np.array([[0.0], [np.nan], [0], [np.inf], [0], [0]], np.float32)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            bad(parts=[[0, 1], [1, 2]]),
            "one client only, got 1 in several places, the first is example 1 in clients 0, 1",
        ),
        (bad(parts=[[0, 1, 0]]), "the first is example 0 in clients 0, 0"),
        (bad(parts=[[0], [6]]), r"example numbers in 0 .. 5, got 6 for client 1"),
        (bad(parts=[[0], [1, -1]]), "example numbers in 0 .. 5, got -1 for client 1"),
        (bad(parts=[[0], [], [1], []]), "at least one example per client, got none for client 1, 3: leave"),
        (bad(parts=[[0]] + [[]] * 9), "for client 1, 2, 3, 4, 5 and 4 more"),
        (bad(parts=[]), "expected at least one example in some client, got 0 clients"),
        (bad(parts=[[], []], allow_empty=True), "in some client, got 2 clients without any"),
        (bad(parts=[0, 1, 1]), "one vector of example numbers per client.*use from_client_ids"),
        (bad(parts=[[0.0, 1.0]]), "integer example numbers, got float64"),
        (bad(parts=[np.array([True] * 6)]), r"got bool of shape \(6,\); probably masks.*np.flatnonzero"),
        (bad(parts=[INPUTS]), r"got uint8 of shape \(6, 2\)"),
        (bad(parts=[[0], [[1, 2]]]), "expected parts as vectors of integer example numbers"),
        (bad(targets=TARGETS[:5]), "of one length, got inputs 6, targets 5"),
        (bad(inputs={"a": INPUTS, "b": INPUTS[:4]}), r"got inputs\['a'\] 6, inputs\['b'\] 4, targets 6"),
        (bad(inputs=INPUTS.tolist()), r"expected an array at inputs\[0\]\[0\], got 0.*; probably a list"),
        (bad(inputs=np.float32(1)), "expected an array at inputs, got .*float32"),
        (bad(inputs=np.array(1.0)), "expected an array at inputs"),
        (bad(inputs=np.array([["a"]] * 6)), "expected numbers at inputs, got <U1: encode them"),
        (bad(inputs=np.array([None] * 6)), "expected numbers at inputs, got object"),
        (bad(inputs=NAN), "finite numbers at inputs, got NaN in example 1, 3; probably missing values"),
        (bad(inputs=jnp.asarray(NAN)), "finite numbers at inputs, got NaN"),
        (bad(inputs=jnp.asarray(NAN, jnp.bfloat16)), "finite numbers at inputs, got NaN"),
        (bad(targets=NAN[:, 0]), "finite numbers at targets"),
        (bad(inputs=INPUTS.astype(np.int64) + 2**40), "numbers that fit int32 at inputs, got 1099511627776"),
        (bad(inputs=INPUTS + 1e300), "numbers that fit float32 at inputs"),
        (bad(inputs={}, targets={}), "between 1 and 2³¹-1 examples, got 0"),
        (bad(inputs=INPUTS[:0], targets=TARGETS[:0]), "between 1 and 2³¹-1 examples, got 0"),
        (bad(classes=2), "targets as labels in 0 .. 1, got 0 .. 2"),
        (bad(targets=TARGETS - 1, classes=3), r"targets as labels in 0 .. 2, got -1 .. 1"),
        (bad(targets=TARGETS.astype(np.float32), classes=3), "targets as integers, got float32"),
        (bad(targets=np.eye(3)[TARGETS], classes=3), r"one label per example, got \(6, 3\); probably one-hot"),
        (bad(classes=0), "expected at least one class, got 0"),
        (bad(ids=[1, 1]), "different ids, got 1 more than once: random numbers"),
        (bad(ids=[1]), r"expected ids as 2 integers, one per client, got int64 of shape \(1,\)"),
        (bad(ids=["a", "b"]), "expected ids as"),
        (bad(ids=[-1, 0]), "expected ids in 0 .. 2147483647, got -1 .. 0"),
        (bad(ids=[0, 2**31]), "expected ids in 0 .. 2147483647, got 0 .. 2147483648: number clients"),
        (
            lambda: from_client_ids(INPUTS, TARGETS, [0, 1]),
            r"client_ids of shape \(6,\), one per example, got \(2,\); from_parts",
        ),
        (lambda: from_client_ids(INPUTS, TARGETS, list("aabbcc")), "client_ids as an array of numbers"),
        (lambda: from_client_ids(INPUTS, TARGETS, [0.0] * 6), "integer client_ids, got float64"),
        (lambda: from_client_ids(INPUTS, TARGETS, [-1] * 6), "client_ids in 0 .. 2147483647, got -1"),
        (lambda: from_client_ids(INPUTS, TARGETS[:5], [0] * 6), "of one length, got inputs 6, targets 5"),
        (lambda: from_client_ids(INPUTS, TARGETS, [0] * 6, classes=2), "targets as labels in 0 .. 1"),
    ],
)
def test_bad_data_is_one_clear_line(build, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("x64")
def test_wide_numbers_are_fine_in_64_bit():
    data = from_parts(INPUTS.astype(np.int64) + 2**40, TARGETS, PARTS)
    assert int(data.inputs[0, 0]) == 2**40


def test_stats_count_labels_and_fill_the_rest():
    stats = client_stats(from_parts(INPUTS, TARGETS, PARTS), classes=4)
    assert stats.label_counts.tolist() == [[1, 1, 0, 0], [0, 2, 1, 0]]
    assert stats.size.tolist() == [2, 3]
    assert stats.max_ratio.tolist() == [1, 1]
    assert stats.where.tolist() == [True, True]
    assert (stats.epoch_losses, stats.epochs, stats.extra) == (None, None, None)


@settings(deadline=None, max_examples=50)
@given(labels=st.lists(st.integers(0, 4), min_size=4, max_size=50), seed=st.integers(0, 99))
def test_stats_equal_the_slow_counting(labels, seed):
    labels = np.array(labels)
    parts = partition("quantity", labels, 4, seed=seed)
    stats = client_stats(from_parts(labels[:, None], labels, parts))
    slow = [[int((labels[part] == c).sum()) for c in range(labels.max() + 1)] for part in parts]
    assert stats.label_counts.tolist() == slow


def test_groups_stand_in_for_labels():
    data = from_parts(INPUTS, np.linspace(0, 1, 6, dtype=np.float32), PARTS)
    assert client_stats(data, groups=[0, 0, 1, 5, 1, 1]).label_counts.tolist() == [[1, 1], [1, 2]]
    tokens = from_parts(INPUTS, {"tokens": np.zeros((6, 3), np.int32)}, PARTS)
    assert client_stats(tokens, groups=TARGETS).label_counts.tolist() == [[1, 1, 0], [0, 2, 1]]


def test_columns_of_the_caller():
    losses = [[2.0, 1.0], [3.0, np.nan]]
    stats = client_stats(
        from_parts(INPUTS, TARGETS, PARTS), epoch_losses=losses, epochs=[2, 1], extra=[5, 6], max_ratio=[0.5, 1]
    )
    np.testing.assert_array_equal(stats.epoch_losses, losses)
    assert stats.epochs.tolist() == [2, 1]
    assert stats.extra.shape == (2, 1)
    assert stats.max_ratio.tolist() == [0.5, 1]
    assert {leaf.dtype for leaf in jax.tree.leaves(stats)} == {jnp.dtype(t) for t in ("int32", "float32", "bool")}
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(stats))


FLOATS = np.linspace(0, 1, 6, dtype=np.float32)


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (FLOATS, {}, "targets as integers, got float32; if these are no labels"),
        ({"a": TARGETS}, {}, "targets as one vector of labels, got several arrays; give groups"),
        (np.eye(6, dtype=int), {}, r"one label per example, got \(6, 6\); probably one-hot"),
        (TARGETS - 1, {}, r"targets as labels in 0 .. .*, got -1 .. 1"),
        (TARGETS, {"classes": 2}, "targets as labels in 0 .. 1, got 0 .. 2"),
        (FLOATS, {"groups": [0, 1]}, r"groups of shape \(6,\)"),
        (FLOATS, {"groups": FLOATS}, "groups as integers, got float32"),
        (TARGETS, {"epoch_losses": [[1.0, 1.0]]}, r"epoch_losses of shape \(2, columns\), got \(1, 2\)"),
        (TARGETS, {"epoch_losses": [1.0, 1.0]}, r"epoch_losses of shape \(2, columns\), got \(2,\)"),
        (TARGETS, {"epoch_losses": [[1.0], [np.nan]]}, "others for client 1: of clients that have no losses"),
        (TARGETS, {"epoch_losses": [[-1.0], [1.0]]}, "finite epoch_losses of at least 0, got .* for client 0"),
        (TARGETS, {"epoch_losses": [[1.0], [1.0]], "epochs": [1, 2]}, "epochs in 0 .. 1, got 1 .. 2"),
        (TARGETS, {"epoch_losses": [[1.0], [1.0]], "epochs": [1]}, r"epochs as 2 integers, got int64 of shape \(1,\)"),
        (TARGETS, {"epochs": [1, 1]}, "expected epoch_losses with epochs, got epochs alone"),
        (TARGETS, {"extra": [[1.0, 2.0]]}, r"extra of shape \(2, columns\), got \(1, 2\); probably transposed"),
        (TARGETS, {"extra": [[1.0], [np.inf]]}, "finite extra criteria, got NaN or infinity for client 1"),
        (TARGETS, {"max_ratio": 0.0}, "max_ratio in .0, 1., got 0"),
        (TARGETS, {"max_ratio": [0.5, 64]}, "max_ratio in .0, 1."),
        (TARGETS, {"max_ratio": [0.5, np.nan]}, "max_ratio in .0, 1."),
        (TARGETS, {"max_ratio": [0.5]}, r"max_ratio as one number or 2 of them, got shape \(1,\)"),
    ],
)
def test_bad_statistics_are_one_clear_line(targets, options, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        client_stats(from_parts(INPUTS, targets, PARTS), **options)
    assert "\n" not in str(caught.value)
