"""Aggregation rules for adapters of mixed rank, each a sum over clients and one server step.

A rule is a point in a small space: what is summed (factors, products), how rank positions are weighted (all clients,
owners, norms), where the result goes (adapters, by SVD back to adapters, into the base, through a server optimiser).
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from autorank_jax.aggregators.diagnostics import with_diagnostics
from autorank_jax.aggregators.factors import fedavg, ffa_lora, rbla, rolora, zero_pad
from autorank_jax.aggregators.hetlora import hetlora, with_tail_penalty
from autorank_jax.aggregators.merging import fedex_lora, flora, owner_merge
from autorank_jax.aggregators.personal import fedsa_lora, local_only
from autorank_jax.aggregators.products import flexlora, florist, lora_fair, raflora
from autorank_jax.aggregators.server import with_norm_clipping, with_server_optimizer
from autorank_jax.types import Aggregator

RULES: Mapping[str, Callable[..., Aggregator]] = MappingProxyType(
    {
        rule.__name__: rule
        for rule in (
            *(zero_pad, rbla, hetlora, flexlora, flora, ffa_lora, raflora, owner_merge, fedavg, local_only),
            *(fedex_lora, fedsa_lora, rolora, florist, lora_fair),
        )
    }
)
"""Every rule by name: call it, with options if you like, to get an `Aggregator`."""


def make_rule(name: str, **options: Any) -> Aggregator:
    """Make a rule by its name in `RULES`.

    Args:
        name: such as `"rbla"`.
        **options: of that rule.

    Raises:
        ValueError: for a name that is no rule.
        TypeError: for an option that the rule does not have.
    """
    if name not in RULES:
        close = get_close_matches(name, RULES, n=1)
        hint = f", probably {close[0]!r}" if close else ""
        raise ValueError(f"expected an aggregation rule out of {', '.join(RULES)}, got {name!r}{hint}")
    return RULES[name](**options)


__all__ = [
    "RULES",
    "fedavg",
    "fedex_lora",
    "fedsa_lora",
    "ffa_lora",
    "flexlora",
    "flora",
    "florist",
    "hetlora",
    "local_only",
    "lora_fair",
    "make_rule",
    "owner_merge",
    "raflora",
    "rbla",
    "rolora",
    "with_diagnostics",
    "with_norm_clipping",
    "with_server_optimizer",
    "with_tail_penalty",
    "zero_pad",
]
