"""Splits of labelled examples over clients, on the host and in NumPy.

Every split returns one array of example numbers per client, ascending: every example exactly once, no client empty.
The same seed gives the same split. `classes` are the different labels that occur.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from autorank_jax.federated.checks import concatenate_parts, looks_one_hot, part_sizes
from autorank_jax.federated.held_out import held_counts
from autorank_jax.interface import check_least, check_name, check_share, checked

Seed = int | np.random.Generator
Parts = list[np.ndarray]  # of each client, (n_i,) int64


@checked
def iid(labels: ArrayLike, clients: int, *, seed: Seed) -> Parts:
    """Split at random into equal amounts (they differ by at most one example).

    Args:
      labels: (n,) one per example.
      clients: number of clients, 1 .. n.
      seed: number or generator.

    Raises:
      ValueError: labels that are not a vector, or clients outside 1 .. n.

    Example:
      >>> sorted(len(part) for part in iid([0, 1, 0, 1, 0], 2, seed=0))
      [2, 3]
    """
    n = _check(labels, clients).size
    return _parts(_generator(seed).permutation(np.arange(n) % clients), clients)


@checked
def quantity(labels: ArrayLike, clients: int, *, sigma: float = 1.0, seed: Seed) -> Parts:
    """Split at random into log-normal amounts: `n_i ∝ exp(σ z_i)`, `z_i` standard normal, at least 1.

    Args:
      labels: (n,) one per example.
      clients: number of clients, 1 .. n.
      sigma: size imbalance, at least 0 (equal amounts).
      seed: number or generator.

    Raises:
      ValueError: as `iid`; sigma negative or not finite.
    """
    n = _check(labels, clients).size
    rng = _generator(seed)
    sizes = _lognormal_sizes(rng, n, clients, sigma)
    return _parts(rng.permutation(np.repeat(np.arange(clients), sizes)), clients)


@checked
def dirichlet(labels: ArrayLike, clients: int, *, alpha: float = 0.3, seed: Seed) -> Parts:
    """Split each class over the clients in Dirichlet shares: `q_c ~ Dir(α, …, α)` over clients, `n_ic ≈ q_ci n_c`.

    Sizes are uneven too, all the more the smaller α. A client left empty is given one random example of another.

    Args:
      labels: (n,) class of each example.
      clients: number of clients, 1 .. n.
      alpha: concentration, above 0: small = few classes per client, large = alike.
      seed: number or generator.

    Raises:
      ValueError: as `iid`; labels that are not integers; alpha not positive and finite.

    Source: Yurochkin et al., Bayesian nonparametric federated learning of neural networks (2019).
    """
    classes, members = _classes(_check(labels, clients))
    rng = _generator(seed)
    shares = np.exp(_log_dirichlet(rng, alpha, (len(classes), clients)))
    owner = np.empty(np.size(labels), dtype=np.int64)
    for share, examples in zip(shares, members, strict=True):
        owner[rng.permutation(examples)] = np.repeat(np.arange(clients), _cut(share, examples.size))
    return _parts(_without_empty(rng, owner, clients), clients)


@checked
def shards(labels: ArrayLike, clients: int, *, classes_per_client: int = 2, seed: Seed) -> Parts:
    """Give each client `classes_per_client` classes, each class in equal parts to the clients that hold it.

    Every class is held by as many clients as every other, give or take one. A client may hold fewer classes where a
    class has fewer examples than holders.

    Args:
      labels: (n,) class of each example.
      clients: number of clients, 1 .. n.
      classes_per_client: 1 .. classes; times `clients` at least the number of classes, else a class has no owner.
      seed: number or generator.

    Raises:
      ValueError: as `iid`; labels that are not integers; classes_per_client outside its range.

    Source: McMahan et al., Communication-efficient learning of deep networks from decentralized data (2017), there
    by cutting the sorted examples; here every client's classes differ.
    """
    classes, members = _classes(_check(labels, clients))
    count = len(classes)
    least = -(-count // clients)
    if not least <= classes_per_client <= count:
        raise ValueError(
            f"expected classes_per_client in {least} .. {count} for {count} classes and {clients} clients, "
            f"got {classes_per_client}" + ("; every class needs an owner" if 0 < classes_per_client < least else "")
        )
    rng = _generator(seed)
    used = np.zeros(count, dtype=np.int64)
    holds = np.zeros((clients, count), dtype=bool)
    for row in holds:  # the least used classes, ties at random
        chosen = np.lexsort((rng.random(count), used))[:classes_per_client]
        row[chosen] = True
        used[chosen] += 1
    owner = np.empty(np.size(labels), dtype=np.int64)
    for holders, examples in zip(holds.T, members, strict=True):
        order = rng.permutation(np.flatnonzero(holders))
        owner[rng.permutation(examples)] = order[np.arange(examples.size) % order.size]
    return _parts(_without_empty(rng, owner, clients), clients)


@checked
def staircase(labels: ArrayLike, clients: int | None = None, *, seed: Seed) -> Parts:
    """Give client `i` the classes `0 .. i`: class `c` is cut into `classes - c` equal parts for clients `c, c+1, …`.

    Double imbalance for as many clients as classes: client 0 holds little of one class, the last one much of all.
    Where a class cannot be cut evenly, later clients get the extra examples.

    Args:
      labels: (n,) class of each example.
      clients: number of clients; must be the number of classes, which is the default.
      seed: number or generator: which examples go where.

    Raises:
      ValueError: clients other than classes; a class with fewer examples than clients that hold it.

    Example:
      >>> [len(part) for part in staircase([0] * 6 + [1] * 6 + [2] * 6, seed=0)]
      [2, 5, 11]
    """
    classes, members = _classes(_check(labels, 1))
    count = len(classes)
    if clients not in (None, count):
        raise ValueError(
            f"expected {count} clients for {count} classes on the staircase, got {clients}; dirichlet_lognormal is "
            "doubly imbalanced for any number of clients"
        )
    rng = _generator(seed)
    owner = np.empty(np.size(labels), dtype=np.int64)
    for c, examples in enumerate(members):
        if examples.size < count - c:
            raise ValueError(
                f"expected at least {count - c} examples of class {classes[c]}, one for each of its clients, "
                f"got {examples.size}"
            )
        owner[rng.permutation(examples)] = count - 1 - np.arange(examples.size) % (count - c)
    return _parts(owner, count)


@checked
def dirichlet_lognormal(
    labels: ArrayLike, clients: int, *, alpha: float = 0.3, sigma: float = 1.0, seed: Seed
) -> Parts:
    """Split into log-normal amounts with Dirichlet label mixes: `n_i ∝ exp(σ z_i)`, `p_i ~ Dir(α, …, α)` over classes.

    Double imbalance for any number of clients. In each pass every client asks for what it still lacks, classes drawn
    from `p_i` among those not used up; a class in too much demand serves clients in random order. A pass serves
    everyone or uses up a class, so there are at most `classes` passes, each linear. Amounts are met exactly; mixes as
    far as the examples go: with small α the last requests take what is left.

    Args:
      labels: (n,) class of each example.
      clients: number of clients, 1 .. n.
      alpha: concentration of the label mixes, above 0: small = few classes per client, large = alike.
      sigma: size imbalance, at least 0 (equal amounts).
      seed: number or generator.

    Raises:
      ValueError: as `iid`; labels that are not integers; alpha not positive and finite; sigma negative or not finite.
    """
    classes, members = _classes(_check(labels, clients))
    n = np.size(labels)
    rng = _generator(seed)
    lacking = _lognormal_sizes(rng, n, clients, sigma)
    log_mix = _log_dirichlet(rng, alpha, (clients, len(classes)))
    pools = [rng.permutation(examples) for examples in members]
    left = np.array([pool.size for pool in pools])
    owner = np.empty(n, dtype=np.int64)
    while lacking.any():
        active, some_left = np.flatnonzero(lacking), np.flatnonzero(left)
        wishes = rng.multinomial(lacking[active], _softmax(log_mix[np.ix_(active, some_left)]))
        for c, wish in zip(some_left, wishes.T, strict=True):
            turn = rng.permutation(active.size)
            takers = np.repeat(active[turn], wish[turn])[: left[c]]
            owner[pools[c][left[c] - takers.size : left[c]]] = takers
            left[c] -= takers.size
            lacking -= np.bincount(takers, minlength=clients)
    return _parts(owner, clients)


class Split(NamedTuple):
    """A split by name, with the options it takes beside `seed`."""

    function: Callable[..., Parts]
    options: tuple[str, ...]


SPLITS: Mapping[str, Split] = {
    "iid": Split(iid, ()),
    "dirichlet": Split(dirichlet, ("alpha",)),
    "shards": Split(shards, ("classes_per_client",)),
    "quantity": Split(quantity, ("sigma",)),
    "staircase": Split(staircase, ()),
    "dirichlet_lognormal": Split(dirichlet_lognormal, ("alpha", "sigma")),
}


@checked
def partition(name: str, labels: ArrayLike, clients: int, *, seed: Seed, **options: Any) -> Parts:
    """Split by name. Options of other splits are ignored, so that one set of them serves every split.

    Args:
      name: one of `SPLITS`.
      labels: (n,) class of each example.
      clients: number of clients.
      seed: number or generator.
      **options: `alpha`, `sigma`, `classes_per_client`; defaults as in the split's function.

    Raises:
      ValueError: unknown split (the message lists them) or option, or what the split itself refuses.

    Example:
      >>> [len(part) for part in partition("staircase", [0, 0, 1, 1], 2, seed=0, alpha=0.1)]
      [1, 3]
    """
    check_name("a split", name, SPLITS)
    known = {option for split in SPLITS.values() for option in split.options}
    if not known.issuperset(options):
        raise ValueError(f"expected options out of {', '.join(sorted(known))}, got {', '.join(options)}")
    split = SPLITS[name]
    return split.function(labels, clients, seed=seed, **{key: options[key] for key in split.options if key in options})


@checked
def bins(targets: ArrayLike, count: int = 10) -> np.ndarray:
    """Return for every example in which of equally filled bins its target lies, for splits where there are no labels.

    Args:
        targets: `(n,)` finite numbers, or `(n, outputs)`, of which the mean counts.
        count: of bins, ≥ 1; fewer come out where many targets are equal.

    Returns:
        `(n,)` int32 from 0 on, without gaps.

    Raises:
        ValueError: for numbers that are not finite, or no bin.
    """
    values = np.asarray(targets, float)
    if count < 1 or values.ndim not in (1, 2) or not np.isfinite(values).all():
        raise ValueError(
            f"expected finite targets (n,) or (n, outputs) and at least one bin, got {values.shape}, {count}"
        )
    values = values if values.ndim == 1 else values.mean(axis=1)
    edges = np.unique(np.quantile(values, np.arange(1, count) / count))
    return np.unique(np.searchsorted(edges, values, side="right"), return_inverse=True)[1].astype(np.int32)


@checked
def holdout(parts: Sequence[ArrayLike], fraction: float, *, seed: Seed) -> tuple[Parts, Parts]:
    """Hold out a random share of every client's examples: `floor(fraction · n_i)` of them, so at least one stays.

    Args:
      parts: of each client, the numbers of its examples.
      fraction: share to hold out, 0 .. 1 (exclusive).
      seed: number or generator.

    Returns:
      (training parts, held-out parts). Clients of fewer than `1 / fraction` examples hold out none: build their data
      with `data.from_parts(..., allow_empty=True)`.

    Raises:
      ValueError: fraction outside its range, or parts that are not vectors of integers.

    Example:
      >>> train, held = holdout([[0, 1, 2, 3], [4]], 0.5, seed=0)
      >>> [len(part) for part in train], [len(part) for part in held]
      ([2, 1], [2, 0])
    """
    check_share("fraction", fraction, "[0, 1)")
    size = part_sizes(parts)
    order = concatenate_parts(parts, size)
    owner = np.repeat(np.arange(len(size)), size)
    order = order[np.lexsort((_generator(seed).random(order.size), owner))]  # shuffled within each client
    held = held_counts(fraction, size)
    place = np.arange(order.size) - np.repeat(np.cumsum(size) - size, size)
    out = place < np.repeat(held, size)
    return _slices(order[~out], size - held), _slices(order[out], held)


def _check(labels: ArrayLike, clients: int) -> np.ndarray:
    """Check that labels are a vector and that there are enough examples for all clients."""
    labels = np.asarray(labels)
    if labels.ndim != 1:
        hint = "; probably one-hot: argmax(axis=-1)" if looks_one_hot(labels) else ""
        raise ValueError(f"expected labels as a vector, got shape {labels.shape}{hint}")
    check_least("clients", clients)
    if clients > labels.size:
        raise ValueError(f"expected at least one example for each of {clients} clients, got {labels.size} examples")
    return labels


def _generator(seed: Seed) -> np.random.Generator:
    if isinstance(seed, np.random.Generator):
        return seed
    check_least("seed", seed, 0)
    return np.random.default_rng(seed)


def _classes(labels: np.ndarray) -> tuple[np.ndarray, Parts]:
    """Return the labels that occur, ascending, and the example numbers of each."""
    if labels.dtype.kind not in "iu":
        raise ValueError(
            f"expected integer labels, got {labels.dtype}; bins(targets) makes some of the targets of a regression"
        )
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return classes, _slices(np.argsort(inverse, kind="stable"), counts)


def _slices(examples: np.ndarray, sizes: np.ndarray) -> Parts:
    """Cut a vector into consecutive pieces (numpy.split is slow for a million of them)."""
    ends = np.cumsum(sizes).tolist()
    return [examples[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _parts(owner: np.ndarray, clients: int) -> Parts:
    """Turn the owner of each example into the examples of each owner."""
    return _slices(np.argsort(owner, kind="stable"), np.bincount(owner, minlength=clients))


def _without_empty(rng: np.random.Generator, owner: np.ndarray, clients: int) -> np.ndarray:
    """Give each client without examples one random example of a client that has several."""
    empty = np.flatnonzero(np.bincount(owner, minlength=clients) == 0)
    if not empty.size:
        return owner
    order = rng.permutation(owner.size)
    keeps = order[np.unique(owner[order], return_index=True)[1]]  # one random example of each owner stays
    spare = np.setdiff1d(order, keeps)
    owner = owner.copy()
    owner[rng.choice(spare, size=empty.size, replace=False)] = empty
    return owner


def _lognormal_sizes(rng: np.random.Generator, n: int, clients: int, sigma: float) -> np.ndarray:
    """Draw amounts of at least 1 that add up to n, `∝ exp(σ z)` above that."""
    if not 0 <= sigma < np.inf:
        raise ValueError(f"expected sigma of at least 0 and finite, got {sigma}")
    z = rng.standard_normal(clients)
    above_one = np.maximum(n * _softmax(sigma / max(1.0, sigma / 1e300) * z) - 1, 0)
    return 1 + _cut(above_one, n - clients)


def _cut(weights: np.ndarray, n: int) -> np.ndarray:
    """Cut n into whole numbers in proportion to weights, each within 1 of its share."""
    ends = np.cumsum(weights)
    ends = np.rint(n * (ends / max(ends[-1], np.finfo(np.float64).tiny))).astype(np.int64)
    ends[-1] = n
    return np.diff(ends, prepend=0)


def _log_dirichlet(rng: np.random.Generator, alpha: float, shape: tuple[int, int]) -> np.ndarray:
    """Draw the logarithm of Dirichlet vectors in rows: finite however small or large alpha is.

    `Gamma(α) = Gamma(α + 1) U^(1/α)`, so `ln p = ln Gamma(α + 1) + ln U / α - const` does not underflow.
    """
    if not 0 < alpha < np.inf:
        raise ValueError(f"expected alpha above 0 and finite, got {alpha}")
    log_u = np.log1p(-rng.random(shape))
    logits = np.log(rng.standard_gamma(alpha + 1, shape)) + np.maximum(log_u / max(alpha, 1e-300), -1e300)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
