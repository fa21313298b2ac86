"""Ranks that are set anew between rounds of an experiment: from which curves, by which key."""

import numpy as np
import pytest

from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.run import run_experiment
from autorank_jax.ranks.criteria import loss_entropy

OPTIONS = {
    "dataset": "synthetic", "split": "dirichlet_lognormal", "clients": 6, "hidden": (8,), "max_ranks": (10,),
    "local_epochs": 2, "probe_epochs": 2, "probe_ratio": 1.0, "probe_share": 1.0, "batch_size": 16,
    "learning_rate": 0.1, "lanes": 1, "rank_levels": 1, "rerank_every": 1,
}  # fmt: skip


def follow(**options):
    """Run one policy: the results, and the state after every round."""
    states = []
    results = run_experiment(Experiment(**OPTIONS | options), on_round=lambda end: states.append(end.state))
    return results, states


@pytest.mark.slow
def test_clients_that_have_not_trained_are_ranked_by_the_probe():
    """Where its curves are as long as those of a round, and of as much."""
    results, (state,) = follow(rank_policies=("autorank",), criteria=("loss_entropy",), rounds=1, participation=0.5)
    now, probe = loss_entropy(state.epoch_losses, state.epochs), results.scores[0].matrix[:, 0]
    seen = np.abs(np.asarray(now) - probe) > 1e-6
    assert seen.sum() == 3
    assert state.epochs.tolist() == [2] * 6
    ranks = state.ranks["layers/0"]
    best, worst = int(np.argmax(now)), int(np.argmin(now))
    assert (int(ranks[best]), int(ranks[worst])) == (10, 1)
    assert len(set(ranks[~seen].tolist())) == 3  # each by its own curve


@pytest.mark.slow
@pytest.mark.parametrize("probe", [{"probe_epochs": 3}, {"probe_ratio": 0.5}, {"probe_share": 0.5}], ids=str)
def test_a_cheaper_probe_is_no_curve_beside_those_of_rounds(probe):
    """Its entropies are nearer to 1, so that who took part would be what decides."""
    _, (state,) = follow(rank_policies=("autorank",), criteria=("loss_entropy",), rounds=1, participation=0.5, **probe)
    assert sorted(state.epochs.tolist()) == [0, 0, 0, 2, 2, 2]
    assert len(set(state.ranks["layers/0"][state.epochs == 0].tolist())) == 1  # the mean of the others


@pytest.mark.slow
def test_the_shuffled_control_is_drawn_anew():
    results, states = follow(rank_policies=("shuffled",), criteria=("size", "label_entropy"), rounds=3)
    drawn = [results.scores[0].ranks["shuffled"]["layers/0"], *(state.ranks["layers/0"] for state in states)]
    assert len({tuple(np.sort(ranks)) for ranks in drawn}) == 1
    assert len({tuple(np.asarray(ranks)) for ranks in drawn}) == len(drawn)
