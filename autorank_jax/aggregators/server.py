"""What can be put around any rule: a server optimiser, and clipping of what clients send."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from autorank_jax.adapters.lora import nonzero_positions
from autorank_jax.aggregators.base import anything, choose, in_types_of, moves, owned, widen
from autorank_jax.engine.optimizers import begin_optimizer, means_others, step_optimizer
from autorank_jax.interface import checked
from autorank_jax.types import (
    Adapter,
    Aggregator,
    AggState,
    Array,
    ClientUpdate,
    Key,
    PyTree,
    Server,
    ServerStep,
    Sums,
    Trainable,
)


@checked
def with_server_optimizer(rule: Aggregator, optimizer: optax.GradientTransformation) -> Aggregator:
    """Let an optimiser take the step towards what a rule averages (FedOpt, arXiv 2003.00295).

    `values + optimizer(values - mean)`: FedAvgM is `optax.sgd(1.0, momentum=0.9)`, FedAdam `optax.adam(lr, eps=1e-3)`,
    FedYogi `optax.yogi(lr)`; `optax.sgd(1.0)` is the rule itself. Values are what the rule averages: factors, the
    products of an SVD rule (before the SVD), the kernels of a merging rule, and dense parameters. Where nobody
    reported, at a rank position or at all, values and the optimiser's state stay as they were. Products are summed
    whole here, even by rules that sketch them otherwise: the optimiser's state has their size anyway.

    Of a rule without a `step`, such as one made by hand, the values are factors and dense parameters as its `update`
    leaves them; a rank position that it leaves exactly as it was counts as one that nobody reported. That suits rules
    that average factors; one that splits products, or merges into the base, needs a `ServerStep`.

    Args:
        rule: any rule.
        optimizer: what belongs to a value is found in its state by the value's path, as in everything of optax. It is
            told no loss.

    Raises:
        TypeError: for what is no rule or no optimiser.
        ValueError: if the rule has a server optimiser; when initialised, for an optimiser that moves other values than
            it means (schedule-free ones, SAM); when traced, for one that needs a loss, or if the rule has no `step` and
            changes the base.
    """
    if rule.step is not None and rule.step.read is step_taken:
        raise ValueError("expected a rule without a server optimizer, got one that has it: chain both with optax.chain")
    read = rule.step.read if rule.step else lambda server: server.trainable
    aim = _aim_of_step if rule.step else _aim_of_update

    def prepare(key: Key, state: AggState, server: Server) -> PyTree:
        return () if rule.step else rule.prepare(key, state[0], server)  # a step's values are whole

    def update(key: Key, sums: Sums, state: AggState, server: Server) -> tuple[Server, AggState]:
        inner, memory = state
        values = read(server)
        mean, seen, write, advanced = aim(rule, key, sums, inner, server)
        gradient = jax.tree.map(lambda old, new, some: jnp.where(some, old - new, 0), values, mean, seen)
        updates, after = step_optimizer(optax.with_extra_args_support(optimizer), gradient, memory, values)
        moved = optax.apply_updates(values, updates)
        moved = jax.tree.map(jnp.where, seen, moved, values)
        some = anything(seen)
        flags = jax.tree.map(lambda value, flag: (jnp.shape(value), flag), values, seen)
        return choose(some, write(moved), server), (advanced, _frozen(after, memory, flags, some))

    def begin(server: Server) -> PyTree:
        memory = begin_optimizer(optimizer, read(server))
        if means_others(memory):
            raise ValueError(
                "expected a server optimizer that means the values it moves, got schedule_free or sam: clients may "
                "have it"
            )
        return memory

    return rule._replace(
        init=lambda server: (rule.init(server), begin(server)),
        start=lambda server, state, client: rule.start(server, state[0], client),
        trains=lambda state: rule.trains(state[0]),
        update=update,
        prepare=prepare,
        step=ServerStep(step_taken, step_taken, step_taken),
        traffic=rule.traffic._replace(down=rule.traffic.down._replace(stack=False)),  # factors do not tell the step
    )


def step_taken(*_: Any) -> Any:
    """Stand in the step of a rule whose server step an optimiser has taken."""
    raise ValueError("expected a rule without a server optimizer, got one that has it")


class _Aim(NamedTuple):
    """What a rule would make of its sums."""

    mean: PyTree  # of the values that the optimiser moves
    seen: PyTree  # bools where anyone reported
    write: Callable[[PyTree], Server]  # values into the model
    state: AggState  # the rule's own, after the round


def _aim_of_step(rule: Aggregator, key: Key, sums: Sums, state: AggState, server: Server) -> _Aim:
    assert rule.step is not None
    step = rule.step
    mean, seen = step.mean(sums, state, server)
    return _Aim(mean, seen, lambda values: step.write(key, values, state, server), step.advance(state))


def _aim_of_update(rule: Aggregator, key: Key, sums: Sums, state: AggState, server: Server) -> _Aim:
    after, advanced = rule.update(key, sums, state, server)
    leaves = zip(jax.tree.leaves(after.frozen), jax.tree.leaves(server.frozen), strict=True)
    if any(new is not old for new, old in leaves):
        raise ValueError(
            "expected a rule that leaves the base alone, got one without a step whose update changes it: a rule that "
            "merges needs a ServerStep"
        )
    old, new = server.trainable, after.trainable
    adapters = {path: owned(_moved(new.adapters[path], adapter), adapter) for path, adapter in old.adapters.items()}
    dense = jax.tree.map(lambda n, o: jnp.any(n != o), new.dense, old.dense)
    return _Aim(new, Trainable(adapters, dense), lambda values: server._replace(trainable=values), advanced)


def _moved(new: Adapter, old: Adapter) -> Array:
    """Return at which rank positions anything differs, `(..., r)`."""
    differ = jax.tree.map(lambda n, o: (n != o).astype(o.dtype), new, old)
    return nonzero_positions(differ)


def _frozen(after: PyTree, before: PyTree, flags: PyTree, some: Array) -> PyTree:
    """Keep the optimiser's state where nobody reported.

    Args:
        after: the state after the step.
        before: likewise, before it.
        flags: of every value, its shape and bools where anyone reported; what lies at its path in the state is its own.
        some: whether anyone reported at all: then what belongs to no value moves, such as counts.
    """
    by_path = dict(jax.tree.leaves_with_path(flags, is_leaf=lambda node: type(node) is tuple))

    def keep(path: tuple, new: Array, old: Array) -> Array:
        parts = (path[begin:end] for begin in range(len(path)) for end in range(begin + 1, len(path) + 1))
        shape, flag = next((by_path[part] for part in parts if part in by_path), ((), some))
        return jnp.where(flag if shape == jnp.shape(new) else jnp.any(flag), new, old)

    return jax.tree.map_with_path(keep, after, before)


@checked
def with_norm_clipping(rule: Aggregator, max_norm: float) -> Aggregator:
    """Shrink what a client sends to a norm: `start + Δ min(1, c / ‖Δ‖)`, Δ over all factors and dense parameters.

    The client keeps between rounds what it sent, clipped as well.

    Args:
        rule: any rule.
        max_norm: c > 0.

    Raises:
        ValueError: if the norm is not positive.
    """
    if not 0 < max_norm < float("inf"):
        raise ValueError(f"expected a positive max_norm, got {max_norm}")

    def clip(update: ClientUpdate) -> ClientUpdate:
        moved = moves(update.trained, update.start)
        factor = jnp.minimum(1, max_norm / jnp.maximum(optax.tree.norm(moved), jnp.finfo(jnp.float32).tiny))
        clipped = jax.tree.map(lambda old, delta: widen(old) + factor.astype(delta.dtype) * delta, update.start, moved)
        return update._replace(trained=in_types_of(update.start, clipped))

    return rule._replace(
        summand=lambda update, server, plan: rule.summand(clip(update), server, plan),
        client_keep=lambda update, server: rule.client_keep(clip(update), server),
    )
