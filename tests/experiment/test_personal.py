"""Clients' own accuracy, validation without the test set, whole weights, rules that leave adapters with the clients."""

import dataclasses

import jax
import numpy as np
import pytest
from rich.console import Console

from autorank_jax import datasets, federated
from autorank_jax.cli.figures import accuracy_figure, ranks_figure
from autorank_jax.cli.tables import comparison_tables, scores_table
from autorank_jax.experiment.checkpoints import Checkpoints
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.ranking import by_size_at_mean
from autorank_jax.experiment.results import summarize
from autorank_jax.experiment.run import run_experiment
from autorank_jax.experiment.setup import with_validation
from autorank_jax.federated import partition, split_test_set
from autorank_jax.ranks import policies
from benchmarks import harness

ALONE = Experiment(
    dataset="synthetic",
    split="iid",
    clients=1,
    hidden=(8,),
    rank_policies=("full",),
    rounds=2,
    local_epochs=1,
    batch_size=16,
    learning_rate=0.02,
    rank_levels=1,
    personal=True,
)
MANY = dataclasses.replace(ALONE, split="dirichlet_lognormal", clients=5)


@pytest.fixture(autouse=True, scope="module")
def programs():
    """Compile the same program once, however many experiments need it."""
    with harness.shared_programs():
        yield


def final(results):
    return results.runs[0].rows[-1].accuracy


def test_the_test_set_is_split_in_proportion():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), 50))
    counts = np.array([[30, 0, 10, 0], [10, 20, 10, 0], [0, 20, 20, 0]])
    parts = split_test_set(counts, labels)
    found = np.array([np.bincount(labels[part], minlength=4) for part in parts])
    given = np.concatenate(parts)
    assert len(set(given.tolist())) == len(given)  # nobody shares an example
    np.testing.assert_array_equal(found.sum(axis=0), [50, 50, 50, 0])  # everything but what nobody trains on
    expected = 50 * counts[:, :3] / counts[:, :3].sum(axis=0)
    assert np.abs(found[:, :3] - expected).max() <= 1
    assert [len(part) for part in split_test_set([[0, 0], [1, 0]], [0, 0, 1])] == [0, 2]


@pytest.mark.slow
def test_a_client_that_has_all_is_as_good_as_the_server():
    results = run_experiment(ALONE)
    clients = results.runs[0].clients
    assert results.runs[0].rows[-1].train_loss is not None
    for what in ("label_weighted", "before"):
        found = [clients[what][kind] for kind in ("mean", "weighted_mean", "worst")]
        assert found == [pytest.approx(final(results), abs=1e-6)] * 3
    longer = run_experiment(dataclasses.replace(ALONE, rounds=3, personal=False))
    assert clients["after"]["mean"] == pytest.approx(final(longer), abs=1e-6)  # one round more of the same training
    assert longer.runs[0].clients == {}
    assert "clients" not in summarize(longer)["policies"]["full"]


@pytest.mark.slow
def test_alone_nothing_shared_is_the_same_as_shared():
    shared, kept = (run_experiment(dataclasses.replace(ALONE, aggregators=(a,))) for a in ("rbla", "local_only"))
    for what in ("before", "after"):
        assert kept.runs[0].clients[what] == pytest.approx(
            shared.runs[0].clients[what], abs=0.006
        )  # one example of 200
    assert "label_weighted" not in kept.runs[0].clients
    assert [row.accuracy for row in kept.runs[0].rows] == [None, None]


@pytest.mark.slow
def test_measuring_changes_no_run_and_survives_an_interruption(tmp_path):
    plain = run_experiment(dataclasses.replace(MANY, personal=False))
    whole = run_experiment(MANY)
    assert [r._replace(seconds=0) for r in whole.runs[0].rows] == [r._replace(seconds=0) for r in plain.runs[0].rows]

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(MANY, on_round=interrupt, checkpoints=Checkpoints(tmp_path))
    resumed = run_experiment(MANY, checkpoints=Checkpoints(tmp_path, every=1))
    over = run_experiment(MANY, checkpoints=Checkpoints(tmp_path))  # nothing is left to train
    assert resumed.runs[0].clients == over.runs[0].clients == whole.runs[0].clients


@pytest.mark.slow
def test_whole_weights_and_personal_rules_are_shown():
    whole = run_experiment(dataclasses.replace(MANY, aggregators=("fedavg",)))
    size = sum(np.prod(shape) for shape in ((64, 8), (8,), (8, 10), (10,)))
    assert whole.runs[0].costs.trained_parameters == 5 * size
    assert final(whole) > whole.runs[0].rows[0].accuracy
    kept = run_experiment(dataclasses.replace(MANY, aggregators=("fedsa_lora",), rank_policies=("autorank", "full")))
    summary = summarize(kept)["policies"]["full"]
    assert summary["final_accuracy"]["mean"] is None
    assert 0 <= summary["clients"]["before"]["worst"]["mean"] < summary["clients"]["before"]["mean"]["mean"] <= 1
    console = Console(width=100, record=True)
    for results in (whole, kept):
        console.print(scores_table(results.scores[0]), *comparison_tables(results))
        assert ranks_figure(results.scores[0])
        assert accuracy_figure(results)
    assert "Whole weights, no ranks." in console.export_text(clear=False)
    assert "of the worst client" in console.export_text()


@pytest.mark.slow
def test_clients_that_diverge_are_counted(monkeypatch):
    """Whose training gives nothing finite is in no accuracy, so that it must be said that it is missing."""
    whole = dataclasses.replace(MANY, aggregators=("local_only",), rank_policies=("full",), rounds=1)
    lost = dataclasses.replace(whole, learning_rate=1e30)
    monkeypatch.setattr("autorank_jax.experiment.run.check_progress", lambda *_: None)  # which would end the run
    for experiment, expected in ((whole, 0), (lost, MANY.clients)):
        results = run_experiment(experiment)
        assert [results.runs[0].clients[what]["diverged"] for what in ("before", "after")] == [expected] * 2
        console = Console(width=100, record=True)
        console.print(*comparison_tables(results))
        assert ("without diverged clients" in console.export_text()) == (expected > 0)


def test_validation_takes_examples_from_training():
    dataset = datasets.load_dataset("synthetic")
    part = with_validation(dataset, 0.1)
    n = len(dataset.y_train)
    assert (len(part.y_train), len(part.y_test)) == (n - n // 10, n // 10)
    rows = [tuple(x.ravel()) for x in np.concatenate([part.x_train, part.x_test])]
    assert sorted(rows) == sorted(tuple(x.ravel()) for x in dataset.x_train)
    ordered = dataset._replace(y_train=np.sort(dataset.y_train))  # files may be sorted by class
    assert len(set(with_validation(ordered, 0.1).y_test.tolist())) == dataset.classes
    assert with_validation(dataset, 0.0) is dataset


@pytest.mark.slow
def test_the_server_goes_part_of_the_way():
    moved = {}
    for rate in (1.0, 0.5):
        options = dataclasses.replace(MANY, personal=False, rounds=1, server_learning_rate=rate)
        run_experiment(options, on_round=lambda end, rate=rate: moved.update({rate: end.state.server.trainable.dense}))
    for whole, half in zip(*(jax.tree.leaves(moved[rate]) for rate in (1.0, 0.5)), strict=True):
        assert np.abs(whole).max() > 1e-3
        np.testing.assert_allclose(half, whole / 2, rtol=1e-5, atol=1e-7)  # biases start at 0


def test_sizes_at_another_policys_mean():
    labels = np.random.default_rng(0).integers(0, 4, 400)
    data = federated.from_parts(np.zeros((400, 1), np.float32), labels, partition.quantity(labels, 8, seed=0))
    stats = federated.client_stats(data, classes=4)
    given = policies.manual(np.linspace(0.2, 0.9, 8).tolist())
    ratios, _ = by_size_at_mean(given, 0.1)(jax.random.key(0), stats)
    assert float(ratios.mean()) == pytest.approx(0.55, abs=1e-5)
    np.testing.assert_array_equal(np.argsort(ratios), np.argsort(stats.size))
