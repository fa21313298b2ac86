"""What the rounds of an experiment cost: expected beforehand, and counted by what each of them did."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from autorank_jax.adapters.lora import equal_ranks, max_ranks
from autorank_jax.engine.flops import FlopModel
from autorank_jax.engine.probe import part_sizes
from autorank_jax.evaluation.costs import ClientCosts, client_costs
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.results import Costs
from autorank_jax.experiment.setup import Federation, make_faults, make_participation
from autorank_jax.federated import faults
from autorank_jax.types import Aggregator, FederatedData, Key, State


class RoundCost(NamedTuple):
    """What one round cost all clients together."""

    flops: float
    bytes_up: float
    bytes_down: float


CostFn = Callable[[Key, State, FederatedData], RoundCost]
"""`(key, state before the round, data) -> what the round costs`."""


def probe_flops(experiment: Experiment, federation: Federation, flops: FlopModel) -> float:
    """Return what the probe costs: all clients at the same rank, on their share of examples."""
    if not experiment.probed:
        return 0.0
    size, widest = part_sizes(federation.stats.size, experiment.probe_share), max_ranks(federation.task)
    ranks = equal_ranks(widest, size.shape[0], experiment.probe_ratio)
    each = client_costs(federation.task.server, ranks, size, flops, local_epochs=experiment.probe_epochs)
    return float(each.flops.sum())


def attendance(experiment: Experiment, data: FederatedData) -> np.ndarray:
    """Return how often each client is invited, `(clients,)` in 0..1; by a thousand draws where there is no formula."""
    clients = data.size.shape[0]
    if experiment.sampling == "independent":
        return np.full(clients, experiment.participation)
    if experiment.sampling == "uniform" or experiment.cohort == clients:
        return np.full(clients, experiment.cohort / clients)
    draw = make_participation(experiment)
    rows = jax.vmap(lambda key: draw(key, data).row)(jax.random.split(jax.random.key(0), 1000))
    return np.bincount(np.asarray(rows).ravel(), minlength=clients) / 1000


def expected_costs(
    experiment: Experiment, rule: Aggregator, state: State, data: FederatedData, flops: FlopModel
) -> Costs:
    """Return what one round costs if nobody fails; where clients are sampled, the expectation over who takes part."""
    share = attendance(experiment, data)
    each = _each(experiment, rule, state, data, flops=flops, share=share)
    return Costs(
        trained_parameters=float(np.sum(share * each.parameters)),
        bytes_up=float(np.sum(share * each.bytes_up)),
        bytes_down=float(np.sum(share * each.bytes_down)),
        flops=float(np.sum(share * each.flops)),
        slowest_client=float(each.flops.max()),
    )


def make_round_cost(experiment: Experiment, rule: Aggregator, flops: FlopModel) -> CostFn:
    """Make the function that counts what a round's clients did.

    Whoever is invited is sent the model. Clients that drop out neither train nor send; stragglers train as long as
    their budget lasts; clients whose update is not finite have trained and sent it. A client that prunes its rank in a
    round pays for the smaller one from the next round on.
    """
    participation, struck = make_participation(experiment), make_faults(experiment)
    draw = jax.jit(lambda key, number, data: faults.draw_cohort(key, number, data, participation, struck))

    def round_cost(key: Key, state: State, data: FederatedData) -> RoundCost:
        invited, cohort = jax.tree.map(np.asarray, draw(key, state.round, data))
        size = np.asarray(data.size, np.int64)
        sent, trained = np.zeros(size.shape, bool), np.zeros(size.shape, bool)
        sent[invited.row], trained[cohort.row] = invited.present, cohort.present
        sent, trained = sent & (size > 0), trained & (size > 0)
        each = _each(experiment, rule, state, data, flops=flops, share=trained.astype(np.float64))
        done = np.ones(size.shape)
        if cohort.max_steps is not None:
            done[cohort.row] = _done(experiment, size[cohort.row], cohort.max_steps)
        return RoundCost(
            flops=float(np.sum(each.flops * done, where=trained)),
            bytes_up=float(np.sum(each.bytes_up, where=trained)),
            bytes_down=float(np.sum(each.bytes_down, where=sent)),
        )

    return round_cost


def _each(
    experiment: Experiment, rule: Aggregator, state: State, data: FederatedData, *, flops: FlopModel, share: np.ndarray
) -> ClientCosts:
    return client_costs(
        state.server,
        rule.client_ranks(state.ranks, state.clients),
        data.size,
        flops,
        local_epochs=experiment.local_epochs,
        traffic=rule.traffic,
        attendance=share,
    )


def _done(experiment: Experiment, size: np.ndarray, max_steps: np.ndarray) -> np.ndarray:
    """Return which part of their epochs' examples clients see within a budget of steps; every epoch's last is short."""
    per_epoch = np.maximum(-(-size // experiment.batch_size), 1)
    epochs, rest = np.divmod(np.minimum(max_steps, experiment.local_epochs * per_epoch), per_epoch)
    return (epochs * size + rest * experiment.batch_size) / np.maximum(experiment.local_epochs * size, 1)
