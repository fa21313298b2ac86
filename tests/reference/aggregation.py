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
        own = [(w, c["adapters"][path]) for w, c in zip(weights, clients, strict=True) if j < c["ranks"][path]]
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
