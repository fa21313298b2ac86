"""Transformers in Flax NNX: a BERT-style encoder, a classifier of sequences, and a small causal language model.

Nothing in the package depends on them. Every projection is a plain `nnx.Linear`, so adapters fit everywhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from autorank_jax.interface import check_counts, check_least, check_share, checked
from autorank_jax.types import Array

Texts = dict[str, Array]
"""A batch of texts: "ids" `(b, length)` integers and "mask" `(b, length)`, 0 or False where padded."""


class Size(NamedTuple):
    """The size of a transformer."""

    width: int
    depth: int  # blocks
    heads: int
    hidden: int  # features of the feed-forward layer
    length: int  # positions
    dropout: float = 0.0


def check_size(size: Size) -> None:
    """Raise `ValueError` for a size that no transformer can have."""
    check_counts("a size", size[:5])
    check_share("dropout", size.dropout, "[0, 1)")
    if size.width % size.heads:
        raise ValueError(f"expected a width divisible by the heads, got {size.width} and {size.heads}")


MINILM = Size(width=384, depth=6, heads=12, hidden=1536, length=512)
"""The size of all-MiniLM-L6-v2, whose vocabulary has 30,522 entries."""


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, size: Size, *, rngs: nnx.Rngs) -> None:
        """Make the layers `query`, `key`, `value` and `out`."""
        self.heads = size.heads
        self.query, self.key, self.value, self.out = (nnx.Linear(size.width, size.width, rngs=rngs) for _ in range(4))

    def __call__(self, x: Array, mask: Array) -> Array:
        """Map `(b, length, width)` to the same; mask is `(b or 1, 1, length or 1, length)`, True where seen."""
        split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (layer(x).reshape(split) for layer in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * split[-1] ** -0.5
        seen = jnp.where(mask, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(seen, axis=-1).astype(v.dtype)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class Block(nnx.Module):
    """Attention and a feed-forward layer, each with a residual: normalised after it (BERT), or before (GPT)."""

    def __init__(self, size: Size, *, pre_norm: bool, rngs: nnx.Rngs) -> None:
        """Make the layers `attention`, `attention_norm`, `up`, `down` and `norm`."""
        self.pre_norm = pre_norm
        self.attention = Attention(size, rngs=rngs)
        self.up = nnx.Linear(size.width, size.hidden, rngs=rngs)
        self.down = nnx.Linear(size.hidden, size.width, rngs=rngs)
        self.attention_norm, self.norm = (nnx.LayerNorm(size.width, epsilon=1e-12, rngs=rngs) for _ in range(2))
        self.dropout = nnx.Dropout(size.dropout, rngs=rngs)

    def __call__(self, x: Array, mask: Array) -> Array:
        """Map `(b, length, width)` to the same."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), mask))
            return x + self.dropout(self.feed(self.norm(x)))
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.norm(x + self.dropout(self.feed(x)))

    def feed(self, x: Array) -> Array:
        """Apply the feed-forward layer with BERT's GELU."""
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


class Encoder(nnx.Module):
    """A BERT-style encoder (arXiv 1810.04805) of texts, which can hold the weights of all-MiniLM-L6-v2."""

    @checked
    def __init__(self, vocabulary: int, size: Size, *, segments: int = 2, rngs: nnx.Rngs) -> None:
        """Make the layers `words`, `positions`, `segments`, `norm` and `blocks/0` and so on.

        Args:
            vocabulary: number of tokens.
            size: of the transformer.
            segments: token types; every token is of the first.
            rngs: random numbers of the initial weights and of dropout.
        """
        check_size(size)
        check_counts("vocabulary and segments", (vocabulary, segments))
        self.words = nnx.Embed(vocabulary, size.width, rngs=rngs)
        self.positions = nnx.Embed(size.length, size.width, rngs=rngs)
        self.segments = nnx.Embed(segments, size.width, rngs=rngs)
        self.norm = nnx.LayerNorm(size.width, epsilon=1e-12, rngs=rngs)
        self.dropout = nnx.Dropout(size.dropout, rngs=rngs)
        self.blocks = nnx.List([Block(size, pre_norm=False, rngs=rngs) for _ in range(size.depth)])

    def __call__(self, texts: Texts) -> Array:
        """Map texts to `(b, length, width)`."""
        ids, mask = texts["ids"].astype(jnp.int32), texts["mask"].astype(bool)
        place, first = jnp.arange(ids.shape[1], dtype=jnp.int32), jnp.zeros(1, jnp.int32)
        x = self.words(ids) + self.positions(place)[None] + self.segments(first)[None]
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, mask[:, None, None, :])
        return x


def mean_pool(x: Array, mask: Array) -> Array:
    """Return the mean over the tokens that count, `(b, length, width) -> (b, width)`."""
    weight = mask.astype(x.dtype)[:, :, None]
    return jnp.sum(x * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1)


class TextClassifier(nnx.Module):
    """An encoder, the mean over its tokens, and a linear head."""

    @checked
    def __init__(self, encoder: Encoder, classes: int, *, rngs: nnx.Rngs) -> None:
        """Make the layers `encoder` and `head`.

        Args:
            encoder: pretrained or not.
            classes: outputs.
            rngs: random numbers of the head.
        """
        check_least("classes", classes)
        self.encoder = encoder
        self.head = nnx.Linear(encoder.norm.num_features, classes, rngs=rngs)

    def __call__(self, texts: Texts) -> Array:
        """Map texts to logits `(b, classes)`."""
        return self.head(mean_pool(self.encoder(texts), texts["mask"]))


class Transformer(nnx.Module):
    """A classifier of sequences of vectors, for instance the rows of an image."""

    @checked
    def __init__(self, features: int, classes: int, size: Size, *, rngs: nnx.Rngs) -> None:
        """Make the layers `embed`, `positions`, `blocks/0` and so on, `norm` and `head`.

        Args:
            features: of each vector of the sequence.
            classes: outputs.
            size: of the transformer; its length is that of the sequences, or more.
            rngs: random numbers of the initial weights and of dropout.
        """
        check_size(size)
        check_counts("features and classes", (features, classes))
        self.embed = nnx.Linear(features, size.width, rngs=rngs)
        self.positions = nnx.Embed(size.length, size.width, rngs=rngs)
        self.blocks = nnx.List([Block(size, pre_norm=True, rngs=rngs) for _ in range(size.depth)])
        self.norm = nnx.LayerNorm(size.width, rngs=rngs)
        self.head = nnx.Linear(size.width, classes, rngs=rngs)

    def __call__(self, inputs: Array) -> Array:
        """Map `(b, length, features)` to logits `(b, classes)`."""
        x = self.embed(inputs) + self.positions(jnp.arange(inputs.shape[1], dtype=jnp.int32))[None]
        mask = jnp.ones((1, 1, 1, inputs.shape[1]), bool)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(jnp.mean(self.norm(x), axis=1))


class Decoder(nnx.Module):
    """A causal language model whose output layer is tied to its embedding."""

    @checked
    def __init__(self, vocabulary: int, size: Size, *, rngs: nnx.Rngs) -> None:
        """Make the layers `words`, `positions`, `blocks/0` and so on, and `norm`.

        Args:
            vocabulary: number of tokens.
            size: of the transformer.
            rngs: random numbers of the initial weights and of dropout.
        """
        check_size(size)
        check_least("vocabulary", vocabulary)
        self.words = nnx.Embed(vocabulary, size.width, rngs=rngs)
        self.positions = nnx.Embed(size.length, size.width, rngs=rngs)
        self.blocks = nnx.List([Block(size, pre_norm=True, rngs=rngs) for _ in range(size.depth)])
        self.norm = nnx.LayerNorm(size.width, rngs=rngs)

    def __call__(self, ids: Array) -> Array:
        """Map `(b, length)` ids to logits `(b, length, vocabulary)` of the token that follows each."""
        ids = ids.astype(jnp.int32)
        place = jnp.arange(ids.shape[1], dtype=jnp.int32)
        x = self.words(ids) + self.positions(place)[None]
        mask = (place[None, :] <= place[:, None])[None, None]
        for block in self.blocks:
            x = block(x, mask)
        return self.words.attend(self.norm(x))
