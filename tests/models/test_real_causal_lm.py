"""`transformers` as an oracle: logits and gradients of tiny random decoders of every family that is read."""

import copy
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autorank_jax.datasets.chat import make_chat
from autorank_jax.datasets.instructions import Example, Message
from autorank_jax.models.causal_checkpoint import causal_name, read_safetensors
from autorank_jax.models.causal_lm import causal_losses
from autorank_jax.types import Scored, Tokens
from tests.models.causal_cases import write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
reason = "transformers and torch are not installed: pip install 'autorank-jax[peft]'"
torch = pytest.importorskip("torch", reason=reason)
transformers = pytest.importorskip("transformers", reason=reason)

TINY = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "llama, grouped, tied, large theta": ("Llama", {"tie_word_embeddings": True, "rope_theta": 1e5}),
    "llama 3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, biases, head_dim": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 6}),
    "qwen 2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen 3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen 3, biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
}
IDS = np.random.default_rng(0).integers(0, 61, (2, 11))


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request, tmp_path_factory):
    """Return a decoder of transformers, and ours read from what it saves."""
    import autorank_jax as ar  # noqa: PLC0415

    kind, settings = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(TINY | settings))
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in theirs.named_parameters():
        if "norm" in name or "bias" in name:  # 1 and 0 would hide where they go
            torch.nn.init.normal_(parameter, float("norm" in name), 0.3)
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder, max_shard_size="30KB" if request.param == "llama 3" else "1GB")
    write_tokenizer(folder)
    return theirs, ar.models.load_causal_lm(folder)


def test_logits_are_those_of_transformers(pair):
    theirs, ours = pair
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(ours(jnp.asarray(IDS)), expected, atol=1e-4)


def test_gradients_are_those_of_transformers(pair):
    theirs, ours = pair
    targets = np.concatenate([np.full((2, 4), -100), IDS[:, 5:], np.full((2, 1), -100)], axis=1)
    theirs.zero_grad()
    logits = theirs(torch.tensor(IDS)).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten(), reduction="sum").backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    scored = Scored(jnp.asarray(IDS), jnp.asarray(targets))

    def loss(params):
        return jnp.sum(causal_losses(ours.config, params, scored, checkpoint=True, chunk=4))

    for name, gradient in jax.jit(jax.grad(loss))(ours.params).items():
        path, _, leaf = name.rpartition("/")
        theirs_name = f"{causal_name(path)}.{'bias' if leaf == 'bias' else 'weight'}"
        for number, each in enumerate(gradient if "{}" in theirs_name else [gradient]):
            expected = gradients[theirs_name.format(number)]
            expected = expected.T if leaf == "kernel" else expected
            np.testing.assert_allclose(each, expected, atol=1e-3 * max(1, np.abs(expected).max()), err_msg=name)


def test_texts_in_one_row_do_not_see_each_other(pair):
    _, ours = pair
    row = Tokens(jnp.asarray(IDS.reshape(1, -1)), jnp.asarray(np.repeat([[1, 2]], 11, axis=1)))
    np.testing.assert_allclose(ours(row)[0], ours(jnp.asarray(IDS)).reshape(22, -1), atol=1e-4)


def test_peft_gives_the_same_logits(pair, tmp_path):
    import autorank_jax as ar  # noqa: PLC0415

    peft = pytest.importorskip("peft", reason=reason)
    base, ours = pair
    task = ar.task_from_causal_lm(ours, max_rank={"*/q_proj": 3, "*_proj": 5}, train_dense="*layernorm/scale")
    rng = np.random.default_rng(3)
    moved = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), task.server.trainable
    )
    server = task.server._replace(trainable=moved)
    folder = ar.export_peft(tmp_path, task, server, names=ar.models.causal_name)
    adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    with torch.no_grad():
        theirs = adapted(torch.tensor(IDS)).logits.numpy()
        plain = base(torch.tensor(IDS)).logits.numpy()
    logits = task.predict(server.frozen, server.trainable, jnp.asarray(IDS))
    assert np.abs(theirs - plain).max() > 1
    np.testing.assert_allclose(logits, theirs, atol=2e-4 * np.abs(theirs).max())
    assert ar.merge(task, server)(jnp.asarray(IDS)).shape == theirs.shape


def test_half_precision_is_read_as_it_is(tmp_path):
    config = transformers.LlamaConfig(**TINY)
    theirs = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    tensors = read_safetensors(tmp_path / "model.safetensors")
    kernel = tensors["model.layers.1.mlp.up_proj.weight"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        kernel.astype(np.float32), theirs.model.layers[1].mlp.up_proj.weight.detach().float().numpy()
    )


def test_a_round_of_two_clients_is_two_trainings_with_peft(tmp_path):
    """Client by client with PEFT and torch's SGD, of ranks 2 and 4, and RBLA in NumPy."""
    import autorank_jax as ar  # noqa: PLC0415

    peft = pytest.importorskip("peft", reason=reason)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    theirs.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    task = ar.task_from_causal_lm(ar.models.load_causal_lm(tmp_path), max_rank=4, chunk=5)
    start = task.server.trainable.adapters
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 61, (5, 9)).astype(np.int32)
    targets = np.where(rng.random(ids.shape) < 0.6, np.roll(ids, -1, axis=1), -1).astype(np.int32)
    targets[:, -1] = -1
    rows, ranks, rate = [np.arange(2), np.arange(2, 5)], (2, 4), 0.2
    data = ar.from_parts(jnp.asarray(ids), jnp.asarray(targets), rows)
    rule, local = ar.aggregators.rbla(), ar.make_local_training(task, optax.sgd(rate), batch_size=3)
    state = ar.init_state(task.server, rule, {path: jnp.asarray(ranks) for path in start}, local_epochs=3)
    found = jax.jit(ar.make_round(local, rule))(jax.random.key(0), state, data)[0].server.trainable.adapters

    trained = []
    for part, rank in zip(rows, ranks, strict=True):
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(copy.deepcopy(theirs), config)
        factors = {}
        for path in start:
            for number in range(TINY["num_hidden_layers"]):
                layer = model.get_submodule(f"base_model.model.{causal_name(path).format(number)}")
                factors[path, number] = layer.lora_A.default.weight, layer.lora_B.default.weight
                with torch.no_grad():
                    layer.lora_A.default.weight.copy_(torch.tensor(np.asarray(start[path].lora_a[number, :, :rank]).T))
                    layer.lora_B.default.weight.copy_(torch.tensor(np.asarray(start[path].lora_b[number, :rank]).T))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
        for _ in range(3):
            logits = model(torch.tensor(ids[part], dtype=torch.long)).logits
            wanted = torch.tensor(targets[part], dtype=torch.long)
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained.append({key: [f.detach().numpy().T for f in pair] for key, pair in factors.items()})

    moved = 0.0
    for path, number in trained[0]:
        low, high = (client[path, number] for client in trained)
        for side, axis in ((0, 1), (1, 0)):  # rank positions of A are columns, of B rows
            ours = np.moveaxis(np.asarray(found[path][side][number]), axis, 0)
            small, large = (np.moveaxis(client[side], axis, 0) for client in (low, high))
            expected = np.concatenate([(2 * small + 3 * large[:2]) / 5, large[2:]])
            np.testing.assert_allclose(ours, expected, atol=2e-5)
            moved = max(
                moved, float(np.max(np.abs(ours - np.moveaxis(np.asarray(start[path][side][number]), axis, 0))))
            )
    assert moved > 1e-2


def test_smollm2_gives_the_logits_and_the_chats_of_transformers():
    """With $AUTORANK_JAX_DATA/smollm2, as Hugging Face publishes SmolLM2-135M-Instruct."""
    import autorank_jax as ar  # noqa: PLC0415

    folder = Path(os.environ.get("AUTORANK_JAX_DATA", "")) / "smollm2"
    if not folder.is_dir():
        pytest.skip("AUTORANK_JAX_DATA holds no folder smollm2")
    ours = ar.models.load_causal_lm(folder, dtype=jnp.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    example = Example((Message("user", "What is a cat?"), Message("assistant", "An animal.")))
    ids, learnt = make_chat(ours.tokenizer)(example)
    expected = tokenizer.apply_chat_template([m._asdict() for m in example.messages], tokenize=False)
    assert ours.tokenizer.decode(ids) == expected
    assert ours.tokenizer.decode(np.array(ids)[learnt]).strip() == "An animal.<|im_end|>"
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(ours(jnp.asarray([ids])), logits, rtol=0, atol=2e-4)  # of up to 36
