"""The federated round: who takes part, their training in lanes, one server step."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from autorank_jax.adapters.lora import max_ranks, most_of_layers
from autorank_jax.engine.checks import check_round, check_rule, check_update
from autorank_jax.engine.lanes import Program, Round, make_queue, no_totals, run_queue, steps_of_epochs
from autorank_jax.engine.levels import RankLevels, resolve_levels
from autorank_jax.engine.optimizers import at_round
from autorank_jax.engine.packing import Pack, choose_summation
from autorank_jax.engine.sharding import add_up, check_mesh, on_mesh, own_clients
from autorank_jax.engine.totals import Totals
from autorank_jax.federated.faults import Fault, draw_cohort, round_keys
from autorank_jax.federated.participation import Cohort, Participation, by_examples, everyone
from autorank_jax.interface import check_least, checked
from autorank_jax.types import (
    Aggregator,
    Array,
    FederatedData,
    Key,
    LocalTraining,
    Plan,
    RoundFn,
    RoundInfo,
    State,
)


@checked
def make_round(
    local: LocalTraining,
    aggregator: Aggregator,
    *,
    lanes: int = 1,
    rank_levels: RankLevels = "auto",
    participation: Participation = everyone,
    faults: Sequence[Fault] = (),
    weigh: Callable[[FederatedData], Array] = by_examples,
    mesh: Mesh | None = None,
    pack: Pack = "auto",
) -> RoundFn:
    """Make the function of one federated round, to be jitted by the caller.

    Args:
        local: local training of one client.
        aggregator: the rule.
        lanes: clients trained side by side on each device; few suit a CPU, many a GPU. Results depend on it by
            rounding only.
        rank_levels: adapter widths that are compiled, and at which clients train: how many, `⌈R·q/levels⌉`; or the
            widths by path, ascending, as `choose_levels` finds them (a client beyond the last is absent); "auto" is
            one level of the maximum ranks. Each adds compile time; cost follows rank; results depend by rounding.
        participation: chooses the cohort.
        faults: what becomes of it, from `faults`.
        weigh: weight of each client in the aggregate, `(clients,)`; a client whose weight is not positive and finite
            is absent.
        mesh: devices to shard the clients over, from `sharding.client_mesh`, on one host or many; where None the round
            runs where its arrays are. Place state, key and data by `sharding.replicate`, or make data by
            `sharding.owned_data`. Results depend on the mesh by rounding only.
        pack: whether a turn of the lanes checks and sums whole trees in one vector, not leaf by leaf: fewer kernels,
            more memory traffic. "auto" packs everywhere but on a CPU. Results depend on it by rounding only.

    Returns:
        `round(key, state, data) -> (state, info)`. The same `key` serves all rounds: each folds in its number. A state
        may go on under another rule that remembers things of the same form; most remember nothing.

    Raises:
        TypeError: for what is no local training or no rule, such as one that was not called.
        ValueError: if lanes or levels are below 1, or the mesh has other axes than `clients`; when traced, for a state
            of other clients than the data's, or of another rule, and for widths that do not fit the model.
    """
    if mesh is not None:
        check_mesh(mesh)
    check_least("lanes", lanes)
    if isinstance(rank_levels, int):
        check_least("rank_levels", rank_levels)
    check_rule(aggregator)

    def round_fn(key: Key, state: State, data: FederatedData) -> tuple[State, RoundInfo]:
        check_round(key, state, data, aggregator)
        hparams, state = state.hparams, state._replace(hparams=at_round(state.hparams, state.round))
        _, training, server_step, _ = round_keys(key, state.round)
        levels = resolve_levels(widest := max_ranks(state.server), rank_levels)
        whole = min(local.batch_size, data.order.shape[0])  # no larger batch is ever full
        program = Program(local._replace(batch_size=whole), aggregator, lanes, levels, choose_summation(pack, mesh))
        invited, cohort = draw_cohort(key, state.round, data, participation, faults)
        weights = jnp.asarray(weigh(data))
        if weights.shape != data.size.shape:
            raise ValueError(f"expected one weight of every client, {data.size.shape}, got shape {weights.shape}")
        weights = jnp.where((data.size > 0) & (weights > 0) & jnp.isfinite(weights), weights, 0)
        if program.levels[-1] != widest:
            fits = [most_of_layers(state.ranks[path]) <= width for path, width in program.levels[-1].items()]
            weights = jnp.where(jnp.all(jnp.stack(fits), axis=0), weights, 0)
        weight = jnp.where(cohort.present, weights[cohort.row], 0)
        maps = aggregator.prepare(server_step, state.aggregator, state.server)

        def prepare(weight: Array) -> tuple[Round, Array]:
            mine = jnp.array(True) if mesh is None else own_clients(program, state, data, cohort, weight)
            queue = make_queue(training, state, data, cohort, jnp.where(mine, weight, 0), program=program)
            plan = make_plan(state, cohort, weight, jnp.sum(weights))._replace(prepared=maps)
            return Round(state, data, queue, plan), mine

        def train(weight: Array) -> Totals:
            prepared, mine = prepare(weight)
            totals = run_queue(program, prepared)
            return totals if mesh is None else add_up(totals, state, cohort.row, mine)

        if aggregator.exact_plan:
            blank = jax.eval_shape(lambda weight: no_totals(program, prepare(weight)[0]), weight)
            totals = _train_exactly(train, cohort, weight, blank)
        else:
            totals = train(weight)
        updated = aggregator.update(server_step, totals.sums, state.aggregator, state.server)
        check_update(updated, state)
        server, memory = updated
        diagnostics = aggregator.report(totals.sums, state.server, server)
        state = state._replace(
            server=server,
            aggregator=memory,
            round=state.round + 1,
            epoch_losses=totals.epoch_losses,
            epochs=totals.epochs,
            clients=totals.clients,
        )
        meant = jnp.where(invited.present, weights[invited.row], 0) > 0
        full = steps_of_epochs(state, data, cohort.row, local.batch_size)
        info = _describe(totals, cohort, meant, weight > 0, full)._replace(diagnostics=diagnostics)
        return state._replace(hparams=hparams), info

    return round_fn if mesh is None else on_mesh(round_fn, mesh)


def make_plan(state: State, cohort: Cohort, weight: Array, total: Array) -> Plan:
    """Sum the participants' weights per rank position."""

    def owners(ranks: Array, width: int) -> Array:
        if ranks.ndim > 1:
            return jax.vmap(lambda layer: owners(layer, width), 1)(ranks)
        rank = jnp.clip(ranks[cohort.row], 0, width)  # as masks see one outside, which jit hides
        by_rank = jnp.zeros(width + 1, weight.dtype).at[rank].add(weight)
        return jnp.cumsum(by_rank[::-1])[::-1][1:]

    widest = max_ranks(state.server.trainable)
    return Plan({path: owners(state.ranks[path], widest[path]) for path in widest}, jnp.sum(weight), total)


def _train_exactly(train: Callable[[Array], Totals], cohort: Cohort, weight: Array, shapes: Totals) -> Totals:
    """Train again without the clients that turned out non-finite, until the plan was right (one program)."""
    blank = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    carry = (weight, blank, jnp.ones(blank.finite.shape, bool), jnp.array(True))

    def again(carry: tuple[Array, Totals, Array, Array]) -> tuple[Array, Totals, Array, Array]:
        weight, _, finite, _ = carry
        totals = train(weight)
        finite = finite & totals.finite
        kept = jnp.where(finite[cohort.row], weight, 0)
        return kept, totals._replace(finite=finite), finite, jnp.any(kept != weight)

    return lax.while_loop(lambda carry: carry[3], again, carry)[1]


def _describe(totals: Totals, cohort: Cohort, meant: Array, trained: Array, full: Array) -> RoundInfo:
    """Count; `meant` were to train, `trained` did, and `full` are the steps of their epochs, `(cohort,)` each."""
    short = jnp.zeros_like(trained) if cohort.max_steps is None else trained & (cohort.max_steps < full)
    return RoundInfo(
        loss=jnp.where(totals.examples > 0, totals.loss / jnp.maximum(totals.examples, 1), jnp.nan),
        participants=jnp.sum(meant, dtype=jnp.int32),
        dropped=jnp.sum(meant & ~trained, dtype=jnp.int32),
        excluded=jnp.sum(trained & ~totals.finite[cohort.row], dtype=jnp.int32),
        cut_short=jnp.sum(short, dtype=jnp.int32),
        steps=totals.steps,
        examples=totals.examples,
        lane_steps=totals.lane_steps,
        diagnostics={},
    )
