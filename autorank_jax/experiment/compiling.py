"""Rounds, compiled ahead with as many lanes as fit."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from autorank_jax.engine import compile_ahead, make_local_training, make_round
from autorank_jax.engine.lane_count import free_memory
from autorank_jax.engine.sharding import replicate
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.mistakes import ConfigurationError
from autorank_jax.experiment.setup import (
    Federation,
    lane_count,
    make_aggregator,
    make_faults,
    make_optimizer,
    make_participation,
    start_state,
)
from autorank_jax.federated import by_examples, equally
from autorank_jax.types import Aggregator, Array, FederatedData, Key, RoundFn, RoundInfo, State


class CompiledRound(NamedTuple):
    """One compiled round, and what it was compiled for."""

    run: RoundFn
    experiment: Experiment
    name: str  # of the rule
    rule: Aggregator
    levels: tuple[Mapping[str, int], ...]
    lanes: int
    seconds: float


def serves(compiled: CompiledRound, experiment: Experiment, name: str, levels: Sequence[Mapping[str, int]]) -> bool:
    """Return whether a round was compiled for a rule of an experiment and for these levels."""
    return (compiled.experiment, compiled.name, compiled.levels) == (experiment, name, tuple(levels))


def fits(compiled: Any) -> bool:
    """Return whether a compiled program's results and temporaries fit into what is free of the device's memory.

    A device that does not tell, and a program that is not said to need any, always fit.
    """
    free, analysis = free_memory(), getattr(compiled, "memory_analysis", None)
    needed = None if analysis is None else analysis()
    return free is None or needed is None or needed.temp_size_in_bytes + needed.output_size_in_bytes <= free


def compile_training(
    experiment: Experiment,
    name: str,
    federation: Federation,
    mesh: Mesh | None,
    levels: Sequence[Mapping[str, int]],
    *,
    rule: Aggregator | None = None,
) -> CompiledRound:
    """Compile one round of a rule, by name where it is none of one's own."""
    begin = time.perf_counter()
    rule = rule or make_aggregator(name, experiment)
    local = make_local_training(federation.task, make_optimizer(experiment), batch_size=experiment.batch_size)
    devices = 1 if mesh is None else mesh.devices.size
    by_size = experiment.sampling == "by_size" and experiment.cohort < experiment.clients
    lanes = lane_count(experiment, federation, cohort=experiment.cohort, devices=devices)
    make = functools.partial(
        make_round,
        local,
        rule,
        rank_levels=levels,
        participation=make_participation(experiment),
        weigh=equally if by_size else by_examples,
        faults=make_faults(experiment),
        mesh=mesh,
    )
    state = start_state(experiment, federation, rule)
    arguments = federation.keys["training"], state, federation.data
    run, lanes = compile_fitting(make, lanes, mesh, arguments, fixed=experiment.lanes != "auto")
    return CompiledRound(run, experiment, name, rule, tuple(levels), lanes, time.perf_counter() - begin)


def compile_fitting(
    make: Callable[..., RoundFn],
    lanes: int,
    mesh: Mesh | None,
    arguments: tuple[Key, State, FederatedData],
    *,
    fixed: bool,
) -> tuple[RoundFn, int]:
    """Compile a round with fewer lanes until it fits into memory, unless their number is fixed; return it with them."""
    try:
        run = compile_round(make(lanes=lanes), mesh, *arguments)
    except jax.errors.JaxRuntimeError as error:  # some compilers find out themselves
        if fixed or lanes == 1 or "RESOURCE_EXHAUSTED" not in str(error):
            raise
    else:
        if fixed or lanes == 1 or fits(run):
            return run, lanes
    return compile_fitting(make, lanes // 2, mesh, arguments, fixed=False)


def compile_round(round_fn: RoundFn, mesh: Mesh | None, key: Key, state: State, data: FederatedData) -> RoundFn:
    """Compile a round for arguments like these.

    What it takes and returns lies on this process's first device: nobody else need know of a mesh. Data, and
    what the latest round left, are on all devices already and are not copied again.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise ConfigurationError(["expected JAX to compile, got JAX_DISABLE_JIT=1: unset it, runs are compiled ahead"])
    if mesh is None:
        return compile_ahead(round_fn, key, state, data)
    placed: dict[int, tuple[Array, Array]] = {}  # by identity of the array: the array, and its copy on all devices
    left: dict[int, tuple[Array, Array]] = {}  # likewise

    def place(leaf: Array) -> Array:
        one, everywhere = (placed | left).get(id(leaf), (None, leaf))
        return everywhere if one is leaf else replicate(leaf, mesh)

    def hold(data: FederatedData) -> FederatedData:
        placed.update({id(leaf): (leaf, place(leaf)) for leaf in jax.tree.leaves(data)})
        return jax.tree.map(place, data)

    compiled = jax.jit(round_fn).lower(*jax.tree.map(place, (key, state)), hold(data)).compile()

    def run(key: Key, state: State, data: FederatedData) -> tuple[State, RoundInfo]:
        result = compiled(*jax.tree.map(place, (key, state)), hold(data))
        here = jax.tree.map(lambda leaf: leaf.addressable_data(0), result)
        left.clear()
        left.update({id(one): (one, many) for one, many in zip(*map(jax.tree.leaves, (here, result)), strict=True)})
        return here

    run.memory_analysis = compiled.memory_analysis  # type: ignore[attr-defined]  # for `fits`
    return run
