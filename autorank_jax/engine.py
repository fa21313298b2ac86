"""The federated round: lanes that pull clients from a queue, level by level of rank.

A fixed number of lanes is vmapped. Inside one `lax.while_loop` free lanes take the next client from a queue sorted by
descending steps, all lanes train until the first of them is done, and finished clients are added to running sums:
memory is O(lanes + data), work is O(total steps), whatever the imbalance. Rank levels run the loop once per static
adapter width, so that cost follows rank; ranks themselves are data.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from autorank_jax.lora import cut, max_ranks, narrow, pad_like, rank_masks
from autorank_jax.shuffle import permuted
from autorank_jax.types import (
    Aggregator,
    Array,
    Batch,
    Client,
    ClientUpdate,
    FederatedData,
    Key,
    LocalState,
    LocalTraining,
    Plan,
    PyTree,
    RoundFn,
    RoundInfo,
    Setting,
    State,
    Sums,
)


class Cohort(NamedTuple):
    """Who takes part in a round."""

    index: Array  # (cohort,) int32 rows of `FederatedData`, each at most once
    present: Array  # (cohort,) bool


Participation = Callable[[Key, FederatedData], Cohort]
"""Chooses who takes part. The cohort's length is static."""


def everyone(key: Key, data: FederatedData) -> Cohort:  # noqa: ARG001
    """Let every client take part in every round."""
    clients = data.size.shape[0]
    return Cohort(jnp.arange(clients, dtype=jnp.int32), jnp.ones(clients, bool))


def sample_uniformly(cohort: int) -> Participation:
    """Sample a fixed number of clients without replacement; who is drawn follows identities, not positions.

    Raises:
        ValueError: if the cohort is below 1 or, when traced, above the number of clients.
    """
    if cohort < 1:
        raise ValueError(f"expected a cohort of at least one client, got {cohort}")

    def sample(key: Key, data: FederatedData) -> Cohort:
        clients = data.size.shape[0]
        if cohort > clients:
            raise ValueError(f"expected a cohort of at most all {clients} clients, got {cohort}")
        draws = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(data.id)
        return Cohort(lax.top_k(draws, cohort)[1].astype(jnp.int32), jnp.ones(cohort, bool))

    return sample


def by_examples(data: FederatedData) -> Array:
    """Weigh clients by their number of examples, `(clients,)`."""
    return data.size.astype(jnp.result_type(float))


class Queue(NamedTuple):
    """The cohort in the order in which lanes take it: by rank level, then by descending steps."""

    index: Array  # (cohort,) int32
    weight: Array  # (cohort,)
    steps: Array  # (cohort,) int32
    ends: Array  # (levels,) int32 where each level ends


class Seat(NamedTuple):
    """What a lane knows of the client it holds."""

    client: Client
    offset: Array  # () int32 first position in `FederatedData.order`
    size: Array  # () int32
    steps: Array  # () int32
    words: Array  # (2,) uint32 key of its shuffles this round
    noise: Key  # key of its random layers this round


class Lanes(NamedTuple):
    """The stacked lanes; every leaf begins with `(lanes,)`."""

    place: Array  # int32 place in the queue; at or beyond the level's end: idle
    step: Array  # int32 steps done
    free: Array  # bool: takes a new client next
    local: LocalState
    losses: Array  # (lanes, max_epochs + 1) summed losses by epoch; the last column takes all later epochs


class Tally(NamedTuple):
    """What a round adds up."""

    sums: Sums
    epoch_losses: Array  # (clients, max_epochs)
    epochs: Array  # (clients,)
    clients: PyTree
    finite: Array  # (clients,) bool
    loss: Array
    examples: Array
    steps: Array
    lane_steps: Array


class Round(NamedTuple):
    """The values one round is a function of, closed over by what is vmapped over lanes."""

    key: Key
    state: State
    data: FederatedData
    queue: Queue
    plan: Plan


def make_round(
    local: LocalTraining,
    aggregator: Aggregator,
    *,
    lanes: int = 1,
    rank_levels: int = 1,
    participation: Participation = everyone,
    weigh: Callable[[FederatedData], Array] = by_examples,
) -> RoundFn:
    """Make the function of one federated round, to be jitted by the caller.

    Args:
        local: local training of one client.
        aggregator: the rule.
        lanes: clients trained side by side; few suit a CPU, many a GPU. Results depend on it by rounding only.
        rank_levels: widths at which adapters are trained: `⌈R·q/levels⌉`. Each adds compile time; cost follows rank.
        participation: chooses the cohort.
        weigh: weight of each client in the aggregate, `(clients,)`.

    Returns:
        `round(key, state, data) -> (state, info)`. The same `key` serves all rounds: each folds in its number.

    Raises:
        ValueError: if lanes or levels are below 1.
    """
    for name, value in (("lanes", lanes), ("rank_levels", rank_levels)):
        if value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}")

    def round_fn(key: Key, state: State, data: FederatedData) -> tuple[State, RoundInfo]:
        keys = jax.random.split(jax.random.fold_in(key, state.round), 3)
        widths = level_widths(max_ranks(state.server.trainable), rank_levels)
        cohort = participation(keys[0], data)
        weight = jnp.where(cohort.present, weigh(data)[cohort.index], 0)
        total = jnp.sum(weigh(data))

        def train(weight: Array) -> tuple[Tally, Array]:
            queue = make_queue(state, data, cohort._replace(present=weight > 0), weight, widths, local.batch_size)
            plan = make_plan(state, cohort, weight, total)
            tally = run_queue(Round(keys[1], state, data, queue, plan), local, aggregator, lanes, widths)
            return tally, jnp.where(tally.finite[cohort.index], weight, 0)

        tally = _train_exactly(train, weight) if aggregator.exact_plan else train(weight)[0]
        server, memory = aggregator.update(keys[2], tally.sums, state.aggregator, state.server)
        state = state._replace(
            server=server,
            aggregator=memory,
            round=state.round + 1,
            epoch_losses=tally.epoch_losses,
            epochs=tally.epochs,
            clients=tally.clients,
        )
        return state, _describe(tally, cohort, weight)

    return round_fn


def _train_exactly(train: Callable[[Array], tuple[Tally, Array]], weight: Array) -> Tally:
    """Train again without the clients that turned out non-finite, until the plan was right (one program)."""
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(train, weight)[0])

    def again(carry: tuple[Array, Tally, Array, Array]) -> tuple[Array, Tally, Array, Array]:
        weight, _, finite, _ = carry
        tally, kept = train(weight)
        finite = finite & tally.finite
        return kept, tally._replace(finite=finite), finite, jnp.any((weight > 0) & (kept == 0))

    everybody = jnp.ones(blank.finite.shape, bool)
    return lax.while_loop(lambda carry: carry[3], again, (weight, blank, everybody, jnp.array(True)))[1]


def _describe(tally: Tally, cohort: Cohort, weight: Array) -> RoundInfo:
    meant = weight > 0
    return RoundInfo(
        loss=tally.loss / jnp.maximum(tally.examples, 1),
        participants=jnp.sum(meant, dtype=jnp.int32),
        excluded=jnp.sum(meant & ~tally.finite[cohort.index], dtype=jnp.int32),
        steps=tally.steps,
        examples=tally.examples,
        lane_steps=tally.lane_steps,
        diagnostics={},
    )


def level_widths(widest: dict[str, int], levels: int) -> list[dict[str, int]]:
    """Return the adapter widths of each rank level, `⌈R·q/levels⌉` for `q = 1..levels`."""
    return [{p: -(-r * q // levels) for p, r in widest.items()} for q in range(1, levels + 1)]


def make_plan(state: State, cohort: Cohort, weight: Array, total: Array) -> Plan:
    """Sum the participants' weights per rank position."""
    owners = {}
    for path, width in max_ranks(state.server.trainable).items():
        ranks = state.ranks[path][cohort.index]
        by_rank = jnp.zeros(width + 1, weight.dtype).at[ranks].add(weight)
        owners[path] = jnp.cumsum(by_rank[::-1])[::-1][1:]
    return Plan(owners, jnp.sum(weight), total)


def make_queue(
    state: State, data: FederatedData, cohort: Cohort, weight: Array, widths: list[dict[str, int]], batch_size: int
) -> Queue:
    """Sort the cohort by rank level, then by descending steps; absent clients come last, beyond every level."""
    steps = state.hparams["local_epochs"].astype(jnp.int32) * (-(-data.size[cohort.index] // batch_size))
    level = jnp.zeros(cohort.index.shape, jnp.int32)
    for path, ranks in state.ranks.items():
        edges = jnp.array([w[path] for w in widths[:-1]], jnp.int32)
        level = jnp.maximum(level, jnp.searchsorted(edges, ranks[cohort.index], side="left").astype(jnp.int32))
    level = jnp.where(cohort.present & (steps > 0), level, len(widths))
    order = jnp.lexsort((-steps, level))
    ends = jnp.searchsorted(level[order], jnp.arange(len(widths), dtype=jnp.int32), side="right").astype(jnp.int32)
    return Queue(cohort.index[order], weight[order], steps[order], ends)


def run_queue(
    round_: Round, local: LocalTraining, aggregator: Aggregator, lanes: int, widths: list[dict[str, int]]
) -> Tally:
    """Train the whole cohort, one loop per rank level, with one tally carried through all of them."""
    state, data = round_.state, round_.data
    clients, dtype = data.size.shape[0], jnp.result_type(float)
    tally = Tally(
        sums=_no_sums(round_, local, aggregator, widths[-1]),
        epoch_losses=state.epoch_losses,
        epochs=state.epochs,
        clients=state.clients,
        finite=jnp.ones(clients, bool),
        loss=jnp.zeros((), dtype),
        examples=jnp.zeros((), dtype),
        steps=jnp.zeros((), jnp.int32),
        lane_steps=jnp.zeros((), jnp.int32),
    )
    for level, width in enumerate(widths):
        begin = round_.queue.ends[level - 1] if level else jnp.zeros((), jnp.int32)
        blank = _no_sums(round_, local, aggregator, width)
        done = run_level(
            round_, local, aggregator, lanes, width, (begin, round_.queue.ends[level]), tally._replace(sums=blank)
        )
        sums = jax.tree.map(jnp.add, tally.sums, pad_like(done.sums, tally.sums))
        tally = done._replace(sums=sums)
    return tally


def _no_sums(round_: Round, local: LocalTraining, aggregator: Aggregator, width: dict[str, int]) -> Sums:
    """Return zeros in the shapes of a rule's sums at an adapter width."""

    def one(place: Array) -> Sums:
        seat = take_seat(round_, width, place)
        start = _start(round_, aggregator, width, seat)
        state = local.begin(round_.state.hparams, start, seat.client)
        update = ClientUpdate(local.end(state, seat.client), start, seat.client)
        return aggregator.summand(update, round_.state.server, _narrow_plan(round_.plan, width))

    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, jnp.zeros((), jnp.int32)))


def _narrow_plan(plan: Plan, width: dict[str, int]) -> Plan:
    return plan._replace(owners={p: o[: width[p]] for p, o in plan.owners.items()})


def take_seat(round_: Round, width: dict[str, int], place: Array) -> Seat:
    """Look up everything about the client at one place of the queue."""
    state, data, queue = round_.state, round_.data, round_.queue
    place = jnp.minimum(place, queue.index.shape[0] - 1)
    index = queue.index[place]
    masks = rank_masks({p: r[index] for p, r in state.ranks.items()}, width)
    kept = jax.tree.map(lambda leaf: leaf[index], state.clients)
    shuffle, noise = jax.random.split(jax.random.fold_in(round_.key, data.id[index]))
    return Seat(
        client=Client(index, masks, queue.weight[place], kept),
        offset=data.start[index],
        size=data.size[index],
        steps=queue.steps[place],
        words=jax.random.bits(shuffle, (2,), jnp.uint32),
        noise=noise,
    )


def take_batch(data: FederatedData, seat: Seat, step: Array, batch_size: int) -> tuple[Batch, Array]:
    """Gather the examples of one step of one client; return them and the epoch they belong to.

    Every example comes exactly once per epoch, in an order that depends on (key, round, client id, epoch) only.
    """
    per_epoch = jnp.maximum(-(-seat.size // batch_size), 1)
    epoch, number = step // per_epoch, step % per_epoch
    position = number * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    weight = (position < seat.size).astype(jnp.float32)
    examples = data.order[seat.offset + permuted(position, seat.size, seat.words, epoch)]
    inputs, targets = jax.tree.map(lambda leaf: leaf[examples], (data.inputs, data.targets))
    return Batch(inputs, targets, weight), epoch


def _start(round_: Round, aggregator: Aggregator, width: dict[str, int], seat: Seat) -> PyTree:
    """Return what a client starts from, at a level's width and cut to its own rank."""
    handed = aggregator.start(round_.state.server, round_.state.aggregator, seat.client)
    return cut(narrow(handed, width), seat.client.masks)


def run_level(
    round_: Round,
    local: LocalTraining,
    aggregator: Aggregator,
    lanes: int,
    width: dict[str, int],
    bounds: tuple[Array, Array],
    tally: Tally,
) -> Tally:
    """Train the clients between two places of the queue at one adapter width."""
    begin, end = bounds
    state, data = round_.state, round_.data
    plan = _narrow_plan(round_.plan, width)
    trains = aggregator.trains(state.aggregator)

    def fresh(seat: Seat) -> LocalState:
        return local.begin(state.hparams, _start(round_, aggregator, width, seat), seat.client)

    def advance(seat: Seat, start: PyTree, lane: LocalState, losses: Array, step: Array) -> tuple[LocalState, Array]:
        batch, epoch = take_batch(data, seat, step, local.batch_size)
        setting = Setting(seat.client, start, state.server.frozen, trains)
        lane, example_losses = local.step(state.hparams, setting, lane, batch, jax.random.fold_in(seat.noise, step))
        column = jnp.minimum(epoch, losses.shape[0] - 1)
        return lane, losses.at[column].add(jnp.sum(example_losses).astype(losses.dtype))

    def finish(seat: Seat, start: PyTree, lane: LocalState, done: Array) -> tuple[Sums, Array, PyTree]:
        trained = local.end(lane, seat.client)
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(trained)]))
        counts = done & finite
        trained = jax.tree.map(lambda new, old: jnp.where(counts, new, old), trained, start)
        client = seat.client._replace(weight=jnp.where(counts, seat.client.weight, 0))
        update = ClientUpdate(trained, start, client)
        return aggregator.summand(update, state.server, plan), finite, aggregator.client_keep(update, state.server)

    def turn(carry: tuple[Lanes, Array, Tally]) -> tuple[Lanes, Array, Tally]:
        held, following, tally = carry
        held, following = _claim(held, following)
        seats = jax.vmap(lambda place: take_seat(round_, width, place))(held.place)
        starts = jax.vmap(lambda seat: _start(round_, aggregator, width, seat))(seats)
        held = held._replace(local=_select(held.free, jax.vmap(fresh)(seats), held.local))
        active = held.place < end
        left = jnp.where(active, seats.steps - held.step, jnp.iinfo(jnp.int32).max)
        count = jnp.min(left)

        def forward(_: Array, moving: tuple[LocalState, Array, Array]) -> tuple[LocalState, Array, Array]:
            lane, losses, step = moving
            lane, losses = jax.vmap(advance)(seats, starts, lane, losses, step)
            return lane, losses, step + 1

        lane, losses, step = lax.fori_loop(0, count, forward, (held.local, held.losses, held.step))
        done = active & (step == seats.steps)
        sums, finite, kept = jax.vmap(finish)(seats, starts, lane, done)
        tally = _add(tally, state, seats, (sums, finite, kept), losses, done, count)
        return Lanes(held.place, step, done | ~active, lane, losses), following, tally

    def busy(carry: tuple[Lanes, Array, Tally]) -> Array:
        held, following, _ = carry
        return (following < end) | jnp.any(~held.free)

    start = _empty_lanes(round_, lanes, fresh, width, end, tally.epoch_losses.shape[1])
    return lax.while_loop(busy, turn, (start, begin, tally))[2]


def _empty_lanes(
    round_: Round, lanes: int, fresh: Callable[[Seat], LocalState], width: dict[str, int], end: Array, epochs: int
) -> Lanes:
    one = jax.eval_shape(lambda place: fresh(take_seat(round_, width, place)), end)
    blank = jax.tree.map(lambda s: jnp.zeros((lanes, *s.shape), s.dtype), one)
    place = jnp.broadcast_to(end, (lanes,))
    losses = jnp.zeros((lanes, epochs + 1), round_.state.epoch_losses.dtype)
    return Lanes(place, jnp.zeros(lanes, jnp.int32), jnp.ones(lanes, bool), blank, losses)


def _claim(held: Lanes, following: Array) -> tuple[Lanes, Array]:
    """Give each free lane the next place of the queue."""
    taken = jnp.cumsum(held.free, dtype=jnp.int32)
    place = jnp.where(held.free, following + taken - 1, held.place)
    step = jnp.where(held.free, 0, held.step)
    losses = jnp.where(held.free[:, None], 0, held.losses)
    return held._replace(place=place, step=step, losses=losses), following + taken[-1]


def _select(flags: Array, new: PyTree, old: PyTree) -> PyTree:
    """Choose between two stacked trees lane by lane."""
    return jax.tree.map(lambda n, o: jnp.where(flags.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, old)


def _add(
    tally: Tally,
    state: State,
    seats: Seat,
    finished: tuple[Sums, Array, PyTree],
    losses: Array,
    done: Array,
    count: Array,
) -> Tally:
    """Add the finished lanes to the tally; write what is remembered of each client, if its update was finite."""
    sums, finite, kept = finished
    nowhere = tally.finite.shape[0]
    good = done & finite
    row, good_row = (jnp.where(flag, seats.client.index, nowhere) for flag in (done, good))
    local_epochs = state.hparams["local_epochs"].astype(jnp.int32)
    mean_losses = losses[:, :-1] / jnp.maximum(seats.size, 1).astype(losses.dtype)[:, None]
    examples = jnp.where(good, seats.size, 0).astype(tally.examples.dtype) * local_epochs.astype(tally.examples.dtype)
    return Tally(
        sums=jax.tree.map(lambda total, s: total + jnp.sum(s, axis=0), tally.sums, sums),
        epoch_losses=tally.epoch_losses.at[good_row].set(mean_losses, mode="drop"),
        epochs=tally.epochs.at[good_row].set(jnp.minimum(local_epochs, mean_losses.shape[1]), mode="drop"),
        clients=jax.tree.map(lambda a, k: a.at[good_row].set(k, mode="drop"), tally.clients, kept),
        finite=tally.finite.at[row].set(finite, mode="drop"),
        loss=tally.loss + jnp.sum(jnp.where(good[:, None], losses, 0)).astype(tally.loss.dtype),
        examples=tally.examples + jnp.sum(examples),
        steps=tally.steps + jnp.sum(jnp.where(done, seats.steps, 0)),
        lane_steps=tally.lane_steps + count * done.shape[0],
    )
