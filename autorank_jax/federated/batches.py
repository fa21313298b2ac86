"""Batches of one client: a keyed bijection of `0..n-1` decides the order of its examples in every epoch.

The bijection is evaluated position by position: shuffling without a sort, memory or static shapes.

Swap-or-not (Hoang, Morris, Rogaway 2012): each round pairs `x` with `(K - x) mod n` and swaps the pair if a keyed bit,
the same for both partners, says so.
"""

import jax
import jax.numpy as jnp
from jax import lax

from autorank_jax.types import Array, Batch, FederatedData

_ROUNDS = 24


def _mix(x: Array) -> Array:
    """Scramble 32-bit words (the finaliser of MurmurHash3: a bijection with good avalanche)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def permuted(positions: Array, size: Array, words: Array, epoch: Array) -> Array:
    """Return where a keyed permutation of `0..size-1` sends each position.

    Args:
        positions: any shape, integers in `0..size-1`; larger ones come back as some number below `size`.
        size: () integer ≥ 1, below 2³¹.
        words: `(2,)` uint32, the key.
        epoch: () integer; every epoch has its own permutation.

    Returns:
        int32 in the shape of `positions`.
    """
    n = jnp.maximum(size, 1).astype(jnp.uint32)
    x = positions.astype(jnp.uint32) % n
    tweak = _mix(words[1] ^ _mix(epoch.astype(jnp.uint32)))
    rounds = jnp.arange(_ROUNDS, dtype=jnp.uint32)
    keys = _mix(words[0] ^ _mix(tweak + rounds)) % n  # (rounds,)
    salts = _mix(tweak ^ _mix(words[0] + rounds + jnp.uint32(_ROUNDS)))  # (rounds,)

    def swap_or_not(x: Array, of_round: tuple[Array, Array]) -> tuple[Array, None]:
        key, salt = of_round
        partner = jnp.where(x > key, key + n, key) - x  # (key - x) mod n, without the division
        bit = _mix(jnp.maximum(x, partner) ^ salt) & jnp.uint32(1)
        return jnp.where(bit == 1, partner, x), None

    x, _ = lax.scan(swap_or_not, x, (keys, salts), unroll=_ROUNDS)  # traced once, one kernel
    return x.astype(jnp.int32)


def steps_per_epoch(size: Array, batch_size: int) -> Array:
    """Return `⌈size / batch_size⌉`: the last batch of an epoch may be short."""
    return -(-size // batch_size)


def take_batch(data: FederatedData, row: Array, words: Array, step: Array, batch_size: int) -> tuple[Batch, Array]:
    """Gather the examples of one step of one client, every example exactly once per epoch.

    The order depends on the key, the epoch and the client's own examples only.

    Args:
        data: all clients' examples.
        row: () the client.
        words: `(2,)` uint32, the key of its shuffles this round.
        step: () integer, steps done since the round began.
        batch_size: static; a short last batch has weight 0 beyond its examples.

    Returns:
        The batch, and the () epoch it belongs to, from 0.
    """
    size = data.size[row]
    per_epoch = jnp.maximum(steps_per_epoch(size, batch_size), 1)
    epoch, number = step // per_epoch, step % per_epoch
    position = number * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    weight = (position < size).astype(jnp.float32)
    examples = data.order[data.start[row] + permuted(position, size, words, epoch)]
    inputs, targets = jax.tree.map(lambda leaf: leaf[examples], (data.inputs, data.targets))
    return Batch(inputs, targets, weight), epoch
