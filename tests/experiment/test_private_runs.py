"""Experiments under differential privacy: what is spent, what is promised, what is refused."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import autorank_jax as ar
from autorank_jax.checkpoint import saved_steps
from autorank_jax.cli.tables import footnotes
from autorank_jax.evaluation.privacy import spent_epsilon
from autorank_jax.experiment.checkpoints import Checkpoints
from autorank_jax.experiment.config import ConfigurationError, Experiment
from autorank_jax.experiment.position import is_evaluated, is_last, rounded_up
from autorank_jax.experiment.results import behind_highest
from autorank_jax.experiment.run import run_experiment
from autorank_jax.experiment.setup import Federation, make_aggregator, start_state, training_key

PRIVATE = Experiment(
    dataset="synthetic",
    split="dirichlet_lognormal",
    clients=6,
    hidden=(8,),
    rank_policies=("autorank", "full"),
    criteria=("size", "classes", "label_entropy", "gini_simpson"),
    aggregators=("rbla",),
    rounds=3,
    local_epochs=1,
    batch_size=16,
    learning_rate=0.1,
    rank_levels=1,
    participation=0.5,
    sampling="independent",
    dp_epsilon=100.0,
    dp_delta=1e-3,
    dp_ranks="private",
    dp_count_clip=100.0,
)


@pytest.fixture(scope="module")
def private():
    return run_experiment(PRIVATE)


@pytest.mark.slow
def test_every_round_says_what_is_spent_and_the_last_keeps_the_budget(private):
    plan = PRIVATE.privacy
    for run in private.runs:
        for row in run.rows:
            spent = spent_epsilon(plan.noise, row.round, 1e-3, rate=0.5, release=plan.release)
            assert row.epsilon == pytest.approx(spent, rel=1e-3)
        assert run.rows[-1].epsilon <= 100.0
    notes = " ".join(footnotes(private))
    assert "ε = 100, δ = 0.001" in notes
    assert "ranks come from noisy label counts" in notes
    assert "of one run" in notes
    assert set(private.compile_seconds) == {"rbla"}  # which serves both policies


@pytest.mark.slow
def test_a_probe_may_go_before_private_rounds_of_fixed_cohorts():
    probed = dataclasses.replace(
        PRIVATE, criteria=("size", "loss_entropy"), dp_ranks="public", dp_count_clip=500.0, sampling="uniform",
        rounds=1, rank_policies=("autorank",), probe_epochs=2,
    )  # fmt: skip
    results = run_experiment(probed)
    assert probed.privacy.clients == 6
    assert results.scores[0].criteria == ("size", "loss_entropy")
    assert 0 < results.runs[0].rows[-1].epsilon <= 100.0


@pytest.mark.slow
def test_private_ranks_see_noisy_counts_only(private):
    scores = private.scores[0]
    open_ = run_experiment(dataclasses.replace(PRIVATE, dp_ranks="public", dp_count_clip=500.0, rounds=1))
    public = open_.scores[0]
    size = scores.criteria.index("size")
    np.testing.assert_array_equal(public.matrix[:, size], public.size)
    assert not np.array_equal(scores.matrix[:, size], scores.size)
    np.testing.assert_array_equal(scores.size, np.rint(scores.matrix[:, size]))  # nothing shows the true ones
    assert not np.array_equal(scores.label_counts, public.label_counts)
    full = [next(run for run in results.runs if run.policy == "full") for results in (private, open_)]
    assert full[0].costs.slowest_client != full[1].costs.slowest_client


def test_a_release_of_nothing_is_summed_up_all_the_same():
    assert behind_highest(np.ones(3), np.zeros(3, int)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.0, 100.0])
def test_private_runs_share_neither_noise_nor_cohorts_and_others_share_all(epsilon):
    """The policies give the same ranks: what differs is drawn."""
    calm = {"dp_epsilon": epsilon, "dp_noise": 5.0 * (epsilon > 0), "dp_ranks": "public", "dp_count_clip": 500.0}
    twins = dataclasses.replace(PRIVATE, rank_policies=("full", "manual"), ratios=(1.0,) * 6, rounds=1, **calm)
    if not epsilon:
        twins = dataclasses.replace(twins, dp_delta=1e-5)
    losses = [run.rows[-1].loss for run in run_experiment(twins).runs]
    assert (losses[0] == losses[1]) == (epsilon == 0)


def test_only_private_runs_have_keys_of_their_own():
    federation = Federation(0, None, None, None, {"training": jax.random.key(3)})
    private = dataclasses.replace(PRIVATE, dp_noise=5.0, dp_ranks="public", dp_count_clip=500.0)
    runs = [("full", "rbla"), ("full", "zero_pad"), ("uniform", "rbla")]
    keys = {str(jax.random.key_data(training_key(private, federation, *run))) for run in runs}
    assert len(keys | {str(jax.random.key_data(jax.random.key(3)))}) == 4
    public = dataclasses.replace(private, dp_epsilon=0.0)
    assert all(training_key(public, federation, *run) is federation.keys["training"] for run in runs)


def test_denominators_are_the_owners_that_ranks_let_expect():
    task = ar.task_from_nnx(ar.models.MLP((4, 3, 2), rngs=nnx.Rngs(0)), max_rank=2)
    data = ar.from_parts(np.zeros((6, 4), np.float32), np.zeros(6, np.int32), np.arange(6)[:, None], classes=2)
    federation = Federation(0, data, task, None, {})
    public = dataclasses.replace(PRIVATE, dp_noise=5.0, dp_ranks="public", dp_count_clip=500.0)
    rule = make_aggregator("rbla", public)
    ranks = {path: jnp.array([1, 1, 1, 1, 2, 2]) for path in task.server.trainable.adapters}
    for given, want in ((None, [3.0, 3.0]), (ranks, [3.0, 1.0])):  # half of the clients come
        for owners in start_state(public, federation, rule, given).aggregator.owners.values():
            assert owners.tolist() == want


@pytest.mark.parametrize(("spent", "last"), [(1.0, False), (2.0, True)])
def test_the_round_after_which_nothing_is_left_is_the_last_and_tested(monkeypatch, spent, last):
    class Plan:
        epsilon = 1.5

        def spent(self, rounds):
            return spent if rounds == 2 else 0.0

    monkeypatch.setattr(Experiment, "privacy", Plan())
    rare = dataclasses.replace(PRIVATE, rounds=9, eval_every=5)
    assert is_last(rare, 1) is last
    assert is_evaluated(rare, "rbla", 1) is last
    assert is_last(rare, 9)


def test_what_is_spent_is_never_rounded_down():
    assert [rounded_up(x) for x in (1.00001, 0.12344, 0.123412, 1234.2, 0.0, 7.0)] == [
        1.001, 0.1235, 0.1235, 1235.0, 0.0, 7.0,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_whose_budget_is_used_up_stops_and_resumes_to_the_same_bits(tmp_path):
    tight = dataclasses.replace(
        PRIVATE, rank_policies=("full",), dp_ranks="public", dp_count_clip=500.0, dp_noise=1.0, dp_epsilon=4.0,
        eval_every=50,
    )  # fmt: skip
    affordable = next(n for n in itertools.count(1) if spent_epsilon(1.0, n + 1, 1e-3, rate=0.5) > 4.0)
    tight = dataclasses.replace(tight, rounds=affordable + 5)
    whole = run_experiment(tight)
    assert [row.accuracy is not None for row in whole.runs[0].rows] == [False] * (affordable - 1) + [True]

    class KilledError(Exception):
        pass

    def kill(end):
        if end.row.round == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run_experiment(tight, on_round=kill, checkpoints=Checkpoints(tmp_path))
    assert saved_steps(tmp_path)
    resumed = run_experiment(tight, checkpoints=Checkpoints(tmp_path))
    rows = [[row._replace(seconds=0.0) for row in results.runs[0].rows] for results in (whole, resumed)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aggregators": ("raflora",)}, "aggregators: expected one of zero_pad, .* beside --dp-epsilon, got raflora"),
        ({"clip_norm": 1.0}, "clip-norm: expected it without --dp-epsilon"),
        ({"sampling": "by_size"}, "sampling: expected uniform or independent with --dp-epsilon"),
        (
            {"criteria": ("size", "loss_entropy")},
            "criteria: expected them without loss_entropy where ranks are private",
        ),
        ({"dp_delta": 0.5}, "dp-delta: expected less than 1 / 6 clients"),
        ({"dp_delta": 0.0}, r"^dp-delta: expected a number above 0, got 0.0$"),
        ({"dp_noise": -1.0}, r"^dp-noise: expected a number of at least 0, got -1.0$"),
        ({"dp_epsilon": float("inf")}, r"^dp-epsilon: expected a finite number of at least 0, got inf$"),
        ({"rank_levels": 0}, r"^rank-levels: expected a whole number of at least 1, or auto, got 0$"),
        pytest.param(
            {"dp_epsilon": 0.5, "dp_noise": 0.3, "dp_ranks": "public", "dp_count_clip": 500.0},
            "dp-noise: expected noise with which one round",
            marks=pytest.mark.slow,
        ),
        (
            {"dp_adaptive": 0.5, "dp_ranks": "public", "dp_count_clip": 500.0, "dp_noise": 4.0},
            "dp-adaptive: expected more than",
        ),
        ({"dp_epsilon": 0.0}, "dp-ranks: expected only with --dp-epsilon, got it without"),
        ({"dp_ranks": "secret"}, r"dp-ranks: expected one of public, private, got 'secret'"),
    ],
)
def test_what_cannot_be_private_is_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        dataclasses.replace(PRIVATE, **changes).validate()
