"""Equations of a client's data complexity, and the decision matrix built from them.

`label_entropy`, `gini_simpson` and `loss_entropy` work on the last axis, so one client is `(classes,)` and all of them
`(clients, classes)`. They are total: an empty client has complexity 0, never NaN, and gradients stay finite.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from autorank_jax.interface import check_name, check_values, checked
from autorank_jax.interface.kinds import is_traced, whole_to_float
from autorank_jax.types import Array, ClientStats

Criterion = Callable[[ClientStats], Array]  # -> (clients,)


@checked
def label_entropy(label_counts: ArrayLike) -> Array:
    """Return the Shannon entropy of the labels, `-Σ_c p_c ln p_c`.

    Args:
        label_counts: `(..., classes)` examples of each class, ≥ 0; or of each group where there are no classes.

    Returns:
        `(...)` nats in [0, ln classes]; 0 for a client without examples.

    Source: Shannon, "A mathematical theory of communication" (1948); as a criterion of rank: arXiv 2412.15553.

    Example:
        One class only, two equal classes (`ln 2`), and `p = (¾, ¼)`: `¾ ln 4/3 + ¼ ln 4`.

        >>> print(label_entropy(jnp.array([[10, 0], [5, 5], [30, 10]])))
        [0.     0.6931 0.5623]
    """
    return _entropy(*_shares(_counts(label_counts)))


@checked
def gini_simpson(label_counts: ArrayLike) -> Array:
    """Return the probability that two examples differ in label, `1 - Σ_c p_c²`.

    Args:
        label_counts: `(..., classes)` examples of each class, ≥ 0; or of each group where there are no classes.

    Returns:
        `(...)` in [0, 1 - 1/classes]; 0 for a client without examples.

    Source: Simpson, "Measurement of diversity", Nature 163 (1949); as a criterion of rank: arXiv 2412.15553.

    Example:
        `1 - 1`, `1 - ¼ - ¼` and `1 - 9/16 - 1/16`:

        >>> print(gini_simpson(jnp.array([[10, 0], [5, 5], [30, 10]])))
        [0.    0.5   0.375]
    """
    p, rest = _shares(_counts(label_counts))
    return jnp.sum(p * rest, axis=-1)  # as Σ p is 1; nothing cancels where one class has nearly all


@checked
def loss_entropy(epoch_losses: ArrayLike, epochs: ArrayLike | None = None) -> Array:
    """Return how evenly the loss spreads over the epochs, `-(1/ln T) Σ_t q_t ln q_t` with `q_t = L_t / Σ_t L_t`.

    It is near 1 where the loss hardly falls (hard data) and smaller where it falls fast. `T = 1` and losses of zero
    leave it undefined. A client for which it is undefined, or whose curve is missing or not finite, takes the mean of
    the others, and 1 where it is undefined for all.

    Args:
        epoch_losses: `(..., max_epochs)` mean training loss per local epoch, ≥ 0.
        epochs: `(...)` whole numbers `T` in 0..max_epochs: how many of these epochs were run, 0 for no curve yet;
            `max_epochs` for everyone where None.

    Returns:
        `(...)` in [0, 1].

    Raises:
        ValueError: for negative losses, losses without an axis of epochs, or `epochs` of another shape or out of range.

    Source: our form of an idea of arXiv 2412.15553, which describes it in words.

    Example:
        A flat curve; `q = (¾, ¼)`: `0.5623 / ln 2`; and a loss that vanishes after one epoch.

        >>> print(loss_entropy(jnp.array([[2.0, 2.0], [3.0, 1.0], [1.0, 0.0]])))
        [1.     0.8113 0.    ]
    """
    losses = _as_float(epoch_losses)
    if losses.ndim == 0 or losses.shape[-1] == 0:
        raise ValueError(f"epoch_losses: expected shape (..., epochs), at least one epoch, got {losses.shape}")
    T = jnp.full(losses.shape[:-1], losses.shape[-1], jnp.int32) if epochs is None else jnp.asarray(epochs)
    if T.shape != losses.shape[:-1]:
        raise ValueError(f"epochs: expected shape {losses.shape[:-1]}, got {T.shape}")
    most = losses.shape[-1]
    check_values("epochs", T, lambda n: (n >= 0) & (n <= most) & (n % 1 == 0), f"whole numbers in 0..{most}")

    run = lax.broadcasted_iota(jnp.int32, losses.shape, losses.ndim - 1) < T[..., None].astype(jnp.int32)
    known = (T > 0) & jnp.all(jnp.isfinite(losses) | ~run, axis=-1)
    losses = jnp.where(run & known[..., None], losses, 0)
    check_values("epoch_losses", losses)
    defined = known & (T > 1) & (jnp.sum(losses, axis=-1) > 0)
    ln_T = jnp.log(jnp.where(defined, T, 2).astype(losses.dtype))
    value = jnp.where(defined, _entropy(*_shares(losses)) / ln_T, 1)
    curves = jnp.sum(defined).astype(losses.dtype)
    mean = jnp.where(curves > 0, jnp.sum(value, where=defined) / jnp.maximum(curves, 1), 1)
    return jnp.where(defined, value, mean)


def _classes(stats: ClientStats) -> Array:
    return jnp.sum(jnp.asarray(stats.label_counts) > 0, axis=-1)


def _loss_entropy_of_present(stats: ClientStats) -> Array:
    if stats.epoch_losses is None:
        raise ValueError(
            "criterion 'loss_entropy': expected stats.epoch_losses, got None: autorank_jax.probe makes them, or drop "
            "the criterion"
        )
    losses = jnp.asarray(stats.epoch_losses)
    epochs = jnp.full(losses.shape[0], losses.shape[1], jnp.int32) if stats.epochs is None else stats.epochs
    return loss_entropy(losses, jnp.where(stats.where, epochs, 0))  # absent clients stay out of the mean


CRITERIA: Mapping[str, Criterion] = {
    "size": lambda stats: stats.size,
    "classes": _classes,
    "label_entropy": lambda stats: label_entropy(stats.label_counts),
    "gini_simpson": lambda stats: gini_simpson(stats.label_counts),
    "loss_entropy": _loss_entropy_of_present,
}


NEEDS_LOSSES = frozenset({"loss_entropy"})  # of `CRITERIA`, those that need a probe


@checked
def complexity_matrix(stats: ClientStats, *, criteria: Sequence[str | Criterion] = tuple(CRITERIA)) -> Array:
    """Build the decision matrix `X[client, criterion]` of `mcda.critic_weights` and `mcda.topsis`.

    One's own criterion is a function `ClientStats -> (clients,)` put in `criteria` among the names. The columns of
    `stats.extra` follow after the criteria whenever there are any.

    Args:
        stats: one row per client.
        criteria: names in `CRITERIA`, or functions, in the order of the columns.

    Returns:
        `(clients, criteria)` in the default float type. Rows of absent clients mean nothing.

    Raises:
        ValueError: for an unknown name, no column at all, `loss_entropy` without losses, negative sizes, or a column or
            a `stats.where` of another shape.

    Example:
        Two criteria by name and one's own: the share of the most frequent class.

        >>> counts = jnp.array([[10, 0], [5, 5], [30, 10]])
        >>> size, ones, present = counts.sum(axis=1), jnp.ones(3), jnp.ones(3, bool)
        >>> stats = ClientStats(size, counts, None, None, None, max_ratio=ones, where=present)
        >>> def dominance(stats):
        ...     return stats.label_counts.max(axis=1) / stats.size
        >>> print(complexity_matrix(stats, criteria=("size", "gini_simpson", dominance)))
        [[10.     0.     1.   ]
         [10.     0.5    0.5  ]
         [40.     0.375  0.75 ]]
    """
    clients = jnp.shape(stats.size)[0]
    if jnp.shape(stats.where) != (clients,):
        raise ValueError(f"stats.where: expected shape ({clients},), got {jnp.shape(stats.where)}")
    check_values("stats.size", stats.size)
    columns = []
    for name, criterion in zip(criterion_names(stats, criteria=criteria), criteria, strict=False):
        column = _as_float((CRITERIA[criterion] if isinstance(criterion, str) else criterion)(stats))
        if column.shape != (clients,):
            raise ValueError(f"criterion {name!r}: expected shape ({clients},), got {column.shape}")
        columns.append(column[:, None])
    if stats.extra is not None:
        columns.append(_as_float(stats.extra))
    return jnp.concatenate(columns, axis=1)


def criterion_names(stats: ClientStats, *, criteria: Sequence[str | Criterion] = tuple(CRITERIA)) -> tuple[str, ...]:
    """Name the columns of `complexity_matrix`: `criteria`, then `extra_0`, `extra_1`, … for the columns of `extra`.

    Args:
        stats: one row per client.
        criteria: as given to `complexity_matrix`.

    Returns:
        One name per column; that of a function is its `__name__`.

    Raises:
        ValueError: for an unknown name, no column at all, or an `extra` of wrong shape.

    Example:
        >>> ones, present = jnp.ones(3), jnp.ones(3, bool)
        >>> stats = ClientStats(ones, jnp.ones((3, 2)), None, None, jnp.ones((3, 2)), max_ratio=ones, where=present)
        >>> criterion_names(stats, criteria=("size", "classes"))
        ('size', 'classes', 'extra_0', 'extra_1')
    """
    clients = jnp.shape(stats.size)[0]
    extra = (clients, 0) if stats.extra is None else jnp.shape(stats.extra)
    if len(extra) != 2 or extra[0] != clients:
        raise ValueError(f"stats.extra: expected shape ({clients}, k), got {extra}")
    check_criteria(criteria)
    names = tuple(c if isinstance(c, str) else getattr(c, "__name__", "criterion") for c in criteria)
    names += tuple(f"extra_{k}" for k in range(extra[1]))
    if not names:
        raise ValueError("criteria: expected at least one, got none, and no stats.extra")
    return names


def are_equal(matrix: np.ndarray) -> bool:
    """Return whether no criterion differs between clients, and all get the same rank.

    Args:
        matrix: `(clients, criteria)`, of those present.

    Example:
        >>> are_equal(np.array([[5.0, 2.0], [5.0, 2.0]])), are_equal(np.array([[5.0, 2.0], [5.0, 3.0]]))
        (True, False)
    """
    least = 1e-12 if matrix.dtype == np.float64 else 1e-6  # as `mcda` has it
    return bool(matrix.size) and bool(np.all(np.ptp(matrix, axis=0) <= least * np.abs(matrix).max(axis=0)))


def tell_equals(matrix: Array, where: ArrayLike) -> None:
    """Warn of clients that do not differ, as far as they are known yet; called by a checked function.

    Args:
        matrix: `(clients, criteria)`.
        where: `(clients,)` bool, False where a client is absent.

    Example:
        >>> tell_equals(jnp.array([[5.0], [6.0]]), jnp.ones(2, bool))
    """
    if is_traced(matrix) or is_traced(where):
        return
    present = np.asarray(matrix)[np.asarray(where)]
    if are_equal(present):
        warnings.warn(f"no criterion differs between the clients ({len(present)}): all get the full rank", stacklevel=4)


def check_criteria(criteria: Sequence[str | Criterion]) -> None:
    """Raise `ValueError` for a name that is no criterion, or a criterion that is there twice.

    Example:
        >>> check_criteria(["size", "size"])
        Traceback (most recent call last):
        ValueError: expected every criterion once, got 'size' twice
    """
    for number, criterion in enumerate(criteria):
        if isinstance(criterion, str):
            check_name("criteria", criterion, CRITERIA)
        if criterion in tuple(criteria)[:number]:
            raise ValueError(f"expected every criterion once, got {criterion!r} twice")


def _shares(counts: Array) -> tuple[Array, Array]:
    """Return `p = n / Σ n` along the last axis, 0 where there is nothing to share, and `1 - p` without cancellation.

    Where one has it all they are exactly 1 and 0: XLA may multiply by a reciprocal, so that `n / n` is a little less
    than 1 for some n, and the entropy of one class would differ between clients.
    """
    total = jnp.sum(counts, axis=-1, keepdims=True)
    some = jnp.where(total > 0, total, 1)
    shares = jnp.where(total > 0, jnp.where(counts == total, 1, counts / some), 0)
    kinds = lax.broadcasted_iota(jnp.int32, counts.shape, counts.ndim - 1)
    most = kinds == jnp.argmax(counts, axis=-1, keepdims=True).astype(jnp.int32)
    others = jnp.sum(jnp.where(most, 0, counts), axis=-1, keepdims=True)
    return shares, jnp.where(most, others, total - counts) / some


def _counts(label_counts: ArrayLike) -> Array:
    counts = _as_float(label_counts)
    if counts.ndim == 0:
        raise ValueError("expected label_counts of shape (..., classes), got one number")
    check_values("label_counts", counts)
    return counts


def _entropy(p: Array, rest: Array) -> Array:
    """Return `-Σ p ln p` along the last axis with `0 ln 0 = 0`, and gradient 0 there, given `1 - p` as well."""
    much = p > 0.5
    logs = jnp.where(much, jnp.log1p(-jnp.where(much, rest, 0)), jnp.log(jnp.where((p > 0) & ~much, p, 1)))
    return jnp.sum(jnp.where(p > 0, -p * logs, 0), axis=-1)


def _as_float(x: ArrayLike) -> Array:
    return jnp.asarray(whole_to_float(x)).astype(jnp.result_type(float))
