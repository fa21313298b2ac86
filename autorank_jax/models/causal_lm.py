"""A causal decoder as pure functions of one flat dictionary of parameters, its blocks in a single `lax.scan`.

Parameters have Hugging Face's names without their numbers, stacked over the blocks: `layers/self_attn/q_proj/kernel` is
`(depth, width, heads · head_dim)`. One block is traced and compiled, however deep the model is. A kernel may be
anything that knows `x @ kernel`, so adapters need no code here.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from autorank_jax.interface import check_least, checked, describe
from autorank_jax.interface.kinds import is_traced, is_whole
from autorank_jax.models.causal_config import CausalConfig, check_heads, rope_frequencies, rotate
from autorank_jax.models.quantized import Format, is_quantizable, quantize_stack
from autorank_jax.types import Array, Scored, Tokens

Params = dict[str, Any]
"""Arrays, or quantised matrices, by name."""

CHUNK = 128
"""Positions whose logits exist at a time."""


class CausalLM(NamedTuple):
    """A causal decoder: what it is, its weights, and how texts become tokens."""

    config: CausalConfig
    params: Params
    tokenizer: Any = None

    def __call__(self, inputs: Any) -> Array:
        """Return logits `(b, length, vocabulary)` in float32 for ids `(b, length)` or `Tokens`.

        Raises:
            ValueError: for ids that are no whole numbers of the vocabulary, and texts of more tokens than
                `config.length` (rows of `Tokens`, where positions begin anew, may have more).
        """
        check_inputs(self.config, inputs)
        inputs = inputs if isinstance(inputs, Tokens) else jnp.asarray(inputs)
        return causal_logits(self.config, self.params, inputs)


def check_inputs(config: CausalConfig, inputs: Any) -> None:
    """Raise `ValueError` for ids `(b, length)` or `Tokens` that a decoder does not take, as far as they are known.

    In compiled code values are not known: losses and logits of ids beyond the vocabulary are NaN there.
    """
    ids, segments = inputs if isinstance(inputs, Tokens) else (inputs, None)
    if not is_traced(ids):
        try:
            ids = np.asarray(ids)
        except (ValueError, OverflowError):  # rows of several lengths
            ids = np.zeros(0)
    _check_ids(ids)
    if not is_traced(ids) and not 0 <= ids.min() <= ids.max() < config.vocabulary:
        told = f"{ids.min()} to {ids.max()}, probably of another tokenizer"
        raise ValueError(f"expected ids in 0..{config.vocabulary - 1}, got {told}")
    longest = ids.shape[1] if segments is None or ids.shape[1] <= config.length else _longest(segments)
    if longest > config.length:
        raise ValueError(
            f"expected at most {config.length} tokens a text, as the model is made for (max_position_embeddings), "
            f"got {longest}"
        )


def _longest(segments: Any) -> int:
    """Return the tokens of the longest text in rows of several, 0 where that is not known yet."""
    if is_traced(segments):
        return 0
    return max(int(np.bincount(row[row > 0], minlength=1).max()) for row in np.asarray(segments))


def _check_ids(ids: Any) -> None:
    known = hasattr(ids, "dtype") and ids.ndim == 2 and ids.size
    if not known or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"expected ids as whole numbers of shape (b, length), got {describe(ids)}")


def _check_config(config: CausalConfig) -> None:
    for name in ("vocabulary", "width", "depth", "heads", "kv_heads", "head_dim", "hidden", "length"):
        if not is_whole(getattr(config, name)):
            raise ValueError(f"expected {name} as a whole number, got {getattr(config, name)!r:.60}")
        check_least(name, getattr(config, name))
    check_heads(config)


def check_dtype(dtype: Any) -> Any:
    """Return a type that a decoder can be computed in."""
    known = [np.dtype(each) for each in (jnp.float32, jnp.bfloat16, jnp.float16)]
    try:
        found = np.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    if found not in known:
        raise ValueError(f"expected dtype as one of {', '.join(map(str, known))}, got {dtype!r:.60}")
    return found


def param_shapes(config: CausalConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter, by name."""
    c, d = config, (config.depth,)
    queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
    linear = {
        "self_attn/q_proj": (c.width, queries, c.qkv_bias),
        "self_attn/k_proj": (c.width, keys, c.qkv_bias),
        "self_attn/v_proj": (c.width, keys, c.qkv_bias),
        "self_attn/o_proj": (queries, c.width, c.out_bias),
        "mlp/gate_proj": (c.width, c.hidden, c.feed_bias),
        "mlp/up_proj": (c.width, c.hidden, c.feed_bias),
        "mlp/down_proj": (c.hidden, c.width, c.feed_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens/embedding": (c.vocabulary, c.width), "norm/scale": (c.width,)}
    for name, (d_in, d_out, bias) in linear.items():
        shapes[f"layers/{name}/kernel"] = (*d, d_in, d_out)
        if bias:
            shapes[f"layers/{name}/bias"] = (*d, d_out)
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"layers/{name}/scale"] = (*d, c.width)
    if c.qk_norm:
        shapes |= {f"layers/self_attn/{name}/scale": (*d, c.head_dim) for name in ("q_norm", "k_norm")}
    if not c.tied:
        shapes["lm_head/kernel"] = (c.width, c.vocabulary)
    return shapes


@checked
def init_causal_lm(
    config: CausalConfig,
    *,
    seed: int = 0,
    dtype: Any = jnp.float32,
    tokenizer: Any = None,
    quantize: Format | None = None,
) -> CausalLM:
    """Draw a decoder: matrices `N(0, 1 / width)`, scales 1, biases 0.

    Args:
        config: sizes and switches.
        seed: of the numbers.
        dtype: of the parameters, and so of the arithmetic: float32, bfloat16 or float16.
        tokenizer: kept with the model.
        quantize: the blocks' matrices, as `load_causal_lm` does; the numbers are those of the same seed without.

    Raises:
        ValueError: for sizes that no decoder has, or another `dtype`.
    """
    _check_config(config)
    dtype = check_dtype(dtype)
    rng = np.random.default_rng(seed)  # NumPy: nothing is compiled
    params: Params = {}

    def draw(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
        return ((name, rng.standard_normal(shape[1:]) * config.width**-0.5) for _ in range(shape[0]))

    for name, shape in param_shapes(config).items():
        leaf = name.rpartition("/")[2]
        if quantize and is_quantizable(name):
            params[name] = quantize_stack(draw(name, shape), quantize, dtype)
            continue
        fixed = {"scale": np.ones(shape), "bias": np.zeros(shape)}
        value = fixed[leaf] if leaf in fixed else rng.standard_normal(shape) * config.width**-0.5
        params[name] = jnp.asarray(value.astype(dtype))
    return CausalLM(config, params, tokenizer)


def causal_logits(config: CausalConfig, params: Params, inputs: Any, *, checkpoint: bool = False) -> Array:
    """Return the logits of the token after each position, `(b, length, vocabulary)` float32.

    Args:
        config: of the decoder.
        params: as in `param_shapes`; kernels may be anything that knows `x @ kernel`.
        inputs: ids `(b, length)`, one text a row, or `Tokens`.
        checkpoint: compute the activations of each block again in the backward pass instead of keeping them.
    """
    hidden = causal_hidden(config, params, inputs, checkpoint=checkpoint)
    return _unembed(params, hidden).astype(jnp.float32)


def causal_losses(
    config: CausalConfig, params: Params, scored: Scored, *, checkpoint: bool = False, chunk: int = CHUNK
) -> Array:
    """Return the cross-entropy of each target, `(b, length)` float32 nats, 0 where it is not counted.

    Logits are formed for `chunk` positions at a time, and again in the backward pass: there is never an array of
    batch × length × vocabulary.

    Args:
        config: of the decoder.
        params: likewise.
        scored: inputs and targets.
        checkpoint: as in `causal_logits`.
        chunk: positions at a time.
    """
    hidden = causal_hidden(config, params, scored.inputs, checkpoint=checkpoint)
    batch, length, width = hidden.shape
    chunks = -(-length // chunk)
    pad = chunks * chunk - length
    hidden = jnp.pad(hidden, [(0, 0), (0, pad), (0, 0)]).reshape(batch, chunks, -1, width)
    targets = jnp.pad(scored.targets.astype(jnp.int32), [(0, 0), (0, pad)], constant_values=-1)

    @jax.checkpoint
    def one(_: None, part: tuple[Array, Array]) -> tuple[None, Array]:
        hidden, targets = part
        logits = _unembed(params, hidden).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        known = jnp.where(targets < config.vocabulary, 1, jnp.nan)  # so that gradients are NaN as well
        return None, jnp.where(targets >= 0, known * (jax.nn.logsumexp(logits, axis=-1) - chosen), 0)

    parts = jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets.reshape(batch, chunks, -1), 1, 0)
    losses = lax.scan(one, None, parts)[1]
    return jnp.moveaxis(losses, 0, 1).reshape(batch, -1)[:, :length]


def causal_hidden(config: CausalConfig, params: Params, inputs: Any, *, checkpoint: bool = False) -> Array:
    """Return the normalised features before the logits, `(b, length, width)`; arguments as in `causal_logits`."""
    ids, segments = inputs if isinstance(inputs, Tokens) else (inputs, None)
    _check_ids(ids)
    index = jnp.arange(ids.shape[-1], dtype=jnp.int32)
    seen = (index[:, None] >= index[None, :])[None]
    position = index[None, :]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None, :])
        position = position - lax.cummax(jnp.where(_begins(segments), position, 0), axis=1)
    seen = seen[:, None, None]
    angles = position[..., None].astype(jnp.float32) * rope_frequencies(config.rope, config.head_dim)[None, None, :]
    layers = {name.removeprefix("layers/"): value for name, value in params.items() if name.startswith("layers/")}

    def block(x: Array, weights: Mapping[str, Any]) -> tuple[Array, None]:
        h = rms_norm(x, weights["input_layernorm/scale"], config.norm_eps)
        x = x + _attend(config, weights, h, angles, seen)
        h = rms_norm(x, weights["post_attention_layernorm/scale"], config.norm_eps)
        gated = jax.nn.silu(_linear(weights, "mlp/gate_proj", h)) * _linear(weights, "mlp/up_proj", h)
        return x + _linear(weights, "mlp/down_proj", gated), None

    run: Callable[..., Any] = jax.checkpoint(block) if checkpoint else block
    x = params["embed_tokens/embedding"][ids]
    x = jnp.where(((ids >= 0) & (ids < config.vocabulary))[..., None], x, jnp.asarray(jnp.nan, x.dtype))
    x = lax.scan(run, x, layers)[0]
    return rms_norm(x, params["norm/scale"], config.norm_eps)


def _begins(segments: Array) -> Array:
    """Return where a text of a row begins."""
    return jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)


def _attend(config: CausalConfig, weights: Mapping[str, Any], x: Array, angles: Array, seen: Array) -> Array:
    q, k, v = (
        _linear(weights, f"self_attn/{name}_proj", x).reshape(*x.shape[:2], -1, config.head_dim) for name in "qkv"
    )
    if config.qk_norm:
        q = rms_norm(q, weights["self_attn/q_norm/scale"], config.norm_eps)
        k = rms_norm(k, weights["self_attn/k_norm/scale"], config.norm_eps)
    grouped = rotate(q, angles).reshape(*x.shape[:2], config.kv_heads, -1, config.head_dim)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, rotate(k, angles), preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores * config.head_dim**-0.5, jnp.finfo(jnp.float32).min)
    attended = jnp.einsum("bhgqk,bkhd->bqhgd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    return _linear(weights, "self_attn/o_proj", attended.reshape(*x.shape[:2], -1))


def _linear(weights: Mapping[str, Any], name: str, x: Array) -> Array:
    outputs = x @ weights[f"{name}/kernel"]
    bias = weights.get(f"{name}/bias")
    return outputs if bias is None else outputs + bias[None, None, :]


def _unembed(params: Params, hidden: Array) -> Array:
    kernel = params.get("lm_head/kernel")
    return hidden @ (params["embed_tokens/embedding"].T if kernel is None else kernel)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Return `x / √(mean(x²) + ε) · scale`, the mean in float32 (arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    normal = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return normal.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


class ByteTokenizer:
    """Texts as their UTF-8 bytes: needs no file and knows every script. Tokens 256 and 257 begin and end a text."""

    vocabulary = 258
    bos, eos = "<s>", "</s>"
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, in which `<s>` and `</s>` stand for one token each."""
        ids: list[int] = []
        for part in text.split(self.eos):
            pieces = part.split(self.bos)
            for number, piece in enumerate(pieces):
                ids += [*([256] if number else []), *piece.encode()]
            ids.append(257)
        return ids[:-1]

    def decode(self, ids: Any) -> str:
        """Return the text of tokens."""
        named = {256: self.bos.encode(), 257: self.eos.encode()}
        return b"".join(named.get(int(i), bytes([int(i) % 256])) for i in np.asarray(ids)).decode(errors="replace")
