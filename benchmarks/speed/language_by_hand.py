"""Training steps of a Llama with an adapter for each client, as somebody would write them by hand: a yardstick.

Nothing of this package is in it: no ranks, masks, queue, rule or checks; clients are as many as lanes, all of one rank,
and every step trains all of them. Blocks are one scan and recomputed in the backward pass, logits exist for 128
positions at a time, the base has the checkpoint's type, adapters and momentum are float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from autorank_jax.models.causal_config import CausalConfig

CHUNK = 128
Shapes = dict[str, Any]


def matrices(config: CausalConfig) -> dict[str, tuple[int, int]]:
    """Return the sides of a block's matrices."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    width, hidden = config.width, config.hidden
    return {
        "q": (width, queries), "k": (width, keys), "v": (width, keys), "o": (queries, width),
        "gate": (width, hidden), "up": (width, hidden), "down": (hidden, width),
    }  # fmt: skip


def arguments(config: CausalConfig, dtype: Any, *, lanes: int, texts: int, length: int, rank: int) -> tuple[Any, ...]:
    """Return the shapes of adapters, momentum, base and the texts of ten steps."""

    def shape(*sizes: int, of: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(sizes, of)

    depth, adapters, base = config.depth, {}, {}
    for name, (d_in, d_out) in matrices(config).items():
        base[name] = shape(depth, d_in, d_out, of=dtype)
        adapters[name] = shape(lanes, depth, d_in, rank), shape(lanes, depth, rank, d_out)
    base |= {name: shape(depth, config.width, of=dtype) for name in ("before_attention", "before_feed")}
    outer = {"tokens": shape(config.vocabulary, config.width, of=dtype), "norm": shape(config.width, of=dtype)}
    if not config.tied:
        outer["output"] = shape(config.width, config.vocabulary, of=dtype)
    return adapters, adapters, (base, outer), shape(10, lanes, texts, length, of=jnp.int32)


def make_training(config: CausalConfig, *, rotary: bool) -> Callable[..., Any]:
    """Make `(adapters, momentum, base, texts) -> (adapters, momentum)`; `rotary`: queries and keys are turned."""

    def norm(x: Any, scale: Any) -> Any:
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + config.norm_eps)).astype(x.dtype) * scale

    def turned(x: Any) -> Any:
        if not rotary:
            return x
        half = x.shape[-1] // 2
        rate = config.rope.theta ** (-jnp.arange(half) / half)
        angle = jnp.arange(x.shape[1])[:, None, None] * rate
        left, right = jnp.split(x.astype(jnp.float32), 2, -1)
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)

    def block(x: Any, weights: tuple[Mapping[str, Any], Mapping[str, Any]]) -> tuple[Any, None]:
        kernels, factors = weights

        def linear(x: Any, name: str) -> Any:
            a, b = (factor.astype(x.dtype) for factor in factors[name])
            return x @ kernels[name] + (x @ a) @ b

        h = norm(x, kernels["before_attention"])
        q, k, v = (linear(h, name).reshape(*h.shape[:2], -1, config.head_dim) for name in "qkv")
        attended = jax.nn.dot_product_attention(turned(q), turned(k), v, is_causal=True)
        x = x + linear(attended.reshape(*h.shape[:2], -1), "o")
        h = norm(x, kernels["before_feed"])
        return x + linear(jax.nn.silu(linear(h, "gate")) * linear(h, "up"), "down"), None

    def loss(adapters: Shapes, base: tuple[Shapes, Shapes], ids: Any) -> Any:
        blocks, outer = base
        x = jax.lax.scan(jax.checkpoint(block), outer["tokens"][ids], (blocks, adapters))[0]
        x = norm(x, outer["norm"])

        @jax.checkpoint
        def chunk(total: Any, part: tuple[Any, Any]) -> tuple[Any, None]:
            x, following = part
            logits = (x @ outer.get("output", outer["tokens"].T)).astype(jnp.float32)
            chosen = jnp.take_along_axis(logits, following[..., None], -1)[..., 0]
            return total + jnp.sum(jax.nn.logsumexp(logits, -1) - chosen), None

        def split(leaf: Any) -> Any:
            size = min(CHUNK, ids.shape[1])
            return jnp.moveaxis(leaf.reshape(ids.shape[0], -1, size, *leaf.shape[2:]), 1, 0)

        total, _ = jax.lax.scan(chunk, jnp.zeros(()), (split(x), split(jnp.roll(ids, -1, 1))))
        return total / ids.size

    def train(adapters: Shapes, momentum: Shapes, base: tuple[Shapes, Shapes], texts: Any) -> Any:
        def step(carry: tuple[Shapes, Shapes], ids: Any) -> tuple[tuple[Shapes, Shapes], None]:
            gradients = jax.vmap(jax.grad(loss), in_axes=(0, None, 0))(carry[0], base, ids)
            momentum = jax.tree.map(lambda m, g: 0.9 * m + g, carry[1], gradients)
            return (jax.tree.map(lambda a, m: a - 0.01 * m, carry[0], momentum), momentum), None

        return jax.lax.scan(step, (adapters, momentum), texts)[0]

    return train
