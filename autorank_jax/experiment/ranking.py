"""Rank policies by name, and what they make of the clients of an experiment."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.adapters import lora
from autorank_jax.engine.flops import FlopModel
from autorank_jax.evaluation.costs import client_costs
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.results import Scores
from autorank_jax.experiment.setup import Federation
from autorank_jax.ranks import budgets, controls, policies
from autorank_jax.ranks.criteria import complexity_matrix
from autorank_jax.types import Array, ClientStats, Key, RankInfo, RankPolicy, Task

PROBE_POLICIES = ("autorank", "covered", "shuffled", "reversed")
"""Policies that are charged for the probe, because each client's ratio comes from its score."""


class Ranked(NamedTuple):
    """What one policy gives the clients."""

    ratios: Array  # (clients,)
    ranks: dict[str, Array]  # by layer, (clients,)


Ranker = Callable[[Key, ClientStats], tuple[dict[str, Ranked], RankInfo | None]]  # by policy; AutoRank's scores


def rank_policy(name: str, experiment: Experiment) -> RankPolicy:
    """Make a rank policy by name."""
    scored = policies.autorank(criteria=experiment.criteria, min_ratio=experiment.min_ratio)
    makers: dict[str, Callable[[], RankPolicy]] = {
        "autorank": lambda: scored,
        "covered": lambda: budgets.with_coverage(scored),
        "by_size": lambda: policies.by_size(min_ratio=experiment.min_ratio),
        "uniform": lambda: budgets.with_one_ratio(scored, "examples"),
        "by_size_bytes": lambda: by_size_at_mean(scored, experiment.min_ratio),
        "uniform_bytes": lambda: budgets.with_one_ratio(scored),
        "full": lambda: policies.uniform(1.0),
        "shuffled": lambda: controls.shuffled(scored),
        "reversed": lambda: controls.reversed_ranks(scored),
        "manual": lambda: policies.manual(experiment.ratios),
    }
    return makers[name]()


def by_size_at_mean(policy: RankPolicy, min_ratio: float) -> RankPolicy:
    """Let ratios grow with the number of examples, at a policy's mean over clients (equal bytes)."""

    def sized(key: Key, stats: ClientStats) -> tuple[Array, RankInfo]:
        ratios, info = policy(key, stats)
        mean = budgets.mean_of_ratios(ratios, stats)
        moved = budgets.with_budget(policies.by_size(min_ratio=min_ratio), mean, min_ratio=min_ratio)
        return moved(key, stats)[0], info

    return sized


def make_ranker(experiment: Experiment, task: Task) -> Ranker:
    """Compile all policies of an experiment together, with the rounding to integer ranks."""
    made = {name: rank_policy(name, experiment) for name in experiment.rank_policies}
    scored = rank_policy("autorank", experiment) if experiment.scored else None
    widest = lora.max_ranks(task.server.trainable)

    def rank(key: Key, stats: ClientStats) -> tuple[dict[str, Ranked], RankInfo | None]:
        ranked = {}
        for name, policy in made.items():
            ratios, _ = policy(key, stats)
            ranked[name] = Ranked(ratios, policies.ranks_from_ratios(ratios, widest))
        return ranked, scored(key, stats)[1] if scored else None

    return jax.jit(rank)


def score_clients(experiment: Experiment, federation: Federation, ranker: Ranker, flops: FlopModel) -> Scores:
    """Score the clients of one seed and give them their first ranks under every policy."""
    stats = federation.stats
    ranked, info = ranker(federation.keys["policy"], stats)
    criteria = tuple(c for c in experiment.criteria if c != "loss_entropy" or experiment.probed)
    weights = closeness = None
    if info is not None:
        matrix, weights, closeness = map(np.asarray, info)
    elif criteria:
        matrix = np.asarray(complexity_matrix(stats, criteria=criteria))
    else:
        matrix = np.zeros((len(stats.size), 0))
    return Scores(
        seed=federation.seed,
        criteria=criteria,
        size=np.asarray(stats.size),
        label_counts=np.asarray(stats.label_counts),
        matrix=matrix,
        weights=weights,
        closeness=closeness,
        ratios={name: np.asarray(ranked[name].ratios) for name in experiment.rank_policies},
        ranks={name: {p: np.asarray(r) for p, r in ranked[name].ranks.items()} for name in experiment.rank_policies},
        probe_flops=probe_flops(experiment, federation, flops),
    )


def probe_flops(experiment: Experiment, federation: Federation, flops: FlopModel) -> float:
    """Return what the probe costs: all clients at full rank."""
    if not experiment.probed:
        return 0.0
    server, size = federation.task.server, federation.stats.size
    full = {path: jnp.full(size.shape, width, jnp.int32) for path, width in lora.max_ranks(server.trainable).items()}
    return float(client_costs(server, full, size, flops, local_epochs=experiment.probe_epochs).flops.sum())
