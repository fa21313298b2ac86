"""Numbers that tell what a rule does to the adapters, reported in `RoundInfo.diagnostics`."""

from typing import NamedTuple

import jax.numpy as jnp

from autorank_jax.adapters.lora import per_layer
from autorank_jax.aggregators.base import ClientSums, make_summand, mean_factors, mean_product, wide_product
from autorank_jax.aggregators.decompositions import singular_values
from autorank_jax.interface import checked
from autorank_jax.types import Adapter, Aggregator, AggState, Array, ClientUpdate, Key, Plan, Server, Sums


class Diagnosed(NamedTuple):
    """The sums of a rule, and those that diagnostics need."""

    rule: Sums
    clients: ClientSums


@checked
def with_diagnostics(rule: Aggregator) -> Aggregator:
    """Report what a rule does to each adapter, by path, at the price of summing products too and an SVD per round.

    - `energy/PATH`: `‖A[:, j]‖² ‖B[j]‖²` of the server after the round, `(max_rank,)`; of stacked layers, here and
      below, for each of them
    - `effective_rank/PATH`: `exp(-Σ_i p_i ln p_i)`, `p_i = σ_i / Σ σ`, of the server's `A B` after the round (Roy and
      Vetterli 2007), 0 where it vanishes
    - `gap/PATH`: `‖P - Ā B̄‖_F / ‖P‖_F` between the clients' mean product and the product of their (padded) mean
      factors, 0 where `P` vanishes

    Args:
        rule: what is reported of; its results stay as they are.
    """
    inspect = make_summand(factors=True, products=True)

    def summand(update: ClientUpdate, server: Server, plan: Plan) -> Diagnosed:
        whole = plan._replace(prepared=())  # whatever the rule sums, diagnostics look at whole products
        return Diagnosed(rule.summand(update, server, plan), inspect(update, server, whole))

    def update(key: Key, sums: Diagnosed, state: AggState, server: Server) -> tuple[Server, AggState]:
        return rule.update(key, sums.rule, state, server)

    def report(sums: Diagnosed, before: Server, after: Server) -> dict[str, Array]:
        numbers = dict(rule.report(sums.rule, before, after))
        means = mean_factors(before, sums.clients, owners=False)
        for path, adapter in after.trainable.adapters.items():
            product = mean_product(before.trainable.adapters[path], sums.clients.products[path], sums.clients.weight)
            numbers[f"energy/{path}"] = position_energy(adapter)
            numbers[f"effective_rank/{path}"] = per_layer(effective_rank, wide_product(adapter))
            numbers[f"gap/{path}"] = per_layer(relative_gap, product, wide_product(means[path]))
        return numbers

    inner = rule.step
    step = inner and inner._replace(mean=lambda sums, state, server: inner.mean(sums.rule, state, server))
    return rule._replace(summand=summand, update=update, report=report, step=step)


def position_energy(adapter: Adapter) -> Array:
    """Return `‖A[:, j]‖² ‖B[j]‖²` of each rank position, `(..., r)`."""
    return jnp.sum(jnp.square(adapter.lora_a), axis=-2) * jnp.sum(jnp.square(adapter.lora_b), axis=-1)


def effective_rank(product: Array) -> Array:
    """Return `exp(-Σ_i p_i ln p_i)` with `p_i = σ_i / Σ σ`; 0 for a matrix of zeros (Roy and Vetterli 2007)."""
    values = singular_values(product.astype(jnp.promote_types(product.dtype, jnp.float32)))
    total = jnp.sum(values)
    shares = values / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1)))
    return jnp.where(total > 0, jnp.exp(entropy), 0)


def relative_gap(product: Array, other: Array) -> Array:
    """Return `‖P - Q‖_F / ‖P‖_F`, 0 where `P` vanishes."""
    norm = jnp.linalg.norm(product)
    return jnp.where(norm > 0, jnp.linalg.norm(product - other) / jnp.where(norm > 0, norm, 1), 0)
