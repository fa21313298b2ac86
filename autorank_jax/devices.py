"""A round on many devices: each trains its share of the cohort by itself, then everything is added up once.

The whole round runs under `jax.shard_map`, so that what is not dealt out (who takes part, the server step) is computed
by every device alike, and the only communication is one sum at the end of training.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from autorank_jax.dealing import AXIS, deal, step_cost
from autorank_jax.lanes import Program, Tally, steps_and_levels
from autorank_jax.participation import Cohort
from autorank_jax.types import Array, FederatedData, Key, RoundFn, RoundInfo, State


def on_mesh(round_fn: RoundFn, mesh: Mesh) -> RoundFn:
    """Run a round on every device of a mesh; arguments and results are replicated, but for examples that are owned."""
    everywhere, dealt = PartitionSpec(), PartitionSpec(AXIS)

    def sharded(key: Key, state: State, data: FederatedData) -> tuple[State, RoundInfo]:
        where = jax.tree.map(lambda _: everywhere, data)
        if data.owner is not None:
            examples = jax.tree.map(lambda _: dealt, (data.inputs, data.targets, data.order))
            where = FederatedData(*examples, *where[3:])
        run = jax.shard_map(
            round_fn, mesh=mesh, in_specs=(everywhere, everywhere, where), out_specs=everywhere, check_vma=False
        )
        return run(key, state, data)

    return sharded


def own_clients(program: Program, state: State, data: FederatedData, cohort: Cohort, weight: Array) -> Array:
    """Return which of the cohort this device trains, `(cohort,)` bool: every client has exactly one device.

    Clients are dealt longest first by steps times the cost of a step at their rank level, or by who owns their data.

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
    return deal(cost, lax.axis_size(AXIS)) == lax.axis_index(AXIS)


def add_up(tally: Tally, state: State, row: Array, mine: Array) -> Tally:
    """Add sums over devices, and take what is known of each client from the device that trained it.

    Args:
        tally: of this device.
        state: before the round.
        row: `(cohort,)` rows of clients.
        mine: `(cohort,)` bool, which of them this device trained.
    """

    def pick(leaf: Array) -> Array:
        leaf = leaf[row].astype(jnp.int32) if leaf.dtype == bool else leaf[row]
        return jnp.where(mine.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)

    def write(before: Array, values: Array) -> Array:
        return before.at[row].set(values.astype(before.dtype))

    by_client = (tally.epoch_losses, tally.epochs, tally.clients, tally.finite)
    totals = (tally.sums, tally.loss, tally.examples, tally.steps, tally.lane_steps)
    picked, totals = lax.psum((jax.tree.map(pick, by_client), totals), AXIS)
    before = (state.epoch_losses, state.epochs, state.clients, jnp.ones_like(tally.finite))
    epoch_losses, epochs, clients, finite = jax.tree.map(write, before, picked)
    sums, loss, examples, steps, lane_steps = totals
    return Tally(sums, tally.lost, epoch_losses, epochs, clients, finite, loss, examples, steps, lane_steps)
