"""Causal decoders as tasks: the loss of completions, adapters in every block, perplexities."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autorank_jax as ar
from autorank_jax.adapters.lora import cut, max_ranks, rank_masks
from autorank_jax.evaluation import language_flops
from autorank_jax.models.causal_config import CausalConfig
from autorank_jax.models.causal_lm import init_causal_lm
from autorank_jax.types import Batch, Scored, Tokens
from tests.models.causal_cases import TINY, tiny

RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, 61, (5, 9)), jnp.int32)
TARGETS = jnp.asarray(np.where(RNG.random((5, 9)) < 0.5, RNG.integers(0, 61, (5, 9)), -1), jnp.int32)
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 3 + [0]] * 5, jnp.int32)


@pytest.fixture(scope="module")
def task():
    return ar.task_from_causal_lm(tiny(TINY._replace(depth=2)), max_rank={"*_proj": 3}, chunk=4)


@pytest.fixture(scope="module")
def trained(task):
    """Return a server whose adapters do something."""
    leaves, structure = jax.tree.flatten(task.server.trainable)
    rng = np.random.default_rng(1)
    new = [leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return task.server._replace(trainable=jax.tree.unflatten(structure, new))


def nats(logits, targets):
    log_p = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return np.asarray(jnp.where(targets >= 0, -chosen, 0))


def test_a_merged_decoder_says_what_the_task_says(task, trained):
    assert len(task.server.trainable.adapters) == 7
    assert task.report.unadapted == {"lm_head": "no pattern takes it"}
    inputs = Tokens(IDS, SEGMENTS)
    run = jax.jit(lambda server: task.predict(server.frozen, server.trainable, inputs))
    ours = run(trained)
    assert jnp.max(jnp.abs(ours - run(task.server))) > 0.1
    np.testing.assert_allclose(ours, jax.jit(ar.merge(task, trained).__call__)(inputs), atol=1e-4)


def test_the_mean_over_a_batch_is_that_over_its_tokens(task, trained):
    weight = jnp.asarray([1, 1, 0, 1, 1])
    batch = Batch(Tokens(IDS, SEGMENTS), TARGETS, weight)
    losses = jax.jit(task.loss)(trained.frozen, trained.trainable, batch, jax.random.key(0))
    expected = nats(task.predict(trained.frozen, trained.trainable, batch.inputs), TARGETS)
    real = np.asarray(weight)[:, None] * (np.asarray(TARGETS) >= 0)
    ours = np.sum(np.asarray(losses) * np.asarray(weight)) / 4
    np.testing.assert_allclose(ours, np.sum(expected * real) / np.sum(real), rtol=1e-5)
    nothing = jax.jit(task.loss)(*trained[::-1], batch._replace(targets=-jnp.ones_like(TARGETS)), jax.random.key(0))
    np.testing.assert_array_equal(nothing, 0)


def test_perplexities_are_those_of_the_tokens(task, trained):
    data = ar.from_parts(IDS, TARGETS, [[0, 3, 4], [1]])
    ranks = {path: jnp.asarray([1, 3]) for path in max_ranks(task)}
    state = ar.init_state(trained, ar.aggregators.rbla(), ranks)
    found = jax.jit(ar.evaluation.make_evaluate_language(task, IDS, TARGETS, batch_size=2))(state)
    expected = nats(task.predict(trained.frozen, trained.trainable, IDS), TARGETS)
    counted = np.sum(np.asarray(TARGETS) >= 0, axis=1)
    loss = np.sum(expected) / np.sum(counted)
    np.testing.assert_allclose([found["loss"], found["perplexity"]], [loss, np.exp(loss)], rtol=1e-5)
    masks = rank_masks({path: jnp.asarray(1) for path in ranks}, max_ranks(task))
    lower = cut(trained.trainable, masks)
    first = nats(task.predict(trained.frozen, lower, IDS), TARGETS)
    by_hand = [first[[0, 3, 4]].sum() / counted[[0, 3, 4]].sum(), expected[1].sum() / counted[1]]
    ours = jax.jit(lambda state: ar.evaluation.client_perplexities(task, state, data, batch_size=2))(state)
    np.testing.assert_allclose(ours, np.exp(by_hand), rtol=1e-5)


def test_half_precision_stays_in_the_base(task):
    model = tiny(TINY._replace(depth=2))
    half = model._replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params))
    made = ar.task_from_causal_lm(half, max_rank=3, chunk=4)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(made.server.trainable)}
    assert dtypes == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(made.server.frozen)} == {jnp.dtype(jnp.bfloat16)}
    scored = Scored(IDS, TARGETS)
    shapes = [jax.eval_shape(lambda s, t=t: t.predict(s.frozen, s.trainable, scored), t.server) for t in (task, made)]
    assert {shape.dtype for shape in shapes} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_rank": {"layers/attention/*": 2}}, "that match a layer, got 'layers/attention/*': the candidates are"),
        ({"max_rank": 2, "where": "embed_tokens"}, "can be adapted, got 'embed_tokens'"),
        ({"max_rank": 2, "train_dense": "layers/norm"}, "train_dense patterns"),
    ],
)
def test_patterns_must_match(options, said):
    with pytest.raises(ValueError, match="expected") as caught:
        ar.task_from_causal_lm(tiny(TINY), **options)
    assert said in str(caught.value)


def test_flops_are_those_that_xla_counts_block_by_block():
    config = CausalConfig(vocabulary=128, width=64, depth=1, heads=4, kv_heads=2, head_dim=16, hidden=192)
    tokens = jnp.zeros((2, 32), jnp.int32)
    data = ar.from_parts(tokens, tokens, [[0, 1]])
    task = ar.task_from_causal_lm(init_causal_lm(config), max_rank={"*/k_proj": 8}, checkpoint=False, chunk=32)
    counted, ours = ar.training_flops(task, data, batch_size=2), language_flops(config, task, length=32)
    assert 0.9 < ours.base / counted.base < 1.0  # XLA counts norms and rotations besides
    for path, each in ours.per_rank.items():
        assert each == pytest.approx(counted.per_rank[path], rel=0.02)
    deep = config._replace(depth=5)
    deeper = language_flops(deep, ar.task_from_causal_lm(init_causal_lm(deep), max_rank={"*/k_proj": 8}), length=32)
    logits = 4 * 32 * 64 * 128
    assert deeper.base - logits == pytest.approx(5 * (ours.base - logits))
    assert deeper.per_rank == {path: 5 * each for path, each in ours.per_rank.items()}


def test_the_base_is_never_stacked_over_lanes(task):
    lanes, rule = 3, ar.aggregators.rbla()
    data = ar.from_parts(jnp.zeros((6, 5), jnp.int32), jnp.zeros((6, 5), jnp.int32), np.split(np.arange(6), 3))
    state = ar.init_state(task.server, rule, None, clients=3)
    local = ar.make_local_training(task, optax.sgd(0.1), batch_size=2)
    text = str(jax.make_jaxpr(ar.make_round(local, rule, lanes=lanes))(jax.random.key(0), state, data))
    factors = task.server.trainable.adapters["layers/mlp/up_proj"].lora_a.shape
    assert f"f32[{','.join(map(str, (lanes, *factors)))}]" in text  # adapters are
    for name, kernel in task.server.frozen.kernels.items():
        assert f"[{','.join(map(str, (lanes, *kernel.shape)))}]" not in text, name
        assert f"[{','.join(map(str, (lanes, *kernel.shape[1:])))}]" not in text, name  # nor a block of it
    embedding = task.server.frozen.rest["embed_tokens/embedding"].shape
    assert f"[{','.join(map(str, (lanes, *embedding)))}]" not in text


def test_programs_do_not_grow_with_depth():
    def lines(depth):
        task = ar.task_from_causal_lm(tiny(TINY._replace(depth=depth)), max_rank=3, chunk=4)
        batch = Batch(IDS, TARGETS, jnp.ones(5))

        def loss(trainable):
            return jnp.mean(task.loss(task.server.frozen, trainable, batch, jax.random.key(0)))

        return str(jax.make_jaxpr(jax.grad(loss))(task.server.trainable)).count("\n")

    assert lines(4) == lines(32) > 100
