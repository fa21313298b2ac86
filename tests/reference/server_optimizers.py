"""Server optimizers on the pseudo-gradient `g = start - aggregated` (arXiv 2003.00295), one array at a time.

An optimizer is (initial slots, function (step number from 1, g, slots) -> (update, slots)).
"""

import numpy as np


def fedavgm(learning_rate=1.0, momentum=0.9):
    """FedAvgM (arXiv 1909.06335): `v = g + m·v; update = -lr·v`."""

    def update(_step, g, slots):
        v = g + momentum * slots["v"]
        return -learning_rate * v, {"v": v}

    return {"v": 0.0}, update


def fedadam(learning_rate, b1=0.9, b2=0.999, *, eps=1e-8, v0=0.0, bias_correction=True):
    """FedAdam: `m = b1 m + (1-b1) g; v = b2 v + (1-b2) g²; update = -lr m / (√v + ε)`.

    optax divides m and v by `1 - b^t` (default here). The paper does not, and starts at `v0 ≥ ε²`.
    """

    def update(step, g, slots):
        m = b1 * slots["m"] + (1 - b1) * g
        v = b2 * slots["v"] + (1 - b2) * g**2
        slots = {"m": m, "v": v}
        if bias_correction:
            m, v = m / (1 - b1**step), v / (1 - b2**step)
        return -learning_rate * m / (np.sqrt(v) + eps), slots

    return {"m": 0.0, "v": v0}, update


def fedyogi(learning_rate, b1=0.9, b2=0.999, *, eps=1e-3, m0=1e-6, v0=1e-6, bias_correction=True):
    """FedYogi: as FedAdam with `v = v - (1-b2) g² sign(v - g²)`.

    optax starts both m and v at 1e-6 and corrects the bias (default here). The paper has m0 = 0 and no correction.
    """

    def update(step, g, slots):
        m = b1 * slots["m"] + (1 - b1) * g
        v = slots["v"] - (1 - b2) * np.sign(slots["v"] - g**2) * g**2
        slots = {"m": m, "v": v}
        if bias_correction:
            m, v = m / (1 - b1**step), v / (1 - b2**step)
        return -learning_rate * m / (np.sqrt(v) + eps), slots

    return {"m": m0, "v": v0}, update


def optimize(optimizer, start, aggregated, state=None, *, reported=None):
    """Step every array of a dict: `start + optimizer(start - aggregated)`.

    Args:
        optimizer: from `fedavgm`, `fedadam`, `fedyogi`.
        start: {key: array} before the round.
        aggregated: {key: array}, what the rule made of it.
        state: None at first, else what the call before returned.
        reported: None, or {key: bool array that broadcasts}: where False, value and slots stay as they were. With
            nothing reported at all, the step does not count.

    Returns:
        ({key: array}, state).
    """
    initial, update = optimizer
    state = state or {"step": 0, "slots": {key: dict(initial) for key in start}}
    start = {key: np.array(value, np.float64) for key, value in start.items()}
    where = {key: np.broadcast_to(True if reported is None else reported[key], start[key].shape) for key in start}
    if not any(mask.any() for mask in where.values()):
        return start, state
    step, new, slots = state["step"] + 1, {}, {}
    for key, value in start.items():
        before = state["slots"][key]
        delta, after = update(step, value - aggregated[key], before)
        new[key] = np.where(where[key], value + delta, value)
        slots[key] = {name: np.where(where[key], after[name], before[name]) for name in before}
    return new, {"step": step, "slots": slots}


def flatten(server):
    """Turn a server into one dict of arrays: ("a", path), ("b", path), ("dense", name), ("kernel", path)."""
    flat = {}
    for path, (a, b) in server["adapters"].items():
        flat[("a", path)], flat[("b", path)] = a, b
    flat.update({("dense", name): value for name, value in server["dense"].items()})
    flat.update({("kernel", path): value for path, value in server["kernels"].items()})
    return {key: np.array(value, np.float64) for key, value in flat.items()}


def unflatten(flat):
    """Undo `flatten`."""
    return {
        "adapters": {path: (value, flat[("b", path)]) for (kind, path), value in flat.items() if kind == "a"},
        "dense": {name: value for (kind, name), value in flat.items() if kind == "dense"},
        "kernels": {path: value for (kind, path), value in flat.items() if kind == "kernel"},
    }
