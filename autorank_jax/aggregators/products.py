"""Rules that average products of adapters and go back to factors, by SVD or by least squares.

The SVD is that of the dense `(d_in, d_out)` sum. Stacking factors and a QR of the stacks would need `cohort · max_rank`
columns in the sums, which then grow with the cohort and depend on who sits where in it.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

from autorank_jax.adapters.lora import per_layer
from autorank_jax.aggregators.base import (
    ClientSums,
    Values,
    assemble,
    make_summand,
    mean_dense,
    mean_factors,
    mean_product,
    owned,
    read_trainable,
    reported,
    write_trainable,
)
from autorank_jax.aggregators.owners import (
    Levels,
    check_levels,
    check_levels_fit,
    make_owner_summand,
    owner_product,
)
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

Sigma = Literal["left", "right", "both"]
"""Where the singular values go: `U Σ, Vᵀ`, or `U, Σ Vᵀ`, or `U √Σ, √Σ Vᵀ`."""

_POWERS = {"left": (1.0, 0.0), "right": (0.0, 1.0), "both": (0.5, 0.5)}

Products = Callable[[Server, ClientSums], dict[str, Array]]
Keep = Callable[[Array], Array]  # singular values, descending -> () how many of them to keep


def flexlora(*, sigma: Sigma = "both") -> Aggregator:
    """Split the mean product `Σ_k w_k A_k B_k / Σ_k w_k` by SVD (FlexLoRA, arXiv 2402.11505).

    Rank positions are sorted by singular value, so that clients of low rank get the strongest. The model moves by the
    mean product as far as `max_rank` positions can hold it.

    Args:
        sigma: where the singular values go. The authors' code has "right"; the gradient of `lora_a` then grows with Σ
            while `lora_a` itself is of length 1, and some runs end in guessing that do not with "both".

    Raises:
        ValueError: for another `sigma`.
    """
    return assemble(make_summand(products=True), _svd_step(_mean_products, sigma))


def raflora(*, levels: Levels = None, sigma: Sigma = "both") -> Aggregator:
    """Split the product whose rank positions are averaged over their owners by SVD (raFLoRA, arXiv 2602.13486).

    `P = Σ_h Σ_{k: r_k ≥ r_h} w_k A_k[:, r_{h-1}:r_h] B_k[r_{h-1}:r_h] / Σ_{k: r_k ≥ r_h} w_k`. Positions that nobody
    covers contribute the server's own product. FlexLoRA's plain mean drains the positions that few clients own.

    Args:
        levels: `r_1 < ... < r_H` of the configuration, for all adapters or by path; every rank its own level where
            None, which is the same for ranks that are levels.
        sigma: where the singular values go.

    Raises:
        ValueError: for levels that do not increase or exceed an adapter, or another `sigma`.
    """
    check_levels(levels)

    def init(server: Server) -> AggState:
        check_levels_fit(levels, server)
        return ()

    return assemble(make_owner_summand(levels), _svd_step(owner_products, sigma), init=init, exact_plan=True)


def florist(*, tau: float = 0.99, sigma: Sigma = "both") -> Aggregator:
    """Split the mean product by SVD and keep an energy threshold of it (FLoRIST, arXiv 2506.09199).

    Of each layer the first `p` positions are kept, `p` the least with `Σ_{i≤p} σ_i² ≥ τ Σ_i σ_i²`: one rank for all
    clients, who still cut it to their own. Later positions keep the server's `lora_a` and get `lora_b = 0`.

    Args:
        tau: share of the energy in (0, 1].
        sigma: where the singular values go; see `flexlora`.

    Raises:
        ValueError: for `tau` outside (0, 1], or another `sigma`.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"expected an energy threshold tau in (0, 1], got {tau}")

    def keep(values: Array) -> Array:
        energy = jnp.cumsum(jnp.square(values))
        enough = tau * energy[-1] * (1 - 4 * jnp.finfo(values.dtype).eps)
        before = jnp.concatenate([jnp.zeros_like(energy[:1]), energy[:-1]])
        return jnp.sum(before < enough, dtype=jnp.int32)

    step, traffic = _svd_step(_mean_products, sigma, keep), Traffic(down=Travels(live=True))
    return assemble(make_summand(products=True), step, traffic=traffic)


def lora_fair(*, ridge: float = 0.01, owners: bool = False) -> Aggregator:
    """Average factors and correct `lora_b` towards the mean product P (LoRA-FAIR, arXiv 2411.14961).

    `ΔB = argmin ‖P - Ā (B̄ + ΔB)‖_F² + λ ‖ΔB‖_F²`, so `(ĀᵀĀ + λ I) ΔB = Āᵀ (P - Ā B̄)`. The paper takes gradient steps on
    a cosine similarity, which has no closed form.

    Args:
        ridge: λ ≥ 0; 0 gives the least-squares solution of least norm.
        owners: average factors over owners, as RBLA does; padded with zeros where False.

    Raises:
        ValueError: if the ridge is negative.
    """
    if ridge < 0:
        raise ValueError(f"expected ridge >= 0, got {ridge}")

    def mean(sums: ClientSums, state: AggState, server: Server) -> tuple[Values, Values]:  # noqa: ARG001
        means, seen = mean_factors(server, sums, owners=owners), {}
        for path, (a, b) in means.items():
            product = mean_product(server.trainable.adapters[path], sums.products[path], sums.weight)
            means[path] = Adapter(a, b + per_layer(functools.partial(_correction, ridge=ridge), a, product - a @ b))
            seen[path] = Adapter(owned(sums.owners[path], means[path]).lora_a, sums.weight > 0)
        dense = mean_dense(server, sums)
        return Values(dense, means, {}), Values(reported(dense, sums.weight), seen, {})

    return assemble(make_summand(factors=True, products=True), ServerStep(read_trainable, mean, write_trainable))


def _correction(a: Array, gap: Array, ridge: float) -> Array:
    """Solve `min ‖gap - A ΔB‖_F² + λ ‖ΔB‖_F²` for ΔB."""
    if ridge == 0:
        return jnp.linalg.lstsq(a, gap)[0]
    factor = cho_factor(a.T @ a + ridge * jnp.eye(a.shape[1], dtype=a.dtype))
    return cho_solve(factor, a.T @ gap)


def _mean_products(server: Server, sums: ClientSums) -> dict[str, Array]:
    adapters = server.trainable.adapters
    return {path: mean_product(adapters[path], total, sums.weight) for path, total in sums.products.items()}


def owner_products(server: Server, sums: ClientSums) -> dict[str, Array]:
    """Return the owner-weighted product of each adapter."""
    return {path: owner_product(server, sums, path) for path in sums.products}


def _svd_step(average: Products, sigma: Sigma, keep: Keep | None = None) -> ServerStep:
    """Make the server step that averages products and splits them by SVD."""
    if sigma not in _POWERS:
        raise ValueError(f"expected sigma to be one of {sorted(_POWERS)}, got {sigma!r}")

    def read(server: Server) -> Values:
        products = {path: a.lora_a @ a.lora_b for path, a in server.trainable.adapters.items()}
        return Values(server.trainable.dense, {}, products)

    def mean(sums: ClientSums, state: AggState, server: Server) -> tuple[Values, Values]:  # noqa: ARG001
        values = Values(mean_dense(server, sums), {}, average(server, sums))
        return values, reported(values, sums.weight)

    def write(key: Key, values: Values, state: AggState, server: Server) -> Server:  # noqa: ARG001
        split = functools.partial(split_product, sigma=sigma, keep=keep)
        adapters = {
            path: per_layer(split, values.matrices[path], old) for path, old in server.trainable.adapters.items()
        }
        return server._replace(trainable=Trainable(adapters, values.dense))

    return ServerStep(read, mean, write)


def split_product(product: Array, old: Adapter, *, sigma: Sigma, keep: Keep | None = None) -> Adapter:
    """Split `U Σ Vᵀ` into the factors of an adapter, positions in descending order of singular values.

    Positions of vanishing singular value (those beyond `min(d_in, d_out)` always) keep their old `lora_a` and get
    `lora_b = 0`: with both factors zero they would never train again.

    Args:
        product: `(d_in, d_out)`.
        old: the adapter that gives shapes, types and the `lora_a` that stays.
        sigma: where the singular values go.
        keep: how many positions to keep, of the singular values; all where None.
    """
    wide = product.astype(jnp.promote_types(product.dtype, jnp.float32))  # no SVD in half precision
    u, s, vt = jnp.linalg.svd(wide, full_matrices=False)
    count = min(old.lora_a.shape[-1], s.shape[0])
    live = s > max(product.shape) * jnp.finfo(s.dtype).eps * s[0]
    if keep is not None:
        live = live & (jnp.arange(s.shape[0], dtype=jnp.int32) < keep(s))
    live, (left, right) = live[:count], (s[:count] ** power for power in _POWERS[sigma])
    a, b = (
        (u[:, :count] * left[None, :]).astype(old.lora_a.dtype),
        (right[:, None] * vt[:count]).astype(old.lora_b.dtype),
    )
    return Adapter(
        old.lora_a.at[:, :count].set(jnp.where(live[None, :], a, old.lora_a[:, :count])),
        jnp.zeros_like(old.lora_b).at[:count].set(jnp.where(live[:, None], b, 0)),
    )
