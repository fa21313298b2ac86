import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax.ranks import mcda, policies
from autorank_jax.ranks.criteria import complexity_matrix
from autorank_jax.ranks.policies import autorank_ranks, ranks_from_ratios, ratios_from_scores
from autorank_jax.ranks.reranking import with_reranking
from autorank_jax.types import Adapter, ClientStats, Server, State, Trainable

KEY = jax.random.key(0)
NO_LOSS = ("size", "classes", "label_entropy", "gini_simpson")


def client_stats(clients=6, *, where=None, losses=True, seed=0):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 30, (clients, 4)).astype(np.int32)
    return ClientStats(
        size=jnp.asarray(counts.sum(1)),
        label_counts=jnp.asarray(counts),
        epoch_losses=jnp.asarray(rng.random((clients, 5)), jnp.float32) if losses else None,
        epochs=None,
        extra=None,
        max_ratio=jnp.ones(clients),
        where=jnp.ones(clients, bool) if where is None else jnp.asarray(where),
    )


POLICIES = {
    "autorank": policies.autorank(),
    "by_size": policies.by_size(),
    "uniform": policies.uniform(0.3),
    "manual": policies.manual([0.1, 0.2, 0.3, 0.4, 0.5, 1.0]),
    "manual_per_layer": policies.manual(np.linspace(0.1, 1, 12).reshape(6, 2)),
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_the_protocol_under_jit(name):
    stats = client_stats(where=[True, True, False, True, True, True])
    for ratios, info in (POLICIES[name](KEY, stats), jax.jit(POLICIES[name])(KEY, stats)):
        assert ratios.shape[0] == 6
        assert bool(((ratios > 0) & (ratios <= 1)).all())
        assert info.matrix.shape == (6, *info.weights.shape)
        assert info.closeness.shape == (6,)
        assert len(info.criteria) == len(info.weights)
        chex.assert_tree_all_finite(info)


@pytest.mark.parametrize("normalization", mcda.NORMALIZATIONS)
def test_autorank_is_critic_then_topsis_then_min_max_over_the_floor(normalization):
    stats = client_stats()
    ratios, info = policies.autorank(min_ratio=0.2, normalization=normalization)(KEY, stats)
    np.testing.assert_allclose(info.matrix, complexity_matrix(stats))
    np.testing.assert_allclose(info.weights, mcda.critic_weights(info.matrix), rtol=1e-6)
    np.testing.assert_allclose(info.closeness, mcda.topsis(info.matrix, normalization=normalization), rtol=1e-6)
    C = np.asarray(info.closeness)
    np.testing.assert_allclose(ratios, 0.2 + 0.8 * (C - C.min()) / (C.max() - C.min()), rtol=1e-5)


def test_the_info_names_its_columns_also_out_of_jit():
    def spread(stats):
        return jnp.max(stats.label_counts, axis=1)

    stats = client_stats()._replace(extra=jnp.ones((6, 1)))
    _, info = jax.jit(policies.autorank(criteria=("size", spread)))(KEY, stats)
    assert info.criteria == ("size", "spread", "extra_0")


def test_autorank_honours_costs():
    stats = client_stats()
    ratios, _ = policies.autorank(criteria=("size",), benefit=[False])(KEY, stats)
    np.testing.assert_array_equal(jnp.argsort(ratios), jnp.argsort(-stats.size))


def test_autorank_leaves_absent_clients_out():
    where = np.array([True, True, False, True, False, True])
    stats = client_stats(where=where)
    present = jax.tree.map(lambda leaf: leaf[where], stats)
    ratios, _ = policies.autorank()(KEY, stats)
    np.testing.assert_allclose(ratios[where], policies.autorank()(KEY, present)[0], rtol=1e-5)
    np.testing.assert_allclose(ratios[~where], 0.1, rtol=1e-6)


def test_by_size_grows_with_the_size_from_the_floor_to_one():
    stats = client_stats()
    size = np.asarray(stats.size)
    expected = 0.25 + 0.75 * (size - size.min()) / (size.max() - size.min())
    np.testing.assert_allclose(policies.by_size(min_ratio=0.25)(KEY, stats)[0], expected, rtol=1e-5)


def test_equal_scores_train_everyone_at_full_rank():
    np.testing.assert_array_equal(ratios_from_scores(jnp.full(4, 0.5)), 1)
    np.testing.assert_array_equal(ratios_from_scores(jnp.array([0.3])), 1)


def test_scores_of_absent_clients_do_not_move_the_others():
    ratios = ratios_from_scores(jnp.array([5.0, 1.0, -90.0, 3.0]), where=jnp.array([True, True, False, True]))
    np.testing.assert_allclose(ratios, [1, 0.1, 0.1, 0.55], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
def test_ranks_of_hundredths_are_exact_up_to_4096(jit):
    hundredths = np.arange(1, 101)
    R = np.arange(1, 4097)
    max_ranks = {f"{r:04}": int(r) for r in R[:: 1 if not jit else 37]}
    ranks_of = partial(ranks_from_ratios, max_ranks=max_ranks)
    ranks = (jax.jit(ranks_of) if jit else ranks_of)(jnp.asarray(hundredths / 100, jnp.float32))
    widths = np.array(list(max_ranks.values()))
    expected = np.maximum(1, hundredths[:, None] * widths[None, :] // 100)
    np.testing.assert_array_equal(np.stack(list(ranks.values()), axis=1), expected)
    assert all(r.dtype == jnp.int32 for r in ranks.values())


def test_traced_ratios_are_clipped():
    ranks = jax.jit(partial(ranks_from_ratios, max_ranks={"a": 10}))(jnp.array([1.5, 0.0, -1.0, 0.5, jnp.nan]))
    np.testing.assert_array_equal(ranks["a"], [10, 1, 1, 5, 1])


def test_ranks_per_layer_follow_the_sorted_paths():
    ratios = jnp.array([[0.5, 1.0], [0.1, 0.2]])
    ranks = ranks_from_ratios(ratios, {"b": 10, "a": 100})
    np.testing.assert_array_equal(ranks["a"], [50, 10])
    np.testing.assert_array_equal(ranks["b"], [10, 2])


def test_autorank_ranks_of_the_worked_example():
    ranks, info = autorank_ranks([[10, 0], [5, 5], [20, 20]], max_rank=10)
    assert ranks.dtype == jnp.int32
    np.testing.assert_array_equal(ranks, [1, 3, 10])
    np.testing.assert_allclose(info.weights, [1 / 2, 1 / 6, 1 / 6, 1 / 6], rtol=1e-5)
    np.testing.assert_allclose(info.closeness, [0, 0.33195, 1], atol=1e-5)


def test_autorank_ranks_uses_losses_where_given_and_runs_under_jit():
    counts, losses = np.full((3, 2), 5), np.array([[2.0, 2.0], [3.0, 1.0], [1.0, 0.0]])
    ranks, info = autorank_ranks(counts, losses, max_rank=20, min_ratio=0.5)
    np.testing.assert_array_equal(info.weights, [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(ranks, [20, 18, 10])
    np.testing.assert_array_equal(
        jax.jit(partial(autorank_ranks, max_rank=20, min_ratio=0.5))(counts, losses)[0], ranks
    )


def federation(clients=6):
    adapters = {
        "b": Adapter(jnp.zeros((3, 8)), jnp.zeros((8, 2))),
        "a": Adapter(jnp.zeros((3, 40)), jnp.zeros((40, 2))),
    }
    ranks = {"b": jnp.full(clients, 8, jnp.int32), "a": jnp.full(clients, 40, jnp.int32)}
    losses, epochs = jnp.zeros((clients, 5)), jnp.zeros(clients, jnp.int32)
    return State(Server(Trainable(adapters, ()), ()), (), ranks, jnp.int32(0), {}, losses, epochs, ())


def fake_round(key, state, data):
    """Record new losses of every client that is in `data`, and nothing else."""
    losses = jax.random.uniform(jax.random.fold_in(key, state.round), state.epoch_losses.shape)
    losses = jnp.where(data[:, None], losses, state.epoch_losses)
    epochs = jnp.where(data, 5, state.epochs).astype(jnp.int32)
    return state._replace(round=state.round + 1, epoch_losses=losses, epochs=epochs), {"loss": losses.mean()}


def test_reranking_sets_the_policys_ranks_every_second_round_from_the_recorded_curves():
    stats, policy = client_stats(losses=False), policies.autorank(criteria=("size", "loss_entropy"))
    present = jnp.array([True, True, True, False, True, False])
    round_fn = jax.jit(chex.assert_max_traces(with_reranking(fake_round, policy, stats, every=2), n=1))
    state = federation()
    chex.clear_trace_counter()
    for done in range(1, 5):
        before = state
        state, info = round_fn(KEY, before, present)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
        assert set(info) == {"loss"}
        if done % 2:
            chex.assert_trees_all_equal(state.ranks, before.ranks)
        else:
            curves = stats._replace(epoch_losses=state.epoch_losses, epochs=state.epochs)
            chex.assert_trees_all_equal(state.ranks, ranks_from_ratios(policy(KEY, curves)[0], {"a": 40, "b": 8}))
            assert not bool((state.ranks["a"] == before.ranks["a"]).all())


def test_layers_of_a_stack_may_have_ratios_of_their_own():
    ratios = {"stack": [[0.5, 1.0], [0.1, 0.29]], "head": [1.0, 0.5]}
    ranks = ranks_from_ratios(ratios, {"head": 4, "stack": 10})
    assert {path: rank.tolist() for path, rank in ranks.items()} == {"head": [4, 2], "stack": [[5, 10], [1, 2]]}
    for wrong in ({"head": [1.0]}, ratios | {"head": [1.0]}, ratios | {"head": 1.0}):
        with pytest.raises(ValueError, match=r"the same clients for each of \['head', 'stack'\]"):
            ranks_from_ratios(wrong, {"head": 4, "stack": 10})
    with pytest.raises(ValueError, match=r"ratios\['head'\].*got 2"):
        ranks_from_ratios(ratios | {"head": [1.0, 2.0]}, {"head": 4, "stack": 10})


def test_reranking_gives_all_layers_of_a_stack_the_new_rank():
    state = federation()
    state = state._replace(ranks=state.ranks | {"b": jnp.stack([state.ranks["b"]] * 3, axis=1)})
    after, _ = with_reranking(fake_round, policies.by_size(), client_stats(), every=1)(KEY, state, jnp.ones(6, bool))
    expected = ranks_from_ratios(policies.by_size()(KEY, client_stats())[0], {"b": 8})["b"]
    np.testing.assert_array_equal(after.ranks["b"], np.repeat(expected[:, None], 3, axis=1))


def test_reranking_draws_a_key_of_its_own_each_time():
    def noisy(key, stats):
        return jax.random.uniform(key, (6,), minval=0.1), policies.uniform()(key, stats)[1]

    round_fn = with_reranking(fake_round, noisy, client_stats(), every=1)
    first, _ = round_fn(KEY, federation(), jnp.ones(6, bool))
    second, _ = round_fn(KEY, first, jnp.ones(6, bool))
    drawn = [s.ranks["a"].tolist() for s in (first, second)]
    of_the_round = [
        ranks_from_ratios(noisy(key, client_stats())[0], {"a": 40})["a"].tolist()
        for key in (KEY, *(jax.random.fold_in(KEY, r) for r in range(3)))
    ]
    assert all(x != y for x, y in itertools.combinations(drawn + of_the_round, 2))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: policies.autorank(min_ratio=0), "min_ratio in .0, 1., got 0"),
        (lambda: policies.autorank(normalization="sum"), "normalization out of"),
        (lambda: policies.by_size(min_ratio=10), "min_ratio .*got 10, probably a percentage"),
        (lambda: policies.uniform(1.5), "ratio .*got 1.5"),
        (lambda: policies.manual([0.5, 0.0]), r"ratios in \(0, 1\]"),
        (lambda: policies.manual([0.5, float("nan")]), r"ratios in \(0, 1\]"),
        (lambda: policies.manual(0.5), r"expected shape \(clients,\) or"),
        (lambda: policies.manual([0.5] * 5)(KEY, client_stats()), r"each of 6 clients, got shape \(5,"),
        (lambda: jax.jit(policies.manual([0.5] * 5))(KEY, client_stats()), r"each of 6 clients, got shape \(5,"),
        (lambda: policies.autorank()(KEY, client_stats(losses=False)), "expected stats.epoch_losses, got None"),
        (lambda: ratios_from_scores(jnp.ones((3, 2))), r"scores of shape \(clients,\)"),
        (lambda: ranks_from_ratios(jnp.ones((3, 2)), {"a": 4}), r"expected shape \(clients,\) or \(clients, 1\)"),
        (lambda: ranks_from_ratios(jnp.ones(3), {"a": 0}), r"max_ranks\['a'\] >= 1, got 0"),
        (lambda: ranks_from_ratios(jnp.ones(3), {"a": 0.5}), r"max_ranks as a dict.*0.5"),
        *(
            (
                lambda bad=bad: ranks_from_ratios([0.5, bad], {"a": 4, "b": 4}),
                rf"in \(0, 1\], got {bad:g}",
            )
            for bad in (1.01, 64, 0.0, -0.5, float("nan"))
        ),
        (lambda: ranks_from_ratios(jnp.full((3, 1), 1.5), {"a": 4}), "got 1.5, probably a percentage or a rank"),
        (lambda: with_reranking(fake_round, policies.uniform(), client_stats(), every=0), "every >= 1, got 0"),
        (lambda: autorank_ranks([[1, -2]], max_rank=4), "label_counts as finite numbers >= 0"),
        (lambda: autorank_ranks([[1, 2]], [[np.nan, 1]], max_rank=4), "epoch_losses as finite numbers"),
        (lambda: autorank_ranks([1, 2], max_rank=4), r"label_counts of shape \(clients, columns\), got \(2,\)"),
        (lambda: autorank_ranks([[1, 2]], np.ones((2, 3)), max_rank=4), "epoch_losses: expected 1 clients, got 2"),
        (
            lambda: autorank_ranks([[1, 2], [3]], max_rank=4),
            "label_counts as numbers in rows of one length, got rows of 1 and 2",
        ),
        (lambda: autorank_ranks([[1], [2]], [[1.0], []], max_rank=4), "epoch_losses as numbers in rows of one"),
        (lambda: autorank_ranks([["1", "many"]], max_rank=4), "label_counts as an array of numbers"),
        (lambda: policies.manual([[0.5, 1], [0.5]]), "ratios as numbers in rows of one length, got"),
        *(
            (
                lambda bad=bad: autorank_ranks([[1, 2]], max_rank=bad),
                rf"max_rank.*{bad}",
            )
            for bad in (0, 0.5)
        ),
    ],
)
def test_mistakes_are_named(mistake, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mistake()


def test_reranking_refuses_stats_of_other_clients():
    round_fn = with_reranking(fake_round, policies.autorank(criteria=NO_LOSS), client_stats(5), every=1)
    with pytest.raises(ValueError, match="expected stats of 6 clients, got those of 5"):
        round_fn(KEY, federation(), jnp.ones(6, bool))
