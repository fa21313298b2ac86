"""The probe: one local training of every client, thrown away but for the losses that rank policies look at."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from autorank_jax.adapters.lora import equal_ranks, max_ranks
from autorank_jax.engine.round import make_round
from autorank_jax.federated.data import client_stats
from autorank_jax.interface import check_least, check_share, checked
from autorank_jax.types import (
    Aggregator,
    Array,
    ClientStats,
    FederatedData,
    Key,
    LocalTraining,
    Server,
    State,
    Trains,
)

FEWEST = 32
"""Examples of a client that the probe of a share sees, where it has as many."""


@checked
def probe(
    key: Key,
    local: LocalTraining,
    state: State,
    data: FederatedData,
    *,
    epochs: int = 2,
    ratio: float = 0.1,
    share: float = 0.25,
    lanes: int = 1,
    classes: int | None = None,
    groups: ArrayLike | None = None,
    extra: ArrayLike | None = None,
    max_ratio: ArrayLike | None = None,
    run: Callable[..., Any] | None = None,
) -> ClientStats:
    """Train every client once from the server and return the statistics that rank policies look at, losses included.

    Nothing of the training is kept but each client's mean loss by epoch; the state is not changed. What it costs is
    one local training of `epochs` epochs at the ranks of `ratio` on a `share` of the examples. With the defaults all
    five criteria together give ranks close to those of five epochs of everything, for 1.3 % of the FLOPs of 20 rounds
    in place of 35 % on one small network (`benchmarks/study`); the loss curves themselves are not alike, so where
    these decide alone, take `epochs=5, ratio=1, share=1`.

    Args:
        key: of the batch order and of random layers; not that of the rounds, whose first would have the same batches.
        local: local training of one client, that of the rounds or any other.
        state: before the first round, or any later one: for server and hyper-parameters. Its ranks do not matter.
        data: all clients' examples.
        epochs: passes over its data that every client makes, ≥ 2, or there is no curve.
        ratio: rank of every client over the maximum rank, in (0, 1].
        share: part of its examples that every client trains on, drawn by `key`, in (0, 1]; 32 at least. The
            other statistics are of all its examples.
        lanes: clients trained side by side.
        classes: as in `client_stats`, likewise `groups`, `extra` and `max_ratio`.
        groups: examples' groups, in place of labels.
        extra: the user's own criteria.
        max_ratio: largest rank ratio by device.
        run: `(round, key, state, data) -> (state, info)`, how that round is compiled and run; `jax.jit` where None.

    Returns:
        Statistics of all clients. A client whose training was not finite has no curve, `epochs` 0, and takes the mean
        of the others in `loss_entropy`; a warning says how many there are.

    Raises:
        ValueError: for epochs below 2, a ratio or share outside (0, 1], what `client_stats` refuses, or if no client's
            training was finite.
    """
    if epochs < 2:
        raise ValueError(f"expected epochs >= 2, got {epochs}: one epoch is no curve")
    check_share("ratio", ratio, cause="a rank: divide by the maximum")
    check_share("share", share, cause="a percentage")
    check_least("lanes", lanes)
    plain = client_stats(data, classes=classes, groups=groups, extra=extra, max_ratio=max_ratio)
    clients, dtype = data.size.shape[0], state.epoch_losses.dtype
    state = state._replace(
        aggregator=(),
        clients=(),
        ranks=equal_ranks(max_ranks(state.server), clients, ratio),
        hparams=state.hparams | {"local_epochs": jnp.asarray(epochs, jnp.int32)},
        epoch_losses=jnp.zeros((clients, epochs), dtype),
        epochs=jnp.zeros(clients, jnp.int32),
    )
    one, part = make_round(local, discard(), lanes=lanes), part_of(key, data, share)
    after, _ = run(one, key, state, part) if run else jax.jit(one)(key, state, part)
    known = _has_curve(after.epoch_losses, after.epochs)
    ran = jnp.where(known, after.epochs, 0)
    _check_finite(count_lost(after.epoch_losses, after.epochs, data.size), np.asarray(data.size))
    return plain._replace(epoch_losses=jnp.where(known[:, None], after.epoch_losses, 0), epochs=ran)


def part_of(key: Key, data: FederatedData, share: float) -> FederatedData:
    """Return a random part of every client's examples, of `part_sizes`; all of them, as they are, where that is 1."""
    if share == 1:
        return data
    order, start, size, name = map(np.asarray, (data.order, data.start, data.size, data.id))
    shuffled, part, words = order.copy(), part_sizes(size, share), np.asarray(jax.random.key_data(key)).tolist()
    for client in np.flatnonzero(part < size):
        own = slice(start[client], start[client] + size[client])
        drawn = np.random.default_rng([*words, int(name[client]) & (2**32 - 1)])  # whoever else is there
        shuffled[own] = drawn.permutation(order[own])
    return data._replace(order=_like(data.order, shuffled), size=_like(data.size, part))


def _like(old: Array, new: np.ndarray) -> Array:
    """Return an array where the old one was put, if it was put anywhere."""
    return jax.device_put(new, old.sharding) if getattr(old, "committed", False) else jnp.asarray(new)


def part_sizes(size: ArrayLike, share: float) -> np.ndarray:
    """Return how many examples a share of each client's is, `(clients,)`: rounded, `FEWEST` where there are as many."""
    size = np.asarray(size)
    return np.clip(np.rint(share * size), np.minimum(size, FEWEST), size).astype(size.dtype)


def discard() -> Aggregator:
    """Make the rule that lets clients train everything and takes nothing from them."""
    nothing: Callable[..., tuple] = lambda *_: ()  # noqa: E731

    def keep_server(key: Key, sums: tuple, memory: tuple, server: Server) -> tuple[Server, tuple]:  # noqa: ARG001
        return server, memory

    return Aggregator(nothing, lambda server, *_: server.trainable, lambda _: Trains(), nothing, keep_server)


def count_lost(epoch_losses: Array, epochs: Array, size: ArrayLike) -> int:
    """Return how many of the clients that have examples have no curve: losses `(clients, epochs)`, all finite."""
    return int(np.sum((np.asarray(size) > 0) & ~np.asarray(_has_curve(epoch_losses, epochs))))


def _has_curve(epoch_losses: Array, epochs: Array) -> Array:
    return (epochs > 0) & jnp.all(jnp.isfinite(epoch_losses), axis=1)


def _check_finite(lost: int, size: np.ndarray) -> None:
    """Say how many clients have no curve."""
    if lost == int(np.sum(size > 0)):
        raise ValueError("expected finite losses of a probe, got none of any client: try a smaller learning rate")
    if lost:
        warnings.warn(
            f"the training of {lost} of {len(size)} clients was not finite: they have no loss curve and take the mean "
            "of the others; try a smaller learning rate of the probe",
            stacklevel=3,
        )
