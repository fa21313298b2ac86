"""What aggregation rules are made of: sums over clients, means of those sums, and the server step around a mean.

Factors and dense parameters are summed as *differences from the start*: a million float32 summands of 1e-4 around 0.06
lose 1e-4 by values and 1e-12 by differences, and positions that nobody owns stay put by themselves. The engine has
already replaced what non-finite clients sent by their start and set their weight to 0, so no rule has to look.
Sums and means are in float32 at least, whatever the model is in: half precision rounds weights, and stagnates.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from autorank_jax.adapters.lora import over_columns, over_rows
from autorank_jax.aggregators.sketches import sketch_product
from autorank_jax.types import (
    Adapter,
    Aggregator,
    AggState,
    Array,
    Client,
    ClientUpdate,
    Key,
    Plan,
    PyTree,
    Server,
    ServerStep,
    Sums,
    Trainable,
    Trains,
)

T = TypeVar("T")


class ClientSums(NamedTuple):
    """Sums over clients with their denominators; `adapters` or `products` are `{}` for rules that need none."""

    weight: Array  # () Σ w_k
    dense: PyTree  # Σ w_k (dense_k - start)
    owners: dict[str, Array]  # by path, (..., r) Σ w_k m_kj
    adapters: dict[str, Adapter]  # Σ w_k (A_k - A_start), likewise B
    products: dict[str, Any]  # Σ w_k A_k B_k, a matrix or its `Sketch`


class Values(NamedTuple):
    """What a rule averages; what it does not average is `{}`."""

    dense: PyTree
    adapters: dict[str, Adapter]
    matrices: dict[str, Any]  # by path, (..., d_in, d_out): products of adapters or their `Sketch`, kernels of the base


def no_state(server: Server) -> AggState:  # noqa: ARG001
    """Return the state of a rule that has none."""
    return ()


def start_from_server(server: Server, state: AggState, client: Client) -> Trainable:  # noqa: ARG001
    """Hand every client the server's values."""
    return server.trainable


def train_all(state: AggState) -> Trains:  # noqa: ARG001
    """Let clients train both factors and the dense parameters."""
    return Trains()


def widen(leaf: Array) -> Array:
    """Return numbers in float32, or as they are where they are wider."""
    return leaf.astype(jnp.float32) if jnp.finfo(leaf.dtype).bits < 32 else leaf


def in_types_of(old: T, new: T) -> T:
    """Round means to the types of the server's values."""
    return jax.tree.map(lambda o, n: n.astype(o.dtype), old, new)


def moves(trained: T, start: T) -> T:
    """Return by how much each number has moved."""
    return jax.tree.map(lambda new, old: widen(new) - widen(old), trained, start)


def weighted(adapter: Adapter, weight: Array) -> Adapter:
    """Multiply both factors by a scalar."""
    return Adapter(
        weight.astype(adapter.lora_a.dtype) * adapter.lora_a, weight.astype(adapter.lora_b.dtype) * adapter.lora_b
    )


def sum_dense(update: ClientUpdate) -> PyTree:
    """Return `w_k (dense_k - start)` of one client."""
    weight = update.client.weight
    moved = moves(update.trained.dense, update.start.dense)
    return jax.tree.map(lambda leaf: weight.astype(leaf.dtype) * leaf, moved)


def sum_factors(update: ClientUpdate) -> dict[str, Adapter]:
    """Return `w_k (A_k - A_start)`, likewise of `B`, of one client."""
    moved = moves(update.trained.adapters, update.start.adapters)
    return {path: weighted(adapter, update.client.weight) for path, adapter in moved.items()}


def sum_owners(update: ClientUpdate) -> dict[str, Array]:
    """Return `w_k m_k` of one client."""
    return {path: update.client.weight.astype(mask.dtype) * mask for path, mask in update.client.masks.items()}


def sum_products(
    update: ClientUpdate, server: Server, plan: Plan, shares: Mapping[str, Array] | None = None
) -> dict[str, Any]:
    """Return `w_k A_k diag(share) B_k` of one client, shares 1 where None: whole, or a sketch where there are maps."""
    products, prepared = {}, dict(plan.prepared)
    for path, adapter in update.trained.adapters.items():
        a, b = map(widen, adapter)
        share = update.client.weight if shares is None else update.client.weight * over_columns(shares[path], a)
        left, maps, old = a * share.astype(a.dtype), prepared.get(path), server.trainable.adapters[path]
        products[path] = left @ b if maps is None else sketch_product(left, b, maps, old)
    return products


@functools.cache  # equal summands are one function
def make_summand(
    *, factors: bool = False, products: bool = False
) -> Callable[[ClientUpdate, Server, Plan], ClientSums]:
    """Make the summand of rules that weigh every client by its weight alone."""

    def summand(update: ClientUpdate, server: Server, plan: Plan) -> ClientSums:
        return ClientSums(
            weight=update.client.weight,
            dense=sum_dense(update),
            owners=sum_owners(update),
            adapters=sum_factors(update) if factors else {},
            products=sum_products(update, server, plan) if products else {},
        )

    return summand


def divide(total: Array, weight: Array) -> Array:
    """Return `total / weight`, 0 where the weight is 0, broadcasting the weight."""
    safe = jnp.where(weight > 0, weight, 1).astype(total.dtype)
    return jnp.where(weight > 0, total / safe, 0)


def mean_dense(server: Server, sums: Any) -> PyTree:
    """Return `dense + Σ w_k (dense_k - start) / Σ w_k`."""
    old = server.trainable.dense
    means = jax.tree.map(lambda leaf, total: widen(leaf) + divide(total, sums.weight), old, sums.dense)
    return in_types_of(old, means)


def padded_mean(old: Adapter, total: Adapter, owners: Array, weight: Array) -> Adapter:
    """Return `Σ_k w_k A_k diag(m_k) / Σ_k w_k`, likewise of `B`; positions without owners keep the server's value."""
    a, b = map(widen, old)
    share = jnp.where(owners > 0, divide(owners, weight), 1).astype(a.dtype)
    mean = Adapter(
        a * over_columns(share, a) + divide(total.lora_a, weight),
        b * over_rows(share, b) + divide(total.lora_b, weight),
    )
    return in_types_of(old, mean)


def owner_mean(old: Adapter, total: Adapter, owners: Array) -> Adapter:
    """Return `Σ_k m_kj w_k A_k[:, j] / Σ_k m_kj w_k`, likewise of `B`; positions without owners keep the server's."""
    a, b = map(widen, old)
    mean = Adapter(a + divide(total.lora_a, over_columns(owners, a)), b + divide(total.lora_b, over_rows(owners, b)))
    return in_types_of(old, mean)


def mean_factors(server: Server, sums: ClientSums, *, owners: bool) -> dict[str, Adapter]:
    """Average the factors of every adapter, over owners or padded with zeros."""
    means = {}
    for path, old in server.trainable.adapters.items():
        total, weights = sums.adapters[path], sums.owners[path]
        means[path] = owner_mean(old, total, weights) if owners else padded_mean(old, total, weights, sums.weight)
    return means


def mean_product(old: Adapter, total: Array, weight: Array) -> Array:
    """Return `Σ_k w_k A_k B_k / Σ_k w_k`, the server's own product where nobody reported."""
    return jnp.where(weight > 0, divide(total, weight), wide_product(old))


def wide_product(adapter: Adapter) -> Array:
    """Return `lora_a @ lora_b`, `(..., d_in, d_out)`, in the precision of sums."""
    return widen(adapter.lora_a) @ widen(adapter.lora_b)


def owned(owners: Array, like: Adapter) -> Adapter:
    """Return which values of two factors somebody reported, as bools that broadcast against them."""
    return Adapter(over_columns(owners, like.lora_a) > 0, over_rows(owners, like.lora_b) > 0)


def reported(tree: PyTree, weight: Array) -> PyTree:
    """Return one bool for every leaf: whether anybody reported at all."""
    return jax.tree.map(lambda _: weight > 0, tree)


def update_with(step: ServerStep) -> Callable[[Key, Sums, AggState, Server], tuple[Server, AggState]]:
    """Make a rule's `update` of its step: the server stays exactly as it was where nobody reported anything."""

    def update(key: Key, sums: Sums, state: AggState, server: Server) -> tuple[Server, AggState]:
        values, seen = step.mean(sums, state, server)
        written = step.write(key, values, state, server)
        return choose(anything(seen), written, server), step.advance(state)

    return update


def anything(seen: PyTree) -> Array:
    """Return whether any bool of a tree is true."""
    return jnp.any(jnp.array([jnp.any(leaf) for leaf in jax.tree.leaves(seen)], bool))


def choose(flag: Array, new: PyTree, old: PyTree) -> PyTree:
    """Choose between two trees; leaves that are the same object are left alone."""
    return jax.tree.map(lambda n, o: o if n is o else jnp.where(flag, n, o), new, old)


def compose_rule(
    summand: Callable[[ClientUpdate, Server, Plan], Sums],
    step: ServerStep,
    *,
    init: Callable[[Server], AggState] = no_state,
    start: Callable[[Server, AggState, Client], Trainable] = start_from_server,
    trains: Callable[[AggState], Trains] = train_all,
    **options: Any,
) -> Aggregator:
    """Make a rule of its summand and its server step."""
    return Aggregator(init, start, trains, summand, update_with(step), step=step, **options)


def read_trainable(server: Server) -> Values:
    """Read the values of rules that average factors."""
    return Values(server.trainable.dense, server.trainable.adapters, {})


def write_trainable(key: Key, values: Values, state: AggState, server: Server) -> Server:  # noqa: ARG001
    """Write factors and dense parameters into the model."""
    return server._replace(trainable=Trainable(values.adapters, values.dense))


def need_client_state(client: Client, rule: str) -> None:
    """Raise `ValueError` when a client comes without the state that a rule keeps for it."""
    if isinstance(client.state, tuple) and not client.state:
        raise ValueError(
            f"{rule} keeps a state for every client: expected it in State.clients, got none: "
            f"init_state(server, {rule}(...), ranks) makes it"
        )
