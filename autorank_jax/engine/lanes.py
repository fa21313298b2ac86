"""Lanes that pull clients from a queue: the loop in which a round's clients train.

A fixed number of lanes is vmapped. Inside one `lax.while_loop` per rank level free lanes take the next clients of the
queue, all lanes train until the first of them is done, and finished clients are added to running sums: memory is
O(lanes + data), work is O(total steps), whatever the imbalance.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from autorank_jax.adapters.lora import cut, max_ranks, narrow, pad_like, rank_level, rank_masks
from autorank_jax.engine.checks import check_built_like, check_losses, check_trains, summable
from autorank_jax.engine.levels import Widths
from autorank_jax.engine.optimizers import follow_client
from autorank_jax.engine.totals import LEAF_BY_LEAF, Summation, Totals, Turn, zeros
from autorank_jax.engine.totals import no_totals as totals_of_nobody
from autorank_jax.federated.batches import steps_per_epoch, take_batch
from autorank_jax.federated.participation import Cohort
from autorank_jax.interface import describe
from autorank_jax.types import (
    Aggregator,
    Array,
    Client,
    ClientUpdate,
    FederatedData,
    Key,
    LocalState,
    LocalTraining,
    Plan,
    PyTree,
    Setting,
    State,
    Sums,
    Trainable,
)

T = TypeVar("T")


class Program(NamedTuple):
    """What a round is compiled for."""

    local: LocalTraining
    aggregator: Aggregator
    lanes: int
    levels: list[Widths]
    summation: Summation = LEAF_BY_LEAF


class Queue(NamedTuple):
    """The cohort in the order in which lanes take it: by rank level, then by descending steps."""

    row: Array  # (cohort,) int32
    weight: Array  # (cohort,)
    steps: Array  # (cohort,) int32
    words: Array  # (cohort, 2) uint32 key of each client's shuffles this round
    noise: Key  # (cohort,) key of each client's random layers this round
    ends: Array  # (levels,) int32 where each level ends


class Round(NamedTuple):
    """The values that one round is a function of."""

    state: State
    data: FederatedData
    queue: Queue
    plan: Plan


class Level(NamedTuple):
    """One rank level of a round."""

    program: Program
    round: Round  # its plan is cut to the widths
    widths: Widths
    blank: tuple[Sums, LocalState] = ((), ())  # type: ignore[assignment]  # shapes of a client's summand and training


class Assignment(NamedTuple):
    """What a lane knows of the client it holds."""

    client: Client
    start: Trainable
    size: Array  # () int32 examples
    steps: Array  # () int32
    epochs: Array  # () int32 whole epochs in those steps
    examples: Array  # () examples in those steps, counted once per epoch
    words: Array  # (2,) uint32 key of its shuffles this round
    noise: Key  # key of its random layers this round


class Lanes(NamedTuple):
    """The stacked lanes; every leaf begins with `(lanes,)`."""

    place: Array  # int32 place in the queue; at or beyond the level's end: idle
    since: Array  # int32 steps that all lanes had made when it took its client
    free: Array  # bool: takes a new client next
    local: LocalState
    losses: Array  # (lanes, max_epochs + 1) summed losses by epoch; the last column takes all later epochs


def make_queue(
    key: Key, state: State, data: FederatedData, cohort: Cohort, weight: Array, *, program: Program
) -> Queue:
    """Sort the cohort by rank level, then by descending steps; absent clients come last, beyond every level.

    A client belongs to the smallest level that is wide enough for its integer ranks in every layer. Its random numbers
    follow its identity, not its place.
    """
    steps, level = steps_and_levels(state, data, cohort, program=program)
    level = jnp.where(cohort.present & (weight > 0) & (steps > 0), level, len(program.levels))
    order = jnp.lexsort((-steps, level))
    numbers = jnp.arange(len(program.levels), dtype=jnp.int32)
    ends = jnp.sum(level[None, :] <= numbers[:, None], axis=1, dtype=jnp.int32)
    row = cohort.row[order]
    shuffle, noise = jax.vmap(lambda i: tuple(jax.random.split(jax.random.fold_in(key, i))))(data.id[row])
    words = jax.vmap(lambda k: jax.random.bits(k, (2,), jnp.uint32))(shuffle)
    return Queue(row, weight[order], steps[order], words, noise, ends)


def steps_and_levels(state: State, data: FederatedData, cohort: Cohort, *, program: Program) -> tuple[Array, Array]:
    """Return the local steps of clients this round, and the number of their rank level, `(cohort,)` each."""
    row = cohort.row
    steps = steps_of_epochs(state, data, row, program.local.batch_size)
    if cohort.max_steps is not None:
        steps = jnp.minimum(steps, cohort.max_steps)
    ranks = {path: ranks[row] for path, ranks in state.ranks.items()}
    return steps, rank_level(ranks, program.levels, row.shape[0])


def steps_of_epochs(state: State, data: FederatedData, row: Array, batch_size: int) -> Array:
    """Return the steps that all local epochs of clients take, in the shape of `row`."""
    return jnp.asarray(state.hparams["local_epochs"]).astype(jnp.int32) * steps_per_epoch(data.size[row], batch_size)


def run_queue(program: Program, round_: Round) -> Totals:
    """Train the whole cohort, one loop per rank level, with one totals carried through all of them."""
    levels = [_make_level(program, round_, widths) for widths in program.levels]
    totals = totals_of_nobody(_whole_level(levels[-1]).blank[0], round_.state)
    begin = jnp.zeros((), jnp.int32)
    for level, end in zip(levels, round_.queue.ends, strict=True):
        blank = level.blank[0]
        inside, clock = run_level(level, (begin, end), program.summation.begin(totals, blank))
        totals = program.summation.end(inside, totals, blank)
        totals = totals._replace(lane_steps=totals.lane_steps + clock * program.lanes)
        begin = end
    return totals._replace(steps=_steps_trained(round_.queue, totals.finite))


def _steps_trained(queue: Queue, finite: Array) -> Array:
    """Add up the steps of the clients that trained and are finite."""
    trained = (jnp.arange(queue.row.shape[0], dtype=jnp.int32) < queue.ends[-1]) & finite[queue.row]
    return jnp.sum(jnp.where(trained, queue.steps, 0), dtype=jnp.int32)


def no_totals(program: Program, round_: Round) -> Totals:
    """Return the totals of a cohort of nobody, in the shapes of `run_queue`; no training is traced."""
    blank = _make_level(program, round_, max_ranks(round_.state.server)).blank[0]
    return totals_of_nobody(blank, round_.state)


def _whole_level(level: Level) -> Level:
    """Return the level of the maximum ranks, in whose shapes rules get their sums: mostly the last one itself."""
    widest = max_ranks(level.round.state.server)
    return level if widest == level.widths else _make_level(level.program, level.round, widest)


def _make_level(program: Program, round_: Round, widths: Widths) -> Level:
    owners = {path: owners[..., : widths[path]] for path, owners in round_.plan.owners.items()}
    level = Level(program, round_._replace(plan=round_.plan._replace(owners=owners)), widths)

    def one(place: Array) -> tuple[Sums, LocalState]:
        assignment = look_up(level, place)
        local = _begin(level, assignment)
        return finish(level, assignment, local, jnp.array(True))[0], local

    return level._replace(blank=jax.eval_shape(one, jnp.zeros((), jnp.int32)))


def run_level(level: Level, bounds: tuple[Array, Array], totals: T) -> tuple[T, Array]:
    """Train the clients between two places of the queue at one adapter width.

    Args:
        level: the width, and the round.
        bounds: the first place, and the one behind the last.
        totals: what to add to, of `Summation.begin`.

    Returns:
        The totals, and the steps for which every lane was held.
    """
    begin, end = bounds

    def busy(carry: tuple[Lanes, Array, Array, T]) -> Array:
        lanes, following, *_ = carry
        return (following < end) | jnp.any(~lanes.free)

    def turn(carry: tuple[Lanes, Array, Array, T]) -> tuple[Lanes, Array, Array, T]:
        lanes, following, clock, totals = carry
        lanes, following = _claim(lanes, following, clock)
        assignments = jax.vmap(lambda place: look_up(level, place))(lanes.place)
        fresh = jax.vmap(lambda assignment: _begin(level, assignment))(assignments)
        lanes = lanes._replace(local=_select(lanes.free, fresh, lanes.local))
        active = lanes.place < end
        remaining = jnp.where(active, lanes.since + assignments.steps - clock, jnp.iinfo(jnp.int32).max)
        until = clock + jnp.where(jnp.any(active), jnp.min(remaining), 0)  # 0: under vmap, while others still train

        def step(training: tuple[Array, Lanes]) -> tuple[Array, Lanes]:
            now, lanes = training
            return now + 1, jax.vmap(lambda held, lane: _advance(level, held, lane, now))(assignments, lanes)

        clock, lanes = lax.while_loop(lambda training: training[0] < until, step, (clock, lanes))
        done = active & (lanes.since + assignments.steps == clock)
        finished = jax.vmap(lambda *lane: finish(level, *lane))(assignments, lanes.local, done)
        ended = _end_turn(assignments, finished, lanes.losses, done, nowhere=level.round.data.size.shape[0])
        return lanes._replace(free=done | ~active), following, clock, level.program.summation.add(totals, ended)

    none = _empty_lanes(level, end), begin, jnp.zeros((), jnp.int32), totals
    _, _, clock, totals = lax.while_loop(busy, turn, none)
    return totals, clock


def look_up(level: Level, place: Array) -> Assignment:
    """Look up everything about the client at one place of the queue."""
    state, data, queue = level.round.state, level.round.data, level.round.queue
    place = jnp.minimum(place, queue.row.shape[0] - 1)
    row = queue.row[place]
    masks = rank_masks({path: ranks[row] for path, ranks in state.ranks.items()}, level.widths)
    client = Client(row, masks, queue.weight[place], jax.tree.map(lambda leaf: leaf[row], state.clients))
    handed = level.program.aggregator.start(state.server, state.aggregator, client)
    check_built_like("the rule's start", handed, state.server.trainable)
    size, steps, batch_size = data.size[row], queue.steps[place], level.program.local.batch_size
    per_epoch = jnp.maximum(steps_per_epoch(size, batch_size), 1)
    epochs, rest, dtype = steps // per_epoch, steps % per_epoch, jnp.result_type(float)
    return Assignment(
        client=client,
        start=cut(narrow(handed, level.widths), masks),
        size=size,
        steps=steps,
        epochs=epochs,
        examples=epochs.astype(dtype) * size.astype(dtype) + (rest * batch_size).astype(dtype),
        words=queue.words[place],
        noise=queue.noise[place],
    )


def _begin(level: Level, assignment: Assignment) -> LocalState:
    local = level.program.local.begin(level.round.state.hparams, assignment.start, assignment.client)
    if not isinstance(local, LocalState):
        raise TypeError(f"expected local training's begin to return a LocalState, got {describe(local)}")
    return local._replace(optimizer=follow_client(local.optimizer, assignment.noise))


def _advance(level: Level, assignment: Assignment, lane: Lanes, now: Array) -> Lanes:
    """Take one step of the client that one lane holds."""
    local, state, number = level.program.local, level.round.state, now - lane.since
    batch, epoch = take_batch(level.round.data, assignment.client.row, assignment.words, number, local.batch_size)
    trains = level.program.aggregator.trains(state.aggregator)
    check_trains(trains)
    setting = Setting(assignment.client, assignment.start, state.server.frozen, trains)
    key = jax.random.fold_in(assignment.noise, number)
    stepped = local.step(state.hparams, setting, lane.local, batch, key)
    if type(stepped) is not tuple or len(stepped) != 2:
        raise TypeError(f"expected local training's step to return (state, losses), got {describe(stepped)}")
    trained, losses = stepped
    check_built_like("local training's step", trained, lane.local, dtypes=True)
    check_losses(losses, local.batch_size, "losses of local training's step")
    column = jnp.minimum(epoch, lane.losses.shape[0] - 1)
    summed = lane.losses.at[column].add(jnp.sum(losses).astype(lane.losses.dtype))
    return lane._replace(local=trained, losses=summed)


def finish(level: Level, assignment: Assignment, local: LocalState, done: Array) -> tuple[Sums, Array, PyTree]:
    """Return one lane's summand, whether its update is finite, and what its client keeps.

    A lane that is not done, or whose update or summand is not finite, adds zeros, whatever the rule makes of it; the
    rule sees its start with weight 0.
    """
    trained = level.program.local.end(local, assignment.client)
    check_built_like("local training's end", trained, assignment.start)
    finite = level.program.summation.all_finite(trained)
    counts = done & finite
    trained = jax.tree.map(lambda new, old: jnp.where(counts, new, old), trained, assignment.start)
    client = assignment.client._replace(weight=jnp.where(counts, assignment.client.weight, 0))
    update, server = ClientUpdate(trained, assignment.start, client), level.round.state.server
    sums = summable(level.program.aggregator.summand(update, server, level.round.plan))
    kept = level.program.aggregator.client_keep(update, server)
    widest = max_ranks(server)
    cuts = {(width, widest[path]) for path, width in level.widths.items()}
    check_built_like("the rule's client_keep", kept, client.state, dtypes=True, cut=cuts)
    finite &= level.program.summation.all_finite((sums, kept))  # finite factors may have an infinite product
    sums = jax.tree.map(lambda leaf: jnp.where(done & finite, leaf, 0), sums)
    return sums, finite, pad_like(kept, assignment.client.state)


def _empty_lanes(level: Level, end: Array) -> Lanes:
    lanes, epochs = level.program.lanes, level.round.state.epoch_losses
    return Lanes(
        place=jnp.broadcast_to(end, (lanes,)),
        since=jnp.zeros(lanes, jnp.int32),
        free=jnp.ones(lanes, bool),
        local=zeros(level.blank[1], lanes),
        losses=jnp.zeros((lanes, epochs.shape[1] + 1), epochs.dtype),
    )


def _claim(lanes: Lanes, following: Array, clock: Array) -> tuple[Lanes, Array]:
    """Give each free lane the next place of the queue."""
    taken = jnp.cumsum(lanes.free, dtype=jnp.int32)
    place = jnp.where(lanes.free, following + taken - 1, lanes.place)
    since = jnp.where(lanes.free, clock, lanes.since)
    losses = jnp.where(lanes.free[:, None], 0, lanes.losses)
    return lanes._replace(place=place, since=since, losses=losses), following + taken[-1]


def _select(flags: Array, new: PyTree, old: PyTree) -> PyTree:
    """Choose between two stacked trees lane by lane."""
    return jax.tree.map(lambda n, o: jnp.where(flags.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old)


def _end_turn(
    assignments: Assignment, finished: tuple[Sums, Array, PyTree], losses: Array, done: Array, *, nowhere: int
) -> Turn:
    """Return what the lanes that are done add to the totals, and of which clients it is noted."""
    sums, finite, kept = finished
    good = done & finite
    row, good_row, whole_row = (
        jnp.where(flag, assignments.client.row, nowhere) for flag in (done, good, good & (assignments.epochs > 0))
    )
    size, max_epochs = jnp.maximum(assignments.size, 1).astype(losses.dtype), losses.shape[1] - 1
    whole = jnp.arange(max_epochs, dtype=jnp.int32)[None, :] < assignments.epochs[:, None]
    return Turn(
        sums=sums,
        losses=jnp.where(good[:, None], losses, 0),
        examples=jnp.where(good, assignments.examples, 0),
        row=row,
        good_row=good_row,
        whole_row=whole_row,
        mean_losses=jnp.where(whole, losses[:, :max_epochs] / size[:, None], 0),
        epochs=jnp.minimum(assignments.epochs, max_epochs),
        finite=finite,
        kept=kept,
    )
