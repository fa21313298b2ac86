"""Adapters of rank policies to budgets, devices and rules that average factors.

`with_caps(with_budget(policy, ...))` spends what the devices let it; the other order may exceed the caps.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from autorank_jax.interface import check_least, check_name, check_one, check_share, checked
from autorank_jax.interface.kinds import is_traced
from autorank_jax.types import Array, ClientStats, Key, RankInfo, RankPolicy

WEIGHTS = ("clients", "examples")
DEVICE_LEVELS = (0.125, 0.25, 0.5, 1.0)

# Share of the clients per device level, weakest first; what is left of 1 is spread equally over the other levels.
_PROFILES: Mapping[str, Mapping[int, float]] = {
    "homogeneous": {-1: 1.0},
    "random": {},
    "heavy_tail_light": {0: 0.85},
    "heavy_tail_strong": {-1: 0.85},
}
_ROUNDED = 1 - 1e-6
"""What a ratio of 32 bits may be of the same one of 64."""
RESOURCE_PROFILES = (*_PROFILES, "normal")


@checked
def with_budget(
    policy: RankPolicy,
    mean_ratio: float | Array,
    weight: str = "clients",
    *,
    min_ratio: float = 0.1,
    layer_weights: Sequence[float] | None = None,
    max_ranks: Mapping[str, int] | None = None,
) -> RankPolicy:
    """Move a policy's ratios so that their mean is `mean_ratio`.

    All ratios go the same share of their way up to 1 or down to `min_ratio`, which keeps their order. With the weighted
    mean `μ` of the ratios and the target `m`,

        ρ' = 1 - (1 - ρ) (1 - m) / (1 - μ)                         where m ≥ μ
        ρ' = ρ_min + (ρ - ρ_min) (m - ρ_min) / (μ - ρ_min)         elsewhere

    Integer ranks, rounded down, meet the mean to within one rank per layer; with `max_ranks` to within one rank of one
    client in one layer, never above it unless everybody's least costs more, which is `min_ratio`, or one rank where
    that is more: whoever lost most by the rounding gets it back, if the budget still has it; of equals the first.

    Args:
        policy: whose ratios are moved, after clipping to [min_ratio, 1].
        mean_ratio: `m` in [min_ratio, 1].
        weight: "clients" for a mean over the clients present (equal bytes), "examples" for one weighted by their
            examples (equal training FLOPs). The two differ where data are imbalanced.
        min_ratio: in (0, 1], no ratio falls below it.
        layer_weights: one per layer, > 0: what a unit of ratio costs in each layer, for per-layer ratios. The mean over
            layers is plain where None. What a rank of a layer costs (its numbers for bytes, `FlopModel.per_rank` for
            FLOPs) times its maximum rank.
        max_ranks: by path, the policy's ratios are then those of whole ranks, `(clients, layers)` in the order of
            sorted paths. A client whose smallest ratio is less than one rank has one nevertheless.

    Returns:
        A policy with ratios in [min_ratio, 1], those of whole ranks up to one rank below `min_ratio`. Absent clients
        move along and do not count in the mean.

    Raises:
        ValueError: for numbers out of range, several mean ratios or an unknown `weight`; when called, for another
            number of layers.
    """
    check_share("min_ratio", min_ratio, cause="a percentage or a rank")
    _check_layer_weights(layer_weights)
    check_one("mean_ratio", mean_ratio)
    check_share("mean_ratio", mean_ratio, cause="a percentage or a rank")
    if not (is_traced(min_ratio) or is_traced(mean_ratio)) and float(mean_ratio) < _ROUNDED * float(min_ratio):
        raise ValueError(f"expected mean_ratio of at least min_ratio = {min_ratio}, got {mean_ratio}: lower min_ratio")
    check_name("weight", weight, WEIGHTS)
    if max_ranks is not None and not max_ranks:
        raise ValueError("expected max_ranks by path, got none")
    for path, most in (max_ranks or {}).items():
        check_least(f"max_ranks[{path!r}]", most)

    def budgeted(key: Key, stats: ClientStats) -> tuple[Array, RankInfo]:
        ratios, info = policy(key, stats)
        low, target = jnp.asarray(min_ratio, ratios.dtype), jnp.asarray(mean_ratio, ratios.dtype)
        if max_ranks and ratios.ndim == 1:
            ratios = jnp.broadcast_to(ratios[:, None], (len(ratios), len(max_ranks)))
        if max_ranks:
            most = _in_order(max_ranks, ratios)
            low = jnp.maximum(low, 1 / most)  # nobody has less than one rank
        ratios = jnp.clip(ratios, low, 1)
        shares = _shares(stats, weight, layer_weights, ratios)
        mean, least = jnp.sum(ratios * shares), jnp.sum(low * shares)
        up = (1 - target) / jnp.where(mean < 1, 1 - mean, 1)
        down = jnp.maximum(target - least, 0) / jnp.where(mean > least, mean - least, 1)
        moved = jnp.where(target >= mean, 1 - (1 - ratios) * up, low + (ratios - low) * down)
        moved = jnp.clip(moved, low, 1)
        return _whole_ranks(moved, target, most, shares) if max_ranks else moved, info

    return budgeted


def _in_order(max_ranks: Mapping[str, int], ratios: Array) -> Array:
    """Return maximum ranks as the layers of ratios have them, `(1, layers)`."""
    if ratios.shape[1] != len(max_ranks):
        raise ValueError(f"max_ranks: expected {ratios.shape[1]} of them, as ratios have layers, got {len(max_ranks)}")
    return jnp.array([[max_ranks[path] for path in sorted(max_ranks)]], ratios.dtype)


def _whole_ranks(ratios: Array, budget: Array, most: Array, shares: Array) -> Array:
    """Return ratios of whole ranks that cost at most a budget: rounded down, then up again by largest remainder.

    Args:
        ratios: `(clients, layers)` that cost the budget, of one rank at least.
        budget: mean ratio.
        most: maximum ranks, `(1, layers)`.
        shares: what a ratio of 1 costs, of the shape of the ratios; their sum is 1.
    """
    ranks = jnp.clip(jnp.floor(ratios * most * (1 + 1e-6)), 1, most)
    left = jnp.maximum(ratios * most - ranks, 0).ravel()
    order = jnp.argsort(-left)
    price = (shares / most).ravel()[order]
    room = budget * (1 + 1e-6) - jnp.sum(ranks * shares / most)
    start = jnp.zeros(left.shape, bool), left[order] > 0, price, room
    given = lax.while_loop(_anybody, _give, start)[0]
    return (ranks + jnp.zeros_like(left).at[order].set(given.astype(left.dtype)).reshape(ranks.shape)) / most


Giving = tuple[Array, Array, Array, Array]
"""Who has got a rank back, who wants one, its price, all in their order; and the room in the budget."""


def _affordable(giving: Giving) -> Array:
    given, wanted, price, room = giving
    return ~given & wanted & (price <= room - jnp.sum(jnp.where(given, price, 0)))


def _anybody(giving: Giving) -> Array:
    return jnp.any(_affordable(giving))


def _give(giving: Giving) -> Giving:
    """Give as many ranks as fit from the first on; who is too dear is passed over the next time."""
    given, wanted, price, room = giving
    able, held = _affordable(giving), jnp.sum(jnp.where(given, price, 0))
    first = able & (jnp.cumsum(able) == 1)  # whatever rounding says
    more = able & (held + jnp.cumsum(jnp.where(able, price, 0)) <= room)
    return given | first | more, wanted, price, room


@checked
def with_one_ratio(
    policy: RankPolicy, weight: str = "clients", *, layer_weights: Sequence[float] | None = None
) -> RankPolicy:
    """Give every client a policy's mean ratio: the control of equal cost without personal ranks.

    Costs are equal up to the rounding to whole ranks, which is up to a rank of everybody: at small maximum ranks look
    at the bytes and FLOPs themselves.

    Args:
        policy: whose mean is taken, with its info.
        weight: "clients" (equal bytes) or "examples" (equal training FLOPs), as in `with_budget`.
        layer_weights: likewise, for per-layer ratios.

    Raises:
        ValueError: for an unknown `weight`, or bad `layer_weights`.
    """
    check_name("weight", weight, WEIGHTS)
    _check_layer_weights(layer_weights)

    def one_ratio(key: Key, stats: ClientStats) -> tuple[Array, RankInfo]:
        ratios, info = policy(key, stats)
        mean = mean_of_ratios(ratios, stats, weight, layer_weights=layer_weights)
        return jnp.full_like(ratios, jnp.clip(mean, jnp.min(ratios), jnp.max(ratios))), info  # whatever rounding says

    return one_ratio


@checked
def with_caps(policy: RankPolicy) -> RankPolicy:
    """Let no client's ratio exceed what its device can do: `min(ρ_i, stats.max_ratio_i)` in every layer.

    Args:
        policy: whose ratios are capped.

    Returns:
        A policy; caps go below any `min_ratio`. It raises `ValueError` for caps outside (0, 1].
    """

    def capped(key: Key, stats: ClientStats) -> tuple[Array, RankInfo]:
        check_share("stats.max_ratio", stats.max_ratio, cause="a rank: divide by the maximum")
        ratios, info = policy(key, stats)
        caps = jnp.asarray(stats.max_ratio).astype(ratios.dtype)
        return jnp.minimum(ratios, caps if ratios.ndim == 1 else caps[:, None]), info

    return capped


@checked
def with_coverage(policy: RankPolicy, share: float | Array = 0.5) -> RankPolicy:
    """Cut the highest ratios until the owners of every rank position in use hold a share of all examples.

    Rules that average a position over its owners, as `rbla` does, leave the last positions to whoever has the highest
    rank, with the label mix of its data alone. In every layer

        ρ'_i = min(ρ_i, c),   c = max { ρ_j : Σ_{i: ρ_i ≥ ρ_j} n_i ≥ share · Σ_i n_i }

    Args:
        policy: whose ratios are cut.
        share: in (0, 1], of the examples of all clients present; 1 cuts to the lowest ratio among those that have any.

    Returns:
        A policy; the mean of its ratios is at most the old one. In a round where only some clients take part, fewer
        examples may stand behind a position.

    Raises:
        ValueError: for a bad `share`.

    Source: ours; that positions of few owners are amplified is a known weakness of averaging over owners.
    """
    check_one("share", share)
    check_share("share", share)

    def covered(key: Key, stats: ClientStats) -> tuple[Array, RankInfo]:
        ratios, info = policy(key, stats)
        order = jnp.argsort(-ratios, axis=0)
        examples = jnp.cumsum(jnp.where(stats.where, jnp.asarray(stats.size), 0)[order], axis=0)
        # 15 of 25 are 0.6 of them, whatever float32 says
        least = share * (1 - 1e-6) * examples[-1:].astype(ratios.dtype)
        enough = examples.astype(ratios.dtype) >= least
        cap = jnp.max(jnp.where(enough, jnp.take_along_axis(ratios, order, axis=0), 0), axis=0, keepdims=True)
        return jnp.minimum(ratios, cap), info

    return covered


@checked
def resource_profile(name: str, key: Key, clients: int, *, levels: Sequence[float] = DEVICE_LEVELS) -> Array:
    """Draw the largest ratio that each client's device can train, for `ClientStats.max_ratio`.

    Each client is of one of a few device levels, drawn independently (and by its own number, so that more clients leave
    the first ones as they are):

    - "homogeneous": all of the strongest level;
    - "random": every level equally likely;
    - "heavy_tail_light": 85 % of the weakest level, the others equally likely;
    - "heavy_tail_strong": 85 % of the strongest level, the others equally likely;
    - "normal": level `k = 0..K-1` with probability ∝ `exp(-(k - (K - 1)/2)² / 2)`.

    Args:
        name: of the profile.
        key: random key.
        clients: how many, ≥ 1.
        levels: the ratios of the device levels, weakest first, each in (0, 1].

    Returns:
        `(clients,)` ratios, each one of `levels`.

    Raises:
        ValueError: for an unknown name, no clients, or bad levels.

    Source: FlexLoRA, arXiv 2402.11505, and its code for the shapes of the profiles. The ratios of the levels and the
    width of "normal" are ours: FlexLoRA's levels are rank 8, 30, a mixture by layer, and 200.
    """
    check_name("a resource profile", name, RESOURCE_PROFILES)
    check_least("clients", clients)
    check_share("levels", list(levels), cause="ranks")
    if not len(levels) or list(levels) != sorted(levels):
        raise ValueError(f"expected levels as ratios, weakest first, got {levels}")
    dtype = jnp.result_type(float)
    logits = jnp.log(jnp.array(_probabilities(name, len(levels)), dtype))
    drawn = jax.vmap(lambda i: jax.random.categorical(jax.random.fold_in(key, i), logits))(jnp.arange(clients))
    return jnp.array(levels, dtype)[drawn]


def _probabilities(name: str, levels: int) -> list[float]:
    if name == "normal":
        bell = [math.exp(-((k - (levels - 1) / 2) ** 2) / 2) for k in range(levels)]
        return [b / sum(bell) for b in bell]
    fixed = {k % levels: p for k, p in _PROFILES[name].items()}
    others = max(levels - len(fixed), 1)
    return [fixed.get(k, (1 - sum(fixed.values())) / others) for k in range(levels)]


@checked
def mean_of_ratios(
    ratios: Array, stats: ClientStats, weight: str = "clients", *, layer_weights: Sequence[float] | None = None
) -> Array:
    """Return the mean ratio over the clients present, or over their examples; 0 where nobody counts.

    Args:
        ratios: `(clients,)` or `(clients, layers)`.
        stats: one row per client.
        weight: "clients" or "examples".
        layer_weights: one per layer, > 0; equal where None.
    """
    check_name("weight", weight, WEIGHTS)
    _check_layer_weights(layer_weights)
    return jnp.sum(ratios * _shares(stats, weight, layer_weights, ratios))


def _check_layer_weights(weights: Sequence[float] | None) -> None:
    bad = [weight for weight in (() if weights is None else weights) if not 0 < weight < math.inf]
    if bad:
        raise ValueError(f"expected layer_weights as finite numbers above 0, got {bad[0]:g}")


def _shares(stats: ClientStats, weight: str, layer_weights: Sequence[float] | None, ratios: Array) -> Array:
    """Return weights of the same shape as `ratios` that sum to 1, or to 0 where nobody counts."""
    layers = 1 if ratios.ndim == 1 else ratios.shape[1]
    per_layer = jnp.ones(layers, ratios.dtype) if layer_weights is None else jnp.array(layer_weights, ratios.dtype)
    if per_layer.shape != (layers,):
        raise ValueError(f"layer_weights: expected {layers} of them, got shape {per_layer.shape}")
    per_client = jnp.ones(ratios.shape[0], ratios.dtype) if weight == "clients" else _as(stats.size, ratios)
    per_client = jnp.where(stats.where, per_client, 0)
    product = (per_client[:, None] * per_layer[None, :]).reshape(ratios.shape)
    total = jnp.sum(product)
    return product / jnp.where(total > 0, total, 1)


def _as(x: ArrayLike, like: Array) -> Array:
    return jnp.asarray(x).astype(like.dtype)
