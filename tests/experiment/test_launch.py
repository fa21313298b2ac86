"""Where a command runs: options, and the command line in two processes, one of which is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

from autorank_jax.checkpoint import saved_steps, step_folder
from autorank_jax.engine import sharding
from autorank_jax.experiment import compiling, launch
from autorank_jax.experiment.config import ConfigurationError
from tests import QUICK

OPTIONS = {
    "dataset": "synthetic", "clients": "5", "split": "dirichlet_lognormal", "hidden": "6", "rounds": "40",
    "local-epochs": "1", "criteria": "size", "rank-levels": "1", "rank-policies": "autorank", "targets": "0.5",
    "checkpoint-every": "1", "devices": "1",
}  # fmt: skip
RUN = ["run", *(word for name, value in OPTIONS.items() for word in (f"--{name}", value))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": -1}, "devices: expected a whole number of at least 0, got -1"),
        ({"coordinator": "here:1"}, "expected only with --distributed"),
        ({"distributed": True, "process_id": 0}, "expected all three or none"),
        (
            {"distributed": True, "coordinator": "here:1", "num_processes": 2, "process_id": 2},
            "process-id: expected a whole number of at least 0 and at most 1, got 2",
        ),
        ({"devices": 99}, "devices: expected at most the "),
    ],
)
def test_mistakes_are_named(options, message):
    jax.devices()  # no more of them from here on
    with pytest.raises(ConfigurationError, match=message):
        launch.start(launch.Launch(**options), cohort=3)


def test_one_device_needs_no_mesh_and_all_make_one():
    assert launch.start(launch.Launch(devices=1), cohort=3) is None
    mesh = launch.start(launch.Launch(), cohort=3)
    assert (1 if mesh is None else mesh.devices.size) == jax.device_count()


def test_on_a_cpu_collectives_are_patient_and_every_device_decomposes_by_itself(monkeypatch):
    jax.devices()  # JAX reads the flags once
    monkeypatch.setenv("XLA_FLAGS", "--some_flag=1")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    launch.start(launch.Launch(devices=1), cohort=3)
    assert "OPENBLAS_NUM_THREADS" not in os.environ
    launch.start(launch.Launch(devices=2), cohort=3)
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")  # the user's own
    mesh = launch.start(launch.Launch(devices=2), cohort=3)
    assert os.environ["OPENBLAS_NUM_THREADS"] == "7"
    assert launch.describe_machine(mesh)["device"].endswith("LAPACK threads: 7, 2 devices")
    assert os.environ["XLA_FLAGS"] == "--some_flag=1 --xla_cpu_collective_call_terminate_timeout_seconds=86400"


def test_a_compiled_round_takes_and_returns_what_lies_here():
    mesh, seen = sharding.client_mesh(), []

    def round_fn(key, state, data):
        seen.append(1)
        draw = jax.random.uniform(key)

        def one(state, data):
            return state + jax.lax.psum(data, "clients"), draw

        spec = PartitionSpec()
        return jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(state, data)

    key, state, data = jax.random.key(0), jnp.zeros(3), jnp.ones(3)
    run = compiling.compile_round(round_fn, mesh, key, state, data)
    first, _ = run(key, state, data)
    second, draw = run(key, first, data)
    np.testing.assert_array_equal(second, np.full(3, 2.0 * mesh.devices.size))
    third, _ = run(key, first + 1, data)
    np.testing.assert_array_equal(third, second + 1)
    assert second.devices() == draw.devices() == {jax.local_devices()[0]}
    assert len(seen) == 1


def test_without_compilation_a_run_says_so():
    with jax.disable_jit(), pytest.raises(ConfigurationError, match="JAX_DISABLE_JIT=1: unset it"):
        compiling.compile_round(lambda *given: given, None, jax.random.key(0), jnp.zeros(3), jnp.ones(3))


# -------------------------------------------------------------------------------------------------------- two processes


def start_two(*options):
    """Start the command line in two processes."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    together = ["--distributed", "--coordinator", f"localhost:{port}", "--num-processes", "2"]
    flags = {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "autorank_jax", *options, *together, "--process-id", str(number)],
            env=os.environ | flags,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


def end(processes, seconds=300):
    try:
        return [(process.communicate(timeout=seconds), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def history(folder):
    rows = json.loads((folder / "history.json").read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def last_arrays(folder):
    """Return the arrays of the latest checkpoint."""
    path = step_folder(folder / "checkpoints", saved_steps(folder / "checkpoints")[-1])
    return ocp.PyTreeCheckpointer().restore(path / "arrays")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert [code for _, code in end(start_two(*RUN, "--out", str(folder)))] == [0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_which_can_be_resumed(victim, whole, tmp_path):
    folder = tmp_path / "killed"
    processes = start_two(*RUN, "--out", str(folder))
    while not list(folder.glob("checkpoints/step_*")):
        assert processes[0].poll() is None, end(processes)
        time.sleep(0.01)
    processes[victim].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    (_, problems), code = end(processes, seconds=60)[1 - victim]
    assert time.monotonic() - begin < 60
    assert code in ((-signal.SIGABRT, 4) if victim == 0 else (4,)), problems
    said = [line for line in problems.splitlines() if line.startswith("autorank-jax: ")]  # XLA's threads write as well
    assert "another process ended or cannot be reached" in said[-1], problems
    assert "Traceback" not in problems
    assert not (folder / "history.json").exists()
    results = end(start_two("run", "--resume", str(folder), "--devices", "1"))
    assert [code for _, code in results] == [0, 0], results
    assert "Written to" in results[0][0][0]
    assert "Written to" not in results[1][0][0]
    assert history(folder) == history(whole)
    jax.tree.map(np.testing.assert_array_equal, last_arrays(folder), last_arrays(whole))


@pytest.mark.parametrize(("free", "does"), [(None, True), (12, True), (11, False)])
def test_a_program_that_needs_more_than_is_free_does_not_fit(free, does, monkeypatch):
    memory = SimpleNamespace(temp_size_in_bytes=7, output_size_in_bytes=5)
    monkeypatch.setattr(compiling, "free_memory", lambda: free)
    assert compiling.fits(SimpleNamespace(memory_analysis=lambda: memory)) is does
    assert compiling.fits(lambda: None)


@pytest.mark.parametrize(("fixed", "lanes"), [(False, 2), (True, 8)])
def test_lanes_are_halved_until_a_round_fits(fixed, lanes, monkeypatch):
    monkeypatch.setattr(compiling, "compile_round", lambda made, *_: made)
    monkeypatch.setattr(compiling, "fits", lambda made: made <= 3)
    found = compiling.compile_fitting(lambda lanes: lanes, 8, None, (), fixed=fixed)
    assert found == (lanes, lanes)


@pytest.mark.parametrize(("message", "fixed"), [("RESOURCE_EXHAUSTED: memory", True), ("INTERNAL: else", False)])
def test_a_compiler_that_finds_no_memory_gets_fewer_lanes(message, fixed, monkeypatch):
    def refuse(lanes, *_):
        if lanes > 3:
            raise jax.errors.JaxRuntimeError(message)
        return lanes

    monkeypatch.setattr(compiling, "compile_round", refuse)
    monkeypatch.setattr(compiling, "fits", lambda _: True)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        compiling.compile_fitting(lambda lanes: lanes, 8, None, (), fixed=fixed)
    if fixed:
        assert compiling.compile_fitting(lambda lanes: lanes, 8, None, (), fixed=False) == (2, 2)
