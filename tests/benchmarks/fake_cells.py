"""Cells of the studies that nobody had to train."""

import dataclasses
import json

import grid
import numpy as np

from autorank_jax.experiment.config import Experiment

TINY = Experiment(
    dataset="synthetic",
    split="iid",
    clients=2,
    hidden=(4,),
    rank_policies=("full",),
    rounds=1,
    local_epochs=1,
    rank_levels=1,
)


def fake_cell(experiment, best=lambda _: 0.03):
    """Return a cell as if it had been run: accuracies that a seed and a name determine, falling beside a best rate."""
    cell = {what: {} for what in ("summary", "accuracy", "flops", "bytes", "clients", "scores", "diverged")}
    n, clients = experiment.rounds, experiment.clients
    shared = experiment.aggregators[0] != "local_only"
    for seed in experiment.all_seeds:
        rng = np.random.default_rng(seed)
        matrix, ratios = rng.random((clients, 5)), {p: np.full(clients, 0.5).tolist() for p in experiment.rank_policies}
        ratios |= {"autorank": np.linspace(0.1, 1, clients).tolist()}
        cell["scores"][str(seed)] = {"criteria": list("abcde"), "size": [10] * clients, "matrix": matrix.tolist()}
        cell["scores"][str(seed)] |= {"weights": None, "closeness": None, "ratios": ratios}
        for number, policy in enumerate(experiment.rank_policies):
            top = 0.8 - 0.02 * number + 0.01 * rng.random() - 0.1 * abs(np.log(experiment.learning_rate / best(policy)))
            curve = [round(top * (1 - 0.5**r), 4) if shared else None for r in range(1, n + 1)]
            own = {kind: 0.5 + 0.1 * rng.random() for kind in ("mean", "weighted_mean", "worst")}
            for what, value in (("accuracy", curve), ("flops", [1e9 * r for r in range(n)]), ("bytes", [1e6] * n)):
                cell[what].setdefault(policy, {})[str(seed)] = value
            cell["clients"].setdefault(policy, {})[str(seed)] = {"before": own, "after": own}
    return cell | {"config": json.loads(json.dumps(dataclasses.asdict(experiment)))}


def pretend(monkeypatch):
    """Have cells faked in place of trained, and return the growing list of their names."""
    names = []

    def run(experiment, _, name):
        names.append(name)
        return fake_cell(experiment)

    monkeypatch.setattr(grid, "_run", run)
    return names
