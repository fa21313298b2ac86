"""Aggregation rules that average products: `rule(server, clients, *, state=None, **options) -> (server, state)`.

The product of a client is that of its truncated matrices, `A_k (d_in, r_k) @ B_k (r_k, d_out)`. Dense parameters take
weighted means. Without clients every rule returns the server unchanged.
"""

import numpy as np

from .aggregation import copy_server, dense_mean, padded_factors


def mean_product(server, clients, path):
    """Average `Σ w_k A_k B_k / Σ w_k`; the server's own product where nobody takes part."""
    if not clients:
        a, b = server["adapters"][path]
        return np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    total = sum(c["weight"] for c in clients)
    return sum(c["weight"] / total * c["adapters"][path][0] @ c["adapters"][path][1] for c in clients)


def owner_product(server, clients, path, *, levels=None, unowned="server"):
    """Average the product band by band: `Σ_h Σ_{k: r_k ≥ r_h} w_k A_k[:, seg] B_k[seg] / Σ_{k: r_k ≥ r_h} w_k`.

    Band h is the rank positions `r_{h-1} ≤ j < r_h`, counted from 0, with `r_0 = 0`. `levels` = (r_1, ..., r_H)
    comes from the configuration, not from who shows up; None makes every position its own band, which for ranks
    taken from the levels is the same. A client counts in a band only when it covers all of it. A band that nobody
    covers gives the server's own product (or nothing, "zero"), and so do positions beyond the last level.
    """
    a_s, b_s = (np.asarray(factor, np.float64) for factor in server["adapters"][path])
    R = a_s.shape[1]
    ends = list(range(1, R + 1)) if levels is None else list(levels)
    product = np.zeros((a_s.shape[0], b_s.shape[1]))
    for low, high in zip([0, *ends], [*ends, R], strict=True):
        own = [c for c in clients if c["ranks"][path] >= high] if high in ends else []
        if own:
            total = sum(c["weight"] for c in own)
            for c in own:
                a, b = c["adapters"][path]
                product += c["weight"] / total * a[:, low:high] @ b[low:high]
        elif unowned == "server":
            product += a_s[:, low:high] @ b_s[low:high]
    return product


def svd_factors(product, start, *, sigma="both", keep=None, tolerance=1e-10):
    """Split a product by its SVD `U Σ Vᵀ` into factors of R positions, in descending order of singular values.

    `sigma` says where Σ goes: "right" (U, ΣVᵀ), "left" (UΣ, Vᵀ), "both" (U√Σ, √ΣVᵀ). Positions from `keep` on, or with
    `σ_j ≤ tolerance · σ_0`, or beyond min(d_in, d_out), keep the lora_a of `start` and get lora_b = 0.
    """
    a, b = np.array(start[0], np.float64), np.zeros_like(start[1], np.float64)
    u, s, vt = np.linalg.svd(product, full_matrices=False)
    power = {"right": (0.0, 1.0), "left": (1.0, 0.0), "both": (0.5, 0.5)}[sigma]
    for j in range(min(a.shape[1], len(s), len(s) if keep is None else keep)):
        if s[j] > tolerance * s[0]:
            a[:, j] = u[:, j] * s[j] ** power[0]
            b[j] = s[j] ** power[1] * vt[j]
    return a, b


def flexlora(server, clients, *, state=None, sigma="both", tolerance=1e-10):
    """Split the mean product `Σ w_k A_k B_k / Σ w_k` by SVD at rank R (FlexLoRA, arXiv 2402.11505)."""
    new = copy_server(server)
    if clients:
        new["dense"] = dense_mean(server, clients)
        for path, start in server["adapters"].items():
            product = mean_product(server, clients, path)
            new["adapters"][path] = svd_factors(product, start, sigma=sigma, tolerance=tolerance)
    return new, state


def raflora(server, clients, *, state=None, levels=None, sigma="both", unowned="server", tolerance=1e-10):
    """Split the owner-weighted product by SVD with √Σ on both sides (raFLoRA, arXiv 2602.13486).

    `levels` is None or {path: (r_1, ..., r_H)}; see `owner_product`.
    """
    new = copy_server(server)
    if clients:
        new["dense"] = dense_mean(server, clients)
        for path, start in server["adapters"].items():
            ends = None if levels is None else levels[path]
            product = owner_product(server, clients, path, levels=ends, unowned=unowned)
            new["adapters"][path] = svd_factors(product, start, sigma=sigma, tolerance=tolerance)
    return new, state


def energy_rank(singular_values, tau):
    """Find the smallest p with `Σ_{i<p} σ_i² ≥ τ Σ_i σ_i²`; 0 where there is no energy."""
    energy = np.asarray(singular_values, np.float64) ** 2
    total = energy.sum()
    p, kept = 0, 0.0
    while p < len(energy) and kept < tau * total * (1 - 1e-12):
        kept += energy[p]
        p += 1
    return p


def florist(server, clients, *, state=None, tau=0.99, sigma="both", tolerance=1e-10):
    """Split the mean product by SVD, keeping p singular values by `energy_rank` (FLoRIST, arXiv 2506.09199).

    At most R are kept; the energy counts all of them. Later positions keep the server's lora_a and get lora_b = 0.
    Every layer has its own p. The paper gets the same SVD from the stacked factors.
    """
    new = copy_server(server)
    if clients:
        new["dense"] = dense_mean(server, clients)
        for path, start in server["adapters"].items():
            product = mean_product(server, clients, path)
            keep = energy_rank(np.linalg.svd(product, compute_uv=False), tau)
            new["adapters"][path] = svd_factors(product, start, sigma=sigma, keep=keep, tolerance=tolerance)
    return new, state


def restarted(server, state, path):
    """Restart an adapter: the initial lora_a of `state["lora_a"]` (without state, the server's) and lora_b = 0."""
    a, b = server["adapters"][path]
    return np.array(a if state is None else state["lora_a"][path], np.float64), np.zeros_like(b, np.float64)


def flora(server, clients, *, state=None):
    """Merge the mean product, `W + Σ w_k A_k B_k / Σ w_k`, and restart the adapters (FLoRA, arXiv 2409.05976).

    The paper stacks the factors, whose product is this sum, and draws a new lora_a each round; here it returns to the
    one in `state["lora_a"]`. Adapters are expected to start with lora_b = 0: products, not differences, are merged.
    """
    new = copy_server(server)
    if clients:
        new["dense"] = dense_mean(server, clients)
        for path in server["adapters"]:
            new["kernels"][path] += mean_product(server, clients, path)
            new["adapters"][path] = restarted(server, state, path)
    return new, state


def owner_merge(server, clients, *, state=None, levels=None, unowned="server"):
    """Merge the owner-weighted product of `owner_product` into W and restart the adapters, as in `flora`."""
    new = copy_server(server)
    if clients:
        new["dense"] = dense_mean(server, clients)
        for path in server["adapters"]:
            ends = None if levels is None else levels[path]
            new["kernels"][path] += owner_product(server, clients, path, levels=ends, unowned=unowned)
            new["adapters"][path] = restarted(server, state, path)
    return new, state


def fedex_lora(server, clients, *, state=None, owners=False):
    """Average factors and put the rest into W: `W + Σ p_k A_k B_k - Ā B̄` (FedEx-LoRA, arXiv 2410.09432).

    The model that results, `W + Ā B̄`, moves by the mean product exactly, however Ā and B̄ were formed: zero-padded, or
    over owners (ours; the paper has equal ranks).
    """
    new = copy_server(server)
    if clients:
        new["dense"] = dense_mean(server, clients)
        for path in server["adapters"]:
            a, b = padded_factors(server, clients, path, owners=owners)
            new["kernels"][path] += mean_product(server, clients, path) - a @ b
            new["adapters"][path] = (a, b)
    return new, state


def lora_fair(server, clients, *, state=None, ridge=0.01, owners=False):
    """Average factors and correct lora_b towards the mean product P (LoRA-FAIR, arXiv 2411.14961).

    ΔB minimises `‖P - Ā (B̄ + ΔB)‖_F² + λ ‖ΔB‖_F²`, so `(ĀᵀĀ + λ I) ΔB = Āᵀ (P - Ā B̄)`; λ = 0 gives the least-squares
    solution of least norm. The paper maximises a cosine similarity by gradient steps, which has no closed form, and
    writes the update B A: its B, the factor that starts at 0, is our lora_b.
    """
    new = copy_server(server)
    if clients:
        new["dense"] = dense_mean(server, clients)
        for path in server["adapters"]:
            a, b = padded_factors(server, clients, path, owners=owners)
            gap = mean_product(server, clients, path) - a @ b
            if ridge > 0:
                correction = np.linalg.solve(a.T @ a + ridge * np.eye(a.shape[1]), a.T @ gap)
            else:
                correction = np.linalg.lstsq(a, gap, rcond=None)[0]
            new["adapters"][path] = (a, b + correction)
    return new, state
