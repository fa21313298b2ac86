"""Cells of the studies that nobody had to train."""

import numpy as np

from autorank_jax.experiment import Experiment
from benchmarks.study import cells
from benchmarks.study.cell_file import options_of

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
    options, clients = options_of(experiment), experiment.clients
    shared = experiment.aggregators[0] != "local_only"
    cell = {"options": options, "ran": "never", "size": {}, "runs": {policy: {} for policy in experiment.rank_policies}}
    for seed in experiment.all_seeds:
        rng = np.random.default_rng(seed)
        cell["size"][str(seed)] = [10] * clients
        for number, policy in enumerate(experiment.rank_policies):
            top = 0.8 - 0.02 * number + 0.01 * rng.random() - 0.1 * abs(np.log(experiment.learning_rate / best(policy)))
            curve = [round(top * (1 - 0.5**r), 4) for r in cells.due(options)]
            own = {kind: 0.5 + 0.1 * rng.random() for kind in ("mean", "weighted_mean", "worst")}
            cell["runs"][policy][str(seed)] = {
                "ratios": np.linspace(0.1, 1, clients).tolist() if policy == "autorank" else [0.5] * clients,
                "accuracy": curve if shared else [],
                "flops": 1e9,
                "bytes": 1e6,
                "probe": 0.0,
                "slowest": 1e8,
                "clients": {"before": own, "after": own},
            }
    return cell


def pretend(monkeypatch):
    """Have cells faked in place of trained, and return the growing list of their names."""
    names = []

    def run(experiment, _, name):
        names.append(name)
        return fake_cell(experiment)

    monkeypatch.setattr(cells, "_run", run)
    return names
