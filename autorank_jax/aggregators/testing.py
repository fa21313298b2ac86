"""Checks for parts of one's own: `check_aggregator` runs the invariances that every aggregation rule must have.

```python
import autorank_jax as ar

ar.testing.check_aggregator(ar.aggregators.rbla())
```
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.adapters.lora import over_columns, over_rows
from autorank_jax.engine import init_state, make_round
from autorank_jax.federated.participation import Cohort
from autorank_jax.interface import FOREIGN_FAILURES, checked, first_line
from autorank_jax.types import (
    Adapter,
    Aggregator,
    Array,
    Base,
    Batch,
    Client,
    FederatedData,
    Hparams,
    Key,
    LocalState,
    LocalTraining,
    PyTree,
    RoundFn,
    Server,
    Setting,
    State,
    Trainable,
)

_SIZES = (3, 1, 4, 2, 6)
_RANKS = {"deep": (1, 2, 4, 3, 2), "wide": (2, 3, 1, 2, 1)}
_SHAPES = {"deep": (7, 5, 4), "wide": (24, 28, 3)}  # d_in, d_out, max_rank; of wide products can be sketched
_SOMEONE = 3
"""The client that is away, or sends nonsense. It is not the only owner of any rank position."""


class _Case(NamedTuple):
    """What may differ from one round to the next without compiling anything."""

    order: tuple[int, ...] = (0, 1, 2, 3, 4)
    present: tuple[int, ...] = (1, 1, 1, 1, 1)
    unit: float = 1.0
    of_someone: float = 0.0  # added to the numbers that one client trains on


@checked
def check_aggregator(rule: Aggregator, *, rounds: int = 2) -> None:
    """Check what must hold of every aggregation rule, on a small federation whose local training is made up.

    The clients have mixed ranks. Compared are, after some rounds, the models `W + A B` with the dense parameters, not
    the factors, which may come out in another basis. Checked is that

    - lanes and rank levels change nothing, neither the server nor what clients keep;
    - the order of the clients changes nothing;
    - it does not matter what an absent client would have sent;
    - a client that sends NaN counts as if absent, for numerators and denominators alike;
    - weights in another unit change nothing;
    - where nobody reports, the model stays as it is, without NaN;
    - a round leaves the types of its state as they were, so that the next compiles nothing.

    Args:
        rule: the rule. Its `server.frozen` is a `Base`, so that it may merge.
        rounds: to run for each check; 2 for rules that alternate.

    Raises:
        TypeError: for what is no rule.
        AssertionError: with a line for each check that fails; one line where a plain round fails or is not finite.
    """
    broken: list[str] = []
    plain = jax.jit(_make_round(rule, lanes=1, rank_levels=1))

    def run(case: _Case, go: RoundFn = plain, number: int = rounds) -> State:
        state, data = _begin(rule, case)
        for _ in range(number):
            state, _ = go(jax.random.key(0), state, data)
        return state

    def expect(what: str, cause: str, case: _Case, same_as: State) -> None:
        gap = _gap(_model(run(case).server), _model(same_as.server))
        if not gap <= _tolerance():
            broken.append(f"{what}: the model is off by {gap:.2g}, for instance through {cause}")

    try:
        usual, start = run(_Case()), _begin(rule, _Case())[0]
    except FOREIGN_FAILURES as error:
        raise AssertionError(f"expected an aggregation rule that runs, got {first_line(error)}") from error
    if not np.isfinite(_gap(_model(usual.server), _model(start.server))):
        raise AssertionError("expected an aggregation rule that gives numbers, got NaN or infinity in a plain round")
    _check_lanes(rule, usual, run, broken)
    expect("order of clients", "a summand that looks at `client.row`", _Case(order=(3, 0, 4, 2, 1)), usual)
    away = _Case(present=tuple(int(k != _SOMEONE) for k in range(len(_SIZES))))
    without = run(away)
    expect("an absent client", "sums that count clients who are away", away._replace(of_someone=1.0), without)
    nonsense = _Case(of_someone=float("nan"))
    expect("a client that sends NaN", "`plan.owners` in a rule without `exact_plan`", nonsense, without)
    expect("weights in another unit", "a total that is not divided by the summed weight", _Case(unit=4.0), usual)
    nobody = _Case(present=(0,) * len(_SIZES))
    expect("nobody reports", "a division by a summed weight of 0", nobody, start)
    if _types(usual) != _types(start):
        broken.append("types: the state after a round has other shapes or dtypes, or weakly typed numbers")
    if broken:
        raise AssertionError("expected an aggregation rule that keeps the invariances, got\n- " + "\n- ".join(broken))


def _check_lanes(rule: Aggregator, usual: State, run: Callable[..., State], broken: list[str]) -> None:
    try:
        other = run(_Case(), jax.jit(_make_round(rule, lanes=3, rank_levels=2)))
    except (IndexError, TypeError, ValueError) as error:
        broken.append(
            f"rank levels: {first_line(error)}, for instance through a summand that assumes max_rank: the width is "
            "that of the client's level"
        )
        return
    server, kept = _gap(_model(other.server), _model(usual.server)), _gap(other.clients, usual.clients)
    if not max(server, kept) <= _tolerance():
        broken.append(
            f"lanes and rank levels: the model is off by {server:.2g}, what clients keep by {kept:.2g}, for instance "
            "through something else than a sum over clients"
        )


def _make_round(rule: Aggregator, *, lanes: int, rank_levels: int) -> RoundFn:
    def who(_: Key, data: FederatedData) -> Cohort:
        return Cohort(jnp.arange(len(_SIZES), dtype=jnp.int32), data.targets["present"][data.start] > 0)

    return make_round(
        LocalTraining(_hand_out, _move, lambda state, _: state.params, 2),
        rule,
        lanes=lanes,
        rank_levels=rank_levels,
        participation=who,
        weigh=lambda data: data.targets["weight"][data.start],
    )


def _hand_out(hparams: Hparams, start: Trainable, client: Client) -> LocalState:  # noqa: ARG001
    return LocalState(start, ())


def _move(hparams: Hparams, setting: Setting, state: LocalState, batch: Batch, key: Key) -> tuple[LocalState, Array]:  # noqa: ARG001
    """Move what the rule lets a client train by something that depends on the client, the place and the value."""
    trains = setting.trains

    def moved(value: Array, mask: Array | float, flag: bool | Array) -> Array:
        place = sum(  # the same at every width of a rank level
            1.7**axis * jax.lax.broadcasted_iota(value.dtype, value.shape, axis) for axis in range(value.ndim)
        )
        step = 0.2 * jnp.sin(batch.inputs[0].astype(value.dtype) + place + 2 * value)
        return value + jnp.where(jnp.asarray(flag) & (jnp.asarray(mask) > 0), step, 0)

    adapters = {
        path: Adapter(
            moved(a, over_columns(setting.client.masks[path], a), trains.lora_a),
            moved(b, over_rows(setting.client.masks[path], b), trains.lora_b),
        )
        for path, (a, b) in state.params.adapters.items()
    }
    dense = jax.tree.map(lambda value: moved(value, 1.0, trains.dense), state.params.dense)
    return LocalState(Trainable(adapters, dense), ()), jnp.zeros(batch.weight.shape)


def _begin(rule: Aggregator, case: _Case) -> tuple[State, FederatedData]:
    """Return the state before the first round, and the clients."""
    rng, order, dtype = np.random.default_rng(0), np.array(case.order), jnp.result_type(float)
    adapters = {
        path: Adapter(jnp.asarray(rng.normal(size=(d_in, r)), dtype), jnp.asarray(rng.normal(size=(r, d_out)), dtype))
        for path, (d_in, d_out, r) in _SHAPES.items()
    }
    kernels = {path: jnp.asarray(rng.normal(size=shape[:2]), dtype) for path, shape in _SHAPES.items()}
    dense = {"bias": jnp.asarray(rng.normal(size=3), dtype)}
    size = np.array(_SIZES, np.int32)
    owner = np.repeat(np.arange(len(size)), size)
    number = 1.3 * owner + np.where(owner == _SOMEONE, case.of_someone, 0)
    targets = {
        "present": jnp.asarray(np.array(case.present)[owner], jnp.int32),
        "weight": jnp.asarray(case.unit * size[owner], dtype),
    }
    start, order32 = (np.cumsum(size, dtype=np.int32) - size)[order], order.astype(np.int32)
    examples = jnp.arange(len(owner), dtype=jnp.int32)
    table = (jnp.asarray(column) for column in (start, size[order], order32))
    data = FederatedData(jnp.asarray(number, dtype), targets, examples, *table)
    ranks = {path: jnp.asarray(np.array(of)[order], jnp.int32) for path, of in _RANKS.items()}
    return init_state(Server(Trainable(adapters, dense), Base(kernels, ())), rule, ranks), data


def _model(server: Server) -> PyTree:
    """Return what the model computes with."""
    adapters = server.trainable.adapters
    return {p: server.frozen.kernels[p] + a.lora_a @ a.lora_b for p, a in adapters.items()}, server.trainable.dense


def _gap(one: PyTree, other: PyTree) -> float:
    """Return the largest difference of two trees of small numbers; infinity where anything is no number."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    gaps = [float(np.max(np.abs(np.asarray(a, float) - np.asarray(b, float)), initial=0)) for a, b in pairs]
    return max((gap if np.isfinite(gap) else np.inf for gap in gaps), default=0.0)


def _tolerance() -> float:
    return 10 * float(np.sqrt(jnp.finfo(jnp.result_type(float)).eps))


def _types(state: State) -> list[Any]:
    return [(jnp.shape(leaf), jnp.asarray(leaf).dtype, leaf.weak_type) for leaf in jax.tree.leaves(state)]
