"""Rules that average products of adapters and go back to factors, by SVD or by least squares.

A layer's products are summed whole, `(d_in, d_out)`, and split by a dense SVD; or, as `exact` says, as sketches of the
size of factors (`aggregators.sketches`). Stacking factors and a QR of the stacks would need `cohort · max_rank` columns
in the sums, which then grow with the cohort and depend on who sits where in it.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve

from autorank_jax.adapters.lora import per_layer
from autorank_jax.aggregators.base import (
    ClientSums,
    Values,
    compose_rule,
    divide,
    make_summand,
    mean_dense,
    mean_factors,
    mean_product,
    owned,
    read_trainable,
    reported,
    update_with,
    wide_product,
    widen,
    write_trainable,
)
from autorank_jax.aggregators.decompositions import svd
from autorank_jax.aggregators.owners import (
    Levels,
    check_levels,
    check_levels_fit,
    make_owner_summand,
    owner_product,
)
from autorank_jax.aggregators.sketches import Maps, Reconstruction, Sketch, by_shape, make_prepare, reconstruct
from autorank_jax.interface import checked
from autorank_jax.types import (
    Adapter,
    Aggregator,
    AggState,
    Array,
    ClientUpdate,
    Key,
    Plan,
    Server,
    ServerStep,
    Traffic,
    Trainable,
    Travels,
)

Sigma = Literal["left", "right", "both"]
"""Where the singular values go: `U Σ, Vᵀ`, or `U, Σ Vᵀ`, or `U √Σ, √Σ Vᵀ`."""

_POWERS = {"left": (1.0, 0.0), "right": (0.0, 1.0), "both": (0.5, 0.5)}

Exact = bool | Literal["auto"]
"""How products are summed: True, whole; False, as sketches wherever a layer's sides are at least twice `max_rank`;
"auto", as sketches where they have at most a quarter of the numbers, `k (d_in + d_out) + 9 k²` with
`k = max_rank + max(max_rank, 16)`. It is decided by shapes: small layers are summed whole.
"""

Products = Callable[[Server, ClientSums, dict[str, Maps]], dict[str, Any]]  # matrices, or sketches where there are maps
Keep = Callable[[Array, Array], Array]  # singular values, descending; () least of Σ σ² -> () how many to keep
MakeStep = Callable[[dict[str, Maps]], ServerStep]


@checked
def flexlora(*, sigma: Sigma = "both", exact: Exact = "auto") -> Aggregator:
    """Split the mean product `Σ_k w_k A_k B_k / Σ_k w_k` by SVD (FlexLoRA, arXiv 2402.11505).

    Rank positions are sorted by singular value, so that clients of low rank get the strongest. The model moves by the
    mean product as far as `max_rank` positions can hold it.

    Args:
        sigma: where the singular values go. The authors' code has "right"; the gradient of `lora_a` then grows with Σ
            while `lora_a` itself is of length 1, and some runs end in guessing that do not with "both".
        exact: whether products are summed whole: True always, "auto" in small layers only, False in none whose sides
            are at least `2 max_rank` (see `Exact`). Else they are sketched: the mean is exact in the directions of the
            server's factors, approximated beside them, and split as if the approximation were the mean. That is close
            as long as clients stay near the server: what is approximated is of second order in their moves.

    Raises:
        TypeError, ValueError: for another `sigma` or `exact`.
    """
    return _product_rule(make_summand(products=True), _svd_steps(_mean_products, sigma), exact)


@checked
def raflora(*, levels: Levels = None, sigma: Sigma = "both", exact: Exact = "auto") -> Aggregator:
    """Split the product whose rank positions are averaged over their owners by SVD (raFLoRA, arXiv 2602.13486).

    `P = Σ_h Σ_{k: r_k ≥ r_h} w_k A_k[:, r_{h-1}:r_h] B_k[r_{h-1}:r_h] / Σ_{k: r_k ≥ r_h} w_k`. Positions that nobody
    covers contribute the server's own product. FlexLoRA's plain mean drains the positions that few clients own.

    Args:
        levels: `r_1 < ... < r_H` of the configuration, for all adapters or by path; every rank its own level where
            None, which is the same for ranks that are levels.
        sigma: where the singular values go.
        exact: whether products are summed whole, as in `flexlora`, or sketched: then `P` is exact in the directions of
            the server's factors and approximated beside them. Owners' shares are exact either way.

    Raises:
        ValueError: for levels that do not increase or exceed an adapter, or another `sigma` or `exact`.
    """
    check_levels(levels)

    def init(server: Server) -> AggState:
        check_levels_fit(levels, server)
        return ()

    steps = _svd_steps(owner_products, sigma)
    return _product_rule(make_owner_summand(levels), steps, exact, init=init, exact_plan=True)


@checked
def florist(*, tau: float = 0.99, sigma: Sigma = "both", exact: Exact = "auto") -> Aggregator:
    """Split the mean product by SVD and keep an energy threshold of it (FLoRIST, arXiv 2506.09199).

    Of each layer the first `p` positions are kept, `p` the least with `Σ_{i≤p} σ_i² ≥ τ Σ_i σ_i²`: one rank for all
    clients, who still cut it to their own. Later positions keep the server's `lora_a` and get `lora_b = 0`.

    Args:
        tau: share of the energy in (0, 1].
        sigma: where the singular values go; see `flexlora`.
        exact: whether products are summed whole, as in `flexlora`. Of a layer that is sketched, all energy is known
            but for that beside the directions of the server's factors, for which stands an unbiased estimate.

    Raises:
        ValueError: for `tau` outside (0, 1], or another `sigma` or `exact`.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"expected an energy threshold tau in (0, 1], got {tau}")

    def keep(values: Array, whole: Array) -> Array:
        energy = jnp.cumsum(jnp.square(values))
        enough = tau * jnp.maximum(whole, energy[-1]) * (1 - 4 * jnp.finfo(values.dtype).eps)
        before = jnp.concatenate([jnp.zeros_like(energy[:1]), energy[:-1]])
        return jnp.sum(before < enough, dtype=jnp.int32)

    steps, traffic = _svd_steps(_mean_products, sigma, keep), Traffic(down=Travels(live=True))
    return _product_rule(make_summand(products=True), steps, exact, traffic=traffic)


@checked
def lora_fair(*, ridge: float = 0.01, owners: bool = False, exact: Exact = "auto") -> Aggregator:
    """Average factors and correct `lora_b` towards the mean product P (LoRA-FAIR, arXiv 2411.14961).

    `ΔB = argmin ‖P - Ā (B̄ + ΔB)‖_F² + λ ‖ΔB‖_F²`, so `(ĀᵀĀ + λ I) ΔB = Āᵀ (P - Ā B̄)`. The paper takes gradient steps on
    a cosine similarity, which has no closed form.

    Args:
        ridge: λ ≥ 0; 0 gives the least-squares solution of least norm.
        owners: average factors over owners, as RBLA does; padded with zeros where False.
        exact: whether products are summed whole. Of a layer that is sketched, factors are averaged exactly, and `P` in
            the correction is exact in the directions of the server's factors and approximated beside them.

    Raises:
        ValueError: if the ridge is negative or not finite, or for another `exact`.
    """
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"expected a finite ridge >= 0, got {ridge}")

    from_sketch = functools.partial(_correction_of_reconstruction, ridge=ridge)

    def steps(maps: dict[str, Maps]) -> ServerStep:
        def mean(sums: ClientSums, state: AggState, server: Server) -> tuple[Values, Values]:  # noqa: ARG001
            means, seen = mean_factors(server, sums, owners=owners), {}
            products = _mean_products(server, sums, maps)
            sketched = by_shape(
                functools.partial(per_layer, reconstruct),
                {p: products[p] for p in maps},
                maps,
                server.trainable.adapters,
            )
            for path, (a, b) in means.items():
                if path in sketched:
                    correction = per_layer(from_sketch, Adapter(a, b), sketched[path])
                else:
                    gap = products[path] - wide_product(means[path])
                    correction = per_layer(functools.partial(_correction, ridge=ridge), widen(a), gap)
                means[path] = Adapter(a, (widen(b) + correction).astype(b.dtype))
                seen[path] = Adapter(owned(sums.owners[path], means[path]).lora_a, sums.weight > 0)
            dense = mean_dense(server, sums)
            return Values(dense, means, {}), Values(reported(dense, sums.weight), seen, {})

        return ServerStep(read_trainable, mean, write_trainable)

    return _product_rule(make_summand(factors=True, products=True), steps, exact)


def _product_rule(
    summand: Callable[[ClientUpdate, Server, Plan], ClientSums], steps: MakeStep, exact: Exact, **options: Any
) -> Aggregator:
    """Make a rule of its summand and its server step, which is made anew of each round's sketching maps."""
    prepare = make_prepare(exact=exact)

    def update(key: Key, sums: ClientSums, state: AggState, server: Server) -> tuple[Server, AggState]:
        sketched = any(isinstance(total, Sketch) for total in sums.products.values())
        maps = prepare(_after(sums, key), state, server) if sketched else {}
        return update_with(steps(maps))(key, sums, state, server)

    return compose_rule(summand, steps({}), prepare=prepare, **options)._replace(update=update)


def _after(sums: ClientSums, key: Key) -> Key:
    """Return a key that is there no sooner than the sums: what is drawn of it again is not kept while clients train."""
    words, _ = lax.optimization_barrier((jax.random.key_data(key), sums))
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))


def _correction(a: Array, gap: Array, ridge: float) -> Array:
    """Solve `min ‖gap - A ΔB‖_F² + λ ‖ΔB‖_F²` for ΔB."""
    if ridge == 0:
        return jnp.linalg.lstsq(a, gap)[0]
    factor = cho_factor(a.T @ a + ridge * jnp.eye(a.shape[1], dtype=a.dtype))
    return cho_solve(factor, a.T @ gap)


@jax.default_matmul_precision("highest")
def _correction_of_reconstruction(mean: Adapter, product: Reconstruction, ridge: float) -> Array:
    """Solve the same in an orthonormal basis of `A`, with `AᵀP` of a product that is never formed."""
    a, b = (factor.astype(product.core.dtype) for factor in mean)
    q, upper = jnp.linalg.qr(a)
    gap = ((q.T @ product.left) @ product.core) @ product.right - upper @ b
    return _correction(upper, gap, ridge)


def _mean_products(server: Server, sums: ClientSums, maps: dict[str, Maps]) -> dict[str, Any]:
    def mean(path: str, total: Any) -> Any:
        if path in maps:
            return jax.tree.map(lambda leaf: divide(leaf, sums.weight), total)
        return mean_product(server.trainable.adapters[path], total, sums.weight)

    return {path: mean(path, total) for path, total in sums.products.items()}


def owner_products(server: Server, sums: ClientSums, maps: dict[str, Maps]) -> dict[str, Any]:
    """Return the owner-weighted product of each adapter, sketched where there are maps."""
    return {path: owner_product(server, sums, path, maps.get(path)) for path in sums.products}


def _svd_steps(average: Products, sigma: Sigma, keep: Keep | None = None) -> MakeStep:
    """Make what makes the server step that averages products and splits them by SVD, of a round's sketching maps."""

    def steps(maps: dict[str, Maps]) -> ServerStep:
        def read(server: Server) -> Values:
            products = {path: wide_product(a) for path, a in server.trainable.adapters.items()}
            return Values(server.trainable.dense, {}, products)

        def mean(sums: ClientSums, state: AggState, server: Server) -> tuple[Values, Values]:  # noqa: ARG001
            values = Values(mean_dense(server, sums), {}, average(server, sums, maps))
            return values, reported(values, sums.weight)

        def write(key: Key, values: Values, state: AggState, server: Server) -> Server:  # noqa: ARG001
            old, split = server.trainable.adapters, functools.partial(split_product, sigma=sigma, keep=keep)

            def from_sketch(sketch: Sketch, layer: Maps, a: Adapter) -> Adapter:
                return split(reconstruct(sketch, layer, a), a)

            sketches = {path: values.matrices[path] for path in maps}
            sketched = by_shape(functools.partial(per_layer, from_sketch), sketches, maps, old)
            adapters = {
                p: sketched[p] if p in maps else per_layer(split, values.matrices[p], a) for p, a in old.items()
            }
            return server._replace(trainable=Trainable(adapters, values.dense))

        return ServerStep(read, mean, write)

    return steps


def split_product(product: Array | Reconstruction, old: Adapter, *, sigma: Sigma, keep: Keep | None = None) -> Adapter:
    """Split `U Σ Vᵀ` into the factors of an adapter, positions in descending order of singular values.

    Positions of vanishing singular value (those beyond `min(d_in, d_out)` always) keep their old `lora_a` and get
    `lora_b = 0`: with both factors zero they would never train again.

    Args:
        product: `(d_in, d_out)`, or what a sketch tells of it; then the SVD is that of its core.
        old: the adapter that gives shapes, types and the `lora_a` that stays.
        sigma: where the singular values go.
        keep: how many positions to keep, of the singular values; all where None.
    """
    u, s, vt, energy = _svd_of_reconstruction(product) if isinstance(product, Reconstruction) else _svd(product)
    count = min(old.lora_a.shape[-1], s.shape[0])
    live = s > max(u.shape[0], vt.shape[1]) * jnp.finfo(s.dtype).eps * s[0]
    if keep is not None:
        live = live & (jnp.arange(s.shape[0], dtype=jnp.int32) < keep(s, energy))
    live, (left, right) = live[:count], (s[:count] ** power for power in _POWERS[sigma])
    a, b = (
        (u[:, :count] * left[None, :]).astype(old.lora_a.dtype),
        (right[:, None] * vt[:count]).astype(old.lora_b.dtype),
    )
    return Adapter(
        old.lora_a.at[:, :count].set(jnp.where(live[None, :], a, old.lora_a[:, :count])),
        jnp.zeros_like(old.lora_b).at[:count].set(jnp.where(live[:, None], b, 0)),
    )


def _svd(product: Array) -> tuple[Array, Array, Array, Array]:
    """Return `U, Σ, Vᵀ` of a matrix, and 0: there is no energy but that of `Σ`."""
    wide = product.astype(jnp.promote_types(product.dtype, jnp.float32))  # no SVD in half precision
    u, s, vt = svd(wide)
    return u, s, vt, jnp.zeros((), s.dtype)


@jax.default_matmul_precision("highest")
def _svd_of_reconstruction(product: Reconstruction) -> tuple[Array, Array, Array, Array]:
    u, s, vt = svd(product.core)
    return product.left @ u, s, vt @ product.right, product.energy
