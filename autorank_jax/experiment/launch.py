"""Where a command runs: virtual devices on a CPU, the GPUs of one host, or many hosts as one."""

import contextlib
import os
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

from autorank_jax.engine.lane_count import free_memory
from autorank_jax.engine.sharding import client_mesh, replicate
from autorank_jax.experiment.launch_options import Launch
from autorank_jax.experiment.mistakes import ConfigurationError
from autorank_jax.types import Array, FederatedData, Key, RoundFn, RoundInfo, State

HEARTBEAT_SECONDS = 20
"""A process that is silent for so long is taken for dead, and the others end."""

_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds"
_FORCED = "--xla_force_host_platform_device_count"


def start(launch: Launch, *, cohort: int) -> Mesh | None:
    """Bring devices and processes up, before anything else touches JAX's devices.

    Args:
        launch: the options.
        cohort: clients that take part in a round; a CPU is not split into more devices.

    Returns:
        The devices to train on; None for the one device of one process.

    Raises:
        ConfigurationError: for options that contradict each other, more devices than there are, or processes that do
            not find each other.
    """
    launch.validate()
    flags = os.environ.get("XLA_FLAGS", "")
    if _PATIENCE not in flags:  # a virtual device that waits for others over a minute would abort the process
        os.environ["XLA_FLAGS"] = f"{flags} {_PATIENCE}=86400".strip()
    wanted = launch.devices or max(1, min(_cores(), cohort))
    if _FORCED not in flags:
        with contextlib.suppress(RuntimeError):  # JAX is up already: its devices are what there is
            jax.config.update("jax_num_cpu_devices", wanted)
    if launch.distributed:
        _join(launch)
    mesh = client_mesh(_first_of_each(launch.devices))
    return None if mesh.devices.size == 1 else mesh


def _cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _join(launch: Launch) -> None:
    """Wait for all processes."""
    try:
        jax.distributed.initialize(
            launch.coordinator or None,
            launch.num_processes,
            launch.process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError([f"distributed: expected processes that find each other, got: {reason}"]) from error


def _first_of_each(count: int) -> list[jax.Device]:
    """Return the first devices of every process, all where `count` is 0."""
    chosen: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        chosen.setdefault(device.process_index, []).append(device)
    fewest = min(map(len, chosen.values()))
    if jax.default_backend() == "cpu" and _FORCED not in os.environ.get("XLA_FLAGS", ""):
        fewest = min(fewest, _cores())  # of virtual devices there are as many as were asked for
    if count > fewest:
        raise ConfigurationError([f"devices: expected at most the {fewest} that there are, got {count}"])
    return [device for devices in chosen.values() for device in devices[: count or None]]


def is_first() -> bool:
    """Return whether this process shows progress and writes files."""
    return jax.process_index() == 0


def describe_machine(mesh: Mesh | None) -> dict[str, Any]:
    """Return `device`, in words, and `versions`, of Python and the packages that results depend on."""
    first = jax.devices()[0]
    device = f"{first.device_kind}, {os.cpu_count()} cores" if first.platform == "cpu" else first.device_kind
    packages = ("autorank-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    return {"device": device if mesh is None else f"{device}, {mesh.devices.size} devices", "versions": versions}


def fits(compiled: Any) -> bool:
    """Return whether a compiled program's results and temporaries fit into what is free of the device's memory.

    A device that does not tell, and a program that is not said to need any, always fit.
    """
    free, analysis = free_memory(), getattr(compiled, "memory_analysis", None)
    needed = None if analysis is None else analysis()
    return free is None or needed is None or needed.temp_size_in_bytes + needed.output_size_in_bytes <= free


def compile_fitting(
    make: Callable[..., RoundFn],
    lanes: int,
    mesh: Mesh | None,
    arguments: tuple[Key, State, FederatedData],
    *,
    fixed: bool,
) -> tuple[RoundFn, int]:
    """Compile a round with fewer lanes until it fits into memory, unless their number is fixed; return it with them."""
    run = compile_round(make(lanes=lanes), mesh, *arguments)
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
        return jax.jit(round_fn).lower(key, state, data).compile()
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
