"""Equations of multi-criteria decision making: CRITIC weights and TOPSIS scores of a `(clients, criteria)` matrix.

Every function is pure and total: finite input gives finite output and finite gradients, under `jit`, `vmap` and `grad`
alike, in the cases too where the textbook divides by zero. `where=False` removes a client as if its row were not there,
whatever the row holds. The words and letters are those of the literature: a criterion is a *benefit* where more is
better and a *cost* where less is better.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from autorank_jax.interface import check_name, check_values, checked
from autorank_jax.interface.kinds import is_traced, whole_to_float
from autorank_jax.types import Array

NORMALIZATIONS = ("vector", "minmax")


@checked
def critic_weights(
    matrix: ArrayLike, *, benefit: ArrayLike | Sequence[bool] | None = None, where: ArrayLike | None = None
) -> Array:
    """Weigh criteria by their contrast and by their conflict with each other (CRITIC).

    With columns scaled to `z = (x - worst) / (best - worst)`, `σ_j` the standard deviation of column `j` and `ρ_jk`
    the correlation of two columns,

        C_j = σ_j Σ_k (1 - ρ_jk)        w_j = C_j / Σ_k C_k

    A constant column gets weight 0 and leaves the others as if it were not there. Where `Σ C = 0` (a single varying
    column, or all of them perfectly correlated) the varying columns share the weight equally; where nothing varies,
    all columns do. A column is constant if `max - min ≤ 1e-6 · max|x|`, and `1 - ρ` below 1e-5 is 0 (in float64: 1e-12
    and 1e-10).

    Args:
        matrix: `(clients, criteria)` finite numbers of any unit; the weights do not depend on units.
        benefit: `(criteria,)` bool, False where a criterion is a cost; all benefits where None.
        where: `(clients,)` bool, False where a client is absent; all present where None.

    Returns:
        `(criteria,)` weights in [0, 1] that sum to 1.

    Raises:
        ValueError: for wrong shapes, or `benefit` or `where` that are not booleans.

    Source: Diakoulaki, Mavrotas, Papayannakis, "Determining objective weights in multiple criteria problems: the CRITIC
    method", Computers & Operations Research 22 (1995).

    Example:
        Three clients of 100, 200, 300 examples and 2, 4, 4 classes: `z = (0, ½, 1), (0, 1, 1)`, `σ = √(1/6), √(2/9)`.
        Of two columns each has the same conflict `1 - ρ`, which cancels: `w = √3 : √4`.

        >>> print(critic_weights(jnp.array([[100.0, 2.0], [200.0, 4.0], [300.0, 4.0]])))
        [0.4641 0.5359]
    """
    x, benefit_, where_ = _decision_problem(matrix, benefit, where)
    z, varying = min_max(x, where=where_)
    z = jnp.where(benefit_[None, :], z, 1 - z)

    clients = jnp.maximum(jnp.sum(where_), 1).astype(z.dtype)
    mean = jnp.sum(z, axis=0, where=where_[:, None]) / clients
    centred = jnp.where(where_[:, None] & varying[None, :], z - mean[None, :], 0)
    norm = _norm(centred, axis=0)
    unit = centred / jnp.where(varying, norm, 1)[None, :]
    # 1 - ρ = ½ ‖u_j - u_k‖² has no cancellation where ρ is nearly 1
    conflict = jnp.sum(jnp.square(unit[:, :, None] - unit[:, None, :]), axis=0) / 2
    counts = varying[:, None] & varying[None, :] & (conflict >= _tolerances(x)[1])
    C = norm * jnp.sum(jnp.where(counts, conflict, 0), axis=1)  # σ = norm / √clients, and √clients cancels

    total = jnp.sum(C)
    share = jnp.where(jnp.any(varying), varying, True).astype(x.dtype)
    return jnp.where(total > 0, C / jnp.where(total > 0, total, 1), share / jnp.sum(share))


@checked
def topsis(
    matrix: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    benefit: ArrayLike | Sequence[bool] | None = None,
    normalization: str = "vector",
    where: ArrayLike | None = None,
) -> Array:
    """Score clients by their closeness to the ideal client (TOPSIS).

    With columns normalised to `x̃`, by their L2 norm ("vector") or to `(x - min) / (max - min)` ("minmax"), and
    `v_ij = w_j x̃_ij`, the ideal `v⁺` takes the best of every column and the anti-ideal `v⁻` the worst:

        d_i^± = ‖v_i - v^±‖        C_i = d_i⁻ / (d_i⁺ + d_i⁻)

    A constant column contributes nothing. Where all clients are equal, `C_i = 0.5` for all.

    Args:
        matrix: `(clients, criteria)` finite numbers of any unit; the scores do not depend on units.
        weights: `(criteria,)` non-negative, of any sum; those of `critic_weights` where None.
        benefit: `(criteria,)` bool, False where a criterion is a cost; all benefits where None.
        normalization: "vector" or "minmax".
        where: `(clients,)` bool, False where a client is absent; all present where None.

    Returns:
        `(clients,)` closeness in [0, 1]; 0 for absent clients.

    Raises:
        ValueError: for wrong shapes, an unknown normalisation, negative weights, or `benefit` or `where` that are not
            booleans.

    Source: Hwang, Yoon, "Multiple Attribute Decision Making", Springer (1981).

    Example:
        The norms of the columns are 3 and 7. Client 0 is the worst and client 2 the best in both. Client 1 is
        `½ √(1/9 + 1/49)` from the worst and `½ · 3/7` from the best: `0.1813 / (0.1813 + 0.2143) = 0.4583`.

        >>> print(topsis(jnp.array([[1.0, 2.0], [2.0, 3.0], [2.0, 6.0]]), jnp.array([0.5, 0.5])))
        [0.     0.4583 1.    ]
    """
    check_name("normalization", normalization, NORMALIZATIONS)
    x, benefit_, where_ = _decision_problem(matrix, benefit, where)
    w = critic_weights(x, benefit=benefit_, where=where_) if weights is None else _as_float(weights).astype(x.dtype)
    _check_shape("weights", w, (x.shape[1],))
    if weights is not None:
        check_values("weights", weights)

    z, varying = min_max(x, where=where_)
    if normalization == "vector":
        norm = _norm(jnp.where(where_[:, None], x, 0), axis=0)
        z = x / jnp.where(norm > 0, norm, 1)[None, :]
    v = w[None, :] * jnp.where(varying[None, :], z, 0)

    # absent rows are copies of a present one here, so they move no extreme
    high, low = jnp.max(v, axis=0), jnp.min(v, axis=0)
    ideal, anti_ideal = jnp.where(benefit_, high, low), jnp.where(benefit_, low, high)
    to_ideal, to_anti_ideal = _norm(v - ideal[None, :], axis=1), _norm(v - anti_ideal[None, :], axis=1)
    total = to_ideal + to_anti_ideal
    closeness = jnp.where(total > 0, to_anti_ideal / jnp.where(total > 0, total, 1), 0.5)
    return jnp.where(where_, closeness, 0)


def min_max(matrix: ArrayLike, *, where: ArrayLike | None = None) -> tuple[Array, Array]:
    """Scale each column to [0, 1], `z = (x - min) / (max - min)`, and tell which columns vary at all.

    Args:
        matrix: `(clients, criteria)` finite numbers.
        where: `(clients,)` bool, False where a client is absent; all present where None.

    Returns:
        `z` of shape `(clients, criteria)`, 0 in constant columns, and `varying`, `(criteria,)` bool. Rows of absent
        clients hold some value in [0, 1].

    Raises:
        ValueError: for wrong shapes, or a `where` that is not boolean.

    Example:
        >>> z, varying = min_max(jnp.array([[100.0, 7.0], [150.0, 7.0], [300.0, 7.0]]))
        >>> print(z[:, 0], varying)
        [0.   0.25 1.  ] [ True False]
    """
    x, _, _ = _decision_problem(matrix, None, where)
    high, low = jnp.max(x, axis=0), jnp.min(x, axis=0)
    varying = high - low > _tolerances(x)[0]  # of max|x|, which is 1
    spread = jnp.where(varying, high - low, 1)
    return jnp.where(varying[None, :], (x - low[None, :]) / spread[None, :], 0), varying


def _decision_problem(
    matrix: ArrayLike, benefit: ArrayLike | Sequence[bool] | None, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Check the arguments and return `(x, benefit, where)`: columns of `max|x| = 1`, absent rows made harmless.

    Absent rows become copies of a present one (of zeros where nobody is present). The scale is a constant to autodiff:
    all that is built on `x` is invariant to it, so its derivative is 0 in truth.
    """
    x = _as_float(matrix)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(
            f"matrix: expected shape (clients, criteria), at least one each, got {x.shape}"
            + (": a single criterion is `[:, None]`, a single client `[None]`" if x.ndim == 1 else "")
        )
    clients, criteria = x.shape
    benefit_ = jnp.ones(criteria, bool) if benefit is None else jnp.asarray(benefit)
    where_ = jnp.ones(clients, bool) if where is None else jnp.asarray(where)
    _check_shape("benefit", benefit_, (criteria,))
    _check_shape("where", where_, (clients,))
    _check_bool("benefit", benefit_)
    _check_bool("where", where_)
    if not (is_traced(x) or is_traced(where_)) and not np.isfinite(np.asarray(x)[np.asarray(where_)]).all():
        raise ValueError("matrix: expected finite numbers of every client that is present, got NaN or infinity")

    x = jnp.where(where_[:, None], x, 0)
    x = jnp.where(where_[:, None], x, x[jnp.argmax(where_)][None, :])
    largest = jnp.finfo(x.dtype).max / 8  # whose reciprocal is still a normal number: XLA may multiply by it
    scale = lax.stop_gradient(jnp.minimum(jnp.max(jnp.abs(x), axis=0), jnp.asarray(largest, x.dtype)))
    x = x / jnp.where(scale > 0, scale, 1)[None, :]
    return lax.optimization_barrier(x), benefit_, where_  # XLA would divide by `scale * norm`, perhaps infinite


def _norm(x: Array, axis: int) -> Array:
    """Return the L2 norm, whose gradient is 0, not NaN, where it is 0."""
    square = jnp.sum(jnp.square(x), axis=axis)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _tolerances(x: Array) -> tuple[float, float]:
    """Return the spread, relative to `max|x|`, up to which a column is constant, and the `1 - ρ` that counts as 0."""
    return (1e-12, 1e-10) if x.dtype == jnp.float64 else (1e-6, 1e-5)


def _as_float(x: ArrayLike) -> Array:
    """Return `x` as it is if it has 32 bits or more, else in the default float type."""
    x = jnp.asarray(whole_to_float(x))
    wide_enough = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
    return x if wide_enough else x.astype(jnp.result_type(float))


def _check_shape(name: str, x: Array, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {x.shape}")


def _check_bool(name: str, x: Array) -> None:
    if x.dtype != jnp.bool_:
        raise ValueError(f"{name}: expected booleans, got {x.dtype}: `{name} > 0` makes them of numbers")
