"""Examples that nobody trains on: how many of each client's, and whose each of a test set is."""

import numpy as np
from numpy.typing import ArrayLike

from autorank_jax.interface import checked


def held_counts(share: float, sizes: ArrayLike) -> np.ndarray:
    """Return `⌊share · n⌋` for each size, whatever rounding says: a tenth of 10 is 1."""
    return np.floor(share * np.asarray(sizes) * (1 + 1e-12)).astype(np.int64)


@checked
def split_test_set(label_counts: ArrayLike, labels: ArrayLike) -> list[np.ndarray]:
    """Share test examples out over the clients, each class in proportion to their training examples of it.

    So every client is tested on its own label mix, by examples that nobody trained on and no other client is given.
    Clients of few examples may get none.

    Args:
        label_counts: `(clients, classes)` training examples.
        labels: `(n,)` of the test examples.

    Returns:
        Of each client, the numbers of its test examples. Classes that nobody trains on go to nobody.
    """
    counts, labels = np.asarray(label_counts, np.float64), np.asarray(labels)
    parts: list[list[np.ndarray]] = [[] for _ in counts]
    for label in np.flatnonzero(counts.sum(axis=0)):
        members = np.flatnonzero(labels == label)
        shares = np.cumsum(counts[:, label])
        ends = np.rint(members.size * shares / shares[-1]).astype(np.int64)
        for part, mine in zip(parts, np.split(members, ends[:-1]), strict=True):
            part.append(mine)
    return [np.sort(np.concatenate(part)) if part else np.zeros(0, np.int64) for part in parts]
