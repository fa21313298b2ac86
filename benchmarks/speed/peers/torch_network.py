"""The workloads' models in plain PyTorch, as functions of their values, and the client's training loop."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from common import CORES, Workload

Values = dict[str, torch.Tensor]


def choose_threads(run: Callable[[], Any]) -> None:
    """Warm up, then use one thread or all cores, whichever is faster: small matrices are slower on many threads."""
    seconds = {}
    for threads in (1, 1, CORES):
        torch.set_num_threads(threads)
        begin = time.perf_counter()
        run()
        seconds[threads] = time.perf_counter() - begin
    torch.set_num_threads(min(seconds, key=seconds.__getitem__))


def tensors(arrays: dict[str, np.ndarray]) -> Values:
    """Copy arrays into tensors."""
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def make_loss(workload: Workload) -> Callable[[Values, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """Make the mean loss of a batch, of the examples of weight 1 where weights are given."""
    network, frozen = workload.network, tensors(workload.frozen)
    logits = {"mlp": mlp, "cnn": cnn, "transformer": transformer}[network["kind"]]

    def loss(values: Values, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        out = logits(network, frozen | values, x)
        if weights is None:
            return F.cross_entropy(out, y)
        return (F.cross_entropy(out, y, reduction="none") * weights).sum() / weights.sum().clamp(min=1)

    return loss


def train_client(
    loss: Callable[..., torch.Tensor],
    start: Values,
    examples: tuple[torch.Tensor, torch.Tensor],
    steps: Sequence[torch.Tensor],
    learning_rate: float,
) -> Values:
    """Train one client the plain way: autograd and `torch.optim.SGD`."""
    values = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.SGD(values.values(), lr=learning_rate)
    for batch in steps:
        optimizer.zero_grad()
        loss(values, examples[0][batch], examples[1][batch]).backward()
        optimizer.step()
    return {name: value.detach() for name, value in values.items()}


def linear(v: Values, path: str, x: torch.Tensor) -> torch.Tensor:
    """Return `x W + (x A) B + b` on the last axis."""
    update = (x @ v[f"lora_a:{path}"]) @ v[f"lora_b:{path}"]
    return x @ v[f"kernel:{path}"] + update + v[f"dense:{path}/bias"]


def mlp(network: dict[str, Any], v: Values, x: torch.Tensor) -> torch.Tensor:
    x = x.flatten(1)
    for path in network["layers"][:-1]:
        x = F.relu(linear(v, path, x))
    return linear(v, network["layers"][-1], x)


def convolution(x: torch.Tensor, kernel: torch.Tensor, window: int) -> torch.Tensor:
    """Convolve with a kernel stored as a matrix `(window² · c_in, c_out)`; channels come second in PyTorch."""
    shaped = kernel.reshape(window, window, x.shape[1], -1).permute(3, 2, 0, 1)
    return F.conv2d(x, shaped, padding=window // 2)


def cnn(network: dict[str, Any], v: Values, x: torch.Tensor) -> torch.Tensor:
    x, k = x[:, None], network["window"]
    for path in network["convs"]:
        up = v[f"lora_b:{path}"].T[:, :, None, None]
        update = F.conv2d(convolution(x, v[f"lora_a:{path}"], k), up)
        x = F.relu(convolution(x, v[f"kernel:{path}"], k) + update + v[f"dense:{path}/bias"][:, None, None])
        x = F.max_pool2d(x, 2)
    return linear(v, network["head"], x.permute(0, 2, 3, 1).flatten(1))


def layer_norm(v: Values, path: str, x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], v[f"rest:{path}/scale"], v[f"dense:{path}/bias"], eps=epsilon)


def attention(v: Values, path: str, x: torch.Tensor, heads: int) -> torch.Tensor:
    split = (*x.shape[:-1], heads, x.shape[-1] // heads)
    q, k, values = (linear(v, f"{path}/{part}", x).reshape(split).transpose(1, 2) for part in ("query", "key", "value"))
    mixed = F.scaled_dot_product_attention(q, k, values).transpose(1, 2)
    return linear(v, f"{path}/out", mixed.reshape(x.shape))


def transformer(network: dict[str, Any], v: Values, x: torch.Tensor) -> torch.Tensor:
    x = x @ v["rest:embed/kernel"] + v["dense:embed/bias"] + v["rest:positions/embedding"]
    for number in range(network["blocks"]):
        block = f"blocks/{number}"
        normed = layer_norm(v, f"{block}/attention_norm", x, 1e-12)
        x = x + attention(v, f"{block}/attention", normed, network["heads"])
        hidden = F.gelu(linear(v, f"{block}/up", layer_norm(v, f"{block}/norm", x, 1e-12)))
        x = x + linear(v, f"{block}/down", hidden)
    return linear(v, "head", layer_norm(v, "norm", x, 1e-6).mean(dim=1))
