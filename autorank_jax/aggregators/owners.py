"""Products weighted by the owners of each rank position, or of each band of positions between rank levels.

`P = Σ_h Σ_{k: r_k ≥ r_h} w_k A_k[:, r_{h-1}:r_h] B_k[r_{h-1}:r_h] / Σ_{k: r_k ≥ r_h} w_k`. The denominators must be
known before the sum, so that rules made of this set `exact_plan`.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.adapters.lora import over_columns
from autorank_jax.aggregators.base import ClientSums, divide, sum_dense, sum_products, widen
from autorank_jax.aggregators.sketches import Maps, sketch_product
from autorank_jax.types import ClientUpdate, Plan, Server

Levels = Sequence[int] | Mapping[str, Sequence[int]] | None
"""Rank levels of the configuration, `r_1 < ... < r_H`, for all adapters or by path; None: every rank is a level."""


def check_levels(levels: Levels) -> None:
    """Raise `ValueError` unless levels are increasing positive integers."""
    if levels is None:
        return
    for path, ends in levels.items() if isinstance(levels, Mapping) else [("every adapter", levels)]:
        if not ends or ends[0] < 1 or any(low >= high for low, high in pairwise(ends)):
            hint = ": sort them and drop repetitions" if ends and min(ends) >= 1 else ""
            raise ValueError(f"expected strictly increasing rank levels >= 1, got {tuple(ends)} for {path}{hint}")


def check_levels_fit(levels: Levels, server: Server) -> None:
    """Raise `ValueError` unless every adapter has levels that end within its rank positions."""
    for path, adapter in server.trainable.adapters.items():
        _band_ends(levels, path, adapter.lora_a.shape[-1])


def _band_ends(levels: Levels, path: str, width: int) -> np.ndarray:
    """Return for each position the end of its band, `min {r_h : r_h > j}`; beyond the last level `width + 1`."""
    positions = np.arange(width)
    if levels is None:
        return positions + 1
    if isinstance(levels, Mapping) and path not in levels:
        raise ValueError(f"expected rank levels for every adapter, got none for {path!r} but for {sorted(levels)}")
    ends = np.asarray(levels[path] if isinstance(levels, Mapping) else levels)
    if ends[-1] > width:
        raise ValueError(
            f"expected rank levels of {path!r} up to its {width} rank positions, got {tuple(ends.tolist())}"
        )
    return np.append(ends, width + 1)[np.searchsorted(ends, positions, side="right")]


def make_owner_summand(levels: Levels) -> Callable[[ClientUpdate, Server, Plan], ClientSums]:
    """Make the summand `w_k A_k diag(c_k / N) B_k`, `c_k` the positions of bands that the client covers whole."""

    def summand(update: ClientUpdate, server: Server, plan: Plan) -> ClientSums:
        owners, shares, weight = {}, {}, update.client.weight
        for path, mask in update.client.masks.items():
            widest = server.trainable.adapters[path].lora_a.shape[-1]
            last = _band_ends(levels, path, widest)[: mask.shape[-1]] - 1
            covered = jnp.take(mask, last, axis=-1, mode="fill", fill_value=0)
            total = jnp.take(plan.owners[path], last, axis=-1, mode="fill", fill_value=0)
            owners[path] = weight.astype(covered.dtype) * covered
            shares[path] = divide(covered, total)
        return ClientSums(weight, sum_dense(update), owners, {}, sum_products(update, server, plan, shares))

    return summand


def owner_product(server: Server, sums: ClientSums, path: str, maps: Maps | None = None) -> Any:
    """Return the owner-weighted product; positions without owners contribute the server's own product.

    Args:
        server: before the round.
        sums: over clients.
        path: of the adapter.
        maps: that the sums were sketched with, where they were; then a sketch is returned.
    """
    old = server.trainable.adapters[path]
    a, b = map(widen, old)
    rest = a * over_columns((sums.owners[path] == 0).astype(a.dtype), a)
    if maps is None:
        return sums.products[path] + rest @ b
    return jax.tree.map(jnp.add, sums.products[path], sketch_product(rest, b, maps, old))
