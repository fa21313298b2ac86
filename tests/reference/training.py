"""Local training with hand-written backpropagation on truncated adapters.

A layer computes `z = x W + s (x A) B + b`. Its LoRA scale `s` belongs to the client: it trains `B' = B / s` and sends
`s B'`, so that an update is always `A @ B`.
"""

import numpy as np


def lora_scale(rule, value, rank):
    """Give the scale s of a rank: `value` ("constant"), `value / rank`, `value / sqrt(rank)` (arXiv 2312.03732)."""
    divisor = {"constant": 1.0, "alpha/rank": float(rank), "alpha/sqrt(rank)": float(rank) ** 0.5}[rule]
    return value / divisor


# ------------------------------------------------------------------------------------------------------------ networks
# Parameters are a flat dict: ("a", path), ("b", path), ("dense", name). A model is (parameters, kernels, scales).
# A network is a function (model, x, y) -> (mean loss, gradients). The dense names of a layer are `path/bias` and, where
# the layer is trained whole, `path/kernel`.


def layer_forward(model, path, x):
    """Compute `z = x W + s (x A) B + b` along the last axis; W is frozen, or dense where the layer is trained whole."""
    p, kernels, scales = model
    weight = p[("dense", f"{path}/kernel")] if ("dense", f"{path}/kernel") in p else kernels[path]
    z = x @ weight.reshape(x.shape[-1], -1)
    if ("a", path) in p:
        z = z + scales[path] * ((x @ p[("a", path)]) @ p[("b", path)])
    if ("dense", f"{path}/bias") in p:
        z = z + p[("dense", f"{path}/bias")]
    return z


def layer_backward(model, path, x, dz):
    """Backpropagate dz: `dA = s xᵀ dz Bᵀ, dB = s (x A)ᵀ dz, db = Σ dz, dW = xᵀ dz, dx = dz (W + s A B)ᵀ`."""
    p, kernels, scales = model
    x, dz = x.reshape(-1, x.shape[-1]), dz.reshape(-1, dz.shape[-1])
    grads = {}
    if ("dense", f"{path}/kernel") in p:
        weight = p[("dense", f"{path}/kernel")]
        grads[("dense", f"{path}/kernel")] = (x.T @ dz).reshape(weight.shape)
        weight = weight.reshape(x.shape[-1], -1)
    else:
        weight = kernels[path]
    if ("a", path) in p:
        a, b, s = p[("a", path)], p[("b", path)], scales[path]
        grads[("a", path)] = s * x.T @ dz @ b.T
        grads[("b", path)] = s * (x @ a).T @ dz
        weight = weight + s * a @ b
    if ("dense", f"{path}/bias") in p:
        grads[("dense", f"{path}/bias")] = dz.sum(0)
    return dz @ weight.T, grads


def softmax_cross_entropy(logits, y):
    """Mean over the batch of `log Σ_c exp(z_c) - z_y`, and its gradient `(softmax(z) - onehot(y)) / batch`."""
    rows = np.arange(len(y))
    shifted = logits - logits.max(1, keepdims=True)
    exps = np.exp(shifted)
    losses = np.log(exps.sum(1)) - shifted[rows, y]
    grad = exps / exps.sum(1, keepdims=True)
    grad[rows, y] -= 1.0
    return losses.mean(), grad / len(y)


def mlp(paths):
    """Build an MLP of the layers `paths` in order: ReLU between them, softmax cross-entropy at the end."""

    def network(model, x, y):
        h, inputs, pre = np.asarray(x, np.float64).reshape(len(y), -1), [], []
        for path in paths:
            inputs.append(h)
            pre.append(layer_forward(model, path, h))
            h = np.maximum(pre[-1], 0.0)
        loss, dz = softmax_cross_entropy(pre[-1], y)
        grads = {}
        for i in reversed(range(len(paths))):
            dh, new = layer_backward(model, paths[i], inputs[i], dz)
            grads.update(new)
            if i > 0:
                dz = dh * (pre[i - 1] > 0)
        return loss, grads

    return network


def patches(x, k):
    """Cut (n, h, w, c) into SAME patches (n, h, w, k·k·c), order (kh, kw, c) row-major; the low side pads (k-1)//2."""
    n, h, w, c = x.shape
    low, high = (k - 1) // 2, k // 2
    padded = np.pad(x, ((0, 0), (low, high), (low, high), (0, 0)))
    out = np.zeros((n, h, w, k * k * c))
    for i in range(h):
        for j in range(w):
            out[:, i, j] = padded[:, i : i + k, j : j + k].reshape(n, -1)
    return out


def conv_network(conv, head, k):
    """Build one k×k SAME convolution (as patches times matrices), ReLU, global average pooling, linear layer `head`."""

    def network(model, x, y):
        cut = patches(np.asarray(x, np.float64), k)
        z = layer_forward(model, conv, cut)
        pooled = np.maximum(z, 0.0).mean((1, 2))
        loss, dlogits = softmax_cross_entropy(layer_forward(model, head, pooled), y)
        dpooled, grads = layer_backward(model, head, pooled, dlogits)
        dz = dpooled[:, None, None, :] / (z.shape[1] * z.shape[2]) * (z > 0)
        grads.update(layer_backward(model, conv, cut, dz)[1])
        return loss, grads

    return network


# ---------------------------------------------------------------------------------------------------------- optimizers
# An optimizer is a function (step number from 1, gradient, parameter, slots dict) -> update, for ONE array.


def sgd(learning_rate, momentum=0.0):
    """SGD as in optax: `trace = g + m·trace; update = -lr·trace`."""

    def update(_step, grad, _value, slots):
        slots["trace"] = grad + momentum * slots.get("trace", 0.0)
        return -learning_rate * slots["trace"]

    return update


def adamw(learning_rate, weight_decay=1e-4, b1=0.9, b2=0.999, eps=1e-8):
    """AdamW (arXiv 1711.05101) as in optax: `-lr (m̂ / (√v̂ + ε) + wd·p)`, `m̂ = m/(1-b1^t)`, `v̂ = v/(1-b2^t)`."""

    def update(step, grad, value, slots):
        slots["m"] = b1 * slots.get("m", 0.0) + (1 - b1) * grad
        slots["v"] = b2 * slots.get("v", 0.0) + (1 - b2) * grad**2
        m_hat, v_hat = slots["m"] / (1 - b1**step), slots["v"] / (1 - b2**step)
        return -learning_rate * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * value)

    return update


def adam(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    """Adam (arXiv 1412.6980): AdamW without decay."""
    return adamw(learning_rate, 0.0, b1, b2, eps)


# -------------------------------------------------------------------------------------------------------- local rounds


def start_parameters(server, ranks, scales):
    """Cut the server to the ranks: `A[:, :r]`, `B[:r] / s`, dense whole."""
    p = {("dense", name): np.array(value, np.float64) for name, value in server["dense"].items()}
    for path, (a, b) in server["adapters"].items():
        p[("a", path)] = np.array(a[:, : ranks[path]], np.float64)
        p[("b", path)] = np.array(b[: ranks[path]], np.float64) / scales[path]
    return p


def train_client(
    server,
    ranks,
    batches,
    *,
    network,
    optimizer,
    epochs=1,
    weight=1.0,
    scale=("constant", 1.0),
    proximal=0.0,
    proximal_units="sent",
    train_a=True,
    train_b=True,
    train_dense=True,
    report_penalty=False,
):
    """Train one client: for each batch in order `p += optimizer(∇[mean loss + (mu/2) Σ ‖p - p_start‖²])`.

    Args:
        server, ranks: where the client starts, its adapters cut to {path: rank}.
        batches: all batches of all epochs in order, (x, y) each; every epoch has the same number of them.
        network, optimizer: from `mlp` or `conv_network`; from `sgd`, `adam` or `adamw`, with fresh state.
        epochs, weight: how many epochs `batches` spans; what the client carries as its weight.
        scale: (rule, value) of `lora_scale`, with the rank of each layer.
        proximal, proximal_units: mu of FedProx (arXiv 1812.06127); its p is what is "sent", s B', or "trained", B'.
        train_a, train_b, train_dense: what changes at all; the rest is sent back as it came.
        report_penalty: whether reported losses contain the FedProx term.

    Returns:
        (client, losses): losses[t] is the mean over the examples of epoch t of the loss before each step.
    """
    kernels = {path: np.asarray(w, np.float64) for path, w in server["kernels"].items()}
    scales = {path: lora_scale(*scale, ranks[path]) for path in server["adapters"]}
    start = start_parameters(server, ranks, scales)
    p = {key: value.copy() for key, value in start.items()}
    trained = [key for key in p if {"a": train_a, "b": train_b, "dense": train_dense}[key[0]]]
    slots = {key: {} for key in trained}
    units = {k: scales[k[1]] if k[0] == "b" and proximal_units == "sent" else 1.0 for k in trained}
    seen = []
    for step, (x, y) in enumerate(batches, start=1):
        loss, grads = network((p, kernels, scales), x, np.asarray(y))
        penalty, pull = proximal_term(p, start, units, proximal)
        seen.append((len(y), loss + penalty if report_penalty else loss))
        for key in trained:
            grad = grads.get(key, np.zeros_like(p[key])) + pull[key]
            p[key] = p[key] + optimizer(step, grad, p[key], slots[key])
    return as_client(p, ranks, scales, weight), epoch_means(seen, epochs)


def proximal_term(p, start, units, mu):
    """Give `(mu/2) Σ ‖u (p - p_start)‖²` and its gradient `mu u² (p - p_start)`, over the keys of `units`."""
    moved = {key: p[key] - start[key] for key in units}
    value = 0.5 * mu * sum(np.sum((unit * moved[key]) ** 2) for key, unit in units.items())
    return value, {key: mu * unit**2 * moved[key] for key, unit in units.items()}


def as_client(p, ranks, scales, weight):
    """Send back `(A, s B')` and the dense parameters."""
    adapters = {path: (p[("a", path)], scales[path] * p[("b", path)]) for path in scales}
    dense = {key[1]: value for key, value in p.items() if key[0] == "dense"}
    return {"adapters": adapters, "dense": dense, "weight": float(weight), "ranks": dict(ranks)}


def epoch_means(seen, epochs):
    """Average (examples, mean loss) pairs over each epoch: `L_t = Σ n_b L_b / Σ n_b`."""
    per_epoch, rest = divmod(len(seen), epochs)
    assert rest == 0, "every epoch has the same number of batches"
    means = []
    for t in range(epochs):
        part = seen[t * per_epoch : (t + 1) * per_epoch]
        means.append(sum(n * loss for n, loss in part) / sum(n for n, _ in part))
    return np.array(means)
