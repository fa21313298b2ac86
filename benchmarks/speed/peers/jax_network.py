"""The workloads' models in plain JAX, as a user of DrJAX or FedJAX would write them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Values = dict[str, jax.Array]


def make_loss(
    network: dict[str, Any], frozen: Values
) -> Callable[[Values, jax.Array, jax.Array, jax.Array], jax.Array]:
    """Make the mean loss of a batch whose padding has weight 0: `(values, inputs, targets, weights) -> ()`."""
    logits = {"mlp": mlp, "cnn": cnn, "transformer": transformer}[network["kind"]]

    def loss(values: Values, x: jax.Array, y: jax.Array, weights: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits(network, frozen | values, x))
        losses = -jnp.take_along_axis(log_p, y[:, None], axis=-1)[:, 0]
        return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1)

    return loss


def linear(v: Values, path: str, x: jax.Array) -> jax.Array:
    """Return `x W + (x A) B + b` on the last axis."""
    return x @ v[f"kernel:{path}"] + (x @ v[f"lora_a:{path}"]) @ v[f"lora_b:{path}"] + v[f"dense:{path}/bias"]


def mlp(network: dict[str, Any], v: Values, x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0], -1)
    for path in network["layers"][:-1]:
        x = jax.nn.relu(linear(v, path, x))
    return linear(v, network["layers"][-1], x)


def convolution(x: jax.Array, kernel: jax.Array, window: int) -> jax.Array:
    """Convolve with a kernel stored as a matrix `(window² · c_in, c_out)`."""
    shaped = kernel.reshape(window, window, x.shape[-1], -1)
    return jax.lax.conv_general_dilated(x, shaped, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def cnn(network: dict[str, Any], v: Values, x: jax.Array) -> jax.Array:
    x, k = x[..., None], network["window"]
    for path in network["convs"]:
        update = convolution(x, v[f"lora_a:{path}"], k) @ v[f"lora_b:{path}"]
        x = jax.nn.relu(convolution(x, v[f"kernel:{path}"], k) + update + v[f"dense:{path}/bias"])
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return linear(v, network["head"], x.reshape(x.shape[0], -1))


def layer_norm(v: Values, path: str, x: jax.Array, epsilon: float) -> jax.Array:
    mean = jnp.mean(x, -1, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), -1, keepdims=True) + epsilon)
    return (x - mean) * scale * v[f"rest:{path}/scale"] + v[f"dense:{path}/bias"]


def attention(v: Values, path: str, x: jax.Array, heads: int) -> jax.Array:
    split = (*x.shape[:-1], heads, x.shape[-1] // heads)
    q, k, values = (linear(v, f"{path}/{part}", x).reshape(split) for part in ("query", "key", "value"))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(split[-1]))
    return linear(v, f"{path}/out", jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(x.shape))


def transformer(network: dict[str, Any], v: Values, x: jax.Array) -> jax.Array:
    x = x @ v["rest:embed/kernel"] + v["dense:embed/bias"] + v["rest:positions/embedding"]
    for number in range(network["blocks"]):
        block = f"blocks/{number}"
        normed = layer_norm(v, f"{block}/attention_norm", x, 1e-12)
        x = x + attention(v, f"{block}/attention", normed, network["heads"])
        hidden = jax.nn.gelu(linear(v, f"{block}/up", layer_norm(v, f"{block}/norm", x, 1e-12)), approximate=False)
        x = x + linear(v, f"{block}/down", hidden)
    return linear(v, "head", jnp.mean(layer_norm(v, "norm", x, 1e-6), axis=1))
