"""From an `Experiment` to `Results`: data, probe, ranks, and the host loop over compiled rounds.

One program is compiled per aggregator. It serves every policy, every seed and the probe: ranks, hyper-parameters and
frozen weights are data in the state. Nothing is printed here: what happens goes to `on_event`.
"""

import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autorank_jax import datasets, engine, evaluation, local, lora, simulation
from autorank_jax.configuration import ConfigurationError, Experiment, make_aggregator
from autorank_jax.datasets import Dataset
from autorank_jax.evaluation import FlopModel
from autorank_jax.federations import Federation, make_federations
from autorank_jax.participation import everyone, sample_uniformly
from autorank_jax.ranking import PROBE_POLICIES, Ranker, make_ranker, score_clients
from autorank_jax.results import Costs, Results, Row, Run, Scores
from autorank_jax.scheduling import choose_lanes
from autorank_jax.types import Aggregator, Array, EvaluateFn, FederatedData, RoundFn, State


class Compiled(NamedTuple):
    """Event: the program of an aggregator is ready."""

    aggregator: str
    seconds: float


class Scored(NamedTuple):
    """Event: the clients of a seed have their scores and ranks."""

    scores: Scores


class Started(NamedTuple):
    """Event: a run begins."""

    policy: str
    aggregator: str
    seed: int


class RoundDone(NamedTuple):
    """Event: a round is over."""

    row: Row
    examples: float  # seen in this round, counted once per epoch


class Finished(NamedTuple):
    """Event: a run is over."""

    run: Run


Event = Compiled | Scored | Started | RoundDone | Finished
OnEvent = Callable[[Event], None]


class Program(NamedTuple):
    """What is compiled for one aggregator."""

    rule: Aggregator
    round: RoundFn
    evaluate: EvaluateFn


class Progress(NamedTuple):
    """Where a run stands: all that a checkpoint would have to hold."""

    state: State
    rows: tuple[Row, ...]
    costs: Costs  # of a round under the present ranks
    train_flops: float  # spent so far, with the probe
    bytes: float  # sent so far


class Job(NamedTuple):
    """What all runs under one aggregator share."""

    experiment: Experiment
    aggregator: str
    program: Program
    ranker: Ranker
    flops: FlopModel
    on_event: OnEvent


def run_experiment(experiment: Experiment, *, on_event: OnEvent = lambda _: None) -> Results:
    """Run every policy under every aggregator and seed.

    A seed varies the initial weights, the adapters' start, the batch order and the split.

    Args:
        experiment: the options.
        on_event: called with what happens, as it happens.

    Returns:
        The results; equal experiments on equal devices give equal ones, apart from seconds.

    Raises:
        ConfigurationError: for options that make no experiment, all mistakes at once as far as they are independent.
        DatasetError: for a missing or damaged dataset.
    """
    experiment.validate()
    dataset = datasets.load_dataset(experiment.dataset)
    try:
        federations = make_federations(experiment, dataset)
    except ValueError as error:
        raise ConfigurationError([str(error)]) from error
    flops = evaluation.training_flops(federations[0].task, federations[0].data)
    ranker = make_ranker(experiment, federations[0].task)
    seconds: dict[str, float] = {}
    scores: list[Scores] = []
    runs: list[Run] = []
    for name in experiment.aggregators:
        begin = time.perf_counter()
        program = compile_program(experiment, dataset, federations[0], make_aggregator(name))
        prober = program if scores else make_prober(experiment, dataset, federations[0], program)
        seconds[name] = time.perf_counter() - begin
        on_event(Compiled(name, seconds[name]))
        if not scores:
            federations = [probe(experiment, prober, federation) for federation in federations]
            scores = [score_clients(experiment, federation, ranker, flops) for federation in federations]
            for seen in scores:
                on_event(Scored(seen))
        job = Job(experiment, name, program, ranker, flops, on_event)
        for policy in experiment.rank_policies:
            for federation, seen in zip(federations, scores, strict=True):
                on_event(Started(policy, name, federation.seed))
                runs.append(run_policy(job, federation, seen, policy))
                on_event(Finished(runs[-1]))
    return Results(dataclasses.asdict(experiment), tuple(scores), tuple(runs), seconds, _device(), _versions())


def compile_program(experiment: Experiment, dataset: Dataset, federation: Federation, rule: Aggregator) -> Program:
    """Compile one round and one evaluation for an aggregation rule."""
    training = local.make_local_training(federation.task, make_optimizer(experiment), batch_size=experiment.batch_size)
    sampled = experiment.cohort < experiment.clients
    round_fn = engine.make_round(
        training,
        rule,
        lanes=lanes_of(experiment, federation),
        rank_levels=experiment.rank_levels,
        participation=sample_uniformly(experiment.cohort) if sampled else everyone,
    )
    evaluate = evaluation.make_evaluate(federation.task, dataset.x_test, dataset.y_test)
    state = start_state(experiment, federation, rule)
    key = federation.keys["training"]
    return Program(
        rule,
        jax.jit(round_fn).lower(key, state, federation.data).compile(),
        jax.jit(evaluate).lower(state).compile(),
    )


def make_prober(experiment: Experiment, dataset: Dataset, federation: Federation, program: Program) -> Program:
    """Return the program of the probe: that of training, unless only some of the clients take part there."""
    if not experiment.probed or experiment.cohort == experiment.clients:
        return program
    return compile_program(dataclasses.replace(experiment, participation=1.0), dataset, federation, program.rule)


def make_optimizer(experiment: Experiment) -> Callable[[Mapping[str, Array]], optax.GradientTransformation]:
    """Return the clients' optimiser as a function of the hyper-parameters in the state."""
    if experiment.optimizer == "sgd":
        return lambda h: optax.sgd(h["learning_rate"], momentum=experiment.momentum or None)
    make = {"adam": optax.adam, "adamw": optax.adamw}[experiment.optimizer]
    return lambda h: make(h["learning_rate"])


def lanes_of(experiment: Experiment, federation: Federation) -> int:
    """Return how many clients train side by side: what was asked for, or what suits data, model and device."""
    if experiment.lanes != "auto":
        return min(int(experiment.lanes), experiment.cohort)
    return choose_lanes(federation.data, federation.task, batch_size=experiment.batch_size, cohort=experiment.cohort)


def start_state(
    experiment: Experiment, federation: Federation, rule: Aggregator, ranks: Mapping[str, Array] | None = None
) -> State:
    """Make the state before the first round, at full rank unless ranks are given."""
    server, clients = federation.task.server, federation.data.size.shape[0]
    full = {path: jnp.full(clients, width, jnp.int32) for path, width in lora.max_ranks(server.trainable).items()}
    return simulation.init_state(
        server,
        rule,
        full if ranks is None else ranks,
        learning_rate=experiment.learning_rate,
        local_epochs=experiment.local_epochs,
        max_epochs=max(experiment.local_epochs, experiment.probe_epochs),
    )


def probe(experiment: Experiment, program: Program, federation: Federation) -> Federation:
    """Add every client's loss curve to its statistics: one round at full rank whose server is thrown away."""
    if not experiment.probed:
        return federation
    state = start_state(experiment, federation, program.rule)
    epochs = jnp.asarray(experiment.probe_epochs, jnp.int32)
    state = state._replace(hparams=state.hparams | {"local_epochs": epochs})
    state, _ = program.round(federation.keys["probe"], state, federation.data)
    return federation._replace(
        stats=federation.stats._replace(epoch_losses=state.epoch_losses, epochs=state.epochs),
    )


def run_policy(job: Job, federation: Federation, scores: Scores, policy: str) -> Run:
    """Run all rounds of one policy under one aggregator and one seed."""
    experiment, data = job.experiment, federation.data
    state = start_state(experiment, federation, job.program.rule, _arrays(scores.ranks[policy]))
    first = round_costs(experiment, state, data, job.flops)
    charged = scores.probe_flops if policy in PROBE_POLICIES else 0.0
    progress = Progress(state, (), first, charged, 0.0)
    while len(progress.rows) < experiment.rounds:
        progress, examples = run_round(job, federation, policy, progress)
        job.on_event(RoundDone(progress.rows[-1], examples))
        if experiment.rerank_every and len(progress.rows) % experiment.rerank_every == 0:
            progress = rank_again(job, federation, policy, progress)
    ratios = scores.ratios[policy]
    by_examples = float(np.average(ratios, weights=scores.size))
    return Run(
        policy, job.aggregator, federation.seed, progress.rows, first, float(ratios.mean()), by_examples, charged
    )


def run_round(job: Job, federation: Federation, policy: str, progress: Progress) -> tuple[Progress, float]:
    """Run one round, evaluate it if it is time to, and append its row; also return the examples seen."""
    number = len(progress.rows) + 1
    begin = time.perf_counter()
    state, info = job.program.round(federation.keys["training"], progress.state, federation.data)
    jax.block_until_ready((state, info))
    seconds = time.perf_counter() - begin
    due = number % job.experiment.eval_every == 0 or number == job.experiment.rounds
    metrics = job.program.evaluate(state) if due else {}
    flops = progress.train_flops + progress.costs.flops
    sent = progress.bytes + progress.costs.bytes_up + progress.costs.bytes_down
    row = Row(
        policy=policy,
        aggregator=job.aggregator,
        seed=federation.seed,
        round=number,
        accuracy=_number(metrics.get("accuracy")),
        loss=_number(metrics.get("loss")),
        train_loss=_number(info.loss),
        participants=int(info.participants),
        excluded=int(info.excluded),
        train_flops=flops,
        bytes=sent,
        seconds=round(seconds, 6),
    )
    return Progress(state, (*progress.rows, row), progress.costs, flops, sent), float(info.examples)


def rank_again(job: Job, federation: Federation, policy: str, progress: Progress) -> Progress:
    """Set new ranks from the loss curves of each client's latest round."""
    state = progress.state
    stats = federation.stats._replace(epoch_losses=state.epoch_losses, epochs=state.epochs)
    ranked, _ = job.ranker(federation.keys["policy"], stats)
    state = state._replace(ranks=ranked[policy].ranks)
    return progress._replace(state=state, costs=round_costs(job.experiment, state, federation.data, job.flops))


def round_costs(experiment: Experiment, state: State, data: FederatedData, flops: FlopModel) -> Costs:
    """Return what one round costs; where clients are sampled, the expectation over who takes part."""
    each = evaluation.client_costs(state.server, state.ranks, data.size, flops, local_epochs=experiment.local_epochs)
    share = experiment.cohort / data.size.shape[0]
    return Costs(
        trained_parameters=share * float(each.parameters.sum()),
        bytes_up=share * float(each.bytes_up.sum()),
        bytes_down=share * float(each.bytes_down.sum()),
        flops=share * float(each.flops.sum()),
        slowest_client=float(each.flops.max()),
    )


def _arrays(ranks: Mapping[str, np.ndarray]) -> dict[str, Array]:
    return {path: jnp.asarray(rank, jnp.int32) for path, rank in ranks.items()}


def _number(value: Array | None) -> float | None:
    """Return a finite number to the digits that float32 holds, else None: JSON knows no NaN."""
    return float(f"{float(value):.6g}") if value is not None and np.isfinite(value) else None


def _device() -> str:
    device = jax.devices()[0]
    return f"{device.device_kind}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind


def _versions() -> dict[str, str]:
    packages = ("autorank-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
