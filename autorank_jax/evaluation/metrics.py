"""What a federation has learnt: accuracy of the server, by class and of clients."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from autorank_jax.adapters.lora import cut, level_widths, max_ranks, rank_level, rank_masks
from autorank_jax.adapters.losses import check_outputs, regression_loss
from autorank_jax.federated.checks import check_numbers
from autorank_jax.interface import check_least, checked, describe
from autorank_jax.types import (
    Array,
    EvaluateFn,
    PyTree,
    Server,
    State,
    Task,
)

Metrics = Callable[[Array, PyTree], dict[str, Array]]
"""`(outputs, targets) -> (b,)` numbers of each example, to be averaged."""


def classification_metrics(logits: Array, labels: Array) -> dict[str, Array]:
    """Return whether each example is right (`accuracy`) and its cross-entropy in nats (`loss`).

    Args:
        logits: `(b, classes)`.
        labels: `(b,)` integers.
    """
    check_outputs("classification_metrics", logits, labels, (2, 1))
    labels = labels.astype(jnp.int32)
    log_p = jax.nn.log_softmax(logits)
    return {
        "accuracy": (jnp.argmax(logits, axis=-1) == labels).astype(log_p.dtype),
        "loss": -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0],
    }


@checked
def regression_metrics(targets: ArrayLike) -> Metrics:
    """Make the metrics of a regression: the share of variance explained (`r2`), and the mean squared error (`loss`).

    `r2 = 1 - Σ (y - ŷ)² / Σ (y - ȳ)²`, the mean of what each example contributes.

    Args:
        targets: `(n,)` or `(n, outputs)` of the whole test set, not all equal: mean and variance are theirs.
    """
    y = jnp.asarray(targets)
    y = y.reshape(y.shape[0], -1)
    variance = jnp.mean(jnp.square(y - jnp.mean(y, axis=0, keepdims=True)))

    def metrics(outputs: Array, targets: PyTree) -> dict[str, Array]:
        loss = regression_loss(outputs, targets)
        return {"r2": 1 - loss / variance, "loss": loss}

    return metrics


@checked
def make_evaluate(
    task: Task, inputs: PyTree, targets: PyTree, *, metrics: Metrics = classification_metrics, batch_size: int = 1000
) -> EvaluateFn:
    """Make the evaluation of the server model on a test set.

    Args:
        task: the model.
        inputs: leaves `(n, ...)`.
        targets: leaves `(n, ...)`.
        metrics: numbers of each example.
        batch_size: examples at a time, which bounds memory.

    Returns:
        `state -> {name: mean}`.

    Raises:
        TypeError: for metrics that are no dict; when called, for what is no state.
        ValueError: if inputs and targets differ in length or are empty, or inputs are not finite; for labels that
            are text or have no output of their own, and metrics of another shape.
    """
    check_least("batch_size", batch_size)
    for name, tree in {"inputs": inputs, "targets": targets}.items():
        for leaf in jax.tree.leaves(tree):
            if isinstance(leaf, np.ndarray):
                check_numbers(name, leaf)
    inputs, targets = jax.tree.map(jnp.asarray, (inputs, targets))
    examples = _length(inputs, targets)
    _check_evaluation(_predictor(task, task.server), metrics, inputs, targets)

    def evaluate(state: State) -> dict[str, Array]:
        if not hasattr(state, "server"):
            raise TypeError(f"expected a state, got {describe(state)}")
        values = _by_batch(_predictor(task, state.server), (inputs, targets), metrics, batch_size)
        return {name: jnp.sum(value) / examples for name, value in values.items()}

    return evaluate


def _check_evaluation(predict: Callable[[PyTree], Array], metrics: Metrics, inputs: PyTree, targets: PyTree) -> None:
    """Raise an error where the model does not take the inputs, the metrics the targets, or a label has no output."""
    x, y = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), (inputs, targets))
    logits = jax.eval_shape(predict, x)
    measured = jax.eval_shape(metrics, logits, y)
    if not isinstance(measured, dict):
        raise TypeError(f"expected metrics as a dict of (b,) numbers, got {describe(measured)}")
    for name, value in measured.items():
        if value.shape != (1,):
            raise ValueError(f"expected metrics of each example, (b,), got {name!r} of shape {value.shape} for one")
    if metrics is classification_metrics:
        _check_classes(logits.shape, targets)
    for leaf in jax.tree.leaves(inputs):
        known = not isinstance(leaf, jax.core.Tracer) and jnp.issubdtype(leaf.dtype, jnp.floating)
        if known and not bool(jnp.all(jnp.isfinite(leaf))):
            raise ValueError("expected finite test inputs, got NaN or infinity in them")


def _check_classes(logits: tuple[int, ...], labels: Array) -> None:
    """Raise `ValueError` for a label without an output of its own: no rule of indexing makes a number of it."""
    if isinstance(labels, jax.core.Tracer):
        return
    least, largest = int(np.asarray(labels).min()), int(np.asarray(labels).max())
    if least < 0:
        raise ValueError(f"expected labels of at least 0, got {least}: leave out examples without a label")
    if largest >= logits[1]:
        raise ValueError(
            f"expected a model of at least {largest + 1} outputs for labels up to {largest}, got {logits[1]}"
            + ", probably labels that count from 1" * (least == 1 and largest == logits[1])
        )


def _length(inputs: PyTree, targets: PyTree) -> int:
    leaves = jax.tree.leaves((inputs, targets))
    if not all(leaf.ndim for leaf in leaves):
        raise ValueError("expected inputs and targets as arrays, got single numbers: np.asarray makes arrays of lists")
    lengths = {leaf.shape[0] for leaf in leaves}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"expected inputs and targets of one length >= 1, got {sorted(lengths)}")
    return lengths.pop()


def _predictor(task: Task, server: Server) -> Callable[[PyTree], Array]:
    return lambda inputs: task.predict(server.frozen, server.trainable, inputs)


def _by_batch(
    predict: Callable[[PyTree], Array], examples: PyTree, metrics: Metrics, batch_size: int
) -> dict[str, Array]:
    """Return the metrics of every example, `(batches · batch_size,)`, 0 where the last batch is short."""
    examples = jax.tree.map(jnp.asarray, examples)
    count = _length(*examples)
    batch_size = min(batch_size, count)
    batches = -(-count // batch_size)

    def one(start: Array) -> dict[str, Array]:
        position = start + jnp.arange(batch_size)
        x, y = jax.tree.map(lambda leaf: leaf[jnp.minimum(position, count - 1)], examples)
        values = metrics(predict(x), y)
        return {name: jnp.where(position < count, value, 0) for name, value in values.items()}

    values = lax.map(one, jnp.arange(batches) * batch_size)
    return {name: value.reshape(-1) for name, value in values.items()}


@checked
def class_accuracy(task: Task, server: Server, inputs: Array, labels: Array, *, classes: int) -> Array:
    """Return the server's accuracy on each class, `(classes,)`; 0 for a class without test examples.

    Args:
        task: the model.
        server: that is tested.
        inputs: `(n, ...)` test inputs.
        labels: `(n,)` test labels, below `classes`.
        classes: how many there are.
    """
    correct = _by_batch(_predictor(task, server), (inputs, labels), classification_metrics, 1000)["accuracy"]
    members = jax.nn.one_hot(labels.astype(jnp.int32), classes, dtype=correct.dtype)
    return members.T @ correct[: labels.shape[0]] / jnp.maximum(jnp.sum(members, axis=0), 1)


@checked
def label_weighted_accuracy(
    task: Task, state: State, label_counts: Array, inputs: Array, labels: Array, *, rank_levels: int = 4
) -> Array:
    """Return each client's accuracy as its label mix predicts it: `Σ_c p_kc · accuracy_c(server at the client's rank)`.

    The server is cut to the client's rank level and tested once per level, with no pass per client. Under feature skew
    (clients whose images differ within a class) this is not the client's own accuracy.

    Args:
        task: the model.
        state: for the server and the ranks.
        label_counts: `(clients, classes)`.
        inputs: `(n, ...)` test inputs.
        labels: `(n,)` test labels.
        rank_levels: at how many ranks the server is tested.

    Returns:
        `(clients,)` in [0, 1].

    Raises:
        ValueError: for label counts of other clients than the state's.
    """
    if label_counts.ndim != 2 or label_counts.shape[:1] != state.epochs.shape:
        raise ValueError(
            f"expected label counts of the state's {state.epochs.shape[0]} clients, got shape {label_counts.shape}"
        )
    check_least("rank_levels", rank_levels)
    widest = max_ranks(state.server.trainable)
    ladder = level_widths(widest, rank_levels)
    by_class = []
    for widths in ladder:
        masks = rank_masks({p: jnp.array(w) for p, w in widths.items()}, widest)
        server = state.server._replace(trainable=cut(state.server.trainable, masks))
        by_class.append(class_accuracy(task, server, inputs, labels, classes=label_counts.shape[1]))
    level = rank_level(state.ranks, ladder, label_counts.shape[0])
    table = jnp.stack(by_class)
    counts = label_counts.astype(table.dtype)
    shares = counts / jnp.maximum(jnp.sum(counts, axis=1, keepdims=True), 1)
    return jnp.sum(shares * table[level], axis=1)


@checked
def summarize_clients(values: Array, examples: Array) -> dict[str, Array]:
    """Return the mean over clients, the mean weighted by examples, and the worst client.

    Args:
        values: `(clients,)`.
        examples: `(clients,)` that each value was measured on; clients without any do not count.

    Returns:
        `mean`, `weighted_mean` and `worst`, 0 where no client has examples.
    """
    measured, weight = examples > 0, examples.astype(values.dtype)
    worst = jnp.min(values, where=measured, initial=jnp.inf)
    return {
        "mean": jnp.sum(values, where=measured) / jnp.maximum(jnp.sum(measured), 1).astype(values.dtype),
        "weighted_mean": jnp.sum(values * weight, where=measured) / jnp.maximum(jnp.sum(weight), 1),
        "worst": jnp.where(jnp.any(measured), worst, 0),
    }
