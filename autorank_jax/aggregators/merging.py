"""Rules that merge products of adapters into the base weights. `server.frozen` must be a `Base`."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from autorank_jax.adapters.lora import check_mergeable, key_of
from autorank_jax.aggregators.base import (
    ClientSums,
    Values,
    compose_rule,
    make_summand,
    mean_dense,
    mean_factors,
    mean_product,
    owned,
    reported,
    wide_product,
)
from autorank_jax.aggregators.owners import (
    Levels,
    check_levels,
    check_levels_fit,
    make_owner_summand,
    owner_product,
)
from autorank_jax.interface import checked
from autorank_jax.types import (
    Adapter,
    Aggregator,
    AggState,
    Array,
    Key,
    Server,
    ServerStep,
    Traffic,
    Trainable,
    Travels,
)

Restart = Literal["start", "fresh"]
"""`lora_a` after a merge: as it was at the start, or drawn anew every round from the numbers of the start.

The numbers of a `lora_a` are drawn independently of each other, so that the same numbers in a random order are
distributed as the start is, whatever distribution a task takes: embeddings have another bound than kernels.
"""

Product = Callable[[Server, ClientSums, str], Array]

_MERGED = Traffic(down=Travels(lora_a=0, lora_b=0, kernels=True, stack=True))
"""Clients fetch what is merged; adapters restart from what they know."""


@checked
def flora(*, restart: Restart = "start") -> Aggregator:
    """Merge the mean product and restart the adapters: `W + Σ_k w_k A_k B_k / Σ_k w_k` (FLoRA, arXiv 2409.05976).

    The paper stacks the clients' factors, whose product is this sum, sends the stack to everybody and draws a new
    `lora_a` every round. Adapters must start with `lora_b = 0`: products, not differences, are merged.

    Args:
        restart: `"start"` gives every round the `lora_a` of the first, `"fresh"` its numbers in a new random order,
            which is a draw from whatever distribution the task took.

    Raises:
        ValueError: for another `restart`; when initialised, if the server has no mergeable base.
    """

    def product(server: Server, sums: ClientSums, path: str) -> Array:
        return mean_product(server.trainable.adapters[path], sums.products[path], sums.weight)

    init = _remember("flora")
    return compose_rule(make_summand(products=True), _merge_step("flora", product, restart), init=init, traffic=_MERGED)


@checked
def owner_merge(*, levels: Levels = None, restart: Restart = "start") -> Aggregator:
    """Merge the product whose rank positions are averaged over their owners, and restart the adapters (ours).

    `W + Σ_h Σ_{k: r_k ≥ r_h} w_k A_k[:, r_{h-1}:r_h] B_k[r_{h-1}:r_h] / Σ_{k: r_k ≥ r_h} w_k`: what `raflora`
    averages, without the loss of an SVD. Rank positions that nobody covers contribute the server's own product.

    Args:
        levels: as in `raflora`.
        restart: as in `flora`.

    Raises:
        ValueError: for levels that do not increase or exceed an adapter, or another `restart`; when initialised, if
            the server has no mergeable base.
    """
    check_levels(levels)
    init = _remember("owner_merge", levels)
    step = _merge_step("owner_merge", owner_product, restart)
    return compose_rule(make_owner_summand(levels), step, init=init, exact_plan=True, traffic=_MERGED)


@checked
def fedex_lora(*, owners: bool = False) -> Aggregator:
    """Average factors and merge what is missing: `W + Σ_k p_k A_k B_k - Ā B̄` (FedEx-LoRA, arXiv 2410.09432).

    The model `W + Ā B̄` moves by the mean product exactly, however `Ā` and `B̄` were formed.

    Args:
        owners: average factors over owners, as RBLA does (ours); padded with zeros where False.

    Raises:
        ValueError: when initialised, if the server has no mergeable base.
    """

    def init(server: Server) -> AggState:
        check_mergeable(server, "fedex_lora")
        return ()

    def mean(sums: ClientSums, state: AggState, server: Server) -> tuple[Values, Values]:  # noqa: ARG001
        kernels, seen = _kernels(server, "fedex_lora"), {}
        means, dense = mean_factors(server, sums, owners=owners), mean_dense(server, sums)
        for path, (a, b) in means.items():
            residual = mean_product(server.trainable.adapters[path], sums.products[path], sums.weight)
            residual = residual - wide_product(Adapter(a, b))
            kernels[path] = kernels[path] + jnp.where(sums.weight > 0, residual, 0).astype(kernels[path].dtype)
            seen[path] = owned(sums.owners[path], means[path])
        values = Values(dense, means, kernels)
        return values, reported(values, sums.weight)._replace(adapters=seen)

    step = ServerStep(
        read=lambda server: Values(server.trainable.dense, server.trainable.adapters, _kernels(server, "fedex_lora")),
        mean=mean,
        write=lambda key, values, state, server: _write(values.adapters, values, server),  # noqa: ARG005
    )
    traffic = Traffic(down=Travels(kernels=True, stack=True))
    return compose_rule(make_summand(factors=True, products=True), step, init=init, traffic=traffic)


def _remember(rule: str, levels: Levels = None) -> Callable[[Server], dict[str, Array]]:
    """Make the `init` that remembers the first `lora_a` of each adapter."""

    def init(server: Server) -> dict[str, Array]:
        check_mergeable(server, rule)
        check_levels_fit(levels, server)
        return {path: adapter.lora_a for path, adapter in server.trainable.adapters.items()}

    return init


def _merge_step(rule: str, product: Product, restart: Restart) -> ServerStep:
    """Make the server step that adds a product to each kernel and restarts the adapters."""

    def mean(sums: ClientSums, state: AggState, server: Server) -> tuple[Values, Values]:  # noqa: ARG001
        kernels = {
            path: kernel + jnp.where(sums.weight > 0, product(server, sums, path), 0).astype(kernel.dtype)
            for path, kernel in _kernels(server, rule).items()
        }
        values = Values(mean_dense(server, sums), {}, kernels)
        return values, reported(values, sums.weight)

    def write(key: Key, values: Values, state: AggState, server: Server) -> Server:
        adapters = {}
        for path, old in server.trainable.adapters.items():
            lora_a = state[path] if restart == "start" else _shuffle(key_of(key, path), state[path])
            adapters[path] = Adapter(lora_a, jnp.zeros_like(old.lora_b))
        return _write(adapters, values, server)

    return ServerStep(lambda server: Values(server.trainable.dense, {}, _kernels(server, rule)), mean, write)


def _shuffle(key: Key, lora_a: Array) -> Array:
    return jax.random.permutation(key, lora_a.reshape(-1)).reshape(lora_a.shape)


def _kernels(server: Server, rule: str) -> dict[str, Array]:
    """Return the kernels that adapters can be merged into."""
    check_mergeable(server, rule)
    return {path: server.frozen.kernels[path] for path in server.trainable.adapters}


def _write(adapters: dict[str, Adapter], values: Values, server: Server) -> Server:
    base = server.frozen._replace(kernels={**server.frozen.kernels, **values.matrices})
    return Server(Trainable(adapters, values.dense), base)
