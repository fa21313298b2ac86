"""Rank self-pruning of HetLoRA (arXiv 2401.06432), on truncated matrices."""

import numpy as np


def tail_start(rank, gamma):
    """First position that pruning drops, `max(1, floor(gamma r))`."""
    return max(1, int(np.floor(gamma * rank + 1e-9)))


def tail_score(a, b, gamma):
    """`‖A[:, t:]‖_F ‖B[t:]‖_F` of the last positions of one adapter."""
    t = tail_start(a.shape[1], gamma)
    return np.sqrt(np.sum(a[:, t:] ** 2)) * np.sqrt(np.sum(b[t:] ** 2))


def self_prune(server, client, gamma):
    """Drop the tail of each adapter whose score fell below that of the server's matrices it started from."""
    pruned = {**client, "adapters": {}, "ranks": {}}
    for path, (a, b) in client["adapters"].items():
        rank = a.shape[1]
        start_a, start_b = server["adapters"][path]
        fell = tail_score(a, b, gamma) < tail_score(start_a[:, :rank], start_b[:rank], gamma)
        rank = tail_start(rank, gamma) if fell else rank
        pruned["adapters"][path], pruned["ranks"][path] = (a[:, :rank], b[:rank]), rank
    return pruned
