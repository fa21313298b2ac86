"""From an `Experiment` to `Results`: data, probe, ranks, and the host loop over compiled rounds.

One program is compiled per aggregator. It serves every policy, every seed and the probe: ranks, hyper-parameters and
frozen weights are data in the state. Nothing is printed here: what happens goes to `on_event`.
"""

import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from autorank_jax import datasets, engine, evaluation
from autorank_jax.checkpoint import saved_steps, step_folder
from autorank_jax.datasets import Dataset
from autorank_jax.engine import local
from autorank_jax.engine.flops import FlopModel, training_flops
from autorank_jax.engine.lane_count import choose_lanes
from autorank_jax.experiment.checkpoints import Checkpoints, make_save, restore_book
from autorank_jax.experiment.config import ConfigurationError, Experiment, make_aggregator
from autorank_jax.experiment.costs import make_faults, make_meter, make_participation, round_costs
from autorank_jax.experiment.events import Compiled, Event, Finished, OnEvent, Resumed, RoundDone, Scored, Started
from autorank_jax.experiment.launch import compile_round, is_first
from autorank_jax.experiment.personal import make_measure
from autorank_jax.experiment.ranking import Ranker, make_ranker, score_clients
from autorank_jax.experiment.results import Results, Run, Scores
from autorank_jax.experiment.rounds import (
    Book,
    DivergedError,
    Job,
    OnRound,
    Program,
    Record,
    Save,
    finished_run,
    first_ranks,
    run_policy,
    start_state,
)
from autorank_jax.experiment.setup import Federation, make_federations
from autorank_jax.federated.participation import by_examples, equally
from autorank_jax.types import Array

__all__ = ["Compiled", "Event", "Finished", "Resumed", "RoundDone", "Scored", "Started", "run_experiment"]


class Setup(NamedTuple):
    """What all aggregators share."""

    experiment: Experiment
    dataset: Dataset
    mesh: Mesh | None
    ranker: Ranker
    flops: FlopModel
    on_event: OnEvent
    on_round: OnRound
    save: Save


def run_experiment(
    experiment: Experiment,
    *,
    mesh: Mesh | None = None,
    on_event: OnEvent = lambda _: None,
    on_round: OnRound = lambda _: None,
    checkpoints: Checkpoints | None = None,
) -> Results:
    """Run every policy under every aggregator and seed.

    A seed varies the initial weights, the adapters' start, the batch order and the split.

    Args:
        experiment: the options.
        mesh: devices to shard the clients over, from `sharding.client_mesh`; where there are several processes, all of
            them call this function and get the results, and the first saves.
        on_event: called with what happens, as it happens.
        on_round: called after every round with its row, its information and the state; True ends that run early.
            Whatever it raises leaves through here, after a checkpoint.
        checkpoints: where to save and how often. If the folder holds checkpoints of this experiment, it goes on from
            the latest: results are bit for bit those of an experiment that was never interrupted.

    Returns:
        The results; equal experiments on equal devices give equal ones, apart from seconds.

    Raises:
        ConfigurationError: for options that make no experiment, all mistakes at once as far as they are independent.
        DatasetError: for a missing or damaged dataset.
        CheckpointError: for checkpoints of another experiment, damaged ones, or those of a newer version.
        DivergedError: if the loss of a run is no number any more; its `results` are those so far.
    """
    experiment.validate()
    dataset = with_validation(datasets.load_dataset(experiment.dataset), experiment.validation)
    try:
        federations = make_federations(experiment, dataset)
    except ValueError as error:
        raise ConfigurationError([str(error)]) from error
    about = {"device": _device(mesh), "versions": _versions()}
    book = Book()
    if checkpoints is not None:
        book, differences = restore_book(checkpoints, experiment, dataset, federations, about=about)
        if book.records:
            on_event(Resumed(book.rounds, differences))
    flops = training_flops(federations[0].task, federations[0].data)
    ranker = make_ranker(experiment, federations[0].task)
    save = make_save(checkpoints if is_first() else None, experiment, dataset, about=about)
    setup = Setup(experiment, dataset, mesh, ranker, flops, on_event, on_round, save)
    scores: list[Scores] = []
    runs: list[Run] = []
    try:
        for name in experiment.aggregators:
            program, book = prepare(setup, federations[0], name, book, scored=bool(scores))
            seconds = book.seconds
            book = run_aggregator(setup, federations, program, book, (scores, runs))
    except DivergedError as error:
        found = _results(setup, scores, runs, seconds)
        raise DivergedError(f"{error}; {_last_good(checkpoints)}", error.record, found) from None
    return _results(setup, scores, runs, book.seconds)


def run_aggregator(
    setup: Setup, federations: Sequence[Federation], program: Program, book: Book, found: tuple[list[Scores], list[Run]]
) -> Book:
    """Run every policy under every seed with one rule, and append what was found; runs that are over are taken over."""
    experiment, name, (scores, runs) = setup.experiment, program.name, found
    if not scores:
        book = probe_all(setup, federations, program, book)
        for federation, losses in zip(federations, book.probes or [None] * len(federations), strict=True):
            scores.append(score_clients(experiment, with_losses(federation, losses), setup.ranker, setup.flops))
            setup.on_event(Scored(scores[-1]))
    meter = make_meter(experiment, program.rule, setup.flops)
    job = Job(experiment, program, setup.ranker, meter, setup.on_event, setup.on_round, setup.save)
    for policy in experiment.rank_policies:
        for federation, seen in zip(federations, scores, strict=True):
            if len(runs) == len(book.records):
                book = book._replace(records=(*book.records, Record(policy, name, federation.seed)), state=None)
            record = book.records[len(runs)]
            setup.on_event(Started(policy, name, federation.seed, len(record.rows)))
            start = start_state(experiment, federation, program.rule, first_ranks(seen, policy))
            costs = round_costs(experiment, program.rule, start, federation.data, setup.flops)
            try:
                if not record.over:
                    book = run_policy(job, federation, seen, book)
            except DivergedError as error:
                runs.append(finished_run(error.record, seen, costs))
                raise
            runs.append(finished_run(book.records[len(runs)], seen, costs))
            setup.on_event(Finished(runs[-1]))
    return book


def prepare(setup: Setup, federation: Federation, name: str, book: Book, *, scored: bool) -> tuple[Program, Book]:
    """Compile the program of a rule, unless all its runs are over."""
    experiment = setup.experiment
    rule = make_aggregator(name, experiment)
    over = sum(record.over for record in book.records if record.aggregator == name)
    known = scored or bool(book.probes) or not experiment.probed
    if known and over == len(experiment.rank_policies) * experiment.seeds:
        return Program(name, rule, _never, _never), book
    begin = time.perf_counter()
    program = compile_program(experiment, setup, federation, name)
    seconds = time.perf_counter() - begin
    setup.on_event(Compiled(name, seconds))
    return program, book._replace(seconds={**book.seconds, name: seconds})


def _never(*arguments: Any) -> Any:
    raise AssertionError(f"a run that is over called its program with {len(arguments)} arguments")


def compile_program(experiment: Experiment, setup: Setup, federation: Federation, name: str) -> Program:
    """Compile one round and one evaluation for an aggregation rule."""
    rule = make_aggregator(name, experiment)
    training = local.make_local_training(federation.task, make_optimizer(experiment), batch_size=experiment.batch_size)
    round_fn = engine.make_round(
        training,
        rule,
        lanes=lanes_of(experiment, federation, setup.mesh),
        rank_levels=experiment.rank_levels,
        participation=make_participation(experiment),
        weigh=equally if experiment.sampling == "by_size" and experiment.cohort < experiment.clients else by_examples,
        faults=make_faults(experiment),
        mesh=setup.mesh,
    )
    evaluate = evaluation.make_evaluate(federation.task, setup.dataset.x_test, setup.dataset.y_test)
    state = start_state(experiment, federation, rule)
    key = federation.keys["training"]
    measure = None
    if experiment.personal:
        lanes = lanes_of(dataclasses.replace(experiment, participation=1.0), federation, None)
        measure = make_measure(experiment, name, training, federation, setup.dataset, lanes=lanes)
    return Program(
        name,
        rule,
        compile_round(round_fn, setup.mesh, key, state, federation.data),
        jax.jit(evaluate).lower(state).compile(),
        measure,
    )


def with_validation(dataset: Dataset, share: float) -> Dataset:
    """Put a share of the training examples, evenly spaced, in the place of the test set; do nothing where it is 0."""
    if not share:
        return dataset
    place = np.floor(share * np.arange(len(dataset.y_train) + 1) * (1 + 1e-12))
    held = np.diff(place) > 0
    x, y = dataset.x_train, dataset.y_train
    return dataset._replace(x_train=x[~held], y_train=y[~held], x_test=x[held], y_test=y[held])


def make_optimizer(experiment: Experiment) -> Callable[[Mapping[str, Array]], optax.GradientTransformation]:
    """Return the clients' optimiser as a function of the hyper-parameters in the state."""
    if experiment.optimizer == "sgd":
        return lambda h: optax.sgd(h["learning_rate"], momentum=experiment.momentum or None)
    make = {"adam": optax.adam, "adamw": optax.adamw}[experiment.optimizer]
    return lambda h: make(h["learning_rate"])


def lanes_of(experiment: Experiment, federation: Federation, mesh: Mesh | None) -> int:
    """Return how many clients each device trains side by side: what was asked for, or what suits data and device."""
    if experiment.lanes != "auto":
        return min(int(experiment.lanes), experiment.cohort)
    share = max(1, experiment.cohort // (1 if mesh is None else mesh.devices.size))
    return choose_lanes(federation.data, federation.task, batch_size=experiment.batch_size, cohort=share)


def probe_all(setup: Setup, federations: Sequence[Federation], program: Program, book: Book) -> Book:
    """Run every seed's probe, unless a checkpoint holds it.

    It has a program of its own where some clients stay away, or where the rule lets clients train only a part.
    """
    experiment = setup.experiment
    if not experiment.probed or book.probes:
        return book
    trains = program.rule.trains(program.rule.init(federations[0].task.server))
    partial = any(flag is not True for flag in trains)
    if experiment.eventful or partial:
        calm = dataclasses.replace(experiment, participation=1.0, sampling="uniform", drop_out=0.0, stragglers=0.0)
        program = compile_program(calm, setup, federations[0], "zero_pad" if partial else program.name)
    return book._replace(probes=tuple(probe(experiment, program, federation) for federation in federations))


def probe(experiment: Experiment, program: Program, federation: Federation) -> tuple[Array, Array]:
    """Return every client's loss curve and its length: one round at full rank whose server is thrown away."""
    state = start_state(experiment, federation, program.rule)
    epochs = jnp.asarray(experiment.probe_epochs, jnp.int32)
    state = state._replace(hparams=state.hparams | {"local_epochs": epochs})
    state, _ = program.round(federation.keys["probe"], state, federation.data)
    return state.epoch_losses, state.epochs


def with_losses(federation: Federation, losses: tuple[Array, Array] | None) -> Federation:
    """Add every client's loss curve to its statistics."""
    if losses is None:
        return federation
    return federation._replace(stats=federation.stats._replace(epoch_losses=losses[0], epochs=losses[1]))


def _results(setup: Setup, scores: Sequence[Scores], runs: Sequence[Run], seconds: Mapping[str, float]) -> Results:
    options, device = dataclasses.asdict(setup.experiment), _device(setup.mesh)
    return Results(options, tuple(scores), tuple(runs), dict(seconds), device, _versions())


def _last_good(checkpoints: Checkpoints | None) -> str:
    steps = saved_steps(checkpoints.folder) if checkpoints else []
    if not checkpoints or not steps:
        return "no checkpoint was saved"
    return f"the last good checkpoint is {step_folder(checkpoints.folder, steps[-1])}"


def _device(mesh: Mesh | None) -> str:
    device = jax.devices()[0]
    name = f"{device.device_kind}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    return name if mesh is None else f"{name}, {mesh.devices.size} devices"


def _versions() -> dict[str, str]:
    packages = ("autorank-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
