"""Where an experiment stands: the rounds of every run so far, and the state to go on from."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.costs import RoundCost
from autorank_jax.experiment.names import PERSONAL_RULES
from autorank_jax.experiment.results import Costs, DivergedError, Record, Row, Run, Scores
from autorank_jax.types import Array, RoundInfo, State

PATIENCE = 3
"""Rounds in a row in which every client that trains may send something non-finite, before a run has diverged."""


class Position(NamedTuple):
    """All that a checkpoint has to hold."""

    records: tuple[Record, ...] = ()  # in the order of the runs; only the last may not be over
    state: State | None = None  # of the last record's run; None where there is no run yet
    probes: tuple[tuple[Array, Array], ...] = ()  # (epoch_losses, epochs) of every seed, where there was a probe
    seconds: Mapping[str, float] = {}  # spent compiling, by aggregation rule
    levels: tuple[Mapping[str, int], ...] = ()  # rank levels: widths by path, ascending; empty until they are chosen

    @property
    def rounds(self) -> int:
        """Rounds of all runs together."""
        return sum(record.round for record in self.records)

    def needs_rounds(self, experiment: Experiment, name: str) -> bool:
        """Return whether a rule has rounds left to run."""
        over = sum(record.over for record in self.records if record.aggregator == name)
        return over < len(experiment.rank_policies) * experiment.seeds

    def begin(self, record: Record, state: State) -> "Position":
        """Begin a run, from the state before its first round."""
        return self._replace(records=(*self.records, record), state=state)

    def update(self, record: Record, state: State) -> "Position":
        """Replace the last record, and the state that belongs to it."""
        return self._replace(records=(*self.records[:-1], record), state=state)


class RoundEnd(NamedTuple):
    """What `on_round` is told."""

    row: Row  # as in the history
    info: RoundInfo
    state: State


OnRound = Callable[[RoundEnd], bool | None]
"""Called after every round, for logging and early stopping: True ends the run, the next one goes on."""


class Measured(NamedTuple):
    """What one round gave."""

    info: RoundInfo
    metrics: Mapping[str, Array]  # on the test set; {} in rounds without evaluation
    seconds: float  # of training


def is_evaluated(experiment: Experiment, aggregator: str, number: int) -> bool:
    """Return whether the server is tested after a round: when it is time to, and if there is one model of all."""
    due = number % experiment.eval_every == 0 or is_last(experiment, number)
    return due and aggregator not in PERSONAL_RULES


def is_last(experiment: Experiment, number: int) -> bool:
    """Return whether no round follows: all are done, or the next would spend more than the budget of privacy."""
    if number >= experiment.rounds:
        return True
    privacy = experiment.privacy
    return privacy is not None and privacy.spent(number + 1) > privacy.epsilon


def next_row(record: Record, measured: Measured, cost: RoundCost, *, probe_flops: float, epsilon: float | None) -> Row:
    """Make the row of the round after those of a record; `probe_flops` were spent before the first, ε after it."""
    info, metrics, seconds = measured
    spent, sent = (record.rows[-1].train_flops, record.rows[-1].bytes) if record.rows else (probe_flops, 0.0)
    participants, dropped, excluded = int(info.participants), int(info.dropped), int(info.excluded)
    return Row(
        policy=record.policy,
        aggregator=record.aggregator,
        seed=record.seed,
        round=record.round + 1,
        accuracy=_number(metrics.get("accuracy", metrics.get("r2"))),
        loss=_number(metrics.get("loss")),
        train_loss=_number(info.loss) if info.examples > 0 else None,
        participants=participants,
        dropped=dropped,
        excluded=excluded,
        cut_short=int(info.cut_short),
        reported=participants - dropped - excluded,
        train_flops=spent + cost.flops,
        bytes=sent + cost.bytes_up + cost.bytes_down,
        seconds=round(seconds, 6),
        epsilon=None if epsilon is None else rounded_up(epsilon),
    )


def rounded_up(epsilon: float) -> float:
    """Return ε to four digits, never less than was spent."""
    near = float(f"{epsilon:.4g}")
    if near >= epsilon:
        return near
    return float(f"{near + 10.0 ** (math.floor(math.log10(epsilon)) - 3):.4g}")


def check_progress(record: Record, experiment: Experiment) -> None:
    """Stop a run that trains for nothing.

    Raises:
        DivergedError: if the model's loss is not finite, or nobody has sent a finite update for `PATIENCE` rounds,
            or in all rounds where there are fewer.
    """
    row = record.rows[-1]
    tested = is_evaluated(experiment, record.aggregator, row.round)
    lost = [r.excluded > 0 and r.reported == 0 for r in record.rows[-PATIENCE:]]
    if (tested and row.loss is None) or (row.reported and row.train_loss is None):
        what = "the loss is not finite any more"
    elif len(lost) == min(PATIENCE, experiment.rounds) and all(lost):
        what = f"no client has sent a finite update for {len(lost)} round{'s' * (len(lost) > 1)}"
    else:
        return
    raise DivergedError(
        f"{record.policy} with {record.aggregator}, seed {record.seed}: {what} in round {row.round}; probably the "
        f"learning rate {experiment.learning_rate:g} is too large",
        record,
    )


def finish_run(record: Record, scores: Scores, costs: Costs, probe_flops: float) -> Run:
    """Sum up a run that is over; `probe_flops` are charged to its policy."""
    ratios = scores.ratios[record.policy]
    return Run(
        policy=record.policy,
        aggregator=record.aggregator,
        seed=record.seed,
        rows=record.rows,
        costs=costs,
        ratio_by_clients=float(ratios.mean()),
        ratio_by_examples=float(np.average(ratios, weights=scores.size if scores.size.any() else None)),
        probe_flops=probe_flops,
        clients=record.clients,
    )


def _number(value: Array | None) -> float | None:
    """Return a finite number to the digits that float32 holds, else None: JSON knows no NaN."""
    return float(f"{float(value):.6g}") if value is not None and np.isfinite(value) else None
