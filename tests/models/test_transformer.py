"""Transformers: shapes, masks, causality, pretrained weights, learning, and memory that does not grow with the base."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from autorank_jax import aggregators
from autorank_jax.adapters.lora import max_ranks
from autorank_jax.adapters.losses import regression_loss, token_loss
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state, simulate
from autorank_jax.federated.data import from_parts
from autorank_jax.models.bert import LAYERS, bert_name, load_bert, load_tokenizer
from autorank_jax.models.transformer import MINILM, Decoder, Encoder, Size, TextClassifier, Transformer, mean_pool

SIZE = Size(width=8, depth=2, heads=2, hidden=12, length=8)


def texts(rows, length=6, vocabulary=11):
    ids = np.arange(rows * length).reshape(rows, length) % vocabulary
    mask = np.arange(length)[None] < (length - np.arange(rows) % 3)[:, None]
    return {"ids": jnp.asarray(ids, jnp.int32), "mask": jnp.asarray(mask)}


@pytest.fixture(scope="module")
def encoder():
    """A small encoder, compiled."""
    model = Encoder(11, SIZE, rngs=nnx.Rngs(0))
    return model, jax.jit(model)


def test_padding_changes_no_embedding(encoder):
    _, run = encoder
    batch = texts(3)
    longer = {name: jnp.pad(leaf, ((0, 0), (0, 2))) for name, leaf in batch.items()}
    a, b = mean_pool(run(batch), batch["mask"]), mean_pool(run(longer), longer["mask"])
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    other = batch | {"ids": jnp.where(batch["mask"], batch["ids"], 5)}  # what stands in the padding does not count
    np.testing.assert_allclose(a, mean_pool(run(other), batch["mask"]), rtol=1e-5, atol=1e-6)


def test_words_and_order_change_the_embedding(encoder):
    _, run = encoder
    batch = texts(1)
    plain = mean_pool(run(batch), batch["mask"])
    for ids in (batch["ids"].at[0, 2].set(9), batch["ids"][:, ::-1]):
        assert np.abs(mean_pool(run(batch | {"ids": ids}), batch["mask"]) - plain).max() > 1e-3


def test_the_decoder_is_causal_and_the_encoder_is_not(encoder):
    ids = texts(1)["ids"]
    changed = ids.at[0, 4].set(10)
    decoder = jax.jit(Decoder(11, SIZE, rngs=nnx.Rngs(0)))
    a, b = decoder(ids), decoder(changed)
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert np.abs(a[:, 4:] - b[:, 4:]).max() > 1e-3
    mask = jnp.ones_like(ids)
    a, b = (encoder[1]({"ids": i, "mask": mask}) for i in (ids, changed))
    assert np.abs(a[:, :4] - b[:, :4]).max() > 1e-4


def test_every_layer_of_the_encoder_has_a_name(encoder):
    model, _ = encoder
    layers = ["/".join(map(str, p)) for p, m in nnx.iter_modules(model) if isinstance(m, nnx.Linear | nnx.Embed)]
    names = [bert_name(path) for path in layers]
    assert len(set(names)) == len(names) == 3 + 6 * SIZE.depth
    with pytest.raises(ValueError, match=r"one of .*got 'blocks/0/attn'"):
        bert_name("blocks/0/attn")


def save_bert(folder, model, prefix=""):
    """Write an encoder's weights as Hugging Face does."""
    safetensors = pytest.importorskip("safetensors.numpy", reason="the package safetensors is not installed")
    tensors = {}
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *layer, leaf = map(str, path)
        array = np.asarray(value.get_value())
        name = f"{prefix}{bert_name('/'.join(layer))}.{'bias' if leaf == 'bias' else 'weight'}"
        tensors[name] = np.ascontiguousarray(array.T if leaf == "kernel" else array)
    safetensors.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_loading_gives_back_the_encoder(tmp_path, encoder, prefix):
    model, run = encoder
    save_bert(tmp_path, model, prefix)
    loaded = load_bert(tmp_path, heads=SIZE.heads)
    batch = texts(2)
    np.testing.assert_array_equal(jax.jit(loaded)(batch), run(batch))
    other = load_bert(tmp_path, heads=4)
    assert np.abs(jax.jit(other)(batch) - run(batch)).max() > 1e-4


def test_mistakes_in_files_are_named(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="the package safetensors is not installed")
    with pytest.raises(ValueError, match="which holds none"):
        load_bert(tmp_path)
    safetensors.save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"BERT encoder in .*got \['weight'\]"):
        load_bert(tmp_path)
    assert set(LAYERS) >= {"words", "norm"}


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="divisible by the heads, got 8 and 3"):
        Transformer(4, 2, SIZE._replace(heads=3), rngs=nnx.Rngs(0))


def test_tokenizer_cuts_and_pads(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    words = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "film": 4}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    tokens = load_tokenizer(tmp_path)(["good film", "bad bad bad film", "odd"], length=3)
    np.testing.assert_array_equal(tokens["ids"], [[2, 4, 0], [3, 3, 3], [1, 0, 0]])
    np.testing.assert_array_equal(tokens["mask"], [[1, 1, 0], [1, 1, 1], [1, 0, 0]])


GOLDEN = {  # first numbers of the embeddings that transformers 5.23 gives, before they are normalised
    "The film was a delight from start to finish.": [-0.223510, 0.103025, -0.081102, 0.084800],
    "A dull, overlong mess.": [-0.140485, 0.056371, 0.261885, 0.213447],
    "x": [-0.623240, -0.407394, -0.147560, -0.294063],
}


def test_minilm_gives_the_reference_embeddings():
    pytest.importorskip("safetensors", reason="the package safetensors is not installed")
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    folder = Path(os.environ.get("AUTORANK_JAX_DATA", "")) / "minilm"
    if not folder.is_dir():
        pytest.skip("AUTORANK_JAX_DATA holds no folder minilm")
    tokens = jax.tree.map(jnp.asarray, load_tokenizer(folder)(list(GOLDEN), length=24))
    embeddings = mean_pool(jax.jit(load_bert(folder))(tokens), tokens["mask"])
    np.testing.assert_allclose(embeddings[:, :4], np.array(list(GOLDEN.values())), atol=1e-4)


def federate(task, inputs, targets, *, clients=3, rounds=3, rate=0.3):
    """Train a few rounds and return the mean loss of each."""
    parts = np.array_split(np.arange(len(jax.tree.leaves(inputs)[0])), clients)
    data = from_parts(inputs, targets, parts)
    training = make_local_training(task, lambda h: optax.sgd(h["learning_rate"]), batch_size=4)
    rule = aggregators.rbla()
    ranks = {p: jnp.clip(1 + jnp.arange(clients), 1, width) for p, width in max_ranks(task.server.trainable).items()}
    state = init_state(task.server, rule, ranks, learning_rate=rate, local_epochs=2)
    run = jax.jit(lambda s: simulate(jax.random.key(0), make_round(training, rule), s, data, rounds=rounds))
    return np.asarray(run(state)[1].info.loss)


@pytest.mark.slow
def test_texts_are_pytrees_through_a_federation():
    batch = texts(18)
    model = TextClassifier(Encoder(11, SIZE._replace(depth=1), rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(1))
    task = task_from_nnx(model, max_rank={"encoder/blocks/*": 2}, train_dense="head/*")
    losses = federate(task, jax.tree.map(np.asarray, batch), np.asarray(batch["ids"][:, 0] % 2))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
def test_causal_language_model_learns_in_a_federation():
    ids = np.asarray(texts(12, length=8, vocabulary=5)["ids"])
    task = task_from_nnx(Decoder(5, SIZE._replace(depth=1), rngs=nnx.Rngs(0)), max_rank=3, loss=token_loss)
    losses = federate(task, ids[:, :-1], ids[:, 1:])
    assert losses[-1] < 0.8 * losses[0]


def test_token_loss_leaves_out_negative_tokens():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 4))
    tokens = jnp.array([[1, 2, -1], [-1, -1, -1]])
    log_p = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(token_loss(logits, tokens), [-(log_p[0, 0, 1] + log_p[0, 1, 2]) / 2, 0], rtol=1e-6)


def test_regression_loss_is_the_mean_squared_error():
    np.testing.assert_allclose(regression_loss(jnp.array([[1.0], [3.0]]), jnp.array([0.0, 1.0])), [1.0, 4.0])
    np.testing.assert_allclose(regression_loss(jnp.ones((1, 2)), jnp.array([[1.0, 3.0]])), [2.0])


@pytest.mark.slow
def test_sixty_four_lanes_of_minilm_fit_in_four_gibibytes():
    """64 copies of the base alone would take 5.4 GiB; batch 4, 32 tokens, rank 8 on every layer of the blocks."""
    lanes, rank = 64, 8
    shapes = jax.eval_shape(lambda: nnx.state(Encoder(30_522, MINILM, rngs=nnx.Rngs(0))))
    base = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes) if leaf.dtype == jnp.float32)
    assert lanes * base > 5 * 2**30
    model = TextClassifier(Encoder(30_522, MINILM, rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(0))
    layers = {f"encoder/blocks/*/{name}": rank for name in ("attention/*", "up", "down")}
    task = task_from_nnx(model, max_rank=layers, train_dense="head/*")
    rows = 4 * lanes
    inputs = {"ids": np.zeros((rows, 32), np.int32), "mask": np.ones((rows, 32), bool)}
    data = from_parts(inputs, np.zeros(rows, np.int32), np.split(np.arange(rows), lanes))
    training = make_local_training(task, lambda h: optax.sgd(h["learning_rate"]), batch_size=4)
    ranks = {path: jnp.full(lanes, rank) for path in task.server.trainable.adapters}
    state = init_state(task.server, aggregators.rbla(), ranks)
    program = jax.jit(make_round(training, aggregators.rbla(), lanes=lanes))
    memory = program.lower(jax.random.key(0), state, data).compile().memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    print(f"{peak / 2**30:.2f} GiB")
    assert peak < 4 * 2**30
