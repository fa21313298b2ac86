"""A keyed bijection of `0..n-1`, evaluated position by position: shuffling without a sort, memory or static shapes.

Swap-or-not (Hoang, Morris, Rogaway 2012): each round pairs `x` with `(K - x) mod n` and swaps the pair if a keyed bit,
the same for both partners, says so.
"""

import jax.numpy as jnp

from autorank_jax.types import Array

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
    for number in range(_ROUNDS):
        partner = (keys[number] + n - x) % n
        bit = _mix(jnp.maximum(x, partner) ^ salts[number]) & jnp.uint32(1)
        x = jnp.where(bit == 1, partner, x)
    return x.astype(jnp.int32)
