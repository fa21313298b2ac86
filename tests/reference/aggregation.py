"""Aggregation rules that average factors: `rule(server, clients, *, state=None, **options) -> (server, state)`.

Every rule loops over clients with truncated matrices. Without clients every rule returns the server unchanged.
"""

import numpy as np


def copy_server(server):
    """Copy to float64, so that rules never write into their arguments."""
    return {
        "adapters": {p: (np.array(a, np.float64), np.array(b, np.float64)) for p, (a, b) in server["adapters"].items()},
        "dense": {name: np.array(value, np.float64) for name, value in server["dense"].items()},
        "kernels": {path: np.array(w, np.float64) for path, w in server["kernels"].items()},
    }


def dense_mean(server, clients, weights=None):
    """Weighted mean `Σ w_k v_k / Σ w_k` of each dense parameter; the server's where nobody takes part."""
    weights = [c["weight"] for c in clients] if weights is None else weights
    new = {name: np.array(value, np.float64) for name, value in server["dense"].items()}
    if clients:
        for name in new:
            new[name] = sum(w * c["dense"][name] for w, c in zip(weights, clients, strict=True)) / sum(weights)
    return new


def padded_factors(server, clients, path, weights=None, *, owners=False):
    """Average `A[:, j]` and `B[j]` over clients, one rank position j at a time.

    A client owns the positions j < r_k. `owners=False`: `Σ_owners w_k A_k[:, j] / Σ_all w_k`, the others count as
    zeros; `owners=True`: `Σ_owners w_k A_k[:, j] / Σ_owners w_k`. A position nobody owns keeps the server's value.
    """
    weights = [c["weight"] for c in clients] if weights is None else weights
    a, b = (np.array(factor, np.float64) for factor in server["adapters"][path])
    for j in range(a.shape[1]):
        own = [
            (w, c["adapters"][path]) for w, c in zip(weights, clients, strict=True) if j < c["ranks"][path] and w > 0
        ]
        if own:
            total = sum(w for w, _ in own) if owners else sum(weights)
            a[:, j] = sum(w * factors[0][:, j] for w, factors in own) / total
            b[j] = sum(w * factors[1][j] for w, factors in own) / total
    return a, b


def zero_pad(server, clients, *, state=None):
    """Average zero-padded factors, `Σ_owners w_k A_k[:, j] / Σ_all w_k` (FedIT, arXiv 2305.05644, for equal ranks)."""
    new = copy_server(server)
    new["dense"] = dense_mean(server, clients)
    for path in new["adapters"]:
        new["adapters"][path] = padded_factors(server, clients, path)
    return new, state


def rbla(server, clients, *, state=None):
    """Average every rank position over its owners, `Σ_owners w_k A_k[:, j] / Σ_owners w_k` (arXiv 2408.08699)."""
    new = copy_server(server)
    new["dense"] = dense_mean(server, clients)
    for path in new["adapters"]:
        new["adapters"][path] = padded_factors(server, clients, path, owners=True)
    return new, state


def fedavg(server, clients, *, state=None):
    """Average dense parameters, `Σ w_k v_k / Σ w_k` (arXiv 1602.05629); adapters and kernels stay as they are."""
    new = copy_server(server)
    new["dense"] = dense_mean(server, clients)
    return new, state


def update_norm(client, paths):
    """Take `‖ΔW_k‖_F = sqrt(Σ_layers ‖A_k B_k‖_F²)`, the norm of all named layers as one long vector."""
    return np.sqrt(sum(np.sum((client["adapters"][p][0] @ client["adapters"][p][1]) ** 2) for p in paths))


def hetlora(server, clients, *, state=None, per="model", dense="size"):
    """Average zero-padded factors with weights `S_k / Σ S_k`, `S_k = ‖A_k B_k‖_F` (arXiv 2401.06432).

    The paper writes one LoRA module, so `per` is ours: "model" takes one norm over all layers, "layer" one for each.
    It has no dense parameters either: `dense` averages them by "size" (w_k) or "norm" (of the whole model). Sizes do
    not enter otherwise. Where all norms are 0, sizes are the weights.
    """
    new = copy_server(server)

    def norms(paths):
        values = [update_norm(c, paths) for c in clients]
        return values if sum(values) > 0 else [c["weight"] for c in clients]

    paths = list(new["adapters"])
    new["dense"] = dense_mean(server, clients, norms(paths) if dense == "norm" else None)
    for path in paths:
        new["adapters"][path] = padded_factors(server, clients, path, norms(paths if per == "model" else [path]))
    return new, state


def ffa_lora(server, clients, *, state=None, owners=False):
    """Keep lora_a as it is and average lora_b, zero-padded or over owners (FFA-LoRA, arXiv 2403.12313)."""
    new = copy_server(server)
    new["dense"] = dense_mean(server, clients)
    for path, (a, _) in new["adapters"].items():
        new["adapters"][path] = (a, padded_factors(server, clients, path, owners=owners)[1])
    return new, state


def rolora_trains(state):
    """Say which factors train: (train_a, train_b); B in rounds 0, 2, 4, ..., A in rounds 1, 3, 5, ..."""
    even = (state or {"round": 0})["round"] % 2 == 0
    return not even, even


def rolora(server, clients, *, state=None, owners=False):
    """Average lora_b in even rounds (from 0) and lora_a in odd ones; the other stays (RoLoRA, arXiv 2502.01755)."""
    state = state or {"round": 0}
    train_a, _ = rolora_trains(state)
    new = copy_server(server)
    new["dense"] = dense_mean(server, clients)
    for path, (a, b) in new["adapters"].items():
        mean_a, mean_b = padded_factors(server, clients, path, owners=owners)
        new["adapters"][path] = (mean_a, b) if train_a else (a, mean_b)
    return new, {"round": state["round"] + 1}


def fedsa_lora(server, clients, *, state=None, owners=True):
    """Average lora_a over owners (or zero-padded); lora_b stays with its client (FedSA-LoRA, arXiv 2410.01463).

    The server's lora_b never changes. `state[id][path]` is the lora_b of a client, (R, d_out): positions beyond its
    present rank keep what it had there before, at first the server's.
    """
    new, state = copy_server(server), {key: dict(kept) for key, kept in (state or {}).items()}
    new["dense"] = dense_mean(server, clients)
    for path, (_, b) in new["adapters"].items():
        new["adapters"][path] = (padded_factors(server, clients, path, owners=owners)[0], b)
        for client in clients:
            kept = state.setdefault(client["id"], {})
            whole = np.array(kept.get(path, b))
            whole[: client["ranks"][path]] = client["adapters"][path][1]
            kept[path] = whole
    return new, state


def fedsa_start(server, state, client_id):
    """Give the server as a FedSA-LoRA client sees it: the shared lora_a with its own lora_b."""
    own = copy_server(server)
    for path, b in (state or {}).get(client_id, {}).items():
        own["adapters"][path] = (own["adapters"][path][0], np.array(b))
    return own


def clip_client(server, client, max_norm):
    """Shrink a client's update to a norm: `start + Δ min(1, c / ‖Δ‖)`, Δ over both factors and dense parameters."""
    new = {**client, "adapters": {}, "dense": {}}
    deltas = {("dense", name): value - server["dense"][name] for name, value in client["dense"].items()}
    for path, (a, b) in client["adapters"].items():
        r, (start_a, start_b) = client["ranks"][path], server["adapters"][path]
        deltas[("a", path)], deltas[("b", path)] = a - start_a[:, :r], b - start_b[:r]
    norm = np.sqrt(sum(np.sum(delta**2) for delta in deltas.values()))
    factor = min(1.0, max_norm / norm) if norm > 0 else 1.0
    for path in client["adapters"]:
        r, (start_a, start_b) = client["ranks"][path], server["adapters"][path]
        a, b = start_a[:, :r] + factor * deltas[("a", path)], start_b[:r] + factor * deltas[("b", path)]
        new["adapters"][path] = (a, b)
    for name in client["dense"]:
        new["dense"][name] = server["dense"][name] + factor * deltas[("dense", name)]
    return new
