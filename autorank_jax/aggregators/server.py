"""What can be put around any rule: a server optimiser, and clipping of what clients send."""

import jax
import jax.numpy as jnp
import optax

from autorank_jax.aggregators.base import anything, choose
from autorank_jax.types import (
    Aggregator,
    AggState,
    Array,
    ClientUpdate,
    Key,
    PyTree,
    Server,
    Sums,
)


def with_server_optimizer(rule: Aggregator, optimizer: optax.GradientTransformation) -> Aggregator:
    """Let an optimiser take the step towards what a rule averages (FedOpt, arXiv 2003.00295).

    `values + optimizer(values - mean)`: FedAvgM is `optax.sgd(1.0, momentum=0.9)`, FedAdam `optax.adam(lr, eps=1e-3)`,
    FedYogi `optax.yogi(lr)`; `optax.sgd(1.0)` is the rule itself. Values are what the rule averages: factors, the
    products of an SVD rule (before the SVD), the kernels of a merging rule, and dense parameters. Where nobody
    reported, at a rank position or at all, values and the optimiser's state stay as they were.

    Args:
        rule: any rule of this package, or one that has a `step`.
        optimizer: its state must be built like the values, or of scalars, as everything in optax is.

    Raises:
        ValueError: if the rule's server step cannot be taken apart.
    """
    step = rule.step
    if step is None:
        raise ValueError(
            "expected a rule with a step, got one with update alone, probably a rule that already has a server "
            "optimiser or was made by hand: give it a ServerStep"
        )

    def update(key: Key, sums: Sums, state: AggState, server: Server) -> tuple[Server, AggState]:
        inner, memory = state
        values = step.read(server)
        mean, seen = step.mean(sums, inner, server)
        gradient = jax.tree.map(lambda old, new, some: jnp.where(some, old - new, 0), values, mean, seen)
        updates, after = optimizer.update(gradient, memory, values)
        moved = optax.apply_updates(values, updates)
        moved = jax.tree.map(jnp.where, seen, moved, values)
        written = step.write(key, moved, inner, server)
        some = anything(seen)
        return choose(some, written, server), (step.advance(inner), _frozen(optimizer, after, memory, seen, some))

    return rule._replace(
        init=lambda server: (rule.init(server), optimizer.init(step.read(server))),
        start=lambda server, state, client: rule.start(server, state[0], client),
        trains=lambda state: rule.trains(state[0]),
        update=update,
        step=None,
        traffic=rule.traffic._replace(down=rule.traffic.down._replace(stack=False)),  # factors do not tell the step
    )


def _frozen(
    optimizer: optax.GradientTransformation, after: PyTree, before: PyTree, seen: PyTree, some: Array
) -> PyTree:
    """Keep the optimiser's state where nobody reported; scalars such as counts move if anybody did."""
    flags = optax.tree.map_params(optimizer, lambda _, flag: flag, after, seen, transform_non_params=lambda _: some)
    return jax.tree.map(jnp.where, flags, after, before)


def with_norm_clipping(rule: Aggregator, max_norm: float) -> Aggregator:
    """Shrink what a client sends to a norm: `start + Δ min(1, c / ‖Δ‖)`, Δ over all factors and dense parameters.

    The client keeps between rounds what it sent, clipped as well.

    Args:
        rule: any rule.
        max_norm: c > 0.

    Raises:
        ValueError: if the norm is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"expected a positive max_norm, got {max_norm}")

    def clip(update: ClientUpdate) -> ClientUpdate:
        moved = jax.tree.map(jnp.subtract, update.trained, update.start)
        factor = jnp.minimum(1, max_norm / jnp.maximum(optax.tree.norm(moved), jnp.finfo(jnp.float32).tiny))
        clipped = jax.tree.map(lambda old, delta: old + factor.astype(delta.dtype) * delta, update.start, moved)
        return update._replace(trained=clipped)

    return rule._replace(
        summand=lambda update, server, plan: rule.summand(clip(update), server, plan),
        client_keep=lambda update, server: rule.client_keep(clip(update), server),
    )
