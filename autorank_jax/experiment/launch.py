"""Where a command runs: virtual devices on a CPU, the GPUs of one host, or many hosts as one."""

import contextlib
import os
import platform
from importlib import metadata
from typing import Any

import jax
from jax.sharding import Mesh

from autorank_jax.engine.sharding import client_mesh
from autorank_jax.experiment.launch_options import Launch
from autorank_jax.experiment.mistakes import ConfigurationError

HEARTBEAT_SECONDS = 20
"""A process that is silent for so long is taken for dead, and the others end."""

_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds"
_FORCED = "--xla_force_host_platform_device_count"
_THREADS = "OPENBLAS_NUM_THREADS"  # of LAPACK on a CPU, on which the last bits of a decomposition depend


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
    if mesh.devices.size == 1:
        return None
    if jax.default_backend() == "cpu":  # every device decomposes by itself: more threads than cores would spin
        os.environ.setdefault(_THREADS, "1")  # heeded, as the library is loaded by the first decomposition
    return mesh


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
    if first.platform == "cpu" and _THREADS in os.environ:
        device += f", LAPACK threads: {os.environ[_THREADS]}"
    packages = ("autorank-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}
    return {"device": device if mesh is None else f"{device}, {mesh.devices.size} devices", "versions": versions}
