"""Every client's own accuracy at the end of a run: as its label mix predicts it, and on examples of its own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from autorank_jax import evaluation
from autorank_jax.datasets import Dataset
from autorank_jax.engine import make_local_training
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.names import PERSONAL_RULES
from autorank_jax.experiment.setup import Federation, lane_count, make_aggregator, make_optimizer
from autorank_jax.federated import from_parts, split_test_set
from autorank_jax.types import Array, FederatedData, Key, State

Measure = Callable[[Federation, State], dict[str, dict[str, float]]]
"""Accuracies over clients by what was measured: each `mean`, `weighted_mean` (by examples) and `worst`.

Of what took a local training, `diverged` counts the clients whose training gave no finite result. They are in none of
the accuracies, which then speak for the others alone.
"""


SERVER_WIDTHS = 4
"""At how many ranks the server is tested where rank levels are chosen by what they save."""


def make_measure(experiment: Experiment, name: str, federation: Federation, dataset: Dataset) -> Measure:
    """Make the measurement for an aggregation rule; one program serves every policy and seed.

    `label_weighted` tests the server, cut to each client's rank level, on each class; `before` tests what the rule
    hands the client, cut to its rank, on the client's share of the test set; `after` does so after one more local
    training.

    Args:
        experiment: the options.
        name: of the rule; under rules that leave adapters with the clients, nothing is `label_weighted`.
        federation: of any seed, for the model.
        dataset: whose test examples are shared out.
    """
    rule, task = make_aggregator(name, experiment), federation.task
    local = make_local_training(task, make_optimizer(experiment), batch_size=experiment.batch_size)
    lanes = lane_count(experiment, federation, cohort=experiment.clients)
    inputs, labels = jnp.asarray(dataset.x_test), jnp.asarray(dataset.y_test)

    options = {"lanes": lanes, "rank_levels": experiment.rank_levels}

    @jax.jit
    def measured(key: Key, state: State, data: FederatedData, own: FederatedData, counts: Array) -> dict:
        scores = evaluation.personal_scores(key, local, rule, state, data, task=task, held_out=own, **options)
        diverged = {"diverged": jnp.sum((own.size > 0) & (data.size > 0) & (scores.examples == 0))}
        found = {
            "before": evaluation.summarize_clients(scores.before, scores.examples) | diverged,
            "after": evaluation.summarize_clients(scores.after, scores.examples) | diverged,
        }
        if name in PERSONAL_RULES:
            return found
        levels = SERVER_WIDTHS if experiment.rank_levels == "auto" else experiment.rank_levels
        predicted = evaluation.label_weighted_accuracy(task, state, counts, inputs, labels, rank_levels=levels)
        return {"label_weighted": evaluation.summarize_clients(predicted, jnp.sum(counts, axis=1))} | found

    def measure(federation: Federation, state: State) -> dict[str, dict[str, float]]:
        counts = federation.stats.label_counts
        own = from_parts(inputs, labels, split_test_set(counts, dataset.y_test), allow_empty=True)
        found = measured(federation.keys["training"], state, federation.data, own, counts)
        return {what: {kind: float(f"{float(v):.6g}") for kind, v in row.items()} for what, row in found.items()}

    return measure
