"""Many devices and processes: the same result as one, evenly loaded, and gone together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from autorank_jax import aggregators
from autorank_jax.engine import sharding
from autorank_jax.engine.round import make_round
from autorank_jax.types import LocalTraining
from tests import QUICK
from tests.engine import device_cases as small

in_64_bit = pytest.mark.usefixtures("x64", "standard_promotion")
needs_two = pytest.mark.skipif(jax.device_count() < 2, reason="XLA_FLAGS of the environment give one device")


# ------------------------------------------------------------------------------------------------------- processes


def start(call, *, devices=None):
    """Start a process that calls a function of `device_cases`."""
    flags = QUICK + (f" --xla_force_host_platform_device_count={devices}" if devices else "")
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", f"from tests.engine import device_cases as f; f.{call}"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, seconds=500):
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.mark.slow
def test_many_devices_give_the_round_of_one():
    assert finish(start("compare_devices()", devices=8)) == (0, "equal\n", "")


@pytest.mark.slow
def test_devices_get_equal_shares():
    code, out, err = finish(start("count_steps()", devices=8))
    assert code == 0, err
    steps = np.array(out.split(), int)
    assert len(steps) == 8
    assert steps.max() <= 1.05 * steps.mean(), steps


@pytest.mark.slow
def test_two_processes_give_the_round_of_one():
    port = free_port()
    processes = [start(f"be_one_process({port}, {number})") for number in range(2)]
    results = [finish(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert all(out.endswith("done\n") for _, out, _ in results)


@pytest.mark.slow
def test_checkpoints_move_between_one_and_four_devices(tmp_path):
    code, out, err = finish(start(f"resume_elsewhere({str(tmp_path)!r})", devices=4))
    assert (code, out) == (0, "equal\n"), err


# ----------------------------------------------------------------------------------------------------- balanced shards


def test_sharding_is_longest_first_to_the_least_loaded():
    cost = jnp.array([3.0, 7.0, 5.0, 6.0, 4.0, 0.0])
    np.testing.assert_array_equal(
        sharding.assign(cost, 2)[:5], [0, 0, 1, 1, 0]
    )  # 7 | 6, 7 | 6+5, 7+4 | 11, the tie to the first
    np.testing.assert_array_equal(sharding.assign(cost, 1), np.zeros(6))


@pytest.mark.parametrize("devices", [2, 8, 64])
@pytest.mark.parametrize("clients", [1000, 20_000])
@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
def test_large_cohorts_are_sharded_in_pieces_of_even_cost(sigma, clients, devices):
    cost = jnp.exp(sigma * jax.random.normal(jax.random.key(1), (clients,)))
    device = np.asarray(sharding.assign(cost, devices))
    load = np.bincount(device, weights=cost, minlength=devices)
    assert load.max() <= max(1.05 * load.mean(), 1.001 * cost.max())
    assert np.bincount(device, minlength=devices).min() > 0


def test_cost_of_a_step_rises_with_the_width():
    trainable = small.make_task().server.trainable
    assert sharding.step_cost(trainable, {"layer": 4}) - sharding.step_cost(trainable, {"layer": 2}) == 6 * 2 * (5 + 3)


def test_other_meshes_are_refused():
    untrained = LocalTraining(*[lambda *given: given] * 3, 1)
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    for make in (
        lambda: make_round(untrained, aggregators.rbla(), mesh=mesh),
        lambda: sharding.owned_data(mesh, np.zeros(2), np.zeros(2), [[0], [1]]),
    ):
        with pytest.raises(ValueError, match="expected a mesh of the one axis 'clients', got"):
            make()


# ------------------------------------------------------------------------------------------------------ owned data


@needs_two
def test_every_device_holds_its_own_clients_only():
    mesh = sharding.client_mesh()
    inputs, targets, parts = small.make_parts()
    inputs = inputs.astype(np.float32)
    data = sharding.owned_data(mesh, inputs, targets, parts, owner=np.arange(len(parts)) % 2)
    shards = [np.asarray(shard.data) for shard in data.inputs.addressable_shards]
    for row, part in enumerate(parts):
        first = int(data.start[row])
        np.testing.assert_array_equal(shards[row % 2][first : first + len(part)], inputs[part])
    held = [sum(map(len, parts[number::2])) for number in range(2)]
    assert [len(shard) for shard in shards] == [max(held)] * 2
    np.testing.assert_array_equal(shards[np.argmin(held)][min(held) :], 0)


def test_owned_data_refuses_what_it_cannot_place():
    mesh, (inputs, targets, parts) = sharding.client_mesh(), small.make_parts()
    with pytest.raises(ValueError, match="expected owner as 11 places in 0"):
        sharding.owned_data(mesh, inputs, targets, parts, owner=np.full(11, 99))
    with pytest.raises(ValueError, match="expected finite numbers"):
        sharding.owned_data(mesh, np.full_like(inputs, np.nan), targets, parts)
    with pytest.raises(ValueError, match="as integers"):
        sharding.owned_data(mesh, inputs, targets[:, 0], parts, classes=2)


@pytest.mark.slow
@in_64_bit
@needs_two
def test_owned_data_give_the_round_of_replicated_data_and_compile_once():
    mesh, rules = sharding.client_mesh(jax.devices()[:2]), {"fedsa_lora": aggregators.fedsa_lora()}
    train = small.compile_round(rules, mesh=mesh, rank_levels=1)
    results = []
    for data in (sharding.replicate(small.make_data(), mesh), small.owned(mesh)):
        key, state = sharding.replicate((jax.random.key(5), small.start_state(rules)), mesh)
        for _ in range(2):
            state, info = train(key, state._replace(aggregator=()), data)
        results.append((state, info))
    small.assert_same_round(*results)
    assert train._cache_size() == 2, "one program for each way of placing data"
