"""Tiny causal decoders, and folders as Hugging Face writes them."""

import json

import numpy as np

from autorank_jax.models.causal_checkpoint import causal_name
from autorank_jax.models.causal_config import CausalConfig
from autorank_jax.models.causal_lm import init_causal_lm

TINY = CausalConfig(
    vocabulary=61, width=16, depth=3, heads=4, kv_heads=2, head_dim=4, hidden=24, qkv_bias=True, tied=False
)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 2,
}


def tiny(config=TINY, seed=0, scale=1.5):
    """Return a decoder whose logits differ visibly."""
    model = init_causal_lm(config, seed=seed)
    params = {n: v * (1 if n.endswith("scale") else scale) for n, v in model.params.items()}
    return model._replace(params=params)


def write_tokenizer(folder, words=("<s>", "</s>", "<unk>", "a", "b", "c", " ")):
    """Write a tokenizer.json of a few words."""
    model = {"type": "WordLevel", "vocab": {word: n for n, word in enumerate(words)}, "unk_token": "<unk>"}
    pre = {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    whole |= {"pre_tokenizer": pre, "post_processor": None, "decoder": None, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole))


def tensors_of(model):
    """Return the weights of a decoder under Hugging Face's names."""
    tensors = {}
    for name, value in model.params.items():
        path, _, leaf = name.rpartition("/")
        theirs = f"{causal_name(path)}.{'bias' if leaf == 'bias' else 'weight'}"
        for number, each in enumerate(value if "{}" in theirs else [value]):
            array = np.asarray(each)
            tensors[theirs.format(number)] = np.ascontiguousarray(array.T if leaf == "kernel" else array)
    return tensors


def write_folder(folder, model, config, *, files=1):
    """Write a decoder as Hugging Face does, in one or two files."""
    from safetensors.numpy import save_file  # noqa: PLC0415

    tensors = tensors_of(model)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    if files == 1:
        save_file(tensors, str(folder / "model.safetensors"))
        return folder
    names, weight_map = sorted(tensors), {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        mine = names[number::files]
        save_file({name: tensors[name] for name in mine}, str(folder / file))
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
