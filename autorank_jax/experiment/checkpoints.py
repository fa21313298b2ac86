"""Where an experiment stands, to checkpoints and back."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from autorank_jax.checkpoint import read_about, restore_state, save_state, saved_steps, step_folder
from autorank_jax.datasets import Dataset
from autorank_jax.experiment.config import BEFORE, ConfigurationError, Experiment
from autorank_jax.experiment.position import Position
from autorank_jax.experiment.results import Record, Row
from autorank_jax.experiment.setup import Federation, make_aggregator, start_state

Save = Callable[[Position, bool], None]
"""Called after every round with where the experiment stands, and whether this is the last chance to save it."""


class Checkpoints(NamedTuple):
    """Where checkpoints go, and how many."""

    folder: Path
    every: int = 0  # rounds of a run between them; 0: only when the experiment is interrupted
    keep: int = 3  # how many of the latest stay

    def due(self, number: int, *, over: bool) -> bool:
        """Return whether it is time to save after a round."""
        return bool(self.every) and (over or number % self.every == 0)


def make_save(
    checkpoints: Checkpoints | None, experiment: Experiment, dataset: Dataset, machine: Mapping[str, Any]
) -> Save:
    """Return what is called after every round: it saves when it is time to, and when there is no later chance."""
    if checkpoints is None:
        return lambda position, last_chance: None  # noqa: ARG005
    config = full_configuration(experiment, dataset)

    def save(position: Position, last_chance: bool) -> None:
        record = position.records[-1]
        if not (checkpoints.due(record.round, over=record.over) or last_chance):
            return
        records = [r._asdict() | {"rows": [row._asdict() for row in r.rows]} for r in position.records]
        extra = {
            "records": records,
            "seconds": dict(position.seconds),
            "levels": list(position.levels),
            "about": dict(machine),
        }
        arrays = {"state": position.state, "probes": position.probes}
        save_state(checkpoints.folder, arrays, step=position.rounds, config=config, extra=extra, keep=checkpoints.keep)

    return save


def restore_position(
    checkpoints: Checkpoints | None,
    experiment: Experiment,
    dataset: Dataset,
    federations: Sequence[Federation],
    machine: Mapping[str, Any],
) -> tuple[Position, tuple[str, ...]]:
    """Return where an experiment stood at its latest checkpoint, and what differs in device and versions since.

    More rounds may be asked for than before, where the result is that of asking for all of them at once.

    Raises:
        ConfigurationError: for another number of rounds where the result would be another.
        CheckpointError: for checkpoints of another experiment, damaged ones, or those of a newer version.
    """
    if checkpoints is None or not saved_steps(checkpoints.folder):
        return Position(), ()
    config = full_configuration(experiment, dataset)
    about = read_about(checkpoints.folder)
    records = tuple(Record(**r | {"rows": tuple(Row(**row) for row in r["rows"])}) for r in about.extra["records"])
    as_before = json.loads(json.dumps({**dataclasses.asdict(Experiment()), **BEFORE}))
    before = as_before | about.config
    if before == json.loads(json.dumps(config | {"rounds": before["rounds"]})):
        records = with_rounds(records, experiment, before["rounds"])
        config = dict(about.config)
    extra = read_about(checkpoints.folder, config=config).extra
    federation = next(f for f in federations if f.seed == records[-1].seed)
    rule = make_aggregator(records[-1].aggregator, experiment)
    state = start_state(experiment, federation, rule)
    probes = tuple((jnp.zeros_like(state.epoch_losses), jnp.zeros_like(state.epochs)) for _ in federations)
    like = {"state": state, "probes": probes if experiment.probed else ()}
    restored = restore_state(checkpoints.folder, like, config=config).state
    levels = tuple(extra.get("levels", ()))
    position = Position(records, restored["state"], restored["probes"], extra["seconds"], levels)
    return position, differences(extra["about"], machine)


def with_rounds(records: tuple[Record, ...], experiment: Experiment, before: int) -> tuple[Record, ...]:
    """Return the records of an experiment whose number of rounds is another than before.

    Raises:
        ConfigurationError: saying what makes that another result.
    """
    if experiment.rounds == before:
        return records
    expected = expected_rounds(records, experiment, before)
    if expected:
        raise ConfigurationError([f"rounds: expected {expected}, got {experiment.rounds}"])
    last = records[-1]
    return (last._replace(over=last.over and last.round < before, clients={}),)


def expected_rounds(records: Sequence[Record], experiment: Experiment, before: int) -> str:
    """Return which number of rounds is expected in place of an experiment's, and why; "" where it may be another.

    Of runs that are over, the state is there of the last only. Nothing that happens in a round depends on how many
    there are, but that the last is always evaluated.
    """
    rounds, last = experiment.rounds, records[-1]
    as_before = f"{before} as before, "
    if len(records) > 1:
        first = f"{records[0].policy} with {records[0].aggregator}, seed {records[0].seed}"
        return f"{as_before}as the state of {first} is not kept: only one policy, rule and seed can go on"
    if rounds <= last.round and not (experiment.rate_schedule != "constant" or experiment.dp_epsilon):
        return f"more than the {last.round} that are done"
    reasons = {
        f"as --rate-schedule {experiment.rate_schedule} goes by all rounds": experiment.rate_schedule != "constant",
        "as --dp-epsilon found its noise for so many": experiment.dp_epsilon and not experiment.dp_noise,
        "as --dp-epsilon was shared out over so many": experiment.dp_epsilon,
        "as the last of them is tested, and would not be with --eval-every": (
            last.round == before and before % experiment.eval_every
        ),
    }
    return next((as_before + reason for reason, holds in reasons.items() if holds), "")


def last_good(checkpoints: Checkpoints | None, record: Record) -> str:
    """Say which checkpoint of a run is there to go on from."""
    steps = saved_steps(checkpoints.folder) if checkpoints else []
    if checkpoints and steps:
        held = read_about(checkpoints.folder).extra["records"][-1]
        if (held["policy"], held["aggregator"], held["seed"]) == (record.policy, record.aggregator, record.seed):
            return f"the last good checkpoint is {step_folder(checkpoints.folder, steps[-1])}"
    return "no checkpoint of it was saved"


def full_configuration(experiment: Experiment, dataset: Dataset) -> dict[str, Any]:
    """Return all options and the checksum of the examples: what a checkpoint must agree in."""
    checksum = hashlib.sha256()
    for name in ("x_train", "y_train", "x_test", "y_test"):
        checksum.update(np.ascontiguousarray(getattr(dataset, name)).tobytes())
    return dataclasses.asdict(experiment) | {"checksum of the dataset": checksum.hexdigest()[:16]}


def differences(before: Mapping[str, Any], machine: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what differs in device and versions, in words."""
    then, now = _flat(before), _flat(machine)
    return tuple(f"{name} was {then.get(name)}, is {now[name]}" for name in now if then.get(name) != now[name])


def _flat(machine: Mapping[str, Any]) -> dict[str, str]:
    return {"device": machine["device"]} | dict(machine["versions"])
