"""Pretrained encoders and texts: BERT weights from safetensors, tokens as pytrees of ids and masks."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from autorank_jax.models.transformer import Encoder, Size

_MISSING = "expected the package {name!r} for this, got none: pip install 'autorank-jax[text]'"

LAYERS: Mapping[str, str] = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "blocks/{}/attention/query": "encoder.layer.{}.attention.self.query",
    "blocks/{}/attention/key": "encoder.layer.{}.attention.self.key",
    "blocks/{}/attention/value": "encoder.layer.{}.attention.self.value",
    "blocks/{}/attention/out": "encoder.layer.{}.attention.output.dense",
    "blocks/{}/attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "blocks/{}/up": "encoder.layer.{}.intermediate.dense",
    "blocks/{}/down": "encoder.layer.{}.output.dense",
    "blocks/{}/norm": "encoder.layer.{}.output.LayerNorm",
}
"""Layers of `Encoder` and their names in Hugging Face's BERT, with the number of the block."""


def bert_name(path: str) -> str:
    """Return the name in Hugging Face's BERT of a layer of `Encoder`.

    Args:
        path: such as "blocks/3/attention/query".

    Raises:
        ValueError: for any other path.

    Example:
        >>> bert_name("blocks/3/attention/query")
        'encoder.layer.3.attention.self.query'
    """
    parts = path.split("/")
    number = parts[1] if parts[0] == "blocks" and len(parts) > 1 else ""
    pattern = "/".join(["blocks", "{}", *parts[2:]]) if number else path
    if pattern not in LAYERS:
        raise ValueError(f"expected a layer of Encoder, one of {list(LAYERS)}, got {path!r}")
    return LAYERS[pattern].format(number)


def load_bert(path: str | Path, *, heads: int | None = None, dropout: float = 0.0) -> Encoder:
    """Load a BERT encoder, such as all-MiniLM-L6-v2, from a safetensors file.

    Args:
        path: of the file, or of the folder that holds `model.safetensors`.
        heads: of attention, which the weights do not tell; where None, as `config.json` beside the file says, and
            else one for every 32 features, as MiniLM has.
        dropout: in training.

    Returns:
        The encoder; its size is read off the weights.

    Raises:
        ImportError: without the package safetensors.
        ValueError: if the file holds no BERT weights.
    """
    file = _weights_file(path)
    tensors = _read(file)
    prefix = _prefix(tensors, file)
    vocabulary, width = tensors[f"{prefix}{LAYERS['words']}.weight"].shape
    depth = 0
    while f"{prefix}encoder.layer.{depth}.intermediate.dense.weight" in tensors:
        depth += 1
    hidden = tensors[f"{prefix}encoder.layer.0.intermediate.dense.weight"].shape[0]
    length = tensors[f"{prefix}{LAYERS['positions']}.weight"].shape[0]
    segments = tensors[f"{prefix}{LAYERS['segments']}.weight"].shape[0]
    size = Size(width, depth, heads or _heads(file, width), hidden, length, dropout)
    encoder = Encoder(vocabulary, size, segments=segments, rngs=nnx.Rngs(0))
    for name, module in _layers(encoder):
        for ours, theirs, transposed in _parameters(module):
            tensor = tensors[f"{prefix}{bert_name(name)}.{theirs}"]
            getattr(module, ours).set_value(jnp.asarray(tensor.T if transposed else tensor, jnp.float32))
    return encoder


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Load a tokenizer of the `tokenizers` library.

    Args:
        path: of `tokenizer.json`, or of the folder that holds it.

    Raises:
        ImportError: without the package tokenizers.
    """
    try:
        from tokenizers import Tokenizer as Library  # noqa: PLC0415  optional
    except ImportError as error:
        raise ImportError(_MISSING.format(name="tokenizers")) from error
    path = Path(path)
    return Tokenizer(Library.from_file(str(path / "tokenizer.json" if path.is_dir() else path)))


class Tokenizer:
    """Turns texts into arrays of one length."""

    def __init__(self, library: object) -> None:
        """Wrap a tokenizer of the `tokenizers` library."""
        self.library = library

    def __call__(self, texts: Sequence[str], *, length: int) -> dict[str, np.ndarray]:
        """Return tokens in the form that `FederatedData` and `Encoder` take.

        Args:
            texts: n of them.
            length: tokens per text; longer texts are cut, shorter ones padded.

        Returns:
            "ids" `(n, length)` int32 and "mask" `(n, length)` bool, False where padded.
        """
        self.library.enable_truncation(length)  # type: ignore[attr-defined]
        self.library.enable_padding(length=length)  # type: ignore[attr-defined]
        encodings = self.library.encode_batch(list(texts))  # type: ignore[attr-defined]
        ids = np.array([e.ids for e in encodings], np.int32).reshape(-1, length)
        return {"ids": ids, "mask": np.array([e.attention_mask for e in encodings], bool).reshape(-1, length)}


def _weights_file(path: str | Path) -> Path:
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"expected a safetensors file or the folder of one, got {str(path)!r}, which holds none")
    return file


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file  # noqa: PLC0415  optional
    except ImportError as error:
        raise ImportError(_MISSING.format(name="safetensors")) from error
    return load_file(file)


def _prefix(tensors: Mapping[str, np.ndarray], file: Path) -> str:
    """Return what comes before "embeddings.": nothing, or "bert." in models with a head."""
    for prefix in ("", "bert."):
        if f"{prefix}{LAYERS['words']}.weight" in tensors:
            return prefix
    raise ValueError(f"expected the weights of a BERT encoder in {str(file)!r}, got {sorted(tensors)[:5]} …")


def _heads(file: Path, width: int) -> int:
    config = file.parent / "config.json"
    told = json.loads(config.read_text()) if config.is_file() else {}
    return told.get("num_attention_heads") or width // 32


def _layers(encoder: Encoder) -> Iterator[tuple[str, nnx.Module]]:
    for path, module in nnx.iter_modules(encoder):
        if isinstance(module, nnx.Linear | nnx.Embed | nnx.LayerNorm):
            yield "/".join(map(str, path)), module


def _parameters(module: nnx.Module) -> list[tuple[str, str, bool]]:
    """Return (our name, their name, transposed) of a layer's parameters."""
    if isinstance(module, nnx.Linear):
        return [("kernel", "weight", True), ("bias", "bias", False)]
    if isinstance(module, nnx.Embed):
        return [("embedding", "weight", False)]
    return [("scale", "weight", False), ("bias", "bias", False)]
