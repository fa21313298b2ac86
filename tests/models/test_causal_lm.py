"""The causal decoder: what is read, what is refused, packed rows, losses in chunks."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax.models.causal_checkpoint import load_causal_lm
from autorank_jax.models.causal_config import CausalConfig, Rope, parse_config, rope_frequencies
from autorank_jax.models.causal_lm import ByteTokenizer, causal_losses, init_causal_lm, param_shapes
from autorank_jax.types import Scored, Tokens
from tests.models.causal_cases import CONFIG, TINY, tensors_of, tiny, write_folder

SMALL = parse_config(CONFIG)


def test_losses_in_chunks_are_those_of_whole_logits():
    model, rng = tiny(), np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 61, (2, 10)), jnp.int32)
    targets = jnp.asarray(rng.integers(-20, 61, (2, 10)), jnp.int32)
    inputs = Tokens(ids, jnp.asarray([[1] * 4 + [2] * 4 + [0] * 2, [1] * 10]))

    def whole(params):
        log_p = jax.nn.log_softmax(model._replace(params=params)(inputs))
        chosen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return jnp.where(targets >= 0, -chosen, 0)

    def chunked(params):
        return causal_losses(TINY, params, Scored(inputs, targets), checkpoint=True, chunk=4)

    ours, theirs = jax.jit(lambda p: (chunked(p), whole(p)))(model.params)
    assert jnp.max(theirs) > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (np.array([1, 2]), r"shape \(b, length\), got "),
        (np.zeros((1, 3), np.float32), "expected ids as whole numbers"),
        (np.zeros((1, 0), np.int32), "expected ids as whole numbers"),
        (np.zeros((1, 65), np.int32), "at most 64 tokens a text"),
        ([[1, 61]], r"expected ids in 0\.\.60, got 1 to 61, probably of another tokenizer"),
        (np.array([[-1, 3]]), r"expected ids in 0\.\.60, got -1 to 3"),
        (Tokens(jnp.array([[70]]), jnp.array([[1]])), "got 70 to 70"),
    ],
)
def test_ids_that_a_decoder_does_not_know(ids, said):
    with pytest.raises(ValueError, match=said):
        tiny(SMALL)(ids)


def test_ids_as_lists():
    model = tiny(SMALL)
    for odd in ([[1, 2], [3]], [[2**70]], [[2**40]]):
        with pytest.raises(ValueError, match="expected ids"):
            model(odd)
    ids = jnp.zeros((1, 80), jnp.int32)
    assert model(Tokens(ids, jnp.repeat(jnp.array([[1, 2]]), 40, axis=1))).shape == (1, 80, 61)  # positions begin anew
    np.testing.assert_array_equal(model([[3, 4]]), model(jnp.array([[3, 4]], jnp.int32)))
    with pytest.raises(ValueError, match="at most 64 tokens a text"):
        jax.eval_shape(model, jnp.zeros((1, 65), jnp.int32))


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"heads": 3}, "groups of one size"),
        ({"head_dim": 7}, "even head_dim"),
        ({"depth": 0}, "depth"),
        ({"width": 2.5}, "width"),
    ],
)
def test_sizes_that_no_decoder_has(odd, said):
    with pytest.raises(ValueError, match=said):
        init_causal_lm(SMALL._replace(**odd))


def test_no_array_of_all_logits_is_formed():
    model, scored = tiny(), Scored(jnp.zeros((2, 64), jnp.int32), jnp.zeros((2, 64), jnp.int32))
    gradient = jax.grad(lambda p: jnp.sum(causal_losses(TINY, p, scored, checkpoint=True, chunk=8)))
    text = str(jax.make_jaxpr(gradient)(model.params))
    assert "f32[2,8,61]" in text
    assert "2,64,61]" not in text


def test_a_text_does_not_see_its_neighbours_or_the_future():
    model = tiny()
    ids = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    run = jax.jit(lambda ids, segments: model(Tokens(ids, segments)))
    whole = jnp.ones_like(ids)
    packed = run(ids, jnp.asarray([[1] * 5 + [2] * 5 + [0] * 2]))
    np.testing.assert_allclose(packed[:, :5], run(ids, whole)[:, :5], atol=1e-4)
    moved = run(jnp.roll(ids, -5, axis=1), whole)  # the second text at the beginning of its row
    np.testing.assert_allclose(packed[:, 5:10], moved[:, :5], atol=1e-4)


@pytest.mark.parametrize("files", [1, 3])
def test_folders_are_read(tmp_path, files):
    model = tiny(SMALL)
    loaded = load_causal_lm(write_folder(tmp_path, model, CONFIG, files=files))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, dict(model.params))
    assert loaded.config == SMALL
    assert loaded.tokenizer.encode("ab c") == [3, 4, 6, 5]
    half = load_causal_lm(tmp_path, dtype=jnp.bfloat16)
    assert {value.dtype for value in half.params.values()} == {jnp.dtype(jnp.bfloat16)}


def test_numbers_of_several_types_become_those_of_most(tmp_path):
    model = tiny(SMALL)
    params = {name: v.astype(jnp.float32 if "norm" in name else jnp.bfloat16) for name, v in model.params.items()}
    loaded = load_causal_lm(write_folder(tmp_path, model._replace(params=params), CONFIG))
    assert {value.dtype for value in loaded.params.values()} == {jnp.dtype(jnp.bfloat16)}
    assert jnp.isfinite(loaded(jnp.zeros((1, 4), jnp.int32))).all()


def test_weights_that_a_type_does_not_hold_are_named(tmp_path):
    write_folder(tmp_path, tiny(SMALL), CONFIG)
    _tensors(**{LAYER: np.full((24, 16), 1e6, np.float32)})(tmp_path)
    with pytest.raises(ValueError, match=f"in '{LAYER}', probably too large for float16: bfloat16 holds them"):
        load_causal_lm(tmp_path, dtype=jnp.float16)
    load_causal_lm(tmp_path, dtype=jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.int8, "foo", jnp.complex64, jnp.float64, object()])
def test_types_that_a_decoder_does_not_have(tmp_path, dtype):
    write_folder(tmp_path, tiny(SMALL), CONFIG)
    for make in (lambda: load_causal_lm(tmp_path, dtype=dtype), lambda: init_causal_lm(SMALL, dtype=dtype)):
        with pytest.raises(ValueError, match=r"^expected dtype as one of float32, bfloat16, float16, got "):
            make()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "gemma2"}, "model_type to be one of llama"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "got 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "beta_fast"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "probably a quantised checkpoint"),
        ({"model_type": "mistral", "sliding_window": 32}, "without sliding windows"),
        ({"model_type": "mistral"}, "sliding_window to be told"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "without sliding windows"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "full attention in every layer"),
        ({"attention_dropout": 0.1}, "no dropout of attention"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers"),
        ({"num_key_value_heads": 3}, "groups of one size"),
        ({"rms_norm_eps": None}, "rms_norm_eps as a number"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers as a whole number"),
        ({"head_dim": 5}, "even head_dim"),
        ({"num_attention_heads": 32}, "even head_dim, which rotary positions turn in pairs, got 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "differ"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "one rope_theta, got 500000.0 and 10000.0"),
        ({"rope_parameters": [1]}, "rope_parameters as an object or null, got [1]"),
        ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "got ['linear']"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor as a number > 0, got '2'"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor as a number > 0, got 0"),
        ({"rope_theta": "big"}, "rope_theta as a number > 0, got 'big'"),
        ({"rope_theta": 0.0}, "rope_theta as a number > 0, got 0.0"),
        ({"rope_theta": math.nan}, "rope_theta as a number > 0, got nan"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps as a number > 0, got inf"),
        (
            {
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}
                | {"original_max_position_embeddings": 64}
            },
            "low_freq_factor below high_freq_factor, got 4 and 4",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings as true or false, got 'false'"),
        ({"attention_bias": 0.5}, "attention_bias as true or false"),
        ({"model_type": "qwen2", "use_sliding_window": "no"}, "use_sliding_window as true or false"),
        ({"model_type": "mistral", "sliding_window": "64"}, "sliding_window as a whole number"),
        ({"layer_types": "full_attention"}, "full attention in every layer"),
        ({"eos_token_id": "</s>"}, "eos_token_id as a whole number in 0..60"),
        ({"eos_token_id": -1}, "eos_token_id as a whole number in 0..60"),
        ({"rope_theta": 10**400}, "rope_theta as a number > 0"),
        ({"eos_token_id": [1, "</s>"]}, "eos_token_id as a whole number in 0..60"),
    ],
)
def test_settings_that_are_not_honoured_are_refused(changed, said):
    with pytest.raises(ValueError, match=r"config\.json: expected") as caught:
        parse_config(CONFIG | changed)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_changes_nothing_is_accepted():
    told = CONFIG | {
        "sliding_window": 4,
        "use_sliding_window": False,
        "model_type": "qwen2",
        "quantization_config": None,
    }
    assert parse_config(told) == SMALL._replace(qkv_bias=True, family="qwen2")
    both = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    both |= {"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": None}}
    assert parse_config(CONFIG | both) == SMALL._replace(rope=Rope(kind="linear", factor=2.0), length=128)
    assert parse_config(CONFIG | {"rope_scaling": {}, "rope_parameters": {"rope_type": "default"}}) == SMALL
    assert parse_config(CONFIG | {"model_type": "mistral", "sliding_window": 64}).family == "mistral"


COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "transformers_version": "4.45.0",
    "use_cache": True,
}
LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
PUBLISHED = {
    "Llama 2 7B": (
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "vocab_size": 32000}
        | {"rms_norm_eps": 1e-5, "pretraining_tp": 1, "rope_scaling": None, "tie_word_embeddings": False},
        6_738_415_616,
    ),
    "Llama 3.2 1B": (
        {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072}
        | {"vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True}
        | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}, "eos_token_id": [128001, 128008]},
        1_235_814_400,
    ),
    "Mistral 7B 0.3": (
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "vocab_size": 32768}
        | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "tie_word_embeddings": False},
        7_248_023_552,
    ),
    "Qwen 2.5 0.5B": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
        | {"num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "vocab_size": 151936}
        | {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32768, "use_sliding_window": False}
        | {"tie_word_embeddings": True, "use_mrope": False, "max_window_layers": 24},
        494_032_768,
    ),
    "Qwen 3 0.6B": (
        {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
        | {"vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "attention_bias": False}
        | {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 28, "tie_word_embeddings": True},
        596_049_920,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_published_number_of_parameters(name):
    told, count = PUBLISHED[name]
    assert sum(math.prod(shape) for shape in param_shapes(parse_config(COMMON | told)).values()) == count


def test_frequencies_follow_their_definitions():
    plain = 10000.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(rope_frequencies(Rope(), 8), plain, rtol=1e-6)
    np.testing.assert_allclose(rope_frequencies(Rope(kind="linear", factor=4.0), 8), plain / 4, rtol=1e-6)
    scaled = rope_frequencies(Rope(kind="llama3", factor=8.0, length=32), 8)
    assert scaled[0] == np.float32(plain[0])  # a short wave stays
    np.testing.assert_allclose(scaled[1:], plain[1:] / 8, rtol=1e-6)  # long waves are stretched


def _without(name):
    return lambda folder: (folder / name).unlink()


def _damage(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _tensors(**changed):
    def write(folder):
        from safetensors.numpy import save_file  # noqa: PLC0415

        tensors = tensors_of(tiny(SMALL))
        for name, value in changed.items():
            tensors.pop(name) if value is None else tensors.update({name: value})
        save_file(tensors, str(folder / "model.safetensors"))

    return write


def _about(**told):
    return lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps(told))


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_without("config.json"), "expected config.json in"),
        (_without("model.safetensors"), "got neither"),
        (_without("tokenizer.json"), "expected tokenizer.json in"),
        (_damage("config.json", 20), "expected JSON in"),
        (_damage("model.safetensors", 3000), "probably cut short"),
        (_damage("model.safetensors", 5), "probably cut short"),
        (_damage("model.safetensors", 50), "probably cut short"),
        (_damage("model.safetensors", 0), "probably cut short"),
        (_damage("tokenizer.json", 20), "expected a tokenizer in"),
        (_about(chat_template=[{"template": "{{ x }}"}]), "expected chat_template in"),
        (_about(chat_template=["{{ x }}"]), "expected chat_template in"),
        (_about(chat_template=[{"name": "tool_use", "template": "{{ x }}"}]), "one is called default"),
        (_about(chat_template={"rag": "{{ x }}"}), "one is called default"),
        (_about(chat_template=5), "expected chat_template in"),
        (_about(eos_token=5), "expected eos_token in"),
        (_about(bos_token={"content": ["<s>"]}), "expected bos_token in"),
        (lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{"), "expected text in UTF-8 in"),
        (_tensors(**{LAYER: None}), f"expected the tensor '{LAYER}'"),
        (_tensors(**{LAYER: np.zeros((16, 24), np.float32)}), "of shape (24, 16)"),
        (_tensors(**{LAYER: np.zeros((24, 16), np.int8)}), "probably a quantised checkpoint"),
        (_tensors(**{LAYER: np.full((24, 16), np.nan, np.float32)}), f"in '{LAYER}', probably a damaged checkpoint"),
        (
            _tensors(**{"model.norm.weight": np.full(16, np.inf, np.float32)}),
            "in 'model.norm.weight', probably a damaged",
        ),
        (_tensors(**{"model.layers.0.self_attn.q_norm.weight": np.zeros(4, np.float32)}), "q_norm.weight besides"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x"}}'),
            "expected the file '../x'",
        ),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 3})),
            "of shape (3, 16)",
        ),
    ],
)
def test_odd_folders_are_refused_in_a_line(tmp_path, spoil, said):
    spoil(write_folder(tmp_path, tiny(SMALL), CONFIG))
    with pytest.raises(ValueError, match="expected") as caught:
        load_causal_lm(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("told", ["{{ 1 }}", [{"name": "default", "template": "{{ 1 }}"}], {"default": "{{ 1 }}"}])
def test_chat_templates_by_name(tmp_path, told):
    write_folder(tmp_path, tiny(SMALL), CONFIG)
    _about(chat_template=told, eos_token={"content": "</s>"}, bos_token=None)(tmp_path)
    tokenizer = load_causal_lm(tmp_path).tokenizer
    assert (tokenizer.chat_template, tokenizer.bos, tokenizer.eos) == ("{{ 1 }}", "", "</s>")


def test_bytes_are_tokens():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("<s>Grüße, 世界</s>")
    assert ids[0] == 256
    assert ids[-1] == 257
    assert tokenizer.decode(ids) == "<s>Grüße, 世界</s>"
    assert max(ids) < tokenizer.vocabulary


def test_shapes_follow_the_switches():
    config = CausalConfig(7, 8, 2, 2, 1, 6, 12, out_bias=True, feed_bias=True, qk_norm=True)
    names = tiny(config).params
    assert names["layers/self_attn/q_proj/kernel"].shape == (2, 8, 12)
    assert names["layers/self_attn/k_norm/scale"].shape == (2, 6)
    assert "layers/mlp/up_proj/bias" in names
    assert "lm_head/kernel" not in names
