"""Adapters on any Flax model: start, merge, rank masks, precision, errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from autorank_jax import aggregators
from autorank_jax.adapters.lora import cut, max_ranks, narrow, rank_masks
from autorank_jax.adapters.losses import token_loss
from autorank_jax.adapters.low_rank import einsum_form
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.adapters.task import merge
from autorank_jax.models.transformer import Decoder, Size, Transformer
from autorank_jax.models.vision import CNN, MLP
from autorank_jax.types import Adapter, Batch, Client, ClientUpdate, Plan

SIZE = Size(width=8, depth=1, heads=2, hidden=12, length=6)
IMAGES = jax.random.uniform(jax.random.key(0), (3, 8, 8))
IDS = jnp.arange(18, dtype=jnp.int32).reshape(3, 6) % 11


class Attentive(nnx.Module):
    """Flax's own attention, an einsum layer, and an embedding that is tied to the output."""

    def __init__(self, *, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attend = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
        self.heads = nnx.Einsum("bti,iho->btoh", (8, 2, 4), (2, 4), rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        x = x + self.attend(x)
        return self.embed.attend(self.heads(x).reshape(x.shape))


class Strided(nnx.Module):
    """Convolutions of every padding, strides and dilation, and a linear layer over two axes."""

    def __init__(self, *, rngs):
        self.first = nnx.Conv(1, 2, (3, 3), strides=2, padding=1, rngs=rngs)
        self.second = nnx.Conv(2, 3, (2, 2), padding="VALID", kernel_dilation=2, rngs=rngs)
        self.general = nnx.LinearGeneral((2, 3), (2, 2), axis=(1, -1), rngs=rngs)

    def __call__(self, images):
        return self.general(self.second(self.first(images[..., None])))


MODELS = {
    "mlp": (lambda: MLP((64, 6, 4), rngs=nnx.Rngs(0)), IMAGES),
    "cnn": (lambda: CNN((1, 2, 3), 4, image=(8, 8), rngs=nnx.Rngs(0)), IMAGES),
    "strided": (lambda: Strided(rngs=nnx.Rngs(0)), IMAGES),
    "attention": (lambda: Attentive(rngs=nnx.Rngs(0)), IDS),
    "transformer": (lambda: Transformer(8, 4, SIZE._replace(length=8), rngs=nnx.Rngs(0)), IMAGES),
    "decoder": (lambda: Decoder(11, SIZE, rngs=nnx.Rngs(0)), IDS),
}


SLOW = ("cnn", "attention")  # what they hold, the others hold in smaller models


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS]
)
def case(request):
    """A model, its inputs, and a task of it with adapters everywhere."""
    make, inputs = MODELS[request.param]
    model = make()
    task = task_from_nnx(model, max_rank=3)
    model.eval()
    return model, inputs, task


def moved(tree, seed=1, by=0.3):
    """Add normal numbers to every leaf."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [leaf + by * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, new)


def with_trainable(task, trainable):
    return task.server._replace(trainable=trainable)


def predict(task, server, inputs):
    return jax.jit(task.predict)(server.frozen, server.trainable, inputs)


def test_adapted_model_starts_as_the_original(case):
    model, inputs, task = case
    adapted = task.predict(task.server.frozen, task.server.trainable, inputs)  # op by op: jit may fuse otherwise
    np.testing.assert_array_equal(adapted, model(inputs))


def test_merged_model_gives_the_adapted_outputs_with_plain_layers(case):
    model, inputs, task = case
    server = with_trainable(task, moved(task.server.trainable))
    merged = merge(task, server)
    merged.eval()
    adapted = predict(task, server, inputs)
    np.testing.assert_allclose(jax.jit(merged)(inputs), adapted, rtol=1e-5, atol=1e-5)
    assert np.abs(adapted - predict(task, task.server, inputs)).max() > 0.01
    types = [(path, type(module)) for path, module in nnx.iter_modules(merged)]
    assert types == [(path, type(module)) for path, module in nnx.iter_modules(model)]


def test_rank_masks_equal_truncation(case):
    _, inputs, task = case
    server = with_trainable(task, moved(task.server.trainable))
    ranks = {path: 1 + number % 2 for number, path in enumerate(sorted(server.trainable.adapters))}
    masks = rank_masks({p: jnp.array(r) for p, r in ranks.items()}, max_ranks(server.trainable))
    masked = predict(task, with_trainable(task, cut(server.trainable, masks)), inputs)
    truncated = predict(task, with_trainable(task, narrow(server.trainable, ranks)), inputs)
    np.testing.assert_allclose(masked, truncated, rtol=1e-5, atol=1e-6)
    assert np.abs(masked - predict(task, server, inputs)).max() > 1e-3


def test_positions_beyond_the_rank_have_no_gradient(case):
    _, inputs, task = case
    masks = rank_masks(dict.fromkeys(task.server.trainable.adapters, jnp.array(2)), max_ranks(task.server.trainable))
    trainable = cut(moved(task.server.trainable), masks)
    grads = jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(task.predict(task.server.frozen, t, inputs)))))(trainable)
    for path, adapter in grads.adapters.items():
        assert not adapter.lora_a[:, 2:].any(), path
        assert not adapter.lora_b[2:].any(), path
        assert adapter.lora_a[:, :2].any(), path
        assert adapter.lora_b[:2].any(), path


def test_base_kernels_are_matrices(case):
    _, _, task = case
    for path, adapter in task.server.trainable.adapters.items():
        assert task.server.frozen.kernels[path].shape == (adapter.lora_a.shape[0], adapter.lora_b.shape[1])


@pytest.mark.parametrize(("equation", "shape"), [("...i,oi->...o", (5, 3)), ("bij,oij->bo", (5, 2, 3))])
def test_einsum_kernels_are_transposed_inputs_first(equation, shape):
    form = einsum_form(equation, shape)
    weight = jnp.arange(math.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(form.matrix(weight), weight.reshape(5, -1).T)
    np.testing.assert_array_equal(form.weight(form.matrix(weight)), weight)


@pytest.mark.parametrize("equation", ["bhi,hio->bho", "bi,ii->bi", "bij,io->bo", "bi,i->b", None])
def test_einsums_that_are_no_matrix_are_refused(equation):
    with pytest.raises(ValueError, match="expected an e"):
        einsum_form(equation, (3, 3))


def test_einsum_refuses_another_equation_at_call_time():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Einsum("bi,io->bo", (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.layer(x, "bi,oi->bo")

    task = task_from_nnx(Model(nnx.Rngs(0)), max_rank=1)
    with pytest.raises(ValueError, match="own equation"):
        predict(task, task.server, jnp.ones((1, 3)))


def test_where_takes_patterns_and_predicates():
    model = Attentive(rngs=nnx.Rngs(0))
    by_pattern = task_from_nnx(model, max_rank={"attend/*": 2, "*": 4}, where=("attend/*", "heads"))
    ranks = max_ranks(by_pattern.server.trainable)
    assert ranks == {"attend/key": 2, "attend/out": 2, "attend/query": 2, "attend/value": 2, "heads": 4}
    by_predicate = task_from_nnx(model, max_rank=4, where=lambda _, layer: isinstance(layer, nnx.Embed))
    assert max_ranks(by_predicate.server.trainable) == {"embed": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rank": {"atend/*": 2}}, r"'atend/\*': the candidates are \['attend/key'"),
        ({"max_rank": 2, "where": "nothing"}, "'nothing': the candidates are"),
        (
            {"max_rank": 2, "where": lambda *_: False},
            "predicate `where` that takes some layer, got none of 'attend/key'",
        ),
        ({"max_rank": {"attend": 2}}, r"which matches 'attend' \(MultiHeadAttention\)"),
        ({"max_rank": 0}, "whole numbers >= 1, got 0"),
        ({"max_rank": 0.5}, "whole number.*got 0.5"),
        ({"max_rank": 2, "train_dense": "head/*"}, r"match a parameter that is not adapted, got 'head/\*'"),
        ({"max_rank": 2, "checkpoint": "blocks/*"}, r"match a module, got 'blocks/\*'"),
    ],
)
def test_mistakes_name_the_candidates(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        task_from_nnx(Attentive(rngs=nnx.Rngs(0)), **options)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda rngs: nnx.Conv(4, 4, (3,), feature_group_count=4, rngs=rngs), "feature_group_count=1.*got 4"),
        (lambda rngs: nnx.Conv(4, 4, (3,), padding="CIRCULAR", rngs=rngs), "got 'CIRCULAR'"),
        (lambda rngs: nnx.LinearGeneral(4, 4, batch_axis={0: 2}, rngs=rngs), "without batch_axis"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named(layer, message):
    with pytest.raises(ValueError, match="layer 'layers/0': expected .*" + message):
        task_from_nnx(nnx.Sequential(layer(nnx.Rngs(0))), max_rank=2)


def test_weights_shared_between_layers_are_refused():
    model = MLP((4, 4, 4), rngs=nnx.Rngs(0))
    model.layers[1].kernel = model.layers[0].kernel
    with pytest.raises(ValueError, match="weights of their own, got 'layers/1'"):
        task_from_nnx(model, max_rank=2)


def test_a_layer_alone_is_a_model():
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    task = task_from_nnx(layer, max_rank=2, train_dense="bias")
    server = with_trainable(task, moved(task.server.trainable))
    np.testing.assert_allclose(
        merge(task, server)(jnp.ones((1, 3))), predict(task, server, jnp.ones((1, 3))), rtol=1e-5
    )


class Normed(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))


def test_statistics_are_refused_or_frozen():
    model = Normed(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"mutable statistics, got 'norm/mean'.*frozen_statistics=True"):
        task_from_nnx(model, max_rank=2)
    task = task_from_nnx(model, max_rank=2, frozen_statistics=True, loss=lambda outputs, _: outputs.sum(-1))
    x = jax.random.normal(jax.random.key(1), (5, 4))
    batch = Batch(x, jnp.zeros(5), jnp.ones(5))
    in_training = task.loss(task.server.frozen, task.server.trainable, batch, jax.random.key(0))
    np.testing.assert_allclose(in_training, predict(task, task.server, x).sum(-1), rtol=1e-6)


def losses(task, seed=0):
    batch = Batch(IDS, IDS, jnp.ones(3))
    return jax.jit(task.loss)(task.server.frozen, moved(task.server.trainable), batch, jax.random.key(seed))


@pytest.mark.slow
def test_checkpointing_changes_no_number():
    model = Decoder(11, SIZE._replace(dropout=0.3), rngs=nnx.Rngs(0))
    plain, checkpointed = (task_from_nnx(model, max_rank=2, loss=token_loss, checkpoint=c) for c in ((), "blocks/*"))
    np.testing.assert_allclose(losses(plain), losses(checkpointed), rtol=1e-6)
    assert not np.array_equal(losses(checkpointed), losses(checkpointed, seed=1))  # dropout follows the key

    def gradient(task):
        batch = Batch(IDS, IDS, jnp.ones(3))
        return jax.jit(jax.grad(lambda t: task.loss(task.server.frozen, t, batch, jax.random.key(0)).sum()))

    values = moved(plain.server.trainable)
    for a, b in zip(*(jax.tree.leaves(gradient(t)(values)) for t in (plain, checkpointed)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    recomputed = ["remat" in str(jax.make_jaxpr(gradient(task))(values)) for task in (plain, checkpointed)]
    assert recomputed == [False, True]


def test_small_merges_add_up_in_mixed_precision():
    task = task_from_nnx(MLP((6, 5, 3), rngs=nnx.Rngs(0)), max_rank=2, compute_dtype=jnp.bfloat16)
    rule, server, merges = aggregators.flora(), task.server, 500
    small = {p: Adapter(a.lora_a, jnp.full_like(a.lora_b, 1e-4)) for p, a in server.trainable.adapters.items()}
    masks = {path: jnp.ones(2) for path in small}
    client = Client(jnp.zeros((), jnp.int32), masks, jnp.ones(()), ())
    update = ClientUpdate(server.trainable._replace(adapters=small), server.trainable, client)

    def merge_once(_, server):
        sums = rule.summand(update, server, Plan(masks, jnp.ones(()), jnp.ones(())))
        return rule.update(jax.random.key(0), sums, rule.init(task.server), server)[0]

    after = jax.jit(lambda server: jax.lax.fori_loop(0, merges, merge_once, server))(server)
    for path, adapter in small.items():
        want = merges * np.asarray(adapter.lora_a, np.float64) @ np.asarray(adapter.lora_b, np.float64)
        moved = np.asarray(after.frozen.kernels[path], np.float64) - server.frozen.kernels[path]
        assert np.linalg.norm(moved - want) < 1e-3 * np.linalg.norm(want)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_mixed_precision_keeps_what_is_trained_in_float32():
    model = Decoder(11, SIZE, rngs=nnx.Rngs(0))
    exact, half = (task_from_nnx(model, max_rank=2, loss=token_loss, compute_dtype=d) for d in (None, jnp.bfloat16))
    assert {k.dtype for k in half.server.frozen.kernels.values()} == {jnp.dtype(jnp.float32)}
    floats = [v for v in half.server.frozen.rest.values() if jnp.issubdtype(v.dtype, jnp.floating)]
    assert {v.dtype for v in floats} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(half.server.trainable)} == {jnp.dtype(jnp.float32)}
    outputs = jax.make_jaxpr(lambda x: half.predict(half.server.frozen, half.server.trainable, x))(IDS)
    products = [e for e in outputs.eqns if e.primitive.name == "dot_general"]
    assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype(jnp.bfloat16)}
    assert predict(half, half.server, IDS).dtype == jnp.float32
    np.testing.assert_allclose(losses(half), losses(exact), rtol=0.03)
    batch = Batch(IDS, IDS, jnp.ones(3))
    grad = jax.grad(lambda t: half.loss(half.server.frozen, t, batch, jax.random.key(0)).sum())
    grads = jax.eval_shape(grad, half.server.trainable)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
