"""Central differential privacy at the level of clients, for rules that sum factors.

Here is the mechanism: clip, noise, denominators. What it costs is counted in `evaluation.privacy`, a run's budget and
promise are `experiment.privacy`'s, label counts are released by `ranks.private`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from autorank_jax.adapters.lora import below, layers_of, max_ranks, over_columns, over_rows
from autorank_jax.aggregators.base import ClientSums, make_summand
from autorank_jax.interface import check_share, check_values, checked
from autorank_jax.types import (
    Adapter,
    Aggregator,
    AggState,
    Array,
    Client,
    ClientUpdate,
    Key,
    Plan,
    Server,
    State,
    Trainable,
    Trains,
)

_NOISE = 0x6E6F6973  # folded into the round's key, so that noise shares no number with what a rule draws
_COUNT = 0x636F756E  # likewise, for the noise on the count of clients below an adaptive norm


class PrivateState(NamedTuple):
    """What a private rule remembers: what the rule does, and the fixed denominators, which are data."""

    rule: AggState
    owners: dict[str, Array]  # by adapter path, (*layers, max_rank)
    clip: Array  # () the norm to which a client is clipped next, where it adapts; else that of the rule, and not read


class AdaptiveClip(NamedTuple):
    """How the clipping norm follows the clients: towards a quantile of the norms of what they add."""

    quantile: float = 0.5  # γ in (0, 1): share of the clients that shall stay below the norm
    rate: float = 0.2  # η_C > 0 of the step `C ← C exp(-η_C (b - γ))`
    count_noise: float | None = None  # σ_b on the count of clients below; a twentieth of the denominator where None


class PrivateSums(NamedTuple):
    """Sums of a private rule whose clipping norm adapts."""

    moves: ClientSums
    below: Array  # () Σ_k (b_k - ½) of the clients that took part: a half where the norm was kept, else minus a half


@checked
def with_differential_privacy(
    rule: Aggregator,
    *,
    clip: float,
    noise_multiplier: float,
    denominator: float,
    owners: Mapping[str, ArrayLike] | None = None,
    adaptive: AdaptiveClip | None = None,
) -> Aggregator:
    """Clip what each client adds, add Gaussian noise once a round, and divide by what is fixed beforehand (DP-FedAvg).

    With `u_k` all that client `k` adds to the rule's sums (its moves of factors and dense parameters, 0 beyond its
    rank) and every client of weight 1, however many examples it has:

        S = Σ_k u_k min(1, C / ‖u_k‖) + σ C N(0, I)        value_j + S_j / N_j

    (rules that pad with zeros: `value_j N_j / N + S_j / N`, so they too need `owners` where ranks are mixed).

    One client more or less moves the noiseless sums by at most `C` in the L2 norm, whatever it sends; one that sends
    what is not finite is left out. Sums of the clients' own number, which would tell who came, are not used:
    `N_j = denominator`, or `owners` where a rule averages each rank position over its owners. So positions that some
    client could own are moved by noise in rounds in which none of their owners took part, and the fewer own a position,
    the more (`σ C / N_j`): where ranks are mixed, `zero_pad` bears that better than `rbla`. Positions that none can own
    get no noise.

    An adaptive norm follows the clients (Andrew et al., 2021): the share `b` of those that kept it is released with
    noise `σ_b` on their count, and `C ← C exp(-η_C (b - γ))`. That takes a part of `σ`: the moves get the noise
    `(σ⁻² - (2 σ_b)⁻²)^(-½) C`, so that both together cost what `σ` alone does.

    The privacy of many rounds of one run: `evaluation.privacy.spent_epsilon`, with `sample_independently` as
    participation. Noise is drawn from the round's key: keep it secret, and give every run a key of its own, as two runs
    with one key share their noise. Not protected: from the server, which sees updates; the clients' ranks, which must
    be public (those of AutoRank are computed from data); losses and counts that a round reports, and all that
    `with_diagnostics` around it does; data that the model is tested on.

    Args:
        rule: `zero_pad`, `rbla`, `ffa_lora`, `rolora`, `fedsa_lora` or `fedavg`, also with a server optimiser around.
            Not done: rules that sum products or weigh clients by what they send. Other wrappers, such as
            `keep_local`, go around the private rule; so may a server optimiser. What a client keeps for itself, such as
            `lora_b` under `fedsa_lora`, is clipped with the rest.
        clip: `C` > 0, the largest norm of what a client adds; that of the first round where it adapts.
        noise_multiplier: `σ` ≥ 0; 0 adds nothing and protects nobody.
        denominator: `N` > 0, the number of clients expected in a round.
        owners: by adapter path, `(max_rank,)` or `(*layers, max_rank)`, the number of clients expected in a round that
            own each position, as `expected_owners` counts it from public ranks, for rules that average over owners;
            `denominator` where None.
            `set_expected_owners` sets it later, in a state.
        adaptive: how the norm adapts; it stays where None.

    Raises:
        ValueError: for another rule, or numbers out of range.

    Source: McMahan, Ramage, Talwar, Zhang, "Learning Differentially Private Recurrent Language Models", ICLR 2018
    (arXiv 1710.06963); Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping",
    NeurIPS 2021 (arXiv 1905.03871).
    """
    if rule.summand not in (make_summand(factors=True), make_summand()):
        raise ValueError(
            "expected a rule whose sums are moves of factors and weights, such as rbla, alone or with a server "
            "optimizer, got another: rules that sum products or weigh clients by what they send are not done; "
            "keep_local, with_norm_clipping and the like go around the private rule; or it is private already"
        )
    _check_numbers(clip, noise_multiplier, denominator)
    count_noise = _count_noise(adaptive, noise_multiplier, denominator)
    own_noise = noise_multiplier  # of the moves
    if adaptive and noise_multiplier:
        own_noise = (noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5

    def prepare(key: Key, state: PrivateState, server: Server) -> Array | tuple[()]:  # noqa: ARG001
        return state.clip if adaptive else ()

    def summand(update: ClientUpdate, server: Server, plan: Plan) -> ClientSums | PrivateSums:
        present = (update.client.weight > 0).astype(update.client.weight.dtype)
        alone = update._replace(client=update.client._replace(weight=present))
        sums = rule.summand(alone, server, plan)
        moves = (sums.dense, sums.adapters)
        norm = optax.tree.norm(moves)
        largest = jnp.asarray(plan.prepared).astype(norm.dtype) if adaptive else clip
        bound = largest * (1 - 16 * float(jnp.finfo(norm.dtype).eps))  # rounding of the norm must not loosen it
        factor = jnp.minimum(1.0, bound / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
        dense, adapters = jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), moves)
        clipped = sums._replace(dense=dense, adapters=adapters)
        if not adaptive:
            return clipped
        return PrivateSums(clipped, present * jnp.where(norm <= bound, 0.5, -0.5).astype(present.dtype))

    def init(server: Server) -> PrivateState:
        adapters = server.trainable.adapters
        fixed = {path: _owners_of(path, adapters[path], owners, denominator) for path in sorted(adapters)}
        return PrivateState(rule.init(server), fixed, jnp.asarray(clip, jnp.result_type(float)))

    def start(server: Server, state: PrivateState, client: Client) -> Trainable:
        return rule.start(server, state.rule, client)

    def trains(state: PrivateState) -> Trains:
        return rule.trains(state.rule)

    def update(
        key: Key, sums: ClientSums | PrivateSums, state: PrivateState, server: Server
    ) -> tuple[Server, PrivateState]:
        if isinstance(sums, PrivateSums):
            sums, below = sums
        leaves, tree = jax.tree.flatten((sums.dense, sums.adapters))
        keys = jax.random.split(jax.random.fold_in(key, _NOISE), len(leaves))
        largest = state.clip if adaptive else clip
        scale = own_noise * largest if noise_multiplier else 0.0
        noisy = [
            leaf + jnp.asarray(scale, leaf.dtype) * jax.random.normal(k, leaf.shape, leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        dense, adapters = jax.tree.unflatten(tree, noisy)
        adapters = {path: _keep_owned(adapter, state.owners[path] > 0) for path, adapter in adapters.items()}
        fixed = {path: state.owners[path].astype(old.dtype) for path, old in sums.owners.items()}
        weight = jnp.asarray(denominator, sums.weight.dtype)
        private = sums._replace(dense=dense, adapters=adapters, weight=weight, owners=fixed)
        server, inner = rule.update(key, private, state.rule, server)
        state = state._replace(rule=inner)
        if adaptive:
            noise = count_noise * jax.random.normal(jax.random.fold_in(key, _COUNT), (), below.dtype)
            share = (below + noise) / denominator + 0.5
            step = jnp.exp(-adaptive.rate * (share - adaptive.quantile))
            state = state._replace(clip=state.clip * step.astype(state.clip.dtype))
        return server, state

    return rule._replace(
        init=init,
        start=start,
        trains=trains,
        prepare=prepare,
        summand=summand,
        update=update,
        step=None,
        report=_nothing,
    )


def _keep_owned(noisy: Adapter, owned: Array) -> Adapter:
    """Zero the sums of rank positions that no client can own: known to be 0 beforehand, they need no noise."""
    return Adapter(
        jnp.where(over_columns(owned, noisy.lora_a), noisy.lora_a, 0),
        jnp.where(over_rows(owned, noisy.lora_b), noisy.lora_b, 0),
    )


def _check_numbers(clip: float, noise_multiplier: float, denominator: float) -> None:
    if not clip > 0:
        raise ValueError(f"clip: expected a number above 0, got {clip}")
    if not 0 <= noise_multiplier < np.inf:
        raise ValueError(f"noise_multiplier: expected a number of at least 0 and finite, got {noise_multiplier}")
    if not (denominator > 0 and np.isfinite(denominator)):
        raise ValueError(f"denominator: expected the number of clients expected in a round, got {denominator}")
    if noise_multiplier > 0 and np.isinf(clip):
        raise ValueError("clip: expected a finite norm where there is noise, got inf: the noise would be infinite")


def _count_noise(adaptive: AdaptiveClip | None, noise_multiplier: float, denominator: float) -> float:
    """Return the noise on the count of clients below an adaptive norm, 0 where there is no noise at all."""
    if adaptive is None:
        return 0.0
    noise = denominator / 20 if adaptive.count_noise is None else adaptive.count_noise
    enough = noise_multiplier / 2 < noise < np.inf or not noise_multiplier
    if not (0 < adaptive.quantile < 1 and 0 < adaptive.rate < np.inf and enough):
        raise ValueError(
            f"adaptive: expected a quantile in (0, 1), a rate above 0 and a count_noise above noise_multiplier / 2 = "
            f"{noise_multiplier / 2:g}, got {adaptive} with {noise:g} on the count"
        )
    return noise if noise_multiplier else 0.0


@checked
def set_expected_owners(state: State, rate: float) -> State:
    """Fix the denominators of a private rule to the owners that the state's public ranks let expect.

    Args:
        state: of a rule made by `with_differential_privacy`, alone or with a server optimiser around.
        rate: share of the clients expected in a round, above 0 and at most 1.

    Raises:
        TypeError: for the state of another rule.
        ValueError: for a rate out of range.
    """
    whole = state.aggregator  # with a server optimiser around, a pair
    held = whole[0] if type(whole) is tuple and whole else whole
    if not isinstance(held, PrivateState):
        raise TypeError("expected the state of a rule made by with_differential_privacy, got that of another rule")
    owners = expected_owners(state.ranks, max_ranks(state.server.trainable), rate)
    fixed = {p: jnp.broadcast_to(owners[p], old.shape).astype(old.dtype) for p, old in held.owners.items()}
    held = held._replace(owners=fixed)
    return state._replace(aggregator=(held, *whole[1:]) if type(whole) is tuple else held)


@checked
def expected_owners(ranks: Mapping[str, ArrayLike], max_ranks: Mapping[str, int], rate: float) -> dict[str, Array]:
    """Count the clients expected in a round that own each rank position.

    Args:
        ranks: by adapter path, `(clients,)` or `(clients, *layers)` public ranks.
        max_ranks: by adapter path.
        rate: share of the clients expected in a round, above 0 and at most 1.

    Returns:
        By adapter path, `(max_rank,)` or `(*layers, max_rank)`; 0 at positions that no client owns, which then stay as
        they are.
    """
    check_share("rate", rate)
    return {
        path: rate * jnp.sum(below(jnp.asarray(ranks[path]), widest), axis=0, dtype=jnp.float32)
        for path, widest in max_ranks.items()
    }


def _owners_of(path: str, adapter: Adapter, owners: Mapping[str, ArrayLike] | None, denominator: float) -> Array:
    widest = adapter.lora_a.shape[-1]
    whole = (*layers_of(adapter), widest)
    if owners is None:
        return jnp.full(whole, denominator, jnp.result_type(float))
    if path not in owners or jnp.shape(owners[path]) not in ((widest,), whole):
        got = jnp.shape(owners[path]) if path in owners else "none"
        raise ValueError(f"owners: expected {(widest,)} numbers for {path!r}, got {got}")
    check_values(f"owners of {path!r}", owners[path])
    return jnp.broadcast_to(jnp.asarray(owners[path], jnp.result_type(float)), whole)


def _nothing(sums: Any, before: Server, after: Server) -> dict[str, Array]:  # noqa: ARG001
    return {}
