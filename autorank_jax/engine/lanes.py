"""Lanes that pull clients from a queue: the loop in which a round's clients train.

A fixed number of lanes is vmapped. Inside one `lax.while_loop` per rank level free lanes take the next clients of the
queue, all lanes train until the first of them is done, and finished clients are added to running sums: memory is
O(lanes + data), work is O(total steps), whatever the imbalance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from autorank_jax.adapters.lora import cut, max_ranks, narrow, pad_like, rank_level, rank_masks
from autorank_jax.engine.checks import summable
from autorank_jax.engine.levels import Widths
from autorank_jax.engine.optimizers import follow_client
from autorank_jax.federated.batches import steps_per_epoch, take_batch
from autorank_jax.federated.participation import Cohort
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


class Program(NamedTuple):
    """What a round is compiled for."""

    local: LocalTraining
    aggregator: Aggregator
    lanes: int
    levels: list[Widths]


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
    step: Array  # int32 steps done
    free: Array  # bool: takes a new client next
    local: LocalState
    losses: Array  # (lanes, max_epochs + 1) summed losses by epoch; the last column takes all later epochs


class Totals(NamedTuple):
    """What a round adds up."""

    sums: Sums
    lost: Sums  # what rounding took from the small leaves of `sums`, given back with the next summand
    epoch_losses: Array  # (clients, max_epochs)
    epochs: Array  # (clients,)
    clients: PyTree
    finite: Array  # (clients,) bool
    loss: Array
    examples: Array
    steps: Array
    lane_steps: Array


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
    ends = jnp.searchsorted(level[order], numbers, side="right").astype(jnp.int32)
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
    return state.hparams["local_epochs"].astype(jnp.int32) * steps_per_epoch(data.size[row], batch_size)


def run_queue(program: Program, round_: Round) -> Totals:
    """Train the whole cohort, one loop per rank level, with one totals carried through all of them."""
    levels = [_make_level(program, round_, widths) for widths in program.levels]
    totals = _no_totals(_whole_level(levels[-1]), round_.state)
    begin = jnp.zeros((), jnp.int32)
    for level, end in zip(levels, round_.queue.ends, strict=True):
        sums = totals.sums
        blank = _zeros(level.blank[0])
        totals = totals._replace(sums=blank, lost=_no_loss(blank))
        totals = run_level(level, (begin, end), totals)
        total = jax.tree.map(jnp.add, sums, pad_like(totals.sums, sums))
        totals = totals._replace(sums=total, lost=_no_loss(total))
        begin = end
    return totals


def no_totals(program: Program, round_: Round) -> Totals:
    """Return the totals of a cohort of nobody, in the shapes of `run_queue`; no training is traced."""
    return _no_totals(_make_level(program, round_, max_ranks(round_.state.server)), round_.state)


def _no_totals(level: Level, state: State) -> Totals:
    dtype = jnp.result_type(float)
    return Totals(
        sums=(nothing := _zeros(level.blank[0])),
        lost=_no_loss(nothing),
        epoch_losses=state.epoch_losses,
        epochs=state.epochs,
        clients=state.clients,
        finite=jnp.ones(state.epochs.shape, bool),
        loss=jnp.zeros((), dtype),
        examples=jnp.zeros((), dtype),
        steps=jnp.zeros((), jnp.int32),
        lane_steps=jnp.zeros((), jnp.int32),
    )


def _whole_level(level: Level) -> Level:
    """Return the level of the maximum ranks, in whose shapes rules get their sums: mostly the last one itself."""
    widest = max_ranks(level.round.state.server)
    return level if widest == level.widths else _make_level(level.program, level.round, widest)


def _make_level(program: Program, round_: Round, widths: Widths) -> Level:
    owners = {path: owners[: widths[path]] for path, owners in round_.plan.owners.items()}
    level = Level(program, round_._replace(plan=round_.plan._replace(owners=owners)), widths)

    def one(place: Array) -> tuple[Sums, LocalState]:
        assignment = look_up(level, place)
        local = _begin(level, assignment)
        return finish(level, assignment, local, jnp.array(True))[0], local

    return level._replace(blank=jax.eval_shape(one, jnp.zeros((), jnp.int32)))


def run_level(level: Level, bounds: tuple[Array, Array], totals: Totals) -> Totals:
    """Train the clients between two places of the queue at one adapter width."""
    begin, end = bounds

    def busy(carry: tuple[Lanes, Array, Totals]) -> Array:
        lanes, following, _ = carry
        return (following < end) | jnp.any(~lanes.free)

    def turn(carry: tuple[Lanes, Array, Totals]) -> tuple[Lanes, Array, Totals]:
        lanes, following, totals = carry
        lanes, following = _claim(lanes, following)
        assignments = jax.vmap(lambda place: look_up(level, place))(lanes.place)
        fresh = jax.vmap(lambda assignment: _begin(level, assignment))(assignments)
        lanes = lanes._replace(local=_select(lanes.free, fresh, lanes.local))
        active = lanes.place < end
        remaining = jnp.where(active, assignments.steps - lanes.step, jnp.iinfo(jnp.int32).max)
        count = jnp.where(jnp.any(active), jnp.min(remaining), 0)  # 0: under vmap, while others still train
        step = jax.vmap(lambda assignment, lane: _advance(level, assignment, lane))
        lanes = lax.fori_loop(0, count, lambda _, lanes: step(assignments, lanes), lanes)
        done = active & (lanes.step == assignments.steps)
        finished = jax.vmap(lambda *lane: finish(level, *lane))(assignments, lanes.local, done)
        totals = _add(totals, assignments, finished, lanes.losses, done)
        totals = totals._replace(lane_steps=totals.lane_steps + count * level.program.lanes)
        return lanes._replace(free=done | ~active), following, totals

    return lax.while_loop(busy, turn, (_empty_lanes(level, end), begin, totals))[2]


def look_up(level: Level, place: Array) -> Assignment:
    """Look up everything about the client at one place of the queue."""
    state, data, queue = level.round.state, level.round.data, level.round.queue
    place = jnp.minimum(place, queue.row.shape[0] - 1)
    row = queue.row[place]
    masks = rank_masks({path: ranks[row] for path, ranks in state.ranks.items()}, level.widths)
    client = Client(row, masks, queue.weight[place], jax.tree.map(lambda leaf: leaf[row], state.clients))
    handed = level.program.aggregator.start(state.server, state.aggregator, client)
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
    return local._replace(optimizer=follow_client(local.optimizer, assignment.noise))


def _advance(level: Level, assignment: Assignment, lane: Lanes) -> Lanes:
    """Take one step of the client that one lane holds."""
    local, state = level.program.local, level.round.state
    batch, epoch = take_batch(level.round.data, assignment.client.row, assignment.words, lane.step, local.batch_size)
    trains = level.program.aggregator.trains(state.aggregator)
    setting = Setting(assignment.client, assignment.start, state.server.frozen, trains)
    trained, losses = local.step(
        state.hparams, setting, lane.local, batch, jax.random.fold_in(assignment.noise, lane.step)
    )
    column = jnp.minimum(epoch, lane.losses.shape[0] - 1)
    summed = lane.losses.at[column].add(jnp.sum(losses).astype(lane.losses.dtype))
    return lane._replace(local=trained, losses=summed, step=lane.step + 1)


def finish(level: Level, assignment: Assignment, local: LocalState, done: Array) -> tuple[Sums, Array, PyTree]:
    """Return one lane's summand, whether its update is finite, and what its client keeps.

    A lane that is not done, or whose update or summand is not finite, adds zeros, whatever the rule makes of it; the
    rule sees its start with weight 0.
    """
    trained = level.program.local.end(local, assignment.client)
    finite = _all_finite(trained)
    counts = done & finite
    trained = jax.tree.map(lambda new, old: jnp.where(counts, new, old), trained, assignment.start)
    client = assignment.client._replace(weight=jnp.where(counts, assignment.client.weight, 0))
    update, server = ClientUpdate(trained, assignment.start, client), level.round.state.server
    sums = summable(level.program.aggregator.summand(update, server, level.round.plan))
    kept = level.program.aggregator.client_keep(update, server)
    finite &= _all_finite((sums, kept))  # finite factors may have an infinite product
    sums = jax.tree.map(lambda leaf: jnp.where(done & finite, leaf, 0), sums)
    return sums, finite, pad_like(kept, assignment.client.state)


def _all_finite(tree: PyTree) -> Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)], bool))


def _empty_lanes(level: Level, end: Array) -> Lanes:
    lanes, epochs = level.program.lanes, level.round.state.epoch_losses
    return Lanes(
        place=jnp.broadcast_to(end, (lanes,)),
        step=jnp.zeros(lanes, jnp.int32),
        free=jnp.ones(lanes, bool),
        local=_zeros(level.blank[1], lanes),
        losses=jnp.zeros((lanes, epochs.shape[1] + 1), epochs.dtype),
    )


def _zeros(shapes: PyTree, *leading: int) -> PyTree:
    return jax.tree.map(lambda s: jnp.zeros((*leading, *s.shape), s.dtype), shapes)


def _claim(lanes: Lanes, following: Array) -> tuple[Lanes, Array]:
    """Give each free lane the next place of the queue."""
    taken = jnp.cumsum(lanes.free, dtype=jnp.int32)
    place = jnp.where(lanes.free, following + taken - 1, lanes.place)
    step = jnp.where(lanes.free, 0, lanes.step)
    losses = jnp.where(lanes.free[:, None], 0, lanes.losses)
    return lanes._replace(place=place, step=step, losses=losses), following + taken[-1]


def _select(flags: Array, new: PyTree, old: PyTree) -> PyTree:
    """Choose between two stacked trees lane by lane."""
    return jax.tree.map(lambda n, o: jnp.where(flags.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old)


def _add(
    totals: Totals, assignments: Assignment, finished: tuple[Sums, Array, PyTree], losses: Array, done: Array
) -> Totals:
    """Add the finished lanes to the totals; remember of each client what was finite."""
    sums, finite, kept = finished
    good, nowhere = done & finite, totals.finite.shape[0]
    row, good_row, whole_row = (
        jnp.where(flag, assignments.client.row, nowhere) for flag in (done, good, good & (assignments.epochs > 0))
    )
    size, max_epochs = jnp.maximum(assignments.size, 1).astype(losses.dtype), losses.shape[1] - 1
    whole = jnp.arange(max_epochs, dtype=jnp.int32)[None, :] < assignments.epochs[:, None]
    mean_losses = jnp.where(whole, losses[:, :max_epochs] / size[:, None], 0)
    sums = jax.tree.map(lambda s: jnp.sum(s, axis=0), sums)
    summed, lost = (jax.tree.map(part, totals.sums, totals.lost, sums) for part in (_with_lost, _lost))
    return totals._replace(
        sums=summed,
        lost=lost,
        epoch_losses=totals.epoch_losses.at[whole_row].set(mean_losses, mode="drop"),
        epochs=totals.epochs.at[whole_row].set(jnp.minimum(assignments.epochs, max_epochs), mode="drop"),
        clients=jax.tree.map(lambda a, k: a.at[good_row].set(k, mode="drop"), totals.clients, kept),
        finite=totals.finite.at[row].set(finite, mode="drop"),
        loss=totals.loss + jnp.sum(jnp.where(good[:, None], losses, 0)).astype(totals.loss.dtype),
        examples=totals.examples + jnp.sum(jnp.where(good, assignments.examples, 0)),
        steps=totals.steps + jnp.sum(jnp.where(good, assignments.steps, 0), dtype=jnp.int32),
    )


def _with_lost(total: Array, lost: Array, summand: Array) -> Array:
    """Add to a running total what it lost before (Kahan 1965): a million float32 weights of 37 would lose 1.5 %.

    Only leaves up to a vector are worth it: denominators. Matrices hold differences of either sign.
    """
    return total + (summand - lost) if total.ndim <= 1 else total + summand


def _lost(total: Array, lost: Array, summand: Array) -> Array:
    if total.ndim > 1:
        return lost
    corrected = summand - lost
    return ((total + corrected) - total) - corrected


def _no_loss(sums: Sums) -> Sums:
    return jax.tree.map(lambda total: jnp.zeros_like(total) if total.ndim <= 1 else jnp.zeros((), total.dtype), sums)
