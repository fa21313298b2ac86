"""Losses of each example, and what is done to inputs before a model sees them."""

import jax
import jax.numpy as jnp
import optax

from autorank_jax.types import Array, PyTree


def classification_loss(logits: Array, labels: Array) -> Array:
    """Return the softmax cross-entropy of each example.

    Args:
        logits: `(b, classes)`.
        labels: `(b,)` integers.

    Returns:
        `(b,)` nats.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))


def regression_loss(outputs: Array, targets: Array) -> Array:
    """Return the mean squared error of each example.

    Args:
        outputs: `(b, ...)`.
        targets: of the same shape, or `(b,)` for outputs `(b, 1)`.

    Returns:
        `(b,)`.
    """
    flat = outputs.reshape(outputs.shape[0], -1)
    return jnp.mean(jnp.square(flat - targets.reshape(flat.shape).astype(flat.dtype)), axis=-1)


def token_loss(logits: Array, tokens: Array) -> Array:
    """Return the mean cross-entropy of the tokens of each example, for language models.

    Args:
        logits: `(b, length, vocabulary)`, of the token at each position.
        tokens: `(b, length)` integers; a negative one is not counted.

    Returns:
        `(b,)` nats per token.
    """
    counted = (tokens >= 0).astype(logits.dtype)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(tokens, 0).astype(jnp.int32))
    return jnp.sum(losses * counted, axis=-1) / jnp.maximum(jnp.sum(counted, axis=-1), 1)


def as_float(inputs: PyTree) -> PyTree:
    """Map uint8 leaves (images) to floats in [0, 1]; leave the others."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x, inputs)
