"""Losses of each example, and what is done to inputs before a model sees them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from autorank_jax.interface import describe
from autorank_jax.types import Array, PyTree


def classification_loss(logits: Array, labels: Array) -> Array:
    """Return the softmax cross-entropy of each example.

    Args:
        logits: `(b, classes)`.
        labels: `(b,)` integers.

    Returns:
        `(b,)` nats; NaN for a label without an output, negative ones too.
    """
    check_outputs("classification_loss", logits, labels, (2, 1))
    most = jnp.iinfo(jnp.int32).max  # a negative label becomes a large one: indexing would count it from the end
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32) & most)


def regression_loss(outputs: Array, targets: Array) -> Array:
    """Return the mean squared error of each example.

    Args:
        outputs: `(b, ...)`.
        targets: of the same shape, or `(b,)` for outputs `(b, 1)`.

    Returns:
        `(b,)`.
    """
    check_outputs("regression_loss", outputs, targets)
    size, wanted = outputs.size, targets.size
    if size != wanted:
        raise ValueError(
            f"regression_loss: expected outputs and targets of one shape, got {outputs.shape} and {targets.shape}"
        )
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
    check_outputs("token_loss", logits, tokens, (3, 2))
    counted = (tokens >= 0).astype(logits.dtype)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(tokens, 0).astype(jnp.int32))
    return jnp.sum(losses * counted, axis=-1) / jnp.maximum(jnp.sum(counted, axis=-1), 1)


def check_outputs(name: str, outputs: Any, targets: Any, axes: tuple[int, int] | None = None) -> None:
    """Raise an error unless outputs and targets are one array each, of the numbers of axes.

    Raises:
        TypeError: for models that return several arrays.
        ValueError: for other numbers of axes, other examples, or targets that are no integers where axes are given.
    """
    for what, value in (("outputs", outputs), ("targets", targets)):
        if not hasattr(value, "ndim"):
            raise TypeError(
                f"{name}: expected {what} as one array, got {describe(value)}: a loss of your own chooses one of "
                "several, loss=lambda outputs, targets: ..."
            )
    if axes is not None and (outputs.ndim, targets.ndim) != axes:
        swapped = jnp.issubdtype(outputs.dtype, jnp.integer) and jnp.issubdtype(targets.dtype, jnp.floating)
        cause = ", probably the two swapped" if swapped else ""
        if axes == (2, 1) and outputs.shape == targets.shape:
            cause = ": argmax(axis=-1) makes labels of one-hot targets, others are for regression_loss"
        raise ValueError(
            f"{name}: expected outputs of {axes[0]} axes and targets of {axes[1]}, got shapes {outputs.shape} and "
            f"{targets.shape}{cause}"
        )
    if axes is not None and outputs.shape[: axes[1]] != targets.shape:
        raise ValueError(
            f"{name}: expected targets of shape {outputs.shape[: axes[1]]}, as the outputs {outputs.shape} have, got "
            f"{targets.shape}"
        )
    if axes is not None and jnp.issubdtype(targets.dtype, jnp.floating):
        raise ValueError(
            f"{name}: expected integer targets, got {targets.dtype}: astype(int) makes labels of whole numbers, others "
            "are for regression_loss"
        )


def as_float(inputs: PyTree) -> PyTree:
    """Map uint8 leaves (images) to floats in [0, 1]; leave the others."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x, inputs)
