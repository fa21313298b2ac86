"""Pretrained causal decoders: the folder that Hugging Face's `save_pretrained` writes, read without PyTorch."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from autorank_jax.interface import checked
from autorank_jax.interface.paths import user_path
from autorank_jax.models.causal_config import CausalConfig, parse_config
from autorank_jax.models.causal_lm import CausalLM, check_dtype, param_shapes
from autorank_jax.models.quantized import Format, Quantized, is_quantizable, quantize_stack
from autorank_jax.types import Array

_DTYPES: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "F64": np.float64}
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
"""As `tokenizer_config.json` calls them."""
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@checked
def load_causal_lm(folder: str | Path, *, dtype: Any = None, quantize: Format | None = None) -> CausalLM:
    """Load a causal decoder: Llama 2 and 3, SmolLM2, Mistral without sliding windows, Qwen 2 and 3.

    Args:
        folder: with `config.json`, `model.safetensors` or several files with their index, `tokenizer.json` and, where
            there is one, `tokenizer_config.json` with the chat template.
        dtype: of the weights, and so of the arithmetic: float32, bfloat16 or float16; where None as the files have it,
            or most of their numbers where these differ; 64 bits become 32.
        quantize: hold the matrices inside the blocks as "int8" or "nf4" (`autorank_jax.models.quantized`), made of the
            files' numbers one by one, so that the whole model is never in memory. Where they are used they are `dtype`
            again, block by block. Embeddings, output layer, biases and norms stay. Nothing is quantised where None.

    Returns:
        The model: `model(ids)` gives logits.

    Raises:
        ImportError: without the package tokenizers.
        ValueError: in one line, for missing and damaged files, other families, settings that are not honoured, and
            weights that are not those of the configuration, or that are to be quantised and are not finite.
    """
    folder = user_path(folder)
    config = parse_config(_read_json(folder, "config.json"), where=str(folder / "config.json"))
    tensors = read_weights(folder)
    dtype = _common_dtype(tensors) if dtype is None else check_dtype(dtype)
    params = {}
    for name, shape in param_shapes(config).items():
        found = _tensors_of(tensors, name, shape, folder)
        params[name] = _parameter(found, name, dtype, quantize)
    _refuse_others(tensors, config, folder)
    return CausalLM(config, params, load_text_tokenizer(folder, config))


@checked
def causal_name(path: str) -> str:
    """Return Hugging Face's name of a module, with `{}` where the number of the block goes.

    Args:
        path: such as "layers/self_attn/q_proj".

    Example:
        >>> causal_name("layers/self_attn/q_proj"), causal_name("norm"), causal_name("lm_head")
        ('model.layers.{}.self_attn.q_proj', 'model.norm', 'lm_head')
    """
    if path == "lm_head":
        return path
    return "model." + path.replace("layers/", "layers/{}/").replace("/", ".")


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """Map the tensors of all safetensors files of a folder into memory, by name.

    Raises:
        ValueError: for missing or damaged files, and numbers that are no floats of 16 bits or more.
    """
    if not os.path.isfile(folder / _INDEX):
        if not os.path.isfile(folder / _SINGLE):
            others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".gguf", ".pt", ".pth"))
            raise ValueError(
                f"expected {_SINGLE} or {_INDEX} in {str(folder)!r}, got neither"
                + (f" but {', '.join(others[:3])}: convert it to safetensors" if others else "")
            )
        return read_safetensors(folder / _SINGLE)
    weight_map = _read_json(folder, _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"expected a weight_map in {str(folder / _INDEX)!r}, got none")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not os.path.isfile(folder / name):
            raise ValueError(f"expected the file {name!r}, which {_INDEX} names, in {str(folder)!r}, got none there")
        tensors |= read_safetensors(folder / name)
    return tensors


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    """Map the tensors of one safetensors file into memory, by name; nothing is read before it is used.

    The format: eight bytes with the length of a JSON header, the header, and the numbers.

    Raises:
        ValueError: for a damaged file, and numbers that are no floats of 16 bits or more.
    """
    try:
        if not os.path.getsize(file):
            raise ValueError("an empty one, probably cut short")
        raw = np.memmap(file, np.uint8, "r")
        begin = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        if raw.size < 8 or raw.size < begin:
            raise ValueError(f"{raw.size} bytes, of which a header needs {begin}, probably cut short")
        header = json.loads(raw[8:begin].tobytes())
        tensors = {}
        for name, told in header.items():
            if name == "__metadata__":
                continue
            first, last = told["data_offsets"]
            tensors[name] = (told["dtype"], told["shape"], raw[begin + first : begin + last])
            if begin + last > raw.size:
                raise ValueError(f"{raw.size} bytes, of which {name} needs {begin + last}, probably cut short")
        odd = {name: told[0] for name, told in tensors.items() if told[0] not in _DTYPES}
        if odd:
            few_bits = odd[min(odd)].endswith("8") or "8_" in odd[min(odd)]
            raise ValueError(
                f"numbers of type {odd[min(odd)]} in {min(odd)}" + ", probably a quantised checkpoint" * few_bits
            )
        return {name: part.view(_DTYPES[dtype]).reshape(shape) for name, (dtype, shape, part) in tensors.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(
            f"expected a complete file of float safetensors at {str(file)!r}, got {error!s:.100}"
        ) from error


def _common_dtype(tensors: Mapping[str, np.ndarray]) -> Any:
    """Return the type of most numbers: all are computed with in one."""
    sizes: Counter[Any] = Counter()
    for tensor in tensors.values():
        sizes[tensor.dtype] += tensor.size
    most = sizes.most_common(1)[0][0] if sizes else np.float32
    return np.dtype(np.float32) if most == np.float64 else most


Named = list[tuple[str, np.ndarray]]
"""Matrices with their names in the files."""


def _tensors_of(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], folder: Path) -> Named:
    """Return what a parameter is made of, one for each block where it is stacked; kernels have inputs first."""
    path, _, leaf = name.rpartition("/")
    theirs = f"{causal_name(path)}.{'bias' if leaf == 'bias' else 'weight'}"
    stacked = "{}" in theirs
    one = shape[1:] if stacked else shape
    expected = one[::-1] if leaf == "kernel" else one
    names = [theirs.format(number) for number in range(shape[0])] if stacked else [theirs]
    for each in names:
        if each not in tensors:
            raise ValueError(f"expected the tensor {each!r}, as config.json has it, in {str(folder)!r}, got none")
        if tensors[each].shape != expected:
            raise ValueError(f"expected {each!r} of shape {expected}, as config.json has it, got {tensors[each].shape}")
    return [(each, tensors[each].T if leaf == "kernel" else tensors[each]) for each in names]


def _parameter(found: Named, name: str, dtype: Any, quantize: Format | None) -> Array | Quantized:
    """Return one parameter, stacked over the blocks."""
    if quantize and is_quantizable(name):
        return quantize_stack(found, quantize, dtype)
    whole = np.empty((len(found), *found[0][1].shape), dtype)
    with np.errstate(over="ignore"):  # told below
        for number, (_, tensor) in enumerate(found):
            whole[number] = tensor
    made = jnp.asarray(whole if name.startswith("layers/") else whole[0])
    if not bool(jnp.isfinite(made).all()):
        _refuse_infinite(found, dtype)
    return made


def _refuse_infinite(found: Named, dtype: Any) -> None:
    """Name the first matrix that has numbers that are not finite in a type, and say why it may have."""
    for name, tensor in found:
        with np.errstate(over="ignore"):
            cast = tensor.astype(dtype).astype(np.float32)
        if not np.isfinite(cast).all():
            held = np.isfinite(tensor.astype(np.float32)).all()
            cause = f"too large for {jnp.dtype(dtype).name}: bfloat16 holds them" if held else "a damaged checkpoint"
            raise ValueError(f"expected finite weights, got NaN or infinity in {name!r}, probably {cause}")


def _refuse_others(tensors: Mapping[str, np.ndarray], config: CausalConfig, folder: Path) -> None:
    """Refuse weights that no layer takes: they would change what the model computes."""
    taken = {"lm_head.weight"}  # of a tied model: a copy
    for name in param_shapes(config):
        path, _, leaf = name.rpartition("/")
        theirs = f"{causal_name(path)}.{'bias' if leaf == 'bias' else 'weight'}"
        taken |= {theirs.format(number) for number in range(config.depth)}
    others = sorted(name for name in set(tensors) - taken if not name.endswith("rotary_emb.inv_freq"))
    if others:
        adapters = ", probably of adapters: merge them first" if any("lora" in name for name in others) else ""
        raise ValueError(
            f"expected the tensors of a {config.family} alone in {str(folder)!r}, got {', '.join(others[:3])} besides"
            + adapters
        )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    if not os.path.isfile(file):
        kind = "file" if os.path.isdir(folder) else "folder"
        raise ValueError(f"expected {name} in {str(folder)!r}, got no such {kind}")
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON in {str(file)!r}, got {error!s:.100}") from error
    if not isinstance(told, dict):
        raise ValueError(f"expected an object in {str(file)!r}, got a {type(told).__name__}")
    return told


class TextTokenizer:
    """A tokenizer of the `tokenizers` library, with what a chat needs to know."""

    def __init__(
        self,
        library: Any,
        *,
        bos: str = "",
        eos: str = "",
        chat_template: str | None = None,
        special: Mapping[str, str] | None = None,
    ) -> None:
        """Wrap a tokenizer.

        Args:
            library: of the `tokenizers` library.
            bos: the token that begins a text, as text; empty where there is none.
            eos: the token that ends one.
            chat_template: Jinja source, None where there is none.
            special: other tokens that the template may name, such as "pad_token", as texts.
        """
        library.no_truncation()
        library.no_padding()
        self.library, self.bos, self.eos, self.chat_template = library, bos, eos, chat_template
        self.special = dict(special or {})

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; special tokens are those that it spells out."""
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Any) -> str:
        """Return the text of tokens, special ones spelt out."""
        return self.library.decode([int(i) for i in np.asarray(ids)], skip_special_tokens=False)


def load_text_tokenizer(folder: str | Path, config: CausalConfig | None = None) -> TextTokenizer:
    """Load `tokenizer.json` and what `tokenizer_config.json` and `chat_template.jinja` say.

    Args:
        folder: of the files; only the first is needed.
        config: of the model, whose vocabulary must hold the tokens, and which may know the token that ends a text.

    Raises:
        ImportError: without the package tokenizers.
        ValueError: for missing or damaged files, or more tokens than the model has.
    """
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415  optional
    except ImportError as error:
        raise ImportError("expected the package 'tokenizers', got none: pip install 'autorank-jax[text]'") from error
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not os.path.isfile(file):
        raise ValueError(f"expected tokenizer.json in {str(folder)!r}, got no such file")
    try:
        library = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"expected a tokenizer in {str(file)!r}, got {error!s:.100}") from error
    largest = max(library.get_vocab().values(), default=0)
    if config is not None and largest >= config.vocabulary:
        raise ValueError(f"expected tokens below the model's {config.vocabulary}, got up to {largest} in {str(file)!r}")
    about = _read_json(folder, "tokenizer_config.json") if os.path.isfile(folder / "tokenizer_config.json") else {}
    special = {name: _token(about, name, folder) for name in _SPECIAL}
    eos = special.pop("eos_token")
    if not eos and config is not None and config.end:
        eos = library.id_to_token(config.end[0]) or ""
    bos, named = special.pop("bos_token"), {name: token for name, token in special.items() if token}
    return TextTokenizer(library, bos=bos, eos=eos, chat_template=_template(folder, about), special=named)


def _token(about: Mapping[str, Any], name: str, folder: Path) -> str:
    told = about.get(name)
    token = told.get("content") if isinstance(told, dict) else told
    if token is not None and not isinstance(token, str):
        raise ValueError(f"expected {name} in {str(folder / 'tokenizer_config.json')!r} as a text, got {told!r:.60}")
    return token or ""


def _template(folder: Path, about: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if os.path.isfile(file):
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"expected text in UTF-8 in {str(file)!r}, got {error!s:.100}") from error
    told = about.get("chat_template")
    if isinstance(told, list) and all(isinstance(each, dict) for each in told):  # several by name
        told = {str(each.get("name")): each.get("template") for each in told}
    template = told.get("default") if isinstance(told, dict) else told
    if told is not None and not isinstance(template, str):
        raise ValueError(
            f"expected chat_template in {str(folder / 'tokenizer_config.json')!r} as a text, or several of which one "
            f"is called default, got {told!r:.60}"
        )
    return template
