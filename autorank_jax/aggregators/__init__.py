"""Aggregation rules: a sum over clients, then one server step.

Client `k` has weight `w_k`, owns the rank positions `m_k` and sends `ΔW_k = A_k diag(m_k) B_k`. *Exact*: the server's model
moves by the mean of the products. Everything is tested against an independent NumPy derivation in 64-bit. A rule is an
`Aggregator`, a few small functions: what ONE client adds to the sums (`summand`), and what the server makes of the sums
(`update`). As sums, rules need not know of lanes, order or devices; what is no sum over clients, such as a median, is no
rule here (`with_norm_clipping` bounds what one client can do). `with_server_optimizer`, `with_norm_clipping` and
`with_diagnostics` and `keep_local` (layers that stay with their clients) go around any of them, `with_differential_privacy`
around those whose sums have a bound.

| rule | what is summed | how positions are weighted | where it goes | exact | up | down | source |
|---|---|---|---|---|---|---|---|
| `zero_pad` | factors | all clients | adapters | no | A + B | A + B | FedIT, arXiv 2305.05644 |
| `rbla` | factors | owners only | adapters | no | A + B | A + B | arXiv 2408.08699 |
| `hetlora` | factors | norms of `ΔW_k` | adapters | no | A + B | A + B | arXiv 2401.06432 |
| `ffa_lora` | `lora_b`; `lora_a` stays | all clients (or owners) | adapters | yes, where all clients own a position | B | B | arXiv 2403.12313 |
| `rolora` | `lora_b` and `lora_a` in turn | all clients (or owners) | adapters | as `ffa_lora` | A, B in turn | A, B in turn | arXiv 2502.01755 |
| `fedsa_lora` | `lora_a`; `lora_b` stays with the client | owners (or all clients) | adapters | – | A | A | arXiv 2410.01463 |
| `flexlora` | products, or sketches | all clients | adapters, by SVD | up to the maximum rank | A + B | A + B | arXiv 2402.11505 |
| `raflora` | products, or sketches | owners per level | adapters, by SVD | owner-weighted, up to the maximum rank | A + B | A + B | arXiv 2602.13486 |
| `florist` | products, or sketches | all clients | adapters, by SVD to an energy threshold | up to the threshold | A + B | A + B of the kept positions | arXiv 2506.09199 |
| `lora_fair` | factors and products, or sketches | all clients (or owners) | adapters, `lora_b` corrected | nearly | A + B | A + B | arXiv 2411.14961 |
| `flora` | products | all clients | base weights, adapters restart | yes | A + B | M | arXiv 2409.05976 |
| `owner_merge` | products | owners per level | base weights, adapters restart | owner-weighted | A + B | M | ours |
| `fedex_lora` | factors and products | all clients (or owners) | adapters, residual into base weights | yes | A + B | A + B + M | arXiv 2410.09432 |
| `fedavg` | whole weights | all clients | model | yes | – | – | arXiv 1602.05629 |
| `local_only` | nothing | – | stays with the client | – | – | – | – |

*Up* and *down* are what travels per client and round: `A` is `s r d_in` bytes of each layer (`s` bytes a number, `r` the
client's rank), `B` is `s r d_out`, `M` the merged update, per layer the cheaper of `s d_in d_out` and all participants' factors.
Dense parameters travel besides, but under `local_only`; under `fedavg` they are the whole model. Restarted adapters come from a
seed. `client_costs(..., traffic=rule.traffic)` counts what the table says; a test holds it against the arrays themselves.
Clients that HetLoRA lets prune themselves cost their own ranks, `rule.client_ranks(state.ranks, state.clients)`.

*Sketches*: a product is `d_in × d_out` for every lane, and its SVD takes seconds where layers are wide. By default
(`exact="auto"`) four rules sum three linear sketches of a layer in its place, where these have at most a quarter of its numbers:
wide layers of low rank; layers up to 784 × 200 at rank 16 never. What clients change to first order is kept exactly, the rest is
approximated with random directions of the round's key (`aggregators/sketches.py`). `exact=True` sums products whole, `exact=False`
sketches every layer that is wide enough. Under a server optimiser products are whole; diagnostics look at whole products too.

```python
import autorank_jax as ar
import jax.numpy as jnp

rule = ar.aggregators.with_norm_clipping(ar.aggregators.raflora(), 5.0)
server = ar.Server(ar.Trainable({"head": ar.Adapter(jnp.ones((6, 4)), jnp.zeros((4, 3)))}, ()), ())
memory = rule.init(server)
print(rule.traffic.up.lora_a, sorted(ar.aggregators.RULES)[:3])
```

A rule of your own is an `Aggregator`, of which five functions must be written: `help(ar.Aggregator)`; `factors.py` has the
simplest, the guide `manual/guides/your_own_rule.md` writes one. Sum differences from the start, times the client's weight, and the
weights beside them; what a lane that is not done or a client that is not finite would add, the engine leaves out.
`ar.testing.check_aggregator` says what a rule gets wrong, `with_server_optimizer` and the others go around it. What a rule of
this package needs besides is in `manual/contributing.md`, as for a criterion.
"""  # noqa: E501

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from autorank_jax.aggregators.diagnostics import with_diagnostics
from autorank_jax.aggregators.factors import fedavg, ffa_lora, rbla, rolora, zero_pad
from autorank_jax.aggregators.hetlora import hetlora, with_tail_penalty
from autorank_jax.aggregators.kept import keep_local
from autorank_jax.aggregators.merging import fedex_lora, flora, owner_merge
from autorank_jax.aggregators.personal import fedsa_lora, local_only
from autorank_jax.aggregators.privacy import (
    AdaptiveClip,
    expected_owners,
    set_expected_owners,
    with_differential_privacy,
)
from autorank_jax.aggregators.products import flexlora, florist, lora_fair, raflora
from autorank_jax.aggregators.server import with_norm_clipping, with_server_optimizer
from autorank_jax.interface import check_name, checked
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


@checked
def make_rule(name: str, **options: Any) -> Aggregator:
    """Make a rule by its name in `RULES`.

    Args:
        name: such as `"rbla"`.
        **options: of that rule.

    Raises:
        ValueError: for a name that is no rule.
        TypeError: for an option that the rule does not have.
    """
    check_name("an aggregation rule", name, RULES)
    return RULES[name](**options)


__all__ = [
    "RULES",
    "AdaptiveClip",
    "expected_owners",
    "fedavg",
    "fedex_lora",
    "fedsa_lora",
    "ffa_lora",
    "flexlora",
    "flora",
    "florist",
    "hetlora",
    "keep_local",
    "local_only",
    "lora_fair",
    "make_rule",
    "owner_merge",
    "raflora",
    "rbla",
    "rolora",
    "set_expected_owners",
    "with_diagnostics",
    "with_differential_privacy",
    "with_norm_clipping",
    "with_server_optimizer",
    "with_tail_penalty",
    "zero_pad",
]
