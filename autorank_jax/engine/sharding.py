"""A federation on many devices: the mesh, who trains where, and data that every device holds for its own clients only.

Every device trains its share of the cohort by itself, then everything is added up once. The whole round runs under
`jax.shard_map`, so that what is not shared out (who takes part, the server step) is computed by every device alike, and
the only communication is one sum at the end of training.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from autorank_jax.engine.lanes import Program, steps_and_levels
from autorank_jax.engine.totals import Totals
from autorank_jax.federated.checks import (
    check_array,
    check_ids,
    check_labels,
    check_order,
    concatenate_parts,
    part_sizes,
)
from autorank_jax.federated.participation import Cohort
from autorank_jax.interface import checked
from autorank_jax.types import Array, FederatedData, Key, PyTree, RoundFn, RoundInfo, State, Trainable

__all__ = ["client_mesh", "owned_data", "replicate"]

AXIS = "clients"
"""The mesh axis over which clients are sharded."""

_PIECES = 32  # per device, into which a large cohort is cut


@checked
def client_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of one axis, `clients`.

    Args:
        devices: of the mesh; all there are, on all hosts, where None.
    """
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,))


def check_mesh(mesh: Mesh) -> None:
    """Raise `ValueError` unless a mesh has the one axis `clients`."""
    if mesh.axis_names != (AXIS,):
        raise ValueError(
            f"expected a mesh of the one axis {AXIS!r}, got {mesh.axis_names}: client_mesh(devices) makes one"
        )


@checked
def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put a tree of arrays on every device of a mesh; every host must hold the same values.

    States, keys and data that are not placed so are copied to all devices at every call, and a compiled round expects
    its state where it leaves it.

    Args:
        tree: of arrays or random keys.
        mesh: from `client_mesh`.
    """
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(leaf: PyTree) -> Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(place, tree)


def step_cost(trainable: Trainable, widths: dict[str, int]) -> float:
    """Return what an example costs at the given adapter widths, `Σ_l 4 d_in d_out + 6 w (d_in + d_out)` up to a factor.

    Frozen weights are multiplied twice (forward, gradient of the inputs), adapters three times.
    """
    total = 0.0
    for path, (lora_a, lora_b) in trainable.adapters.items():
        d_in, d_out, layers = lora_a.shape[-2], lora_b.shape[-1], math.prod(lora_a.shape[:-2])
        total += layers * (4 * d_in * d_out + 6 * widths[path] * (d_in + d_out))
    return max(total, 1.0)


def assign(cost: Array, devices: int) -> Array:
    """Assign clients to devices, the longest first, each to the device with the least so far (Graham 1969).

    A cohort of more than 32 clients per device is assigned in that many pieces: its longest clients one by one, the
    others in equal mixtures of long and short.

    Args:
        cost: `(cohort,)` of each client, 0 where absent.
        devices: how many.

    Returns:
        `(cohort,)` int32 device of each client.
    """
    count, single = cost.shape[0], _PIECES * devices // 2
    order = jnp.argsort(-cost)
    piece = jnp.arange(count, dtype=jnp.int32)
    if count > 2 * single:
        piece = jnp.where(piece < single, piece, single + piece % single)
    pieces = jnp.zeros(min(count, 2 * single), cost.dtype).at[piece].add(cost[order])
    turn = jnp.argsort(-pieces)

    def give(loads: Array, load: Array) -> tuple[Array, Array]:
        device = jnp.argmin(loads).astype(jnp.int32)
        return loads.at[device].add(load), device

    _, device = lax.scan(give, jnp.zeros(devices, cost.dtype), pieces[turn], unroll=8)
    holder = jnp.zeros(turn.shape, jnp.int32).at[turn].set(device)
    return jnp.zeros(count, jnp.int32).at[order].set(holder[piece])


@checked
def owned_data(
    mesh: Mesh,
    inputs: PyTree,
    targets: PyTree,
    parts: Sequence[ArrayLike],
    *,
    ids: ArrayLike | None = None,
    classes: int | None = None,
    owner: ArrayLike | None = None,
) -> FederatedData:
    """Build client data of which every device holds its own clients' examples only, padded to the fullest device.

    A round then trains every client where its examples are. Nothing is gathered: a host reads the examples of its own
    devices, so that `inputs` and `targets` may be NumPy memory maps larger than any host.

    Args:
        mesh: of the axis `clients`; the same that `make_round` is given.
        inputs: pytree of arrays (n, ...).
        targets: pytree of arrays (n, ...).
        parts: of each client, the numbers of its examples, the same on all hosts.
        ids: (clients,) identities that random numbers follow; default 0, 1, …
        classes: given it, targets must be a vector of integers in 0 .. classes-1.
        owner: (clients,) place on the mesh of each client's device; assigned by number of examples where None.

    Raises:
        ValueError: for another mesh, and for all that `from_parts` refuses, as far as this host reads it.
    """
    check_mesh(mesh)
    size = part_sizes(parts)
    clients, devices = len(size), mesh.devices.size
    n = len(jax.tree.leaves(inputs)[0])
    order = concatenate_parts(parts, size)
    check_order(order, size, n, require_all=False)
    device = np.asarray(assign(jnp.asarray(size, float), devices) if owner is None else owner)
    if device.shape != (clients,) or device.dtype.kind not in "iu" or device.min() < 0 or device.max() >= devices:
        raise ValueError(f"expected owner as {clients} places in 0 .. {devices - 1}, got {device.dtype} {device.shape}")
    held = [order[np.repeat(device, size) == number] for number in range(devices)]
    start = np.zeros(clients, np.int32)
    for number in range(devices):
        own = size[device == number]
        start[device == number] = np.cumsum(own) - own
    fullest = max(map(len, held))
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    local = jax.make_array_from_callback((devices * fullest,), sharding, lambda _: np.arange(fullest, dtype=np.int32))
    identity = np.arange(clients) if ids is None else check_ids(ids, clients)
    table = tuple(np.asarray(column, np.int32) for column in (start, size, identity, device))
    return FederatedData(
        jax.tree.map(lambda leaf: _place(leaf, held, sharding), inputs),
        jax.tree.map(lambda leaf: _place(leaf, held, sharding, classes=classes), targets),
        local,
        *replicate(table, mesh),
    )


def _place(
    leaf: np.ndarray, held: Sequence[np.ndarray], sharding: NamedSharding, *, classes: int | None = None
) -> Array:
    """Put the examples that each device holds there, padded with zeros; called back for the devices of this host."""
    fullest = max(map(len, held))

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        first = index[0].start or 0 if index else 0
        rows = np.asarray(leaf[held[first // fullest]])
        check_array("inputs or targets", rows)
        if classes is not None:
            check_labels(rows, len(rows), classes, "targets")
        return np.pad(rows, [(0, fullest - len(rows)), *[(0, 0)] * (rows.ndim - 1)])

    return jax.make_array_from_callback((len(held) * fullest, *leaf.shape[1:]), sharding, read)


def on_mesh(round_fn: RoundFn, mesh: Mesh) -> RoundFn:
    """Run a round on every device of a mesh; arguments and results are replicated, but for examples that are owned."""
    everywhere, assigned = PartitionSpec(), PartitionSpec(AXIS)

    def sharded(key: Key, state: State, data: FederatedData) -> tuple[State, RoundInfo]:
        where = jax.tree.map(lambda _: everywhere, data)
        if data.owner is not None:
            examples = jax.tree.map(lambda _: assigned, (data.inputs, data.targets, data.order))
            where = FederatedData(*examples, *where[3:])
        run = jax.shard_map(
            round_fn, mesh=mesh, in_specs=(everywhere, everywhere, where), out_specs=everywhere, check_vma=False
        )
        return run(key, state, data)

    return sharded


def own_clients(program: Program, state: State, data: FederatedData, cohort: Cohort, weight: Array) -> Array:
    """Return which of the cohort this device trains, `(cohort,)` bool: every client has exactly one device.

    Clients are assigned longest first by steps times the cost of a step at their rank level, or by who owns their data.

    Args:
        program: what the round is compiled for.
        state: before the round.
        data: all clients' examples, or those that this device owns.
        cohort: who takes part.
        weight: `(cohort,)`; clients of weight 0 cost nothing.
    """
    if data.owner is not None:
        return data.owner[cohort.row] == lax.axis_index(AXIS)
    steps, level = steps_and_levels(state, data, cohort, program=program)
    costs = jnp.array([step_cost(state.server.trainable, widths) for widths in program.levels])
    cost = jnp.where(weight > 0, steps.astype(costs.dtype) * costs[level], 0)
    return assign(cost, lax.axis_size(AXIS)) == lax.axis_index(AXIS)


def add_up(totals: Totals, state: State, row: Array, mine: Array) -> Totals:
    """Add sums over devices, and take what is known of each client from the device that trained it.

    Args:
        totals: of this device.
        state: before the round.
        row: `(cohort,)` rows of clients.
        mine: `(cohort,)` bool, which of them this device trained.
    """

    def pick(leaf: Array) -> Array:
        leaf = leaf[row].astype(jnp.int32) if leaf.dtype == bool else leaf[row]
        return jnp.where(mine.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)

    def write(before: Array, values: Array) -> Array:
        return before.at[row].set(values.astype(before.dtype))

    by_client = (totals.epoch_losses, totals.epochs, totals.clients, totals.finite)
    added = (totals.sums, totals.loss, totals.examples, totals.steps, totals.lane_steps)
    picked, added = lax.psum((jax.tree.map(pick, by_client), added), AXIS)
    before = (state.epoch_losses, state.epochs, state.clients, jnp.ones_like(totals.finite))
    epoch_losses, epochs, clients, finite = jax.tree.map(write, before, picked)
    sums, loss, examples, steps, lane_steps = added
    return Totals(sums, totals.lost, epoch_losses, epochs, clients, finite, loss, examples, steps, lane_steps)
