"""Evaluation against NumPy: accuracies by class, by label mix and personal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from autorank_jax import aggregators, evaluation
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.aggregators import with_diagnostics
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.federated.data import from_parts
from autorank_jax.models.vision import MLP

RANKS = {"layers/0": np.array([1, 2, 4, 3]), "layers/1": np.array([1, 1, 2, 2])}
SIZES = (5, 9, 3, 7)


@pytest.fixture(scope="module")
def world():
    """A small MLP with random adapters, and data of four clients."""
    rng = np.random.default_rng(0)
    task = task_from_nnx(MLP((6, 8, 3), rngs=nnx.Rngs(0)), max_rank={"layers/0": 4, "layers/1": 2})
    adapters = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), task.server.trainable.adapters)
    server = task.server._replace(trainable=task.server.trainable._replace(adapters=adapters))
    task = task._replace(server=server)
    inputs = rng.normal(size=(sum(SIZES), 6)).astype(np.float32)
    labels = rng.integers(0, 3, sum(SIZES)).astype(np.int32)
    parts = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    state = init_state(server, aggregators.rbla(), RANKS)
    return task, inputs, labels, parts, state


def logits_of(task, inputs, ranks=None):
    """The forward pass in NumPy, with adapters cut to the ranks."""
    x = np.asarray(inputs, np.float64)
    for number in range(2):
        path = f"layers/{number}"
        a, b = (np.asarray(f, np.float64) for f in task.server.trainable.adapters[path])
        r = a.shape[1] if ranks is None else ranks[path]
        kernel = np.asarray(task.server.frozen.kernels[path], np.float64) + a[:, :r] @ b[:r]
        x = x @ kernel + np.asarray(task.server.trainable.dense[f"{path}/bias"], np.float64)
        x = np.maximum(x, 0) if number == 0 else x
    return x


def test_a_model_of_too_few_outputs_is_refused(world):
    task, inputs, labels, _, state = world
    with pytest.raises(ValueError, match="at least 4 outputs for labels up to 3, got 3"):
        jax.jit(evaluation.make_evaluate(task, inputs, labels + 1))(state)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x, y: (x, y - 1), {}, "labels of at least 0, got -1"),
        (lambda x, y: (x * np.float32("nan"), y), {}, "finite test inputs, got NaN"),
        (lambda x, y: (x.tolist(), y), {}, "np.asarray makes arrays of lists"),
        (lambda x, y: (x, y), {"metrics": lambda o, y: jnp.zeros(y.shape)}, "metrics as a dict"),  # noqa: ARG005
        (lambda x, y: (x, y), {"metrics": lambda o, y: {"m": jnp.mean(o)}}, r"got 'm' of shape \(\) for one"),  # noqa: ARG005
    ],
)
def test_odd_test_sets_and_metrics_are_refused(world, change, options, message):
    task, inputs, labels, _, _ = world
    with pytest.raises((ValueError, TypeError), match=message):
        evaluation.make_evaluate(task, *change(np.asarray(inputs), np.asarray(labels)), **options)


def test_a_server_is_no_state(world):
    task, inputs, labels, _, state = world
    with pytest.raises(TypeError, match="expected a state, got a Server"):
        evaluation.make_evaluate(task, inputs, labels)(state.server)


def test_accuracy_and_loss_of_the_server_in_short_batches(world):
    task, inputs, labels, _, state = world
    logits = logits_of(task, inputs)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for batch_size in (5, 24, 1000):
        found = evaluation.make_evaluate(task, inputs, labels, batch_size=batch_size)(state)
        np.testing.assert_allclose(found["accuracy"], np.mean(logits.argmax(1) == labels), rtol=1e-6)
        np.testing.assert_allclose(found["loss"], -log_p[np.arange(len(labels)), labels].mean(), rtol=1e-4)


def test_unequal_lengths_are_refused(world):
    task, inputs, labels, _, _ = world
    with pytest.raises(ValueError, match="expected inputs and targets of one length"):
        evaluation.make_evaluate(task, inputs, labels[:-1])


def test_accuracy_by_class_and_by_label_mix(world):
    task, inputs, labels, parts, state = world
    by_class = evaluation.class_accuracy(task, state.server, inputs, labels, classes=4)  # NumPy's, as they come
    right = logits_of(task, inputs).argmax(1) == labels
    expected = [right[labels == c].mean() if (labels == c).any() else 0 for c in range(4)]
    np.testing.assert_allclose(by_class, expected, rtol=1e-6)

    counts = np.stack([np.bincount(labels[part], minlength=3) for part in parts])
    found = evaluation.label_weighted_accuracy(task, state, counts, inputs, labels, rank_levels=4)
    for client, share in enumerate(counts / counts.sum(1, keepdims=True)):
        ladder = [{"layers/0": q, "layers/1": -(-2 * q // 4)} for q in range(1, 5)]
        cut = next(widths for widths in ladder if all(widths[path] >= RANKS[path][client] for path in widths))
        right = logits_of(task, inputs, cut).argmax(1) == labels
        accuracy = sum(share[c] * right[labels == c].mean() for c in range(3) if (labels == c).any())
        np.testing.assert_allclose(found[client], accuracy, rtol=1e-5)


@pytest.mark.parametrize(
    "wrap", [lambda rule: rule, pytest.param(with_diagnostics, marks=pytest.mark.slow)], ids=["plain", "diagnosed"]
)
def test_personal_scores_before_and_after_training(world, wrap):
    task, inputs, labels, parts, _ = world
    held_parts = [part[:2] for part in parts[:3]] + [parts[3][:0]]
    data = from_parts(inputs, labels, parts)
    held = from_parts(inputs, labels, held_parts, allow_empty=True)
    rule = evaluation.with_personal_scores(wrap(aggregators.rbla()), task, held, batch_size=4)
    local = make_local_training(task, optax.sgd(0.0), batch_size=4)
    state, _ = jax.jit(make_round(local, rule, lanes=2))(jax.random.key(0), init_state(task.server, rule, RANKS), data)
    scores = state.clients[1]
    np.testing.assert_array_equal(scores.examples, [2, 2, 2, 0])
    np.testing.assert_array_equal(scores.before, scores.after)  # a learning rate of 0 changes nothing
    for client in range(3):
        ranks = {path: rank[client] for path, rank in RANKS.items()}
        right = logits_of(task, inputs[held_parts[client]], ranks).argmax(1) == labels[held_parts[client]]
        np.testing.assert_allclose(scores.before[client], right.mean(), rtol=1e-6)
    for new, old in zip(jax.tree.leaves(state.server), jax.tree.leaves(task.server), strict=True):
        np.testing.assert_array_equal(new, old)


def test_clients_without_held_out_examples_do_not_count():
    found = evaluation.summarize_clients(jnp.array([0.9, 0.0, 0.5]), jnp.array([10, 0, 30]))
    np.testing.assert_allclose(found["mean"], 0.7, rtol=1e-6)
    np.testing.assert_allclose(found["weighted_mean"], 0.6, rtol=1e-6)
    np.testing.assert_allclose(found["worst"], 0.5, rtol=1e-6)
    assert evaluation.summarize_clients(jnp.zeros(2), jnp.zeros(2, jnp.int32))["worst"] == 0
