"""The probe of an experiment: one local training of every client, thrown away but for its losses."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from autorank_jax.adapters import max_ranks
from autorank_jax.adapters.lora import equal_ranks
from autorank_jax.engine.probe import discard, part_of
from autorank_jax.experiment.compiling import CompiledRound, compile_training
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.events import OnEvent, Stage
from autorank_jax.experiment.setup import Federation, make_aggregator, start_state
from autorank_jax.experiment.waiting import wait_for
from autorank_jax.types import Array


def compile_probe(
    experiment: Experiment,
    federation: Federation,
    mesh: Mesh | None,
    levels: Sequence[Mapping[str, int]],
    on_event: OnEvent,
    *,
    total: int,
) -> CompiledRound:
    """Compile what the probe runs: the round of the first rule where it will do, else one that keeps nothing.

    It will not where some clients stay away, where the rule lets clients train only a part, and where the levels that
    are expected are other than one: they may turn out otherwise, and all clients of the probe have the same rank.
    """
    name, widest = experiment.aggregators[0], max_ranks(federation.task)
    rule = make_aggregator(name, experiment)
    partial = any(flag is not True for flag in rule.trains(rule.init(federation.task.server)))
    chosen = experiment.rank_levels == "auto" and list(levels) != [widest]
    if not (experiment.eventful or partial or chosen):
        on_event(Stage("compiling", 1, total, told=True))
        return compile_training(experiment, name, federation, mesh, levels)
    on_event(Stage("compiling the probe"))
    calm = dataclasses.replace(experiment, participation=1.0, sampling="uniform", drop_out=0.0, stragglers=0.0)
    width = {path: int(rank[0]) for path, rank in equal_ranks(widest, 1, experiment.probe_ratio).items()}
    return compile_training(calm, "probe", federation, mesh, [width], rule=discard())


def probe(
    experiment: Experiment, compiled: CompiledRound, federations: Sequence[Federation]
) -> tuple[tuple[Array, Array], ...]:
    """Return every seed's loss curves and their lengths: one round of all clients at one rank, thrown away."""
    curves = []
    for federation in federations:
        clients = federation.data.size.shape[0]
        ranks = equal_ranks(max_ranks(federation.task), clients, experiment.probe_ratio)
        state = start_state(experiment, federation, compiled.rule, ranks)
        epochs = jnp.asarray(experiment.probe_epochs, jnp.int32)
        state = state._replace(hparams=state.hparams | {"local_epochs": epochs})
        key = federation.keys["probe"]
        state, _ = compiled.run(key, state, part_of(key, federation.data, experiment.probe_share))
        curves.append(wait_for((state.epoch_losses, state.epochs)))  # or ranking would wait for it
    return tuple(curves)
