"""What a federation has learnt: accuracy of the server, by class and of clients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from autorank_jax.adapters.lora import cut, level_widths, max_ranks, rank_level, rank_masks
from autorank_jax.adapters.losses import check_outputs, regression_loss
from autorank_jax.federated.batches import steps_per_epoch, take_batch
from autorank_jax.interface import check_least, checked
from autorank_jax.types import (
    Aggregator,
    Array,
    Client,
    ClientUpdate,
    EvaluateFn,
    FederatedData,
    PyTree,
    Server,
    State,
    Task,
    Trainable,
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
        ValueError: if inputs and targets differ in length or are empty; where labels outnumber the model's outputs.
    """
    check_least("batch_size", batch_size)
    inputs, targets = jax.tree.map(jnp.asarray, (inputs, targets))
    examples = _length(inputs, targets)
    _check_evaluation(_predictor(task, task.server), metrics, inputs, targets)

    def evaluate(state: State) -> dict[str, Array]:
        values = _by_batch(_predictor(task, state.server), (inputs, targets), metrics, batch_size)
        return {name: jnp.sum(value) / examples for name, value in values.items()}

    return evaluate


def _check_evaluation(predict: Callable[[PyTree], Array], metrics: Metrics, inputs: PyTree, targets: PyTree) -> None:
    """Raise an error where the model does not take the inputs, the metrics the targets, or a label has no output."""
    x, y = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), (inputs, targets))
    logits = jax.eval_shape(predict, x)
    jax.eval_shape(metrics, logits, y)
    if metrics is classification_metrics:
        _check_classes(logits.shape, targets)


def _check_classes(logits: tuple[int, ...], labels: Array) -> None:
    """Raise `ValueError` for a label without an output of its own: no rule of indexing makes a number of it."""
    if isinstance(labels, jax.core.Tracer):
        return
    largest = int(np.asarray(labels).max())
    if largest >= logits[1]:
        raise ValueError(
            f"expected a model of at least {largest + 1} outputs for labels up to {largest}, got {logits[1]}, probably "
            "one for fewer classes, or labels counted from 1"
        )


def _length(inputs: PyTree, targets: PyTree) -> int:
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves((inputs, targets))}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"expected inputs and targets of one length >= 1, got {sorted(lengths)}")
    return lengths.pop()


def _predictor(task: Task, server: Server) -> Callable[[PyTree], Array]:
    return lambda inputs: task.predict(server.frozen, server.trainable, inputs)


def _by_batch(
    predict: Callable[[PyTree], Array], examples: PyTree, metrics: Metrics, batch_size: int
) -> dict[str, Array]:
    """Return the metrics of every example, `(batches · batch_size,)`, 0 where the last batch is short."""
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
    """Return the server's accuracy on each class, `(classes,)`; 0 for a class without test examples."""
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
            f"expected label counts of the state's {state.epochs.shape[0]} clients, got shape {label_counts.shape}, "
            "probably statistics of another split"
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


class PersonalScores(NamedTuple):
    """Each client's accuracy on examples of its own that it did not train on."""

    before: Array  # (clients,) of the server cut to the client's rank
    after: Array  # (clients,) after the client's local training
    examples: Array  # (clients,) int32 they were measured on; 0 for clients without any, absent, or diverged


@checked
def with_personal_scores(rule: Aggregator, task: Task, held_out: FederatedData, *, batch_size: int = 64) -> Aggregator:
    """Make a rule measure, in place of aggregating, every client before and after its local training.

    Run one ordinary round with it: the server stays, and `state.clients[1]` holds the `PersonalScores`. Give it the
    rule that the federation was trained with, so that clients start from what that rule hands them.

    Args:
        rule: the rule; its state and what clients keep enter, and nothing of them changes.
        task: the model, a classifier.
        held_out: examples kept from training, in the same order of clients.
        batch_size: examples at a time.

    Returns:
        An aggregator.
    """

    def correct(server: Server, trainable: Trainable, row: Array) -> Array:
        def add(step: Array, total: Array) -> Array:
            batch, _ = take_batch(held_out, row, jnp.zeros(2, jnp.uint32), step, batch_size)
            logits = task.predict(server.frozen, trainable, batch.inputs)
            right = classification_metrics(logits, batch.targets)["accuracy"]
            return total + jnp.sum(right * batch.weight.astype(right.dtype))

        size = held_out.size[row]
        total = lax.fori_loop(0, steps_per_epoch(size, batch_size), add, jnp.zeros((), jnp.result_type(float)))
        return total / jnp.maximum(size, 1).astype(total.dtype)

    def keep(update: ClientUpdate, server: Server) -> tuple[PyTree, PersonalScores]:
        row = update.client.row
        before, after = correct(server, update.start, row), correct(server, update.trained, row)
        return update.client.state[0], PersonalScores(before, after, held_out.size[row])

    def start(server: Server, state: PyTree, client: Client) -> Trainable:
        return rule.start(server, state, client._replace(state=client.state[0]))

    nothing = jnp.zeros((), jnp.result_type(float))
    unknown = PersonalScores(nothing, nothing, jnp.zeros((), jnp.int32))
    return rule._replace(
        start=start,
        summand=lambda update, server, plan: (),  # noqa: ARG005
        update=lambda key, sums, state, server: (server, state),  # noqa: ARG005
        client_init=lambda server: (rule.client_init(server), unknown),
        client_keep=keep,
        exact_plan=False,
        step=None,
        report=lambda sums, before, after: {},  # noqa: ARG005
        client_ranks=lambda ranks, clients: rule.client_ranks(ranks, clients[0]),
    )


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
