"""What a `config.json` of Hugging Face says about a causal decoder, and what of it is honoured here.

Llama 2 and 3, SmolLM2, Mistral without sliding windows, Qwen 2 and 3 are one architecture with switches. A setting that
would change what the model computes, and that is not honoured, is refused: nothing is ignored silently.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from autorank_jax.types import Array


class Rope(NamedTuple):
    """Rotary positions (arXiv 2104.09864) and how their frequencies are scaled for long texts."""

    theta: float = 10000.0
    kind: str = "default"  # "default"; "linear": positions over a factor (arXiv 2306.15595); "llama3": Llama 3.1's own
    factor: float = 1.0
    low_freq_factor: float = 1.0  # of "llama3": a wave that fits less often into `length` is stretched by the factor
    high_freq_factor: float = 4.0  # likewise: one that fits more often stays; between them the two are blended
    length: int = 8192  # likewise: positions of the model before scaling


class CausalConfig(NamedTuple):
    """The sizes and switches of a causal decoder."""

    vocabulary: int
    width: int
    depth: int  # blocks
    heads: int
    kv_heads: int  # heads of keys and values, each shared by `heads / kv_heads` of queries
    head_dim: int
    hidden: int  # features of the feed-forward layer
    length: int = 2048  # positions the model was made for
    norm_eps: float = 1e-6
    rope: Rope = Rope()
    tied: bool = True  # logits through the embedding
    qkv_bias: bool = False
    out_bias: bool = False  # of the projection behind attention
    feed_bias: bool = False  # of the feed-forward layers
    qk_norm: bool = False  # queries and keys are normalised head by head, as in Qwen 3
    family: str = "llama"
    end: tuple[int, ...] = ()  # tokens that end a text


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` that are read. SmolLM2 is a "llama"."""

_HONOURED = {
    "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "sliding_window",
    "use_sliding_window", "layer_types", "eos_token_id", "attention_dropout",
}  # fmt: skip
_HARMLESS = {
    "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range", "bos_token_id",
    "pad_token_id", "unk_token_id", "pretraining_tp", "max_window_layers", "is_llama_config", "_name_or_path",
    "transformers.js_config", "return_dict", "id2label", "label2id", "_attn_implementation_autoset",
    "output_attentions", "output_hidden_states", "task_specific_params", "tokenizer_class", "use_return_dict",
    "is_decoder", "unsloth_version", "unsloth_fixed", "do_sample", "temperature", "top_p", "top_k", "max_length",
    "repetition_penalty", "num_return_sequences", "length_penalty", "diversity_penalty", "num_beams",
    "num_beam_groups", "typical_p",
}  # fmt: skip
"""Book-keeping, initial values and generation: they change no logit."""
_SCALINGS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "length",
    },
}
"""Their names of what each kind of rotary positions needs, with ours."""


def parse_config(told: Mapping[str, Any], *, where: str = "config.json") -> CausalConfig:
    """Read the configuration of a causal decoder.

    Args:
        told: the contents of a `config.json`, as any version of `transformers` writes it.
        where: how errors call it.

    Returns:
        The configuration.

    Raises:
        ValueError: in one line, for other families, missing or odd numbers, and settings that are not honoured.
    """
    family = told.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{where}: expected model_type to be one of {', '.join(FAMILIES)}, got {family!r}: bring other models as "
            "Flax modules or functions"
        )
    _refuse_unknown(told, where)
    _refuse_settings(told, family, where)
    width, heads = (_count(told, name, where) for name in ("hidden_size", "num_attention_heads"))
    head_dim = _head_dim(told, family, width // heads, where)
    kv_heads = heads
    if told.get("num_key_value_heads") is not None or family != "llama":
        kv_heads = _count(told, "num_key_value_heads", where)
    bias = _switch(told, "attention_bias", where)
    rope = _rope(told, where)
    config = CausalConfig(
        vocabulary=_count(told, "vocab_size", where),
        width=width,
        depth=_count(told, "num_hidden_layers", where),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=_count(told, "intermediate_size", where),
        length=_length(told, where),
        norm_eps=_number(told, "rms_norm_eps", where),
        rope=rope,
        tied=_switch(told, "tie_word_embeddings", where),
        qkv_bias=bias or family == "qwen2",
        out_bias=bias and family != "qwen2",
        feed_bias=_switch(told, "mlp_bias", where),
        qk_norm=family == "qwen3",
        family=family,
        end=_end(told, where),
    )
    check_heads(config, f"{where}: ")
    return config


def check_heads(config: CausalConfig, where: str = "") -> None:
    """Refuse heads that do not share keys evenly, or whose features make no pairs; errors begin with `where`."""
    if config.heads % config.kv_heads:
        told = f"{config.heads} for {config.kv_heads} of keys"
        raise ValueError(f"{where}expected heads in groups of one size, got {told}")
    if config.head_dim < 2 or config.head_dim % 2:  # 0 where there are more heads than features
        told = f"which rotary positions turn in pairs, got {config.head_dim}"
        raise ValueError(f"{where}expected an even head_dim, {told}")


def _refuse_unknown(told: Mapping[str, Any], where: str) -> None:
    """Refuse settings that nobody here has heard of, unless they are switched off."""
    odd = sorted(name for name, value in told.items() if value and name not in _HONOURED | _HARMLESS)
    if odd:
        quantised = "quantization_config" in odd
        shown = ", ".join(f"{name} = {told[name]!r:.60}" for name in odd[:3])
        raise ValueError(
            f"{where}: expected settings that are honoured here, got {shown}"
            + ", probably a quantised checkpoint: get the unquantised one" * quantised
        )


def _refuse_settings(told: Mapping[str, Any], family: str, where: str) -> None:
    def refuse(name: str, expected: str) -> None:
        raise ValueError(f"{where}: expected {expected}, got {name} = {told.get(name)!r}, which is not honoured")

    if told.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "the activation silu")
    if told.get("attention_dropout"):
        refuse("attention_dropout", "no dropout of attention")
    layers = told.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        refuse("layer_types", "full attention in every layer")
    if family == "mistral" and "sliding_window" not in told:  # transformers then takes a window of 4,096
        refuse("sliding_window", "sliding_window to be told, and null")
    used = family == "mistral" or _switch(told, "use_sliding_window", where)
    if used and told.get("sliding_window") is not None:
        window = _count(told, "sliding_window", where)
        if window < _length(told, where):
            refuse("sliding_window", "attention without sliding windows")


def _head_dim(told: Mapping[str, Any], family: str, usual: int, where: str) -> int:
    if told.get("head_dim") is not None:
        return _count(told, "head_dim", where)
    return 128 if family == "qwen3" else usual


def _rope(told: Mapping[str, Any], where: str) -> Rope:
    """Read rotary positions: `rope_parameters` of today, `rope_theta` and `rope_scaling` of before."""
    parts = [part for name in ("rope_parameters", "rope_scaling") if (part := _scaling(told, name, where))]
    thetas = [part.pop("rope_theta", None) for part in parts]
    if len(parts) == 2 and parts[0] != parts[1]:
        raise ValueError(f"{where}: expected one of rope_parameters and rope_scaling, got both, and they differ")
    scaling = parts[0] if parts else {}
    given = [theta for theta in (*thetas, told.get("rope_theta")) if theta is not None]
    if any(theta != given[0] for theta in given[1:]):
        raise ValueError(f"{where}: expected one rope_theta, got {' and '.join(map(repr, given))}")
    kind = scaling.pop("rope_type", "default")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(
            f"{where}: expected rotary positions of one of the kinds {', '.join(_SCALINGS)}, got {kind!r}, which is "
            "not honoured"
        )
    names = _SCALINGS[kind]
    if scaling.get("partial_rotary_factor") == 1:
        del scaling["partial_rotary_factor"]
    extra, missing = sorted(set(scaling) - set(names)), sorted(set(names) - set(scaling))
    if extra or missing:
        raise ValueError(f"{where}: expected rope scaling of kind {kind!r} with {sorted(names)}, got {sorted(scaling)}")
    numbers: dict[str, Any] = {ours: _number(scaling, theirs, where) for theirs, ours in names.items()}
    rope = Rope(_number({"rope_theta": (given or [10000.0])[0]}, "rope_theta", where), kind)._replace(**numbers)
    if rope.low_freq_factor >= rope.high_freq_factor:
        raise ValueError(
            f"{where}: expected low_freq_factor below high_freq_factor, got {rope.low_freq_factor:g} and "
            f"{rope.high_freq_factor:g}"
        )
    return rope


def _scaling(told: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return what is told of rotary positions, without what is null; the kind is `rope_type`, as it is called today."""
    part = told.get(name)
    if part is not None and not isinstance(part, Mapping):
        raise ValueError(f"{where}: expected {name} as an object or null, got {part!r:.60}")
    found = {key: value for key, value in (part or {}).items() if value is not None}
    kind = found.pop("type", None)
    return ({} if kind is None else {"rope_type": kind}) | found


def _length(told: Mapping[str, Any], where: str) -> int:
    """Return the positions that a model is made for: with linear scaling so many times those of before."""
    rope = _rope(told, where)
    positions = _count(told, "max_position_embeddings", where)
    return max(positions, math.floor(positions * rope.factor)) if rope.kind == "linear" else positions


def _end(told: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Return the tokens that end a text; there may be none."""
    eos = told.get("eos_token_id")
    ends = [] if eos is None else eos if isinstance(eos, list) else [eos]
    most = _count(told, "vocab_size", where) - 1
    if not all(type(one) is int and 0 <= one <= most for one in ends):
        raise ValueError(f"{where}: expected eos_token_id as a whole number in 0..{most} or some, got {eos!r:.60}")
    return tuple(ends)


def _switch(told: Mapping[str, Any], name: str, where: str) -> bool:
    value = told.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{where}: expected {name} as true or false, got {value!r:.60}")
    return bool(value)


def _count(told: Mapping[str, Any], name: str, where: str) -> int:
    value = told.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: expected {name} as a whole number >= 1, got {value!r:.60}")
    return value


def _number(told: Mapping[str, Any], name: str, where: str) -> float:
    value = told.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
        raise ValueError(f"{where}: expected {name} as a number > 0, got {value!r:.60}")
    return float(value)


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Return the angle by which each pair of features turns from one position to the next, `(head_dim / 2,)` float32.

    `θ^(-2i/d)`; "linear" divides all by the factor; "llama3" divides those whose wave is long against the original
    length, leaves short waves, and blends linearly in how often a wave fits between the two (Llama 3.1).
    """
    plain = rope.theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if rope.kind == "default":
        return plain.astype(np.float32)
    if rope.kind == "linear":
        return (plain / rope.factor).astype(np.float32)
    fits = rope.length * plain / (2 * math.pi)
    kept = np.clip((fits - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return (plain * ((1 - kept) / rope.factor + kept)).astype(np.float32)


def rotate(x: Array, angles: Array) -> Array:
    """Turn the pairs `(i, i + d/2)` of the features of each head.

    Args:
        x: `(b, length, heads, head_dim)`.
        angles: `(b, length, head_dim / 2)` float32.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
