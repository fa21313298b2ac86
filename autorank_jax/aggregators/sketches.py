"""Sums of products at the size of factors: three linear sketches of a `(d_in, d_out)` sum, and what they tell of it.

With test matrices `left`, `right` of a layer and `P = Σ_k w_k A_k D_k B_k`, a round adds up

    P right[:, :k]    left[:k] P    left[r:] P right[:, r:]        (d_in, k), (k, d_out), (c, c)

instead of `P`. All are linear, so that lanes, devices and exclusion need nothing new. The first `r` rows of `left` and
columns of `right` are the server's own directions, those of `lora_a` and `lora_b`; all others are random. As clients
start from the server, `P` is to first order in the clients' moves in the span of these directions, and of that nothing
is lost: with `U`, `V` orthonormal bases of them,

    P = U UᵀP + (I - UUᵀ) P V Vᵀ + (I - UUᵀ) P (I - VVᵀ)

has two exact summands, and only the third is approximated, `Q C Wᵀ`, after Tropp, Yurtsever, Udell and Cevher,
"Streaming low-rank matrix approximation with an application to scientific simulation" (2019, arXiv 1902.08651). Their
test matrices are independent of each other, while here the random rows of `left` serve two of the sketches: the bound
that they prove is not proven of this.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

from autorank_jax.adapters.lora import key_of, per_layer
from autorank_jax.aggregators.decompositions import svd
from autorank_jax.types import Adapter, AggState, Array, Key, Server

T = TypeVar("T")

_LEAST_RANDOM = 16  # random columns: as many as rank positions, but no fewer
_CORE = 3  # sides of the core over columns; of 2, the least that the source advises, its least squares lose more
_MARGIN = 4  # how many times smaller than the product a sketch must be to be worth an approximation
_SKETCH = 0x736B6574  # folded into the round's key, so that maps share no number with what else a rule draws


class Maps(NamedTuple):
    """The test matrices of one layer in one round, in float32 or wider."""

    left: Array  # (r + c, d_in)
    right: Array  # (d_out, r + c)


class Sketch(NamedTuple):
    """What is summed in place of a product `P` of one layer."""

    columns: Array  # (d_in, k) P right[:, :k]
    rows: Array  # (k, d_out) left[:k] P
    core: Array  # (c, c) left[r:] P right[:, r:]


class Reconstruction(NamedTuple):
    """`P ≈ left @ core @ right`; columns of `left` and rows of `right` are orthonormal as far as `core` uses them."""

    left: Array  # (d_in, r + k)
    core: Array  # (r + k, r + k)
    right: Array  # (r + k, d_out)
    energy: Array  # () unbiased estimate of ‖P‖_F², with what the approximation leaves out


def sketch_columns(adapter: Adapter) -> int:
    """Return `k`, the columns of a sketch: the server's rank positions and the random ones, as far as they fit."""
    rank, least = _sizes(adapter)
    return min(rank + max(rank, _LEAST_RANDOM), least - rank)


def is_sketched(adapter: Adapter, *, exact: bool | str) -> bool:
    """Return whether the product of a layer is sketched: a matter of its shapes alone.

    Args:
        adapter: of the server.
        exact: False: wherever the server's directions leave room for others, `2 r ≤ min(d_in, d_out)`; "auto": where
            the sketch has at most a quarter of the numbers; True: nowhere.
    """
    (rank, least), columns = _sizes(adapter), sketch_columns(adapter)
    d_in, d_out = adapter.lora_a.shape[-2], adapter.lora_b.shape[-1]
    numbers = columns * (d_in + d_out) + (_CORE * columns) ** 2
    return exact is not True and 2 * rank <= least and (exact is False or _MARGIN * numbers <= d_in * d_out)


def make_prepare(*, exact: bool | str) -> Callable[[Key, AggState, Server], dict[str, Maps]]:
    """Make a rule's `prepare`: the test matrices of the layers that are sketched, by path."""

    def prepare(key: Key, state: AggState, server: Server) -> dict[str, Maps]:  # noqa: ARG001
        key, adapters = jax.random.fold_in(key, _SKETCH), server.trainable.adapters
        keys = {path: key_of(key, path) for path, a in adapters.items() if is_sketched(a, exact=exact)}
        return by_shape(draw_maps, keys, adapters)

    return prepare


def draw_maps(key: Key, old: Adapter, columns: int | None = None) -> Maps:
    """Draw the test matrices of a layer beside the server's directions.

    A position of the server that is zero, as all of `lora_b` are before the first round, gives a random direction.
    Stacked layers have maps of their own, stacked likewise.

    Args:
        key: of this layer and round.
        old: the server's adapter.
        columns: `k`, from `r` to `min(d_in, d_out) - r`; `sketch_columns` where None.
    """
    if old.lora_a.ndim > 2:
        keys = jax.random.split(key, old.lora_a.shape[0])
        return jax.vmap(lambda key, old: draw_maps(key, old, columns))(keys, old)
    count, (one, two) = _CORE * (columns or sketch_columns(old)), jax.random.split(key)
    return Maps(_beside(one, old.lora_a.T, count), _beside(two, old.lora_b, count).T)


def _beside(key: Key, directions: Array, count: int) -> Array:
    """Write random rows below the given ones, which become of length 1."""
    directions = directions.astype(jnp.promote_types(directions.dtype, jnp.float32))
    rank, size = directions.shape
    random = jax.random.normal(key, (rank + count, size), directions.dtype)
    norms = jnp.linalg.norm(directions, axis=1, keepdims=True)
    own = jnp.where(norms > 0, directions / jnp.where(norms > 0, norms, 1), random[:rank] / size**0.5)
    return jnp.concatenate([own, random[rank:]])


def sketch_product(a: Array, b: Array, maps: Maps, old: Adapter) -> Sketch:
    """Sketch `a @ b` of any inner width, without forming it.

    Args:
        a: `(..., d_in, w)`.
        b: `(..., w, d_out)`.
        maps: of this layer, or of stacked layers.
        old: the server's adapter, for its shapes.
    """
    return per_layer(_sketch_layer, a, b, maps, old)


@jax.default_matmul_precision("highest")
def _sketch_layer(a: Array, b: Array, maps: Maps, old: Adapter) -> Sketch:
    rank, dtype = _sizes(old)[0], maps.left.dtype
    columns = (maps.left.shape[0] - rank) // _CORE
    a, b = a.astype(dtype), b.astype(dtype)
    left, right = maps.left @ a, b @ maps.right  # (r + c, w), (w, r + c)
    return Sketch(a @ right[:, :columns], left[:columns] @ b, left[rank:] @ right[:, rank:])


@jax.default_matmul_precision("highest")
def reconstruct(sketch: Sketch, maps: Maps, old: Adapter) -> Reconstruction:
    """Approximate the product of one layer: `UᵀP` and `P V` are exact to rounding, the rest is `Q C Wᵀ`.

    Rounding grows with how alike the server's own directions are; those smaller than √eps are left to the random ones.

    `Q` and `W` span what the sketched columns and rows have beside `U` and `V`; with `P'` what `P` has beside both, `C`
    solves `left Q C Wᵀ right = left P' right` by least squares. Nothing larger than `(d, k)` is decomposed.

    Args:
        sketch: of the mean product.
        maps: that it was made with.
        old: the server's adapter, for its shapes.
    """
    rank = _sizes(old)[0]
    u, u_p = _known(maps.left[:rank].T, sketch.rows[:rank])
    v, v_p = _known(maps.right[:, :rank], sketch.columns[:, :rank].T)
    q, w = _beyond(u, sketch.columns), _beyond(v, sketch.rows.T)
    phi, psi, p_v, both = maps.left[rank:], maps.right[:, rank:], v_p.T, u_p @ v
    beside_u = p_v - u @ both  # a basis of nothing may repeat directions of `u`: nothing is left for them
    beside = sketch.core - (phi @ u) @ (u_p @ psi) - (phi @ beside_u) @ (v.T @ psi)
    rest = _solve(psi.T @ w, _solve(phi @ q, beside).T).T
    energy = jnp.sum(u_p**2) + jnp.sum(p_v**2) - jnp.sum(both**2) + jnp.mean(beside**2)
    core = jnp.block([[both, (u_p - both @ v.T) @ w], [q.T @ beside_u, rest]])
    return Reconstruction(jnp.concatenate([u, q], axis=1), core, jnp.concatenate([v, w], axis=1).T, energy)


def _known(directions: Array, image: Array) -> tuple[Array, Array]:
    """Return an orthonormal basis `U (d, r)` of directions and `UᵀP`, given `directionsᵀ P`.

    Directions that the others make superfluous give zeros in both: they are left to the random ones.
    """
    q, upper = jnp.linalg.qr(directions)
    turn, values, back = svd(upper)
    live = values > jnp.sqrt(jnp.finfo(values.dtype).eps) * values[0]
    inverse = jnp.where(live, 1 / jnp.where(live, values, 1), 0)
    return q @ (turn * live[None, :].astype(turn.dtype)), (inverse[:, None] * back) @ image


def _beyond(known: Array, image: Array) -> Array:
    """Return an orthonormal basis, `(d, k)`, of what an image has beside a known basis."""
    for _ in range(2):  # what the first time leaves by rounding, the second takes
        image = jnp.linalg.qr(image - known @ (known.T @ image))[0]
    return image


def _solve(random: Array, target: Array) -> Array:
    """Solve `random @ x = target` by least squares: a third as many columns as rows, so well conditioned."""
    return cho_solve(cho_factor(random.T @ random), random.T @ target)


def by_shape(function: Callable[..., T], *layers: dict[str, Any]) -> dict[str, T]:
    """Apply a function of one layer to all of them by path, layers of one shape in one batch.

    Args:
        function: of one layer's entry in each of `layers`.
        *layers: by path, trees of arrays; the paths of the first count.
    """
    groups: dict[Any, list[str]] = {}
    for path in layers[0]:
        shapes = [(leaf.shape, str(leaf.dtype)) for tree in layers for leaf in jax.tree.leaves(tree[path])]
        groups.setdefault(tuple(shapes), []).append(path)
    done: dict[str, T] = {}
    for paths in groups.values():
        stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *(tree[path] for path in paths)) for tree in layers]
        results = jax.vmap(function)(*stacked)
        done |= {path: jax.tree.map(lambda leaf, n=number: leaf[n], results) for number, path in enumerate(paths)}
    return {path: done[path] for path in layers[0]}


def _sizes(adapter: Adapter) -> tuple[int, int]:
    """Return the rank positions and the shorter side of a layer."""
    return adapter.lora_a.shape[-1], min(adapter.lora_a.shape[-2], adapter.lora_b.shape[-1])
