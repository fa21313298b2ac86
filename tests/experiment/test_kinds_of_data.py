"""Experiments on tables: float features, classes by name or numbers to predict; and learning rates by round."""

import dataclasses
import os

import numpy as np
import pytest

from autorank_jax.cli import main as cli
from autorank_jax.experiment.config import ConfigurationError, Experiment
from autorank_jax.experiment.results import summarize
from autorank_jax.experiment.run import run_experiment
from autorank_jax.experiment.setup import learning_rates

TINY = Experiment(
    dataset="wine",
    split="dirichlet_lognormal",
    clients=5,
    hidden=(8,),
    rank_policies=("autorank",),
    rounds=4,
    local_epochs=3,
    probe_epochs=2,
    batch_size=16,
    learning_rate=0.1,
    rank_levels=1,
)


@pytest.fixture
def wine(tmp_path, monkeypatch):
    """Make a data set of a table whose last column is given."""
    monkeypatch.setenv("AUTORANK_JAX_DATA", str(tmp_path / "data"))
    x = np.random.default_rng(0).normal(size=(400, 4))

    def make(target):
        path = tmp_path / "wine.csv"
        rows = [",".join(map(repr, map(float, row))) + f",{y}" for row, y in zip(x, target(x), strict=True)]
        path.write_text("\n".join(["a,b,c,d,quality", *rows, ""]))
        assert cli.main(["data", "fetch", "wine", "--source", str(path)]) == 0

    return make


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")  # which schedules of optax need
def test_numbers_are_predicted(wine, tmp_path, capsys):
    wine(lambda x: x @ [1.0, 2.0, 0.0, -1.0])
    out = tmp_path / "run"
    arguments = [
        "run", "--dataset", "wine", "--split", "dirichlet_lognormal", "--clients", "5", "--hidden", "8",
        "--rounds", "4", "--rank-policies", "autorank", "--local-epochs", "3", "--probe-epochs", "2",
        "--batch-size", "16", "--learning-rate", "0.1", "--rank-levels", "1",
        "--rate-schedule", "cosine", "--out", str(out),
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "final R²" in said
    assert "final accuracy" not in said
    assert (out / "accuracy.png").stat().st_size > 10_000
    with pytest.raises(ConfigurationError, match="personal: expected a dataset with classes, got wine, a regression"):
        run_experiment(dataclasses.replace(TINY, personal=True))


@pytest.mark.slow
def test_what_is_explained_is_what_numpy_finds(wine):
    wine(lambda x: x @ [1.0, 2.0, 0.0, -1.0])
    results = run_experiment(TINY)
    assert results.score == summarize(results)["score"] == "r2"
    last = results.runs[0].rows[-1]
    assert last.accuracy > 0.7  # a linear target, by a small network
    with np.load(os.environ["AUTORANK_JAX_DATA"] + "/wine.npz") as stored:
        variance = stored["y_test"].var()
    assert last.accuracy == pytest.approx(1 - last.loss / variance, abs=1e-4)


@pytest.mark.slow
def test_names_are_classes(wine):
    wine(lambda x: np.where(x[:, 0] + x[:, 1] > 0, "good", "bad"))
    results = run_experiment(TINY)
    assert results.score == "accuracy"
    assert results.runs[0].rows[-1].accuracy > 0.8


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("constant", [0.1] * 8),
        ("step", [0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]),
        ("step", [0.1]),
        ("step", [0.1, 0.01]),
        ("cosine", 0.05 * (1 + np.cos(np.pi * np.arange(8) / 8))),
        ("warm_up", [0.01, *[0.1] * 7]),
    ],
)
def test_rates_go_by_the_round(name, rates):
    made = learning_rates(dataclasses.replace(TINY, rounds=len(rates), rate_schedule=name))
    found = [float(made(number)) if callable(made) else made for number in range(len(rates))]
    np.testing.assert_allclose(found, rates, rtol=1e-5)
