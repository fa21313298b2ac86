"""The probe of an experiment: what it sees and costs at a low rank, and clients that it cannot train."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax import datasets, engine
from autorank_jax.adapters import max_ranks
from autorank_jax.cli import main as cli
from autorank_jax.cli import running
from autorank_jax.experiment import probing
from autorank_jax.experiment.compiling import CompiledRound
from autorank_jax.experiment.config import ConfigurationError, Experiment, experiment_from
from autorank_jax.experiment.doubts import without_curves
from autorank_jax.experiment.events import Scored
from autorank_jax.experiment.language_options import LanguageOptions, language_options_from
from autorank_jax.experiment.ranking import make_ranking, score_clients
from autorank_jax.experiment.run import run_experiment
from autorank_jax.experiment.setup import make_aggregator, make_federations

TINY = Experiment(
    dataset="synthetic", split="dirichlet_lognormal", clients=6, hidden=(8,), rank_policies=("autorank",),
    criteria=("size", "loss_entropy"), rounds=1, local_epochs=1, probe_epochs=2, probe_ratio=1.0, probe_share=1.0,
    batch_size=16, learning_rate=0.1, rank_levels=1,
)  # fmt: skip
CASES = ((0.25, 1.0, 1.0), (0.25, 0.5, 1.0), (1.0, 1.0, 1.0), (0.25, 1.0, 0.5), (0.25, 0.5, 0.5))
"""Of the rank, of the clients that take part in a round, of the examples."""


@pytest.mark.slow
def test_a_probe_at_a_low_rank_costs_and_sees_what_that_rank_does():
    """Inside the round of the first rule, and in a program of its own, as wide as its rank; of a share likewise."""
    ran = [
        run_experiment(dataclasses.replace(TINY, probe_ratio=ratio, participation=present, probe_share=share)).scores[0]
        for ratio, present, share in CASES
    ]
    entropy = [scores.matrix[:, 1] for scores in ran]
    np.testing.assert_allclose(entropy[0], entropy[1], rtol=1e-5)
    np.testing.assert_allclose(entropy[3], entropy[4], rtol=1e-5)
    assert np.abs(entropy[0] - entropy[2]).max() > 1e-4
    assert np.abs(entropy[0] - entropy[3]).max() > 1e-4
    federation = make_federations(TINY, datasets.load_dataset("synthetic"))[0]
    flops = engine.training_flops(federation.task, federation.data)
    for scores, (ratio, _, share) in zip(ran, CASES, strict=True):
        examples = sum(max(min(32, size), round(share * size)) for size in federation.data.size.tolist())
        ranks = {path: max(1, int(ratio * width)) for path, width in max_ranks(federation.task).items()}
        each = flops.base + sum(flops.per_rank[path] * rank for path, rank in ranks.items())
        assert scores.probe_flops == pytest.approx(2 * examples * each)


def test_clients_that_the_probe_cannot_train_are_told(monkeypatch, capsys, tmp_path):
    """Of three clients one has no finite losses, and one was never trained."""
    experiment = Experiment(dataset="synthetic", split="iid", clients=3, hidden=(4,), probe_ratio=0.5, probe_epochs=2)
    federation = make_federations(experiment, datasets.load_dataset("synthetic"))[0]
    seen, told = [], []

    def run(_key, state, _data):
        seen.append({path: rank.tolist() for path, rank in state.ranks.items()})
        losses = jnp.array([[2.0, 1.0], [2.0, jnp.nan], [0.0, 0.0]])
        return state._replace(epoch_losses=losses, epochs=jnp.array([2, 2, 0])), None

    compiled = CompiledRound(run, experiment, "rbla", make_aggregator("rbla", experiment), (), 1, 0.0)
    (curves,) = probing.probe(experiment, compiled, [federation])
    assert seen == [{"layers/0": [1] * 3, "layers/1": [1] * 3}]  # half of 3 and of 2
    flops = engine.training_flops(federation.task, federation.data)
    scores = score_clients(experiment, federation, curves, make_ranking(experiment, federation.task), flops)
    assert scores.unprobed == 2
    assert without_curves(0, 3) == ""
    assert "so that loss entropy tells nothing" in without_curves(3, 3)

    def telling(*_, on_event, **__):
        told.append([on_event(Scored(scores._replace(seed=seed))) for seed in (0, 1)])
        raise ConfigurationError(["that is all"])

    monkeypatch.setattr(running, "run_experiment", telling)
    assert cli.main(["run", "--dataset", "synthetic", "--split", "iid", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()
    line = "the training of 2 of 3 clients was not finite in the probe, so that they take the mean of the others' loss"
    assert sum(one.startswith(f"autorank-jax: warning: {line}") for one in said) == 1
    assert sum(one.startswith(f"autorank-jax: warning: seed 1: {line}") for one in said) == 1


def test_a_program_of_the_probes_own_is_as_wide_as_its_rank():
    levels = []
    one = dataclasses.replace(TINY, participation=0.5, probe_ratio=0.5)
    federation = make_federations(one, datasets.load_dataset("synthetic"))[0]
    compiled = probing.compile_probe(one, federation, None, [max_ranks(federation.task)], levels.append, total=1)
    assert compiled.levels == ({"layers/0": 3, "layers/1": 2},)


def test_files_of_before_keep_the_probe_of_then():
    def probe(one):
        return one.probe_epochs, one.probe_ratio, one.probe_share

    every = {**json.loads(json.dumps(dataclasses.asdict(Experiment()))), "probe_epochs": 5}
    before = {name: value for name, value in every.items() if name not in ("probe_ratio", "probe_share")}
    assert probe(experiment_from(before)) == (5, 1.0, 1.0)
    assert probe(experiment_from(every)) == (5, 0.1, 0.25)
    assert probe(experiment_from({"probe_epochs": 5, "rounds": 3})) == (5, 0.1, 0.25)  # a few of one's own
    assert probe(experiment_from({"rounds": 3})) == probe(Experiment())
    assert probe(experiment_from({"probe_epochs": 5, "probe_share": 0.5})) == (5, Experiment().probe_ratio, 0.5)
    assert language_options_from({"probe_epochs": 2}).probe_share == 1.0
    assert language_options_from({"rounds": 2}).probe_share == LanguageOptions().probe_share == 0.25
