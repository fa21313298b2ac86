"""Rank policies by name, and what they make of the clients of an experiment."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.adapters import max_ranks
from autorank_jax.engine.flops import FlopModel
from autorank_jax.engine.probe import count_lost
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.costs import probe_flops
from autorank_jax.experiment.results import Scores
from autorank_jax.experiment.setup import Federation
from autorank_jax.ranks import budgets, complexity_matrix, controls, policies
from autorank_jax.ranks.criteria import NEEDS_LOSSES
from autorank_jax.ranks.private import private_counts
from autorank_jax.types import Array, ClientStats, Key, RankInfo, RankPolicy, State, Task

_RELEASE = 0x72656C65  # fold_in tag of the noise on label counts
PROBE_POLICIES = ("autorank", "covered", "shuffled", "reversed")
"""Policies that are charged for the probe, because each client's ratio comes from its score."""


class Ranked(NamedTuple):
    """What one policy gives the clients."""

    ratios: Array  # (clients,)
    ranks: dict[str, Array]  # by layer, (clients,)


Ranking = Callable[[Key, ClientStats], tuple[dict[str, Ranked], RankInfo | None]]
"""`(key, stats) -> (what every policy gives, by name; AutoRank's scores where a policy needs them)`."""


def rank_policy(name: str, experiment: Experiment, scored: RankPolicy | None = None) -> RankPolicy:
    """Make a rank policy by name, around AutoRank's where it is given."""
    scored = scored or policies.autorank(criteria=experiment.criteria, min_ratio=experiment.min_ratio)
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


def make_ranking(experiment: Experiment, task: Task) -> Ranking:
    """Compile all policies of an experiment together, with the rounding to integer ranks."""
    scored = rank_policy("autorank", experiment)
    widest = max_ranks(task.server.trainable)

    def rank(key: Key, stats: ClientStats) -> tuple[dict[str, Ranked], RankInfo | None]:
        ranked, found = {}, scored(key, stats) if experiment.scored else None
        for name in experiment.rank_policies:
            policy = rank_policy(name, experiment, (lambda *_: found) if found else scored)  # scored once
            ratios, _ = policy(key, stats)
            ranked[name] = Ranked(ratios, policies.ranks_from_ratios(ratios, widest))
        return ranked, found[1] if found else None

    return jax.jit(rank)


def score_clients(
    experiment: Experiment,
    federation: Federation,
    curves: tuple[Array, Array] | None,
    ranking: Ranking,
    flops: FlopModel,
) -> Scores:
    """Score the clients of one seed and give them their first ranks under every policy.

    Args:
        experiment: the options.
        federation: the clients.
        curves: their losses by epoch and how many epochs these are, from the probe; None where there was none.
        ranking: the policies.
        flops: to count the probe's cost.
    """
    stats = federation.stats
    if curves is not None:
        stats = stats._replace(epoch_losses=curves[0], epochs=curves[1])
    if experiment.privacy and experiment.privacy.release is not None:
        key = jax.random.fold_in(federation.keys["policy"], _RELEASE)
        noise = experiment.privacy.release
        stats = private_counts(key, stats, clip=experiment.dp_count_clip, noise_multiplier=noise)
    ranked, info = ranking(federation.keys["policy"], stats)
    criteria = tuple(c for c in experiment.criteria if c not in NEEDS_LOSSES or experiment.probed)
    weights = closeness = None
    if info is not None:
        matrix, weights, closeness = map(np.asarray, info[:3])
    elif criteria:
        matrix = np.asarray(complexity_matrix(stats, criteria=criteria))
    else:
        matrix = np.zeros((len(stats.size), 0))
    return Scores(
        seed=federation.seed,
        criteria=criteria,
        size=_whole(stats.size),
        label_counts=_whole(stats.label_counts),
        matrix=matrix,
        weights=weights,
        closeness=closeness,
        ratios={name: np.asarray(ranked[name].ratios) for name in experiment.rank_policies},
        ranks={name: {p: np.asarray(r) for p, r in ranked[name].ranks.items()} for name in experiment.rank_policies},
        probe_flops=probe_flops(experiment, federation, flops),
        unprobed=0 if curves is None else count_lost(*curves, federation.data.size),
    )


def _whole(counts: Array) -> np.ndarray:
    """Return counts; those that were released with noise rounded to whole numbers, true ones as they are."""
    whole = np.asarray(counts)
    return whole if np.issubdtype(whole.dtype, np.integer) else np.rint(whole).astype(np.int64)


def first_ranks(scores: Scores, policy: str) -> dict[str, Array]:
    """Return the ranks a policy begins with."""
    return {path: jnp.asarray(rank, jnp.int32) for path, rank in scores.ranks[policy].items()}


def rank_again(ranking: Ranking, federation: Federation, policy: str, state: State) -> State:
    """Set new ranks from the loss curves of each client's latest round.

    Who has not trained yet has the curve of the probe where that is comparable, else the mean of the others.
    """
    stats = federation.stats._replace(epoch_losses=state.epoch_losses, epochs=state.epochs)
    ranked, _ = ranking(jax.random.fold_in(federation.keys["policy"], state.round), stats)
    return state._replace(ranks=ranked[policy].ranks)


def own_probe_flops(scores: Scores, policy: str) -> float:
    """Return what a policy is charged for the probe: nothing where no client's ratio comes from its score."""
    return scores.probe_flops if policy in PROBE_POLICIES else 0.0
