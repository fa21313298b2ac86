import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats as scipy_stats

from autorank_jax.ranks.criteria import (
    CRITERIA,
    complexity_matrix,
    criterion_names,
    gini_simpson,
    label_entropy,
    loss_entropy,
)
from autorank_jax.ranks.mcda import min_max
from autorank_jax.ranks.policies import autorank_ranks
from autorank_jax.types import ClientStats

COUNTS = np.array([[10, 0, 0], [5, 5, 0], [30, 10, 20], [0, 0, 0]], np.int32)
LOSSES = np.array([[2.0, 1.0, 0.5], [3.0, 1.0, 9.0], [1.0, 1.0, 1.0], [7.0, 7.0, 7.0]], np.float32)


def client_stats(**changes):
    clients = COUNTS.shape[0]
    stats = ClientStats(
        size=jnp.asarray(COUNTS.sum(1)),
        label_counts=jnp.asarray(COUNTS),
        epoch_losses=jnp.asarray(LOSSES),
        epochs=None,
        extra=None,
        max_ratio=jnp.ones(clients),
        where=jnp.ones(clients, bool),
    )
    return stats._replace(**changes)


def test_label_entropy_is_scipys():
    counts = np.random.default_rng(0).integers(0, 50, (20, 7)) + np.eye(20, 7, dtype=int)
    np.testing.assert_allclose(label_entropy(counts), scipy_stats.entropy(counts, axis=1), rtol=1e-5)


def test_gini_simpson_is_the_chance_that_two_examples_differ():
    labels = np.repeat(np.arange(3), [30, 10, 20])
    differ = np.mean(labels[:, None] != labels[None, :])
    np.testing.assert_allclose(gini_simpson(np.array([30, 10, 20])), differ, rtol=1e-6)


@pytest.mark.parametrize("criterion", [label_entropy, gini_simpson])
def test_an_empty_client_or_one_class_has_no_complexity(criterion):
    np.testing.assert_array_equal(criterion(np.array([[0, 0], [0, 4]])), 0)


def test_loss_entropy_is_the_normalised_entropy_of_the_curve():
    np.testing.assert_allclose(loss_entropy(LOSSES), scipy_stats.entropy(LOSSES, axis=1) / np.log(3), rtol=1e-5)


def test_loss_entropy_counts_only_the_epochs_that_were_run():
    value = loss_entropy(LOSSES, np.array([2, 3, 2, 3], np.int32))
    np.testing.assert_allclose(value[0], scipy_stats.entropy([2, 1]) / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(value[1], scipy_stats.entropy(LOSSES[1]) / np.log(3), rtol=1e-5)


@pytest.mark.parametrize("missing", ["no epochs", "diverged"])
def test_a_client_without_a_curve_takes_the_mean_of_the_others(missing):
    epochs = np.array([3, 3, 3, 0 if missing == "no epochs" else 3], np.int32)
    losses = LOSSES if missing == "no epochs" else np.where([[False], [False], [False], [True]], np.inf, LOSSES)
    value = loss_entropy(losses, epochs)
    np.testing.assert_allclose(value[3], np.mean(value[:3]), rtol=1e-6)
    np.testing.assert_allclose(value[:3], loss_entropy(LOSSES[:3]), rtol=1e-6)


@pytest.mark.parametrize(
    ("losses", "epochs"),
    [
        (np.array([[3.0], [5.0]]), None),
        (np.array([[3.0, 9.0], [5.0, 1.0]]), np.array([1, 1])),
        (np.zeros((2, 4)), None),
        (np.array([[3.0, 9.0], [5.0, 1.0]]), np.array([0, 0])),
    ],
    ids=["one epoch", "one epoch run", "zero losses", "nobody"],
)
def test_an_undefined_loss_entropy_is_one(losses, epochs):
    np.testing.assert_array_equal(loss_entropy(losses, epochs), 1)


@pytest.mark.parametrize("criterion", [label_entropy, gini_simpson, loss_entropy])
@pytest.mark.parametrize("row", [[0.0, 0.0], [0.0, 4.0], [4.0, 4.0], [4.0]])
def test_gradients_are_finite(criterion, row):
    assert jnp.isfinite(jax.grad(criterion)(jnp.array(row))).all()


def test_one_client_equals_its_row_under_jit_and_vmap():
    counts = jnp.asarray(COUNTS)
    for criterion in (label_entropy, gini_simpson):
        np.testing.assert_allclose(jax.jit(jax.vmap(criterion))(counts), criterion(counts), rtol=1e-6)
        np.testing.assert_allclose(criterion(counts[2]), criterion(counts)[2], rtol=1e-6)


def test_matrix_has_a_column_per_criterion_in_the_order_asked_for():
    matrix = complexity_matrix(client_stats(), criteria=("gini_simpson", "size", "classes"))
    np.testing.assert_allclose(matrix[:, 0], gini_simpson(COUNTS))
    np.testing.assert_array_equal(matrix[:, 1], [10, 10, 60, 0])
    np.testing.assert_array_equal(matrix[:, 2], [1, 2, 3, 0])


@pytest.mark.parametrize("name", CRITERIA)
def test_every_registered_criterion_gives_a_finite_column_with_or_without_64_bit(name):
    for x64 in (False, True):
        with jax.enable_x64(x64):
            column = jax.jit(lambda stats: complexity_matrix(stats, criteria=(name,)))(client_stats())
            assert column.shape == (4, 1)
            assert column.dtype == (jnp.float64 if x64 else jnp.float32)
            assert jnp.isfinite(column).all()


def test_own_functions_and_extra_columns_enter():
    def dominance(stats):
        return stats.label_counts.max(axis=1)

    stats = client_stats(extra=jnp.arange(8.0).reshape(4, 2))
    criteria = ("size", dominance)
    assert criterion_names(stats, criteria=criteria) == ("size", "dominance", "extra_0", "extra_1")
    matrix = complexity_matrix(stats, criteria=criteria)
    np.testing.assert_array_equal(matrix[:, 1], [10, 5, 30, 0])
    np.testing.assert_array_equal(matrix[:, 2:], stats.extra)
    np.testing.assert_array_equal(complexity_matrix(stats, criteria=()), stats.extra)


def test_absent_clients_stay_out_of_the_mean_curve():
    where = jnp.array([True, False, True, True])
    stats = client_stats(epochs=jnp.array([3, 3, 3, 0], jnp.int32), where=where)
    column = complexity_matrix(stats, criteria=("loss_entropy",))[:, 0]
    np.testing.assert_allclose(column[3], (column[0] + column[2]) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "criteria", "message"),
    [
        (
            {"epoch_losses": None},
            ("loss_entropy",),
            "expected stats.epoch_losses, got None: .*probe makes them, or drop the",
        ),
        ({}, ("entropy",), "expected criteria out of .*label_entropy.*got 'entropy'"),
        ({}, (), "expected at least one, got none"),
        ({}, (lambda stats: stats.label_counts,), r"expected shape \(4,\), got \(4, 3\)"),
        ({"where": jnp.ones(3, bool)}, ("size",), r"stats.where: expected shape \(4,\), got \(3,\)"),
        ({"extra": jnp.ones(4)}, ("size",), r"stats.extra: expected shape \(4, k\), got \(4,\)"),
    ],
)
def test_static_mistakes_are_named(changes, criteria, message):
    with pytest.raises(ValueError, match=message):
        complexity_matrix(client_stats(**changes), criteria=criteria)


def test_loss_entropy_names_wrong_shapes():
    with pytest.raises(ValueError, match=r"at least one epoch, got \(3, 0\)"):
        loss_entropy(np.ones((3, 0)))
    with pytest.raises(ValueError, match=r"epochs: expected shape \(3,\), got \(2,\)"):
        loss_entropy(np.ones((3, 5)), np.ones(2, int))


@pytest.mark.parametrize("equation", [label_entropy, gini_simpson])
@pytest.mark.parametrize(("counts", "got"), [([1.0, -2.0], "-2"), ([np.nan, 1.0], "nan")])
def test_counts_that_are_none_are_refused(equation, counts, got):
    with pytest.raises(ValueError, match=f"label_counts as finite numbers >= 0, got {got}"):
        equation(counts)


@pytest.mark.parametrize("criterion", [label_entropy, gini_simpson])
@pytest.mark.parametrize("compiled", [False, True])
def test_one_class_has_no_complexity_whatever_its_size(criterion, compiled):
    counts = jnp.diag(jnp.arange(1, 1051))  # n / n is a little less than 1 for some of these n where XLA computes it
    assert not jnp.any((jax.jit(criterion) if compiled else criterion)(counts))


def test_a_loss_that_is_gone_after_an_epoch_has_no_entropy_whatever_it_was():
    first = jnp.linspace(0.01, 9, 1000)[:, None]
    assert not jnp.any(loss_entropy(jnp.concatenate([first, 0 * first, 0 * first], axis=1)))


def test_clients_of_one_class_each_differ_by_size_alone():
    for sizes in ([300, 200, 41, 30, 20], [1050, 347, 207, 184, 106, 82, 61, 55, 47]):
        ranks, of_one_class = (
            np.asarray(autorank_ranks(counts, max_rank=16)[0]) for counts in (np.diag(sizes), np.array(sizes)[:, None])
        )
        assert ranks[0] == 16
        assert (np.diff(ranks) <= 0).all()
        assert ranks.tolist() == of_one_class.tolist()


@pytest.mark.parametrize("mix", [(1, 1), (1, 2), (1, 50), (1, 1000), (1, 10_000), (3, 7, 11), tuple(range(1, 41))])
def test_clients_of_one_mix_do_not_differ_by_it(mix):
    counts = np.outer(np.arange(1, 400), mix)
    matrix = jnp.stack([label_entropy(counts), gini_simpson(counts)], axis=1)
    assert not jnp.any(min_max(matrix)[1])


@pytest.mark.parametrize("curve", [(5, 1e-3), (2.3, 1e-4, 1e-5), (1, 1e-6), (1e-6, 1), (5, 1, 0.3)])
def test_curves_of_one_shape_do_not_differ_by_it(curve):
    curves = np.outer([1, 1.3, 2.7, 3.1, 7.7, 9.99, 0.123], curve).astype(np.float32)
    for entropies in (loss_entropy(curves), jax.jit(loss_entropy)(curves)):
        assert not jnp.any(min_max(entropies[:, None])[1])
    shares = np.asarray(curve, np.float64) / sum(curve)
    expected = -np.sum(shares * np.log(shares)) / np.log(len(curve))
    np.testing.assert_allclose(loss_entropy(curves), np.full(7, expected), rtol=1e-5)
