"""What a round costs each client: parameters, bytes in either direction, FLOPs. Numbers on the host, in NumPy."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from autorank_jax.adapters.lora import layers_of
from autorank_jax.adapters.selection import leave_out
from autorank_jax.engine.flops import FlopModel
from autorank_jax.interface import check_least, check_share, checked
from autorank_jax.types import Adapter, Array, Server, Traffic, Travels

EVERYTHING = Traffic()


class ClientCosts(NamedTuple):
    """What one round costs each client, `(clients,)` float64 each."""

    parameters: np.ndarray  # that it holds and trains: adapters at its rank, dense parameters
    bytes_up: np.ndarray
    bytes_down: np.ndarray
    flops: np.ndarray  # of local training


@checked
def client_costs(
    server: Server,
    ranks: Mapping[str, Array],
    size: ArrayLike,
    flops: FlopModel,
    *,
    local_epochs: int,
    traffic: Traffic = EVERYTHING,
    attendance: ArrayLike = 1.0,
) -> ClientCosts:
    """Return what a round costs clients of these ranks, if nothing goes wrong.

    A number takes the bytes of its type. One round's news are counted: who sat rounds out under a rule that merges, or
    that sends one factor at a time, would have to fetch what it missed besides.

    Args:
        server: for shapes, item sizes and, under rules that send live positions alone, `lora_b`.
        ranks: by path, `(clients,)`, or `(clients, *layers)` of a stack: those at which clients train,
            `rule.client_ranks(state.ranks, state.clients)`.
        size: `(clients,)` examples.
        flops: from `training_flops`.
        local_epochs: passes over the data per round.
        traffic: what the rule sends, `rule.traffic`.
        attendance: how often each client takes part, in 0..1: a stack of factors has those of the participants.

    Raises:
        ValueError: for ranks of other adapters or clients, or an attendance outside 0..1.
    """
    check_least("local_epochs", local_epochs)
    check_share("attendance", attendance, "[0, 1]")
    examples = np.asarray(size, np.float64)
    held = {path: np.asarray(rank, np.float64) for path, rank in ranks.items()}
    adapters = server.trainable.adapters
    shapes = {"size": examples.shape} | {f"ranks[{path!r}]": rank.shape for path, rank in held.items()}
    if (
        examples.ndim != 1
        or set(held) != set(adapters)
        or not all(
            rank.shape in (examples.shape, (*examples.shape, *layers_of(adapters[path]))) for path, rank in held.items()
        )
    ):
        raise ValueError(
            f"expected size and ranks of the adapters {sorted(adapters)}, one number for each client, or for "
            f"each layer of a stack, got {shapes}"
        )
    own = {path: np.mean(rank.reshape(len(examples), -1), axis=1) for path, rank in held.items()}
    if np.shape(attendance) not in ((), examples.shape):
        raise ValueError(f"expected attendance as one number or {len(examples)}, got shape {np.shape(attendance)}")
    dense = sum(float(leaf.size) for leaf in jax.tree.leaves(server.trainable.dense))
    per_rank = {path: sum(_numbers(adapter)) for path, adapter in adapters.items()}
    parameters = dense + sum((own[path] * each for path, each in per_rank.items()), np.zeros_like(examples))
    present = np.broadcast_to(np.asarray(attendance, np.float64), examples.shape)
    travelling = server._replace(trainable=leave_out(server.trainable, traffic.kept))
    up, down = (sent_bytes(way, travelling, held, present) for way in (traffic.up, traffic.down))
    per_example = flops.base + sum(flops.per_rank[path] * rank for path, rank in own.items())
    return ClientCosts(parameters, up, down, examples * local_epochs * per_example)


def sent_bytes(sent: Travels, server: Server, ranks: Mapping[str, np.ndarray], attendance: np.ndarray) -> np.ndarray:
    """Return the bytes that travel one way for each client, `(clients,)`."""
    dense = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(server.trainable.dense))
    total = np.full(attendance.shape, float(sent.dense * dense))
    for path, adapter in server.trainable.adapters.items():
        of_a, of_b = (each * factor.dtype.itemsize for each, factor in zip(_numbers(adapter), adapter, strict=True))
        owned = ranks[path].reshape(len(attendance), -1)  # one number, or one for each layer
        positions = np.mean(_live(adapter, owned) if sent.live else owned, axis=1)
        total += positions * (sent.lora_a * of_a + sent.lora_b * of_b)
        if sent.kernels:
            shares = attendance * np.mean(owned, axis=1)
            whole, stacked = adapter.lora_a.shape[-2] * of_b, float(np.sum(shares)) * (of_a + of_b)
            total += min(whole, stacked) if sent.stack else whole
    return total


def _numbers(adapter: Adapter) -> tuple[int, int]:
    """Return how many numbers of each factor belong to one rank position, of all stacked layers together."""
    layers = math.prod(layers_of(adapter))
    return layers * adapter.lora_a.shape[-2], layers * adapter.lora_b.shape[-1]


def _live(adapter: Adapter, ranks: np.ndarray) -> np.ndarray:
    """Count positions below ranks, `(clients, 1 or layers)`, at which `lora_b` is not zero, `(clients, layers)`.

    At the start, where it is zero everywhere, all count.
    """
    width = adapter.lora_b.shape[-2]
    flat = np.asarray(adapter.lora_b, np.float32).reshape(-1, width, adapter.lora_b.shape[-1])
    live = np.count_nonzero(np.any(flat != 0, axis=-1), axis=-1)
    return np.minimum(ranks, np.where(live > 0, live, width))
