"""The host loop: round after round of one run, each by the same compiled program, with checkpoints between them."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.adapters import lora
from autorank_jax.engine import simulation
from autorank_jax.experiment.config import PERSONAL_RULES, Experiment
from autorank_jax.experiment.costs import Charge, Meter
from autorank_jax.experiment.events import OnEvent, RoundDone
from autorank_jax.experiment.personal import Measure
from autorank_jax.experiment.ranking import PROBE_POLICIES, Ranker
from autorank_jax.experiment.results import Costs, Results, Row, Run, Scores
from autorank_jax.experiment.setup import Federation
from autorank_jax.types import Aggregator, Array, EvaluateFn, RoundFn, RoundInfo, State

PATIENCE = 3
"""Rounds in a row in which every client that trains may send something non-finite, before a run has diverged."""


class Program(NamedTuple):
    """What is compiled for one aggregator."""

    name: str
    rule: Aggregator
    round: RoundFn
    evaluate: EvaluateFn
    measure: Measure | None = None  # of the clients' own accuracy, after the last round


class Record(NamedTuple):
    """The rounds of one run so far."""

    policy: str
    aggregator: str
    seed: int
    rows: tuple[Row, ...] = ()
    over: bool = False
    clients: Mapping[str, Mapping[str, float]] = {}  # their own accuracy at the end, where it was asked for


class DivergedError(RuntimeError):
    """A run that trains for nothing, as its loss is no number any more. The message is one line."""

    def __init__(self, message: str, record: Record, results: Results | None = None) -> None:
        """Keep the rounds of the run, and what was found so far, these included."""
        self.record = record
        self.results = results
        super().__init__(message)


class Book(NamedTuple):
    """Where an experiment stands: all that a checkpoint has to hold."""

    records: tuple[Record, ...] = ()  # in the order of the runs; only the last may not be over
    state: State | None = None  # of the last record's run
    probes: tuple[tuple[Array, Array], ...] = ()  # (epoch_losses, epochs) of every seed, where there was a probe
    seconds: Mapping[str, float] = {}  # spent compiling, by aggregator

    @property
    def rounds(self) -> int:
        """Rounds of all runs together."""
        return sum(len(record.rows) for record in self.records)


class RoundEnd(NamedTuple):
    """What `on_round` is told."""

    row: Row  # as in the history
    info: RoundInfo
    state: State


OnRound = Callable[[RoundEnd], bool | None]
"""Called after every round, for logging and early stopping: True ends the run, the next one goes on."""
Save = Callable[[Book, bool], None]
"""Called after every round with where the experiment stands, and whether this is the last chance to save it."""


class Measured(NamedTuple):
    """What one round gave."""

    info: RoundInfo
    metrics: Mapping[str, Array]
    seconds: float


class Job(NamedTuple):
    """What all runs under one aggregator share."""

    experiment: Experiment
    program: Program
    ranker: Ranker
    meter: Meter
    on_event: OnEvent
    on_round: OnRound
    save: Save


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
        clients=clients,
    )


def first_ranks(scores: Scores, policy: str) -> dict[str, Array]:
    """Return the ranks a policy begins with."""
    return {path: jnp.asarray(rank, jnp.int32) for path, rank in scores.ranks[policy].items()}


def run_policy(job: Job, federation: Federation, scores: Scores, book: Book) -> Book:
    """Run what is left of the last record's run: all its rounds, or those that a checkpoint did not hold.

    Raises:
        DivergedError: naming run and round, if the loss is no number any more.
    """
    experiment, record, state = job.experiment, book.records[-1], book.state
    charged = scores.probe_flops if record.policy in PROBE_POLICIES else 0.0
    if state is None:
        state = start_state(experiment, federation, job.program.rule, first_ranks(scores, record.policy))
        if book.probes:  # until a client's first round, its curve is that of the probe
            losses, epochs = book.probes[experiment.all_seeds.index(record.seed)]
            state = state._replace(epoch_losses=losses, epochs=epochs)
    while not record.over:
        charge = job.meter(federation.keys["training"], state, federation.data)
        state, measured = run_round(job, federation, len(record.rows) + 1, state)
        row = make_row(record, measured, charge, charged)
        record = record._replace(rows=(*record.rows, row))
        job.on_event(RoundDone(row, float(measured.info.examples)))
        check_progress(record, experiment)
        if experiment.rerank_every and len(record.rows) % experiment.rerank_every == 0:
            state = rank_again(job, federation, record.policy, state)
        book = book._replace(records=(*book.records[:-1], record), state=state)
        try:
            stop = job.on_round(RoundEnd(row, measured.info, state))
        except BaseException:
            job.save(book, True)
            raise
        record = record._replace(over=bool(stop) or len(record.rows) >= experiment.rounds)
        if record.over and job.program.measure:
            record = record._replace(clients=job.program.measure(federation, state))
        book = book._replace(records=(*book.records[:-1], record))
        job.save(book, False)
    return book


def finished_run(record: Record, scores: Scores, costs: Costs) -> Run:
    """Sum up a run that is over."""
    ratios = scores.ratios[record.policy]
    by_examples = float(np.average(ratios, weights=scores.size))
    charged = scores.probe_flops if record.policy in PROBE_POLICIES else 0.0
    name = (record.policy, record.aggregator, record.seed)
    return Run(*name, record.rows, costs, float(ratios.mean()), by_examples, charged, record.clients)


def run_round(job: Job, federation: Federation, number: int, state: State) -> tuple[State, Measured]:
    """Run one round, and evaluate it if it is time to."""
    begin = time.perf_counter()
    state, info = job.program.round(federation.keys["training"], state, federation.data)
    jax.block_until_ready((state, info))
    seconds = time.perf_counter() - begin
    due = evaluated(job.experiment, job.program.name, number)
    return state, Measured(info, job.program.evaluate(state) if due else {}, seconds)


def evaluated(experiment: Experiment, aggregator: str, number: int) -> bool:
    """Return whether the server is tested after a round: when it is time to, and if there is one model of all."""
    due = number % experiment.eval_every == 0 or number == experiment.rounds
    return due and aggregator not in PERSONAL_RULES


def make_row(record: Record, measured: Measured, charge: Charge, charged: float) -> Row:
    """Make the row of the round after those of a record, with its charge; `charged` was spent before the first."""
    info, metrics, seconds = measured
    spent, sent = (record.rows[-1].train_flops, record.rows[-1].bytes) if record.rows else (charged, 0.0)
    participants, dropped, excluded = int(info.participants), int(info.dropped), int(info.excluded)
    return Row(
        policy=record.policy,
        aggregator=record.aggregator,
        seed=record.seed,
        round=len(record.rows) + 1,
        accuracy=_number(metrics.get("accuracy")),
        loss=_number(metrics.get("loss")),
        train_loss=_number(info.loss) if info.examples > 0 else None,
        participants=participants,
        dropped=dropped,
        excluded=excluded,
        cut_short=int(info.cut_short),
        reported=participants - dropped - excluded,
        train_flops=spent + charge.flops,
        bytes=sent + charge.bytes_up + charge.bytes_down,
        seconds=round(seconds, 6),
    )


def check_progress(record: Record, experiment: Experiment) -> None:
    """Stop a run that trains for nothing.

    Raises:
        DivergedError: if the model's loss is not finite, or nobody has sent a finite update for `PATIENCE` rounds.
    """
    row = record.rows[-1]
    due = evaluated(experiment, record.aggregator, row.round)
    lost = [r.excluded > 0 and r.reported == 0 for r in record.rows[-PATIENCE:]]
    if (due and row.loss is None) or (row.reported and row.train_loss is None):
        what = "the loss is not finite any more"
    elif len(lost) == PATIENCE and all(lost):
        what = f"no client has sent a finite update for {PATIENCE} rounds"
    else:
        return
    raise DivergedError(
        f"{record.policy} with {record.aggregator}, seed {record.seed}: {what} in round {row.round}; probably the "
        f"learning rate {experiment.learning_rate:g} is too large",
        record,
    )


def rank_again(job: Job, federation: Federation, policy: str, state: State) -> State:
    """Set new ranks from the loss curves of each client's latest round, or of the probe where there was none yet."""
    stats = federation.stats._replace(epoch_losses=state.epoch_losses, epochs=state.epochs)
    ranked, _ = job.ranker(jax.random.fold_in(federation.keys["policy"], state.round), stats)
    return state._replace(ranks=ranked[policy].ranks)


def _number(value: Array | None) -> float | None:
    """Return a finite number to the digits that float32 holds, else None: JSON knows no NaN."""
    return float(f"{float(value):.6g}") if value is not None and np.isfinite(value) else None
