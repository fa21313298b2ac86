"""One experiment: load → partition → probe → rank → rounds for every rule, policy and seed → results.

One program is compiled per aggregation rule. It serves every policy, every seed and, if it can, the probe: ranks,
hyper-parameters and frozen weights are data in the state. Nothing is printed here: what happens goes to `on_event`.
"""

import dataclasses
import itertools
import time
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from autorank_jax.datasets import Dataset
from autorank_jax.engine import FlopModel, training_flops
from autorank_jax.evaluation import make_evaluate
from autorank_jax.experiment.checkpoints import Checkpoints, Save, last_good, make_save, restore_position
from autorank_jax.experiment.compiling import CompiledRound, compile_training, serves
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.costs import CostFn, expected_costs, make_round_cost
from autorank_jax.experiment.events import (
    Compiled,
    Finished,
    Leveled,
    OnEvent,
    Resumed,
    RoundDone,
    Scored,
    Stage,
    Started,
    Stopped,
)
from autorank_jax.experiment.launch import describe_machine, is_first
from autorank_jax.experiment.levels import expected_levels, given_levels, levels_for
from autorank_jax.experiment.personal import Measure, make_measure
from autorank_jax.experiment.position import (
    Measured,
    OnRound,
    Position,
    RoundEnd,
    check_progress,
    finish_run,
    is_evaluated,
    is_last,
    next_row,
)
from autorank_jax.experiment.probing import compile_probe, probe
from autorank_jax.experiment.ranking import (
    Ranking,
    first_ranks,
    make_ranking,
    own_probe_flops,
    rank_again,
    score_clients,
)
from autorank_jax.experiment.results import SCORES, DivergedError, Record, Results, Run, Scores
from autorank_jax.experiment.setup import (
    Federation,
    load_data,
    make_aggregator,
    make_federations,
    metrics_of,
    start_state,
    training_key,
)
from autorank_jax.experiment.waiting import wait_for
from autorank_jax.interface import checked
from autorank_jax.types import EvaluateFn, Key, RoundFn, State


class Hooks(NamedTuple):
    """What is called while an experiment goes on."""

    on_event: OnEvent
    on_round: OnRound
    save: Save


class Setup(NamedTuple):
    """What an experiment begins with."""

    dataset: Dataset
    federations: list[Federation]
    flops: FlopModel
    ranking: Ranking


class Program(NamedTuple):
    """What is compiled for one aggregation rule, and what its rounds cost."""

    round: RoundFn
    evaluate: EvaluateFn
    measure: Measure | None  # of the clients' own accuracy, after the last round
    cost: CostFn


@checked
def run_experiment(
    experiment: Experiment,
    *,
    mesh: Mesh | None = None,
    on_event: OnEvent = lambda _: None,
    on_round: OnRound = lambda _: None,
    checkpoints: Checkpoints | None = None,
) -> Results:
    """Run every policy under every aggregation rule and seed.

    A seed varies the initial weights, the adapters' start, the batch order and the split.

    Args:
        experiment: the options.
        mesh: devices to shard the clients over, from `sharding.client_mesh`; where there are several processes, all of
            them call this function and get the results, and the first saves.
        on_event: called with what happens, as it happens.
        on_round: called after every round with its row, its information and the state; True ends that run early.
            Whatever it raises leaves through here, after a checkpoint and the event `Stopped`.
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
    setup = prepare(experiment, on_event)
    dataset, federations, flops, ranking = setup
    machine = describe_machine(mesh)
    position, differences = restore_position(checkpoints, experiment, dataset, federations, machine)
    if position.records:
        on_event(Resumed(position.rounds, differences))
    hooks = Hooks(on_event, on_round, make_save(checkpoints if is_first() else None, experiment, dataset, machine))
    needing = [name for name in experiment.aggregators if position.needs_rounds(experiment, name)]
    position, scores, compiled = score(experiment, setup, position, mesh, on_event, total=len(needing))
    runs: list[Run] = []
    measure = "accuracy" if dataset.classes else "r2"

    def results() -> Results:
        config, seconds = dataclasses.asdict(experiment), dict(position.seconds)
        return Results(config, tuple(scores), tuple(runs), seconds, score=measure, **machine)

    for name in experiment.aggregators:
        rule = make_aggregator(name, experiment)
        cost = make_round_cost(experiment, rule, flops)
        program = None
        if name in needing:
            on_event(Stage("compiling", needing.index(name) + 1, len(needing), told=True))
            if compiled is None or not serves(compiled, experiment, name, position.levels):
                compiled = compile_training(experiment, name, federations[0], mesh, position.levels)
            begin = time.perf_counter()
            program = make_program(experiment, name, federations[0], dataset, compiled=compiled, cost=cost)
            seconds = compiled.seconds + time.perf_counter() - begin
            position = position._replace(seconds={**position.seconds, name: seconds})
            on_event(Compiled(name, seconds, compiled.lanes))
        for policy, number in itertools.product(experiment.rank_policies, range(experiment.seeds)):
            federation, seen = federations[number], scores[number]
            start = start_state(experiment, federation, rule, first_ranks(seen, policy))
            shown = federation.data._replace(size=jnp.asarray(seen.size))  # what files may tell
            costs = expected_costs(experiment, rule, start, shown, flops)
            if len(runs) == len(position.records):
                if position.probes and experiment.probes_as_in_rounds:  # a client's curve until its first round
                    losses, epochs = position.probes[number]
                    start = start._replace(epoch_losses=losses, epochs=epochs)
                position = position.begin(Record(policy, name, federation.seed), start)
            record = position.records[len(runs)]
            on_event(Started(policy, name, federation.seed, record.round, SCORES[measure]))
            try:
                if program and not record.over:
                    position = run_rounds(
                        experiment, federation, seen, position, program=program, ranking=ranking, hooks=hooks
                    )
            except _Halted as halt:
                if halt.record.rows:
                    runs.append(finish_run(halt.record, seen, costs, own_probe_flops(seen, policy)))
                end_early(halt.error, results(), hooks, last_good(checkpoints, halt.record))
            runs.append(finish_run(position.records[len(runs)], seen, costs, own_probe_flops(seen, policy)))
            on_event(Finished(runs[-1]))
    return results()


class _Halted(BaseException):  # it never leaves
    """What went wrong or stopped a run, with the rounds until then."""

    def __init__(self, error: BaseException, record: Record) -> None:
        self.error = error
        self.record = record


def end_early(error: BaseException, found: Results, hooks: Hooks, good: str) -> NoReturn:
    """Hand over what an experiment found, and raise what it ends with before its time."""
    if isinstance(error, DivergedError):
        message = f"{error}; {good}"
        raise DivergedError(message, error.record, found._replace(stopped=message)) from None
    if found.runs:
        hooks.on_event(Stopped(found._replace(stopped=str(error).partition("\n")[0] or type(error).__name__)))
    raise error from error.__cause__


def prepare(experiment: Experiment, on_event: OnEvent) -> Setup:
    """Load, partition, and make model and policies."""
    on_event(Stage(f"reading {experiment.dataset}"))
    dataset = load_data(experiment)
    on_event(Stage("building clients and model"))
    federations = make_federations(experiment, dataset)
    flops = training_flops(federations[0].task, federations[0].data)
    return Setup(dataset, federations, flops, make_ranking(experiment, federations[0].task))


def score(
    experiment: Experiment, setup: Setup, position: Position, mesh: Mesh | None, on_event: OnEvent, *, total: int
) -> tuple[Position, list[Scores], CompiledRound | None]:
    """Probe and rank the clients of every seed, and choose the rank levels, where a checkpoint does not hold them.

    Returns:
        Where the experiment stands then, what AutoRank saw, and the round that was compiled for the probe.
    """
    _, federations, flops, ranking = setup
    devices, compiled = 1 if mesh is None else mesh.devices.size, None
    position = position._replace(levels=position.levels or given_levels(experiment, federations[0]))
    if experiment.probed and not position.probes:
        levels = position.levels or expected_levels(experiment, federations, ranking, flops, devices).levels
        compiled = compile_probe(experiment, federations[0], mesh, levels, on_event, total=total)
        on_event(Stage("probing"))
        position = position._replace(probes=probe(experiment, compiled, federations))
    on_event(Stage("ranking"))
    scores: list[Scores] = []
    for federation, curve in itertools.zip_longest(federations, position.probes):
        scores.append(score_clients(experiment, federation, curve, ranking, flops))
        on_event(Scored(scores[-1]))
    if not position.levels:
        choice = levels_for(experiment, federations, [seen.ranks for seen in scores], flops, devices)
        position = position._replace(levels=choice.levels)
        on_event(Leveled(choice))
    return position, scores, compiled


def make_program(
    experiment: Experiment,
    name: str,
    federation: Federation,
    dataset: Dataset,
    *,
    compiled: CompiledRound,
    cost: CostFn,
) -> Program:
    """Compile an evaluation for an aggregation rule, beside its round."""
    rule = make_aggregator(name, experiment)
    evaluate = make_evaluate(federation.task, dataset.x_test, dataset.y_test, metrics=metrics_of(dataset))
    tested = jax.jit(evaluate).lower(start_state(experiment, federation, rule)).compile()
    measure = make_measure(experiment, name, federation, dataset) if experiment.personal else None
    return Program(compiled.run, tested, measure, cost)


def run_rounds(
    experiment: Experiment,
    federation: Federation,
    scores: Scores,
    position: Position,
    *,
    program: Program,
    ranking: Ranking,
    hooks: Hooks,
) -> Position:
    """Run what is left of the last record's run: all its rounds, or those that a checkpoint did not hold.

    Raises:
        _Halted: of whatever was raised; a `DivergedError`, if the loss is no number any more.
    """
    record, state = position.records[-1], position.state
    key = training_key(experiment, federation, record.policy, record.aggregator)
    spent, privacy = own_probe_flops(scores, record.policy), experiment.privacy
    try:
        while not record.over:
            assert state is not None
            cost = program.cost(key, state, federation.data)
            tested = is_evaluated(experiment, record.aggregator, record.round + 1)
            state, measured = run_round(program, key, federation, state, tested=tested)
            epsilon = privacy.spent(record.round + 1) if privacy else None
            row = next_row(record, measured, cost, probe_flops=spent, epsilon=epsilon)
            record = record._replace(rows=(*record.rows, row))
            hooks.on_event(RoundDone(row, float(measured.info.examples)))
            check_progress(record, experiment)
            if experiment.rerank_every and record.round % experiment.rerank_every == 0:
                state = rank_again(ranking, federation, record.policy, state)
            try:
                stop = hooks.on_round(RoundEnd(row, measured.info, state))
            except BaseException:
                hooks.save(position.update(record, state), True)
                raise
            record = record._replace(over=bool(stop) or is_last(experiment, record.round))
            if record.over and program.measure:
                record = record._replace(clients=program.measure(federation, state))
            position = position.update(record, state)
            hooks.save(position, False)
    except BaseException as error:
        raise _Halted(error, record) from None
    return position


def run_round(
    program: Program, key: Key, federation: Federation, state: State, *, tested: bool
) -> tuple[State, Measured]:
    """Run one round, and evaluate it if it is time to."""
    begin = time.perf_counter()
    state, info = wait_for(program.round(key, state, federation.data))
    seconds = time.perf_counter() - begin
    return state, Measured(info, program.evaluate(state) if tested else {}, seconds)
