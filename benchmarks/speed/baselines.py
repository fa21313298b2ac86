"""Engines to compare with, around the very same local step and aggregation rule.

- `make_lockstep`: `jit(vmap(scan))`, what a JAX researcher writes first and what DrJAX compiles to: all clients side by
  side, everyone waits for the longest.
- `make_loop`: a Python loop over a jitted client.
- `make_centralised`: the yardstick: one shared model at the clients' mean rank, big batches, no clients at all.
- `make_same_batches`: the same shared model over the very batches of the clients, one after the other.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from autorank_jax.adapters.lora import cut, level_widths, max_ranks, narrow, rank_masks
from autorank_jax.engine.lanes import Assignment, Level, Program, Round, finish, look_up, make_queue
from autorank_jax.engine.round import make_plan
from autorank_jax.federated.batches import take_batch
from autorank_jax.federated.participation import by_examples, everyone
from autorank_jax.types import (
    Aggregator,
    Array,
    Batch,
    Client,
    FederatedData,
    Key,
    LocalState,
    LocalTraining,
    PyTree,
    Setting,
    State,
    Sums,
    Trains,
)

Spread = Callable[[PyTree], PyTree]
"""Shards the leading axis of arrays over devices."""
OneRound = Callable[[Key, State, FederatedData], State]


def make_spread(mesh: Mesh | None) -> Spread:
    """Return what shards a leading axis over the devices of a mesh; nothing where there is none."""
    if mesh is None:
        return lambda tree: tree
    sharding = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
    return lambda tree: jax.tree.map(lambda leaf: lax.with_sharding_constraint(leaf, sharding), tree)


def make_level(local: LocalTraining, aggregator: Aggregator, key: Key, state: State, data: FederatedData) -> Level:
    widths = max_ranks(state.server.trainable)
    program = Program(local, aggregator, data.size.shape[0], level_widths(widths, 1))
    _, training, _ = jax.random.split(jax.random.fold_in(key, state.round), 3)
    cohort, weight = everyone(key, data), by_examples(data)
    queue = make_queue(training, state, data, cohort, weight, program=program)
    return Level(program, Round(state, data, queue, make_plan(state, cohort, weight, jnp.sum(weight))), widths)


def _begin(level: Level, assignment: Assignment) -> LocalState:
    return level.program.local.begin(level.round.state.hparams, assignment.start, assignment.client)


def _step(level: Level, assignment: Assignment, trained: LocalState, step: Array) -> LocalState:
    local, state = level.program.local, level.round.state
    batch, _ = take_batch(level.round.data, assignment.client.row, assignment.words, step, local.batch_size)
    trains = level.program.aggregator.trains(state.aggregator)
    setting = Setting(assignment.client, assignment.start, state.server.frozen, trains)
    return local.step(state.hparams, setting, trained, batch, jax.random.fold_in(assignment.noise, step))[0]


def _server_step(level: Level, key: Key, sums: Sums) -> State:
    state = level.round.state
    server, memory = level.program.aggregator.update(key, sums, state.aggregator, state.server)
    return state._replace(server=server, aggregator=memory, round=state.round + 1)


def make_lockstep(local: LocalTraining, aggregator: Aggregator, *, steps: int, mesh: Mesh | None = None) -> OneRound:
    """Make a round in which all clients are vmapped and scan over the longest client's `steps`.

    With a mesh, whose devices must divide the clients, each device trains its share of them.
    """
    spread = make_spread(mesh)

    def round_fn(key: Key, state: State, data: FederatedData) -> State:
        level = make_level(local, aggregator, key, state, data)
        places = jnp.arange(data.size.shape[0])
        assignments = spread(jax.vmap(lambda place: look_up(level, place))(places))

        def one(assignment: Assignment, trained: LocalState, step: Array) -> LocalState:
            stepped = _step(level, assignment, trained, step)
            return jax.tree.map(lambda new, old: jnp.where(step < assignment.steps, new, old), stepped, trained)

        def forward(trained: LocalState, step: Array) -> tuple[LocalState, None]:
            return jax.vmap(one, in_axes=(0, 0, None))(assignments, trained, step), None

        begun = spread(jax.vmap(lambda one: _begin(level, one))(assignments))
        trained, _ = lax.scan(forward, begun, jnp.arange(steps))
        done = jnp.ones(data.size.shape[0], bool)
        sums, _, _ = jax.vmap(lambda *lane: finish(level, *lane))(assignments, trained, done)
        return _server_step(level, key, jax.tree.map(lambda s: jnp.sum(s, axis=0), sums))

    return round_fn


def make_loop(local: LocalTraining, aggregator: Aggregator) -> OneRound:
    """Make a round that is a Python loop over a jitted client; not to be jitted itself."""

    @jax.jit
    def client(key: Key, state: State, data: FederatedData, place: Array) -> Sums:
        level = make_level(local, aggregator, key, state, data)
        assignment = look_up(level, place)
        trained = lax.fori_loop(
            0, assignment.steps, lambda i, t: _step(level, assignment, t, i), _begin(level, assignment)
        )
        return finish(level, assignment, trained, jnp.array(True))[0]

    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
    server_step = jax.jit(
        lambda key, state, data, sums: _server_step(make_level(local, aggregator, key, state, data), key, sums)
    )

    def round_fn(key: Key, state: State, data: FederatedData) -> State:
        sums = None
        for place in range(data.size.shape[0]):
            one = client(key, state, data, jnp.int32(place))
            sums = one if sums is None else add(sums, one)
        return server_step(key, state, data, sums)

    return round_fn


def mean_widths(state: State, data: FederatedData) -> dict[str, int]:
    """Return the clients' mean rank of each layer, weighted by examples."""
    size = np.asarray(data.size, np.float64)
    return {p: max(1, round(float(np.asarray(r) @ size / size.sum()))) for p, r in state.ranks.items()}


def _one_model(local: LocalTraining, state: State, widths: dict[str, int]) -> tuple[LocalState, Client, Setting]:
    """Return a shared model of really truncated width, ready to be trained, and what its steps need."""
    masks = rank_masks({p: jnp.array(w) for p, w in widths.items()}, widths)
    client = Client(jnp.array(0), masks, jnp.array(1.0), ())
    start = cut(narrow(state.server.trainable, widths), masks)
    return local.begin(state.hparams, start, client), client, Setting(client, start, state.server.frozen, Trains())


def _serve(local: LocalTraining, state: State, client: Client, trained: LocalState) -> State:
    server = state.server._replace(trainable=local.end(trained, client))
    return state._replace(server=server, round=state.round + 1)


def make_centralised(
    local: LocalTraining, *, widths: dict[str, int], batch_size: int, mesh: Mesh | None = None
) -> OneRound:
    """Make one epoch of one shared model over all examples in big batches.

    With a mesh each device takes its share of every batch.
    """
    spread = make_spread(mesh)

    def round_fn(key: Key, state: State, data: FederatedData) -> State:
        begun, client, setting = _one_model(local, state, widths)
        used = data.order.shape[0]
        steps = state.hparams["local_epochs"] * -(-used // batch_size)

        def forward(step: Array, trained: LocalState) -> LocalState:
            position = (step * batch_size + jnp.arange(batch_size)) % used
            x, y = jax.tree.map(lambda leaf: leaf[data.order[position]], (data.inputs, data.targets))
            batch = spread(Batch(x, y, jnp.ones(batch_size)))
            return local.step(state.hparams, setting, trained, batch, key)[0]

        return _serve(local, state, client, lax.fori_loop(0, steps, forward, begun))

    return round_fn


def make_same_batches(local: LocalTraining, aggregator: Aggregator, *, widths: dict[str, int], steps: int) -> OneRound:
    """Make a loop of one shared model over all batches of all clients, `steps` of them, one after the other."""

    def round_fn(key: Key, state: State, data: FederatedData) -> State:
        level = make_level(local, aggregator, key, state, data)
        begun, client, setting = _one_model(local, state, widths)
        places = jnp.arange(data.size.shape[0])
        assigned = jax.vmap(lambda place: look_up(level, place))(places)
        place = jnp.repeat(places, assigned.steps, total_repeat_length=steps)
        number = jnp.arange(steps) - (jnp.cumsum(assigned.steps) - assigned.steps)[place]

        def forward(step: Array, trained: LocalState) -> LocalState:
            row, words = assigned.client.row[place[step]], assigned.words[place[step]]
            batch, _ = take_batch(data, row, words, number[step], local.batch_size)
            return local.step(state.hparams, setting, trained, batch, key)[0]

        return _serve(local, state, client, lax.fori_loop(0, steps, forward, begun))

    return round_fn
