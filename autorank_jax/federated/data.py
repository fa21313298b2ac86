"""Client data for the engine: flat arrays grouped by client, checked once on the host when they are built.

Nothing loops over clients in Python, so a million of them take seconds.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from autorank_jax.federated.checks import (
    INT32_MAX,
    check_examples,
    check_ids,
    check_known,
    check_labels,
    check_order,
    check_range,
    concatenate_parts,
    first_few,
    part_sizes,
)
from autorank_jax.interface import check_share, checked
from autorank_jax.types import ClientStats, FederatedData, PyTree


@checked
def from_parts(
    inputs: PyTree,
    targets: PyTree,
    parts: Sequence[ArrayLike],
    *,
    ids: ArrayLike | None = None,
    classes: int | None = None,
    require_all: bool = False,
    allow_empty: bool = False,
) -> FederatedData:
    """Build client data from the example numbers of each client.

    Args:
      inputs: pytree of arrays (n, ...); dtypes stay (uint8 images stay uint8), floats must be finite.
      targets: pytree of arrays (n, ...), likewise.
      parts: of each client, the numbers of its examples, each 0 .. n-1, no example twice.
      ids: (clients,) identities that random numbers follow, different, 0 .. 2³¹-1; default 0, 1, …
      classes: given it, targets must be a vector of integers in 0 .. classes-1.
      require_all: refuse if an example belongs to no client.
      allow_empty: accept clients without examples (held-out data of small clients).

    Raises:
      ValueError: arrays of unequal length, NaN, empty clients, numbers out of range, overlaps, wrong labels or ids.

    Example:
      >>> data = from_parts(np.zeros((5, 2), np.float32), np.arange(5), [[4, 0], [1, 2, 3]])
      >>> data.order.tolist(), data.start.tolist(), data.size.tolist()
      ([4, 0, 1, 2, 3], [0, 2], [2, 3])
    """
    check_known("from_parts", (inputs, targets, parts, ids))
    n = check_examples(inputs, targets, classes)
    size = part_sizes(parts)
    if not allow_empty and not size.all():
        raise ValueError(
            f"expected at least one example per client, got none for client {first_few(np.flatnonzero(size == 0))}: "
            "leave it out, or allow_empty=True"
        )
    order = concatenate_parts(parts, size)
    check_order(order, size, n, require_all)
    return _assemble(inputs, targets, order, size, np.arange(len(size)) if ids is None else check_ids(ids, len(size)))


@checked
def from_client_ids(
    inputs: PyTree, targets: PyTree, client_ids: ArrayLike, *, classes: int | None = None
) -> FederatedData:
    """Build client data from the owner of each example. Clients come in ascending order of their number.

    Args:
      inputs: pytree of arrays (n, ...); dtypes stay, floats must be finite.
      targets: pytree of arrays (n, ...), likewise.
      client_ids: (n,) number of the client of each example, 0 .. 2³¹-1, gaps allowed. It becomes the identity that
        random numbers follow, so leaving clients out changes nothing for the others.
      classes: given it, targets must be a vector of integers in 0 .. classes-1.

    Raises:
      ValueError: arrays of unequal length, NaN, wrong labels or client numbers.

    Example:
      >>> data = from_client_ids(np.zeros((4, 2), np.float32), np.arange(4), [7, 3, 7, 3])
      >>> data.order.tolist(), data.size.tolist(), data.id.tolist()
      ([1, 3, 0, 2], [2, 2], [3, 7])
    """
    check_known("from_client_ids", (inputs, targets, client_ids))
    n = check_examples(inputs, targets, classes)
    owner = np.asarray(client_ids)
    if owner.shape != (n,):
        raise ValueError(
            f"expected client_ids of shape ({n},), one per example, got {owner.shape}; from_parts takes the examples "
            "of each client"
        )
    if owner.dtype.kind not in "iu":
        raise ValueError(
            f"expected integer client_ids, got {owner.dtype}: np.unique(client_ids, return_inverse=True)[1] makes them"
        )
    check_range(owner, INT32_MAX + 1, "client_ids", ": np.unique(client_ids, return_inverse=True)[1] numbers them")
    order = np.argsort(owner, kind="stable")
    first = np.flatnonzero(np.diff(owner[order], prepend=-1))
    return _assemble(inputs, targets, order, np.diff(first, append=n), owner[order[first]])


@checked
def client_stats(
    data: FederatedData,
    *,
    classes: int | None = None,
    groups: ArrayLike | None = None,
    epoch_losses: ArrayLike | None = None,
    epochs: ArrayLike | None = None,
    extra: ArrayLike | None = None,
    max_ratio: ArrayLike | None = None,
) -> ClientStats:
    """Collect what a rank policy may look at: sizes, label counts `n_ic`, and the given columns.

    Args:
      data: client data.
      classes: number of classes or groups; default the largest label plus one.
      groups: (n,) integers of at least 0 to count in place of targets, one per example (not only those in use):
        for regression or language modelling, where there are no class labels.
      epoch_losses: (clients, epochs) mean training losses of a probe or of the latest rounds, at least 0.
      epochs: (clients,) how many of those columns were run; the others are not looked at. Default all.
      extra: (clients, k) or (clients,) the user's own criteria, finite.
      max_ratio: (clients,) or one number, largest rank ratio by device, in (0, 1]; default 1.

    Returns:
      Statistics of all clients, every one of them present.

    Raises:
      ValueError: targets that are not class labels, columns of wrong length, or values outside their range.

    Example:
      >>> data = from_parts(np.zeros((4, 2), np.float32), np.array([0, 1, 1, 2]), [[0, 1, 2], [3]])
      >>> client_stats(data).label_counts.tolist()
      [[1, 2, 0], [0, 0, 1]]
    """
    check_known("client_stats", (data, groups, epoch_losses, epochs, extra, max_ratio))
    size = np.asarray(data.size)
    clients = len(size)
    losses = _columns(epoch_losses, "epoch_losses", clients)
    if losses is None and epochs is not None:
        raise ValueError("expected epoch_losses with epochs, got epochs alone")
    ran = None if losses is None or epochs is None else _check_epochs(epochs, losses.shape)
    if losses is not None:
        _check_losses(losses, ran)
    columns = _columns(extra, "extra", clients)
    if columns is not None and not np.isfinite(columns).all():
        bad = np.flatnonzero(~np.isfinite(columns).all(axis=1))
        raise ValueError(f"expected finite extra criteria, got NaN or infinity for client {first_few(bad)}")
    return ClientStats(
        size=jnp.asarray(size),
        label_counts=jnp.asarray(_label_counts(data, size, classes, groups)),
        epoch_losses=None if losses is None else jnp.asarray(losses, dtype=float),
        epochs=None if ran is None else jnp.asarray(ran),
        extra=None if columns is None else jnp.asarray(columns, dtype=float),
        max_ratio=jnp.asarray(_check_ratios(1.0 if max_ratio is None else max_ratio, clients), dtype=float),
        where=jnp.ones(clients, dtype=bool),
    )


def _assemble(inputs: PyTree, targets: PyTree, order: np.ndarray, size: np.ndarray, ids: np.ndarray) -> FederatedData:
    """Put everything on the device."""
    return FederatedData(
        inputs=jax.tree.map(jnp.asarray, inputs),
        targets=jax.tree.map(jnp.asarray, targets),
        order=jnp.asarray(order.astype(np.int32)),
        start=jnp.asarray((np.cumsum(size) - size).astype(np.int32)),
        size=jnp.asarray(size.astype(np.int32)),
        id=jnp.asarray(ids.astype(np.int32)),
    )


def _label_counts(data: FederatedData, size: np.ndarray, classes: int | None, groups: ArrayLike | None) -> np.ndarray:
    """Count labels, or groups, of each client."""
    if data.owner is not None:
        raise ValueError("expected data that every device holds, got owned_data: make the stats before sharding it")
    n = jax.tree.leaves(data.inputs)[0].shape[0]
    if groups is None and not isinstance(data.targets, (jax.Array, np.ndarray)):
        raise ValueError("expected targets as one vector of labels, got several arrays; give groups to count instead")
    what = "targets" if groups is None else "groups"
    labels = check_labels(data.targets if groups is None else groups, n, classes, what)[np.asarray(data.order)]
    width = classes or int(labels.max(initial=0)) + 1
    owner = np.repeat(np.arange(len(size)), size)
    counts = np.bincount(owner * width + labels, minlength=len(size) * width)
    return counts.reshape(len(size), width).astype(np.int32)


def _columns(values: ArrayLike | None, what: str, clients: int) -> np.ndarray | None:
    """Return a table with one row per client."""
    if values is None:
        return None
    table = np.asarray(values, dtype=float)
    table = table[:, None] if table.ndim == 1 and what == "extra" else table
    if table.ndim != 2 or len(table) != clients:
        hint = "; probably transposed" if table.ndim == 2 and table.shape[1] == clients else ""
        raise ValueError(f"expected {what} of shape ({clients}, columns), got {table.shape}{hint}")
    return table


def _check_epochs(epochs: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """Check the number of recorded epochs of each client."""
    ran = np.asarray(epochs)
    if ran.shape != shape[:1] or ran.dtype.kind not in "iu":
        raise ValueError(f"expected epochs as {shape[0]} integers, got {ran.dtype} of shape {ran.shape}")
    check_range(ran, shape[1] + 1, "epochs", f": epoch_losses has {shape[1]} columns")
    return ran.astype(np.int32)


def _check_losses(losses: np.ndarray, ran: np.ndarray | None) -> None:
    """Check that the losses that count are finite and not negative."""
    seen = np.arange(losses.shape[1]) < (losses.shape[1] if ran is None else ran[:, None])
    bad = np.flatnonzero((seen & ~(np.isfinite(losses) & (losses >= 0))).any(axis=1))
    if bad.size:
        finite = np.isfinite(losses[bad]).all()
        hint = "" if finite else ": of clients that have no losses, give epochs 0"
        raise ValueError(
            f"expected finite epoch_losses of at least 0, got {'negative ones' if finite else 'others'} for client "
            f"{first_few(bad)}{hint}"
        )


def _check_ratios(values: ArrayLike, clients: int) -> np.ndarray:
    """Check largest rank ratios and return one per client."""
    ratios = np.asarray(values, dtype=float)
    if ratios.shape not in ((), (clients,)):
        raise ValueError(f"expected max_ratio as one number or {clients} of them, got shape {ratios.shape}")
    check_share("max_ratio", ratios, cause="ranks: divide by the maximum")
    return np.broadcast_to(ratios, (clients,))
