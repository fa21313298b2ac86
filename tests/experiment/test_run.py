"""Experiments: wiring, budgets, probe, determinism, and mistakes named all at once."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autorank_jax import datasets, engine, evaluation
from autorank_jax.engine import local, simulation
from autorank_jax.experiment import compiling
from autorank_jax.experiment.config import ConfigurationError, Experiment, outside
from autorank_jax.experiment.run import Compiled, Finished, RoundDone, Scored, Stage, Started, run_experiment
from autorank_jax.experiment.setup import make_aggregator, make_federations
from autorank_jax.ranks.criteria import CRITERIA, NEEDS_LOSSES

TINY = Experiment(
    dataset="synthetic",
    split="dirichlet_lognormal",
    clients=6,
    hidden=(8,),
    rank_policies=(
        "autorank",
        "covered",
        "by_size",
        "uniform",
        "uniform_bytes",
        "by_size_bytes",
        "full",
        "shuffled",
        "reversed",
        "manual",
    ),
    ratios=(0.1, 0.2, 0.3, 0.4, 0.5, 1.0),
    rounds=2,
    local_epochs=1,
    probe_epochs=2,
    **{"probe_ratio": 1.0, "probe_share": 1.0},
    batch_size=16,
    learning_rate=0.1,
    seeds=2,
    rank_levels=1,
)


@pytest.fixture(scope="module")
def tiny():
    events = []
    return run_experiment(TINY, on_event=events.append), events


def rows(results):
    return [row._replace(seconds=0.0) for run in results.runs for row in run.rows]


def runs_of(results, policy):
    return [run for run in results.runs if run.policy == policy]


def test_events_tell_the_whole_story(tiny):
    results, events = tiny
    assert [(event.name, event.told) for event in events if isinstance(event, Stage)] == [
        ("reading synthetic", False), ("building clients and model", False), ("compiling", True), ("probing", False),
        ("ranking", False), ("compiling", True),
    ]  # fmt: skip
    kinds = [type(event) for event in events if not isinstance(event, Stage)]
    assert kinds[:3] == [Scored, Scored, Compiled]
    assert kinds[3:] == [Started, RoundDone, RoundDone, Finished] * 2 * len(TINY.rank_policies)
    assert [event.row for event in events if isinstance(event, RoundDone)] == [
        r for run in results.runs for r in run.rows
    ]
    sizes = [scores.size.sum() for scores in results.scores for _ in range(2)] * len(TINY.rank_policies)
    assert [event.examples for event in events if isinstance(event, RoundDone)] == sizes


def test_one_run_equals_the_pipeline_wired_by_hand(tiny):
    results, _ = tiny
    dataset = datasets.load_dataset("synthetic")
    federation = make_federations(TINY, dataset)[1]
    training = local.make_local_training(federation.task, optax.sgd(0.1, momentum=0.9), batch_size=16)
    rule = make_aggregator(*TINY.aggregators, TINY)
    ranks = {p: jnp.asarray(r) for p, r in results.scores[1].ranks["autorank"].items()}
    state = simulation.init_state(federation.task.server, rule, ranks)
    evaluate = evaluation.make_evaluate(federation.task, dataset.x_test, dataset.y_test)
    _, history = simulation.simulate(
        federation.keys["training"],
        engine.make_round(training, rule),
        state,
        federation.data,
        rounds=2,
        evaluate=evaluate,
    )
    run = runs_of(results, "autorank")[1]
    np.testing.assert_allclose([row.loss for row in run.rows], history.metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose([row.train_loss for row in run.rows], history.info.loss, rtol=1e-5)
    np.testing.assert_allclose([row.accuracy for row in run.rows], history.metrics["accuracy"], atol=1e-6)


def test_budgets_and_controls(tiny):
    results, _ = tiny
    for scores in results.scores:
        ratios = scores.ratios
        assert ratios["autorank"].min() == pytest.approx(0.1)
        assert ratios["autorank"].max() == pytest.approx(1.0)
        over_examples = np.sum(ratios["autorank"] * scores.size) / np.sum(scores.size)
        np.testing.assert_allclose(ratios["uniform"], over_examples, rtol=1e-6)
        np.testing.assert_allclose(ratios["uniform_bytes"], ratios["autorank"].mean(), rtol=1e-6)
        assert abs(over_examples - ratios["autorank"].mean()) > 0.02  # else this test could not tell them apart
        np.testing.assert_allclose(ratios["by_size_bytes"].mean(), ratios["autorank"].mean(), rtol=1e-5)
        np.testing.assert_array_equal(np.argsort(ratios["by_size_bytes"]), np.argsort(scores.size))
        assert abs(ratios["by_size"].mean() - ratios["autorank"].mean()) > 0.02
        np.testing.assert_array_equal(np.sort(ratios["shuffled"]), np.sort(ratios["autorank"]))
        order = np.argsort(ratios["autorank"])
        half = np.cumsum(scores.size[order][::-1])[::-1] >= scores.size.sum() / 2
        np.testing.assert_array_equal(
            ratios["covered"], np.minimum(ratios["autorank"], ratios["autorank"][order][half].max())
        )
        np.testing.assert_array_equal(ratios["reversed"][order], np.sort(ratios["autorank"])[::-1])
        np.testing.assert_array_equal(ratios["full"], np.ones(6))
        np.testing.assert_allclose(ratios["manual"], TINY.ratios, rtol=1e-6)


def test_equal_budgets_cost_the_same(tiny):
    results, _ = tiny
    by_policy = {policy: runs_of(results, policy)[0] for policy in TINY.rank_policies}
    auto, uniform, equal_bytes = (by_policy[p].costs for p in ("autorank", "uniform", "uniform_bytes"))
    assert uniform.flops == pytest.approx(auto.flops, rel=0.1)  # ranks are whole numbers of at most 6 here
    assert equal_bytes.bytes_up == pytest.approx(auto.bytes_up, rel=0.15)
    assert by_policy["full"].costs.flops > auto.flops
    server = make_federations(TINY, datasets.load_dataset("synthetic"))[0].task.server
    ranks = results.scores[0].ranks["autorank"]
    dense = 8 + 10
    shapes = {path: a.lora_a.shape[0] + a.lora_b.shape[1] for path, a in server.trainable.adapters.items()}
    counted = sum(int(ranks[path].sum()) * width for path, width in shapes.items()) + 6 * dense
    assert auto.trained_parameters == counted
    assert auto.bytes_up == auto.bytes_down == 4 * counted


def test_the_probe_is_charged_to_those_whose_ranks_come_from_it(tiny):
    results, _ = tiny
    for run in results.runs:
        probe = results.scores[run.seed].probe_flops
        charged = probe if run.policy in ("autorank", "covered", "shuffled", "reversed") else 0.0
        assert run.probe_flops == charged
        assert run.rows[-1].train_flops == pytest.approx(charged + 2 * run.costs.flops)
    full = runs_of(results, "full")[0]
    assert results.scores[0].probe_flops == pytest.approx(2 * full.costs.flops)  # two epochs at full rank


def test_scores_are_autoranks(tiny):
    results, _ = tiny
    scores = results.scores[0]
    assert scores.criteria == tuple(CRITERIA)
    assert scores.weights.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_array_equal(scores.matrix[:, 0], scores.size)
    np.testing.assert_array_equal(scores.label_counts.sum(axis=1), scores.size)
    curve = scores.matrix[:, scores.criteria.index("loss_entropy")]
    assert len(set(curve.tolist())) > 1
    assert ((curve > 0) & (curve <= 1)).all()


@pytest.mark.slow
def test_equal_experiments_have_equal_histories(tiny):
    results, _ = tiny
    again = run_experiment(TINY)
    assert rows(again) == rows(results)


@pytest.mark.slow
def test_a_seed_a_probe_and_other_policies_change_no_run(tiny):
    results, _ = tiny
    alone = run_experiment(dataclasses.replace(TINY, rank_policies=("full",), ratios=(), seeds=1, first_seed=1))
    assert alone.scores[0].closeness is None
    assert alone.scores[0].criteria == tuple(name for name in CRITERIA if name not in NEEDS_LOSSES)
    assert [row._replace(seconds=0.0) for row in alone.runs[0].rows] == [
        row._replace(seconds=0.0) for row in runs_of(results, "full")[1].rows
    ]
    first, second = runs_of(results, "full")
    assert [row.loss for row in first.rows] != [row.loss for row in second.rows]


@pytest.mark.slow
def test_the_probe_trains_everything_whichever_rule_comes_first(tiny):
    one = dataclasses.replace(
        TINY, rank_policies=("autorank",), ratios=(), rounds=1, seeds=1, aggregators=("ffa_lora",)
    )
    found = run_experiment(one).scores[0]
    np.testing.assert_array_equal(found.matrix, tiny[0].scores[0].matrix)


@pytest.mark.slow
def test_one_program_per_aggregator_serves_everything(monkeypatch):
    traced = []

    def counting(*arguments, **options):
        round_fn = engine.make_round(*arguments, **options)

        def counted(*values):
            traced.append(1)
            return round_fn(*values)

        return counted

    monkeypatch.setattr(compiling, "make_round", counting)
    short = dataclasses.replace(TINY, aggregators=("rbla", "zero_pad"), rank_policies=("autorank", "full"), ratios=())
    results = run_experiment(short)
    assert len(traced) == 2
    assert len(results.runs) == 8
    assert set(results.compile_seconds) == {"rbla", "zero_pad"}


@pytest.mark.slow
def test_sampling_reranking_and_rare_evaluation():
    options = dataclasses.replace(
        TINY, rank_policies=("autorank",), ratios=(), participation=0.5, rerank_every=1, eval_every=2, rounds=3, seeds=1
    )
    ranks = []
    results = run_experiment(options, on_round=lambda end: ranks.append(end.state.ranks))
    run = results.runs[0]
    assert [row.participants for row in run.rows] == [3, 3, 3]
    assert [row.accuracy is None for row in run.rows] == [True, False, False]
    first = np.concatenate([results.scores[0].ranks["autorank"][path] for path in sorted(ranks[0])])
    later = np.concatenate([ranks[0][path] for path in sorted(ranks[0])])
    assert not np.array_equal(first, later)  # the ranks of later rounds come from later loss curves
    curve = results.scores[0].matrix[:, -1]
    assert len(set(curve.tolist())) == 6  # the probe saw everyone


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_adamw():
    options = dataclasses.replace(
        TINY, rank_policies=("full",), ratios=(), optimizer="adamw", learning_rate=0.01, seeds=1, rounds=3
    )
    losses = [row.train_loss for row in run_experiment(options).runs[0].rows]
    assert losses[2] < losses[0]


@pytest.mark.slow
def test_cnn():
    options = dataclasses.replace(
        TINY, model="cnn", hidden=(4,), max_ranks=(3,), rank_policies=("full",), ratios=(), rounds=1, seeds=1
    )
    results = run_experiment(options)
    assert set(results.scores[0].ranks["full"]) == {"convs/0", "head"}
    assert {rank.max() for rank in results.scores[0].ranks["full"].values()} == {3}
    assert results.runs[0].rows[0].excluded == 0


def test_cohort_rounds_half_up_and_is_never_empty():
    assert dataclasses.replace(TINY, clients=10, participation=0.25).cohort == 3
    assert dataclasses.replace(TINY, clients=10, participation=0.01).cohort == 1
    assert dataclasses.replace(TINY, clients=10).cohort == 10


BAD = {
    "dataset": ("fashion_mnst", "probably 'fashion_mnist'"),
    "split": ("stairs", "probably 'staircase'"),
    "model": ("mpl", "probably 'mlp'"),
    "optimizer": ("sdg", "probably 'sgd'"),
    "rank_policies": (("manual", "biggest"), "got 'biggest'"),
    "aggregators": (("rlba",), "probably 'rbla'"),
    "criteria": (("entropy",), "label_entropy"),
    "clients": (0, "clients: expected a whole number of at least 1, got 0"),
    "rounds": (0, "rounds: expected a whole number of at least 1, got 0"),
    "local_epochs": (-1, "local-epochs: expected a whole number"),
    "batch_size": (2.5, "batch-size: expected a whole number of at least 1, got 2.5"),
    "learning_rate": (float("nan"), "learning-rate: expected a finite number above 0, got nan"),
    "alpha": (0.0, "alpha: expected a number above 0"),
    "sigma": (-1.0, "sigma: expected a number of at least 0"),
    "momentum": (90.0, "probably a percentage"),
    "participation": (0.0, "participation: expected a number above 0 and at most 1"),
    "min_ratio": (10.0, "min-ratio: expected a number above 0 and at most 1, got 10.0, probably a percentage"),
    "ratios": ((0.1, 64.0, 1, 1, 1, 1), "probably a rank or a percentage"),
    "targets": ((80.0,), "targets: expected a number above 0 and at most 1, got 80.0, probably a percentage: 0.8"),
    "validation": (
        12.5,
        "validation: expected a number of at least 0 and at most 0.5, got 12.5, probably a percentage: 0.125",
    ),
    "drop_out": (300.0, "drop-out: expected a number of at least 0 and below 1, got 300.0, probably a percentage"),
    "stragglers": (
        2.0,
        "stragglers: expected a number of at least 0 and at most 1, got 2.0, probably a percentage: 0.02",
    ),
    "clip_norm": (1e-300, "clip-norm: expected a number that float32 holds, 1.2e-38 to 3.4e+38, got 1e-300"),
    "server_learning_rate": (1e300, "server-learning-rate: expected a number that float32 holds"),
    "max_ranks": ((1, 2, 3), "max-ranks: expected one number or one for each of 2 layers, got 3"),
    "hidden": ((0,), "hidden: expected a whole number of at least 1"),
    "seeds": (True, "seeds: expected a whole number"),
    "eval_every": (0, "eval-every"),
    "lanes": (0, "lanes: expected"),
    "rank_levels": (0, "rank-levels: expected"),
    "first_seed": (
        2**40,
        "first-seed: expected a whole number of at least 0 and at most 2147483647, got 10",
    ),
    "probe_share": (10.0, "probe-share: expected a number above 0 and at most 1, got 10.0, probably a percentage"),
    "probe_epochs": (1, "at least 2 and at most 10000, got 1; to rank without a probe: --criteria size,classes,label_"),
    "rerank_every": (-1, "rerank-every: expected"),
}


@pytest.mark.parametrize("option", BAD)
def test_bad_options(option):
    value, message = BAD[option]
    start = (
        TINY if option in ("ratios", "rank_policies") else dataclasses.replace(TINY, rank_policies=("full",), ratios=())
    )
    with pytest.raises(ConfigurationError) as caught:
        dataclasses.replace(start, **{option: value}).validate()
    assert len(caught.value.problems) == 1
    assert message in str(caught.value)
    assert "\n" not in caught.value.problems[0]


def test_shares_and_rates_that_leave_nothing_to_train():
    for option, value in (("drop_out", 1.0), ("learning_rate", 1e-300)):
        with pytest.raises(ConfigurationError, match=f"^{option.replace('_', '-')}: "):
            dataclasses.replace(TINY, **{option: value}).validate()


@pytest.mark.parametrize(("value", "hint"), [(2, ": 0.02"), (100, ": 1"), (101, ""), (float("inf"), "")])
def test_a_percentage_is_rewritten_where_it_is_one(value, hint):
    (line,) = outside("share", value, 0, 1, cause="a percentage")
    assert line.endswith(f", probably a percentage{hint}")


def test_all_mistakes_are_named_at_once():
    names = [name for name in BAD if name not in ("ratios", "max_ranks", "rank_policies")]
    with pytest.raises(ConfigurationError) as caught:
        run_experiment(dataclasses.replace(TINY, **{name: BAD[name][0] for name in names}))
    for name in names:
        assert sum(problem.startswith(f"{name.replace('_', '-')}:") for problem in caught.value.problems) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_policies": ()}, "expected at least one out of autorank"),
        ({"rank_policies": ("full", "full")}, "expected every name once"),
        ({"rank_policies": ("full",)}, "expected only with the policy manual"),
        ({"ratios": (0.5,)}, "expected one for each of 6 clients"),
        ({"split": "staircase"}, "clients: expected 10 on the staircase split, one for each class, got 6; --split"),
        ({"clients": 2000, "rank_policies": ("full",), "ratios": ()}, "at least one example for each of 2000 clients"),
        ({"model": "cnn", "hidden": (1, 1, 1, 1)}, "expected images of at least 16 pixels"),
        (
            {"max_ranks": (99999,)},
            "max-ranks: expected at most 64 for layer layers/0, the longer side of its weight, got",
        ),
        ({"rank_levels": 7}, "^rank-levels: expected at most 6, the largest maximum rank, got 7"),
        ({"hidden": (10**6,)}, "hidden: expected a model that fits"),
        ({"seeds": 10**6}, "seeds: expected a whole number of at least 1 and at most 1000"),
        ({"model": "cnn", "hidden": (2,), "max_ranks": (10, 1)}, "at most 9 for layer convs/0, the longer side of its"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ConfigurationError, match=message):
        run_experiment(dataclasses.replace(TINY, **options))


IDLE = {
    "momentum": ({"momentum": 0.5, "optimizer": "adam"}, "expected only with the optimizer sgd, got 0.5 with adam"),
    "alpha": (
        {"alpha": 0.1, "split": "quantity"},
        "only with the split dirichlet or dirichlet_lognormal, got 0.1 with",
    ),
    "sigma": ({"sigma": 2.0, "split": "dirichlet"}, "with the split quantity or dirichlet_lognormal, got 2.0 with"),
    "classes_per_client": ({"classes_per_client": 3}, "with the split shards, got 3 with dirichlet_lognormal"),
    "straggler_steps": ({"straggler_steps": 3}, "expected only with --stragglers, got 3 without"),
    "sampling": ({"sampling": "by_size"}, "expected only with --participation below 1, got by_size"),
    "sampling, independent": ({"sampling": "independent"}, "below 1, got independent where all clients take part"),
}
BUSY = [
    {"momentum": 0.5, "optimizer": "sgd"}, {"momentum": 0.9, "optimizer": "adamw"},
    {"alpha": 0.1, "split": "dirichlet"}, {"alpha": 0.1, "sigma": 0.0, "split": "dirichlet_lognormal"},
    {"sigma": 2.0, "split": "quantity"}, {"classes_per_client": 3, "split": "shards"},
    {"straggler_steps": 3, "stragglers": 0.1}, {"sampling": "by_size", "participation": 0.5},
    {"sampling": "independent", "participation": 0.99},
]  # fmt: skip


@pytest.mark.parametrize("name", IDLE)
def test_options_without_effect_are_refused(name):
    options, message = IDLE[name]
    with pytest.raises(ConfigurationError, match=f"^{name.split(',')[0].replace('_', '-')}: ") as caught:
        dataclasses.replace(TINY, **options).validate()
    assert len(caught.value.problems) == 1
    assert message in caught.value.problems[0]


@pytest.mark.parametrize("options", BUSY, ids=str)
def test_options_with_an_effect_are_taken(options):
    dataclasses.replace(TINY, **options).validate()


def test_a_dataset_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv(datasets.ENVIRONMENT_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"expected a file at .*mnist\.npz"):
        dataclasses.replace(TINY, dataset="mnist").validate()
