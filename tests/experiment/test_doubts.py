"""Clients that hardly differ are told, and how much of their ranks is chance."""

import importlib

import numpy as np
import pytest

from autorank_jax.cli import main as cli
from autorank_jax.experiment.doubts import doubts, little_variation, rounded_losses, swapped_pairs, variation
from autorank_jax.experiment.events import Scored
from autorank_jax.ranks import policies
from autorank_jax.ranks.criteria import CRITERIA
from tests.cli.cases import make_results, make_scores

NAMES = ("size", "classes", "label_entropy", "gini_simpson")


def scores_of(counts):
    """What AutoRank makes of label counts."""
    counts = np.asarray(counts)
    ratios = policies.autorank_ranks(counts, max_rank=64)[1]
    return make_scores(0, ("autorank",))._replace(
        criteria=NAMES,
        size=counts.sum(axis=1),
        label_counts=counts,
        matrix=np.asarray(ratios.matrix),
        weights=np.asarray(ratios.weights),
        closeness=np.asarray(ratios.closeness),
        ratios={"autorank": np.linspace(0.1, 0.9, len(counts))},
        ranks={"autorank": {"layers/0": np.arange(1, 1 + len(counts))}},
    )


@pytest.fixture(scope="module")
def alike():
    """Ten clients whose examples come from one pool."""
    return scores_of(np.random.default_rng(1).multinomial(600, [0.1] * 10, 10))


def test_variation_by_hand():
    np.testing.assert_allclose(variation(np.array([[1.0, 5, 0], [3.0, 5, 0]])), [0.5, 0, 0])
    assert little_variation(("a",), np.array([[100.0], [101.0]])).startswith(
        "the criteria hardly vary between clients, at most by 0.5 % (standard deviation over mean of a)"
    )
    for matrix in ([[1.0], [2.0]], [[5.0]]):  # different, alone
        assert little_variation(("a",), np.array(matrix)) == ""
    assert little_variation((), np.zeros((2, 0))) == ""
    assert little_variation(("a",), np.full((2, 1), 5.0)).startswith("no criterion differs between clients: all get")
    least = np.array([[1.0], [1.0 + 1e-7]])
    assert "hardly vary" in little_variation(("a",), least), "in 64 bits this is a difference"
    assert "no criterion" in little_variation(("a",), least.astype(np.float32))


def test_clients_that_are_equal_are_told_in_one_line():
    with pytest.warns(UserWarning, match=r"no criterion differs between the clients \(3\): all get the full rank"):
        equal = scores_of([[5, 5]] * 3)
    assert list(doubts(equal)) == ["no criterion differs between clients: all get the full rank"]


def test_clients_from_one_pool_are_told(alike):
    first, second = doubts(alike)
    share = swapped_pairs(alike)
    assert 0.3 < share < 0.6  # chance
    assert f"{100 * share:.0f} % of all pairs of clients would change places" in first
    assert "one rank for all, at ratio 0.50, sends about the same bytes" in second
    assert list(doubts(alike._replace(closeness=None))) == []


def test_clients_that_differ_are_not():
    counts = np.zeros((10, 10), int)
    for client in range(10):
        counts[client, : client + 1] = 100  # one class and a hundred examples more each
    scores = scores_of(counts)
    assert list(doubts(scores)) == []
    assert swapped_pairs(scores) == 0
    assert set(NAMES) < set(CRITERIA)


def test_entropies_that_rounding_decides_are_told():
    names, sizes = ("size", "loss_entropy"), np.array([1.0, 2.0, 3.0], np.float32)

    def told(entropies):
        return rounded_losses(names, np.stack([sizes, np.array(entropies, np.float32)], axis=1))

    assert told([1.0, 0.999999, 0.9999995]).startswith("loss entropy differs by 1e-06 between clients, hardly more")
    assert told([1.0, 0.9999, 0.99999]) == told([1.0, 1.0, 1.0]) == ""  # enough; equal ones weigh nothing
    assert rounded_losses(("size",), sizes[:, None]) == ""


def test_a_run_tells_its_doubts(alike, tmp_path, monkeypatch, capsys):
    running = importlib.import_module("autorank_jax.cli.running")

    def scored(experiment, *, on_event, **options):  # noqa: ARG001
        on_event(Scored(alike))
        return make_results()

    monkeypatch.setattr(running, "run_experiment", scored)
    run = ["run", "--dataset", "synthetic", "--split", "iid", "--devices", "1", "--out"]
    assert cli.main([*run, str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.startswith("autorank-jax: warning: the criteria hardly vary between clients")
    assert cli.main([*run, str(tmp_path / "quiet"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_a_table_of_clients_that_hardly_differ(tmp_path, capsys):
    path = tmp_path / "criteria.csv"
    path.write_text("client,size\na,1000\nb,1001\n")
    assert cli.main(["ranks", "--criteria", str(path)]) == 0
    assert capsys.readouterr().err.endswith("; consider one rank for all clients\n")
