"""The rank levels of an experiment: as given, or as many as pay for their compilation."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.adapters import max_ranks
from autorank_jax.engine import FlopModel, LevelChoice, Workload, choose_levels
from autorank_jax.engine.levels import Widths, resolve_levels
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.ranking import Ranking
from autorank_jax.experiment.setup import Federation, lane_count
from autorank_jax.federated.batches import steps_per_epoch
from autorank_jax.types import Array

Ranks = Mapping[str, Mapping[str, Array | np.ndarray]]
"""By policy and layer, `(clients,)`."""


def given_levels(experiment: Experiment, federation: Federation) -> tuple[Widths, ...]:
    """Return the rank levels that an experiment asks for, none where they are to be chosen."""
    if experiment.rank_levels == "auto":
        return ()
    return tuple(resolve_levels(max_ranks(federation.task), experiment.rank_levels))


def levels_for(
    experiment: Experiment, federations: Sequence[Federation], ranks: Sequence[Ranks], flops: FlopModel, devices: int
) -> LevelChoice:
    """Choose the rank levels for the ranks that clients have under every seed and policy.

    Where ranks are set anew between rounds, the last level is of the maximum ranks.
    """
    share = experiment.local_epochs * experiment.rounds * experiment.cohort / experiment.clients
    steps = [np.asarray(steps_per_epoch(f.data.size, experiment.batch_size)) * share for f in federations]
    lanes = lane_count(experiment, federations[0], cohort=experiment.cohort, devices=devices)
    choice = choose_levels(
        [Workload(one, work) for work, all_ranks in zip(steps, ranks, strict=True) for one in all_ranks.values()],
        flops,
        batch_size=experiment.batch_size,
        lanes=lanes,
        devices=devices,
    )
    if experiment.rerank_every:
        choice = choice._replace(levels=(*choice.levels[:-1], max_ranks(federations[0].task)))
    return choice


def expected_levels(
    experiment: Experiment, federations: Sequence[Federation], ranking: Ranking, flops: FlopModel, devices: int
) -> LevelChoice:
    """Choose rank levels before there are loss curves: which level will do is mostly known without them."""
    epochs, ranks = max(experiment.local_epochs, experiment.probe_epochs), []
    for federation in federations:
        clients = federation.data.size.shape[0]
        unknown = jnp.zeros((clients, epochs), jnp.result_type(float)), jnp.zeros(clients, jnp.int32)
        ranked, _ = ranking(
            federation.keys["policy"], federation.stats._replace(epoch_losses=unknown[0], epochs=unknown[1])
        )
        ranks.append({name: jax.tree.map(np.asarray, one.ranks) for name, one in ranked.items()})
    return levels_for(experiment, federations, ranks, flops, devices)
