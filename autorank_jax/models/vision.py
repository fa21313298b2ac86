"""Small Flax NNX models to simulate with. Nothing in the package depends on them."""

import math
from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from autorank_jax.interface import check_counts, check_least, checked
from autorank_jax.types import Array


class MLP(nnx.Module):
    """A multi-layer perceptron with ReLU; `MLP((784, 200, 200, 10))` is the reference network of AutoRank."""

    @checked
    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs) -> None:
        """Make the layers `layers/0`, `layers/1` and so on.

        Args:
            sizes: features of the input, the hidden layers and the output.
            rngs: random numbers of the initial weights.
        """
        check_counts("sizes", sizes, least=2)
        self.layers = nnx.List([nnx.Linear(d_in, d_out, rngs=rngs) for d_in, d_out in pairwise(sizes)])

    def __call__(self, inputs: Array) -> Array:
        """Map `(b, ...)` to logits `(b, classes)`."""
        x = inputs.reshape(inputs.shape[0], -1)
        for layer in list(self.layers)[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


def max_pool(images: Array) -> Array:
    """Take the largest of every 2×2 pixels of images `(b, h, w, c)`; an odd last row or column is left out.

    Written as a maximum over axes: its gradient costs a comparison, that of a sliding window a scatter.

    Args:
        images: `(b, h, w, c)`.
    """
    b, h, w, c = images.shape
    return images[:, : h // 2 * 2, : w // 2 * 2].reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


class CNN(nnx.Module):
    """A small convolutional network: 3×3 convolutions with ReLU and 2×2 max pooling, then a linear layer."""

    @checked
    def __init__(self, channels: Sequence[int], classes: int, *, image: tuple[int, int], rngs: nnx.Rngs) -> None:
        """Make the layers `convs/0` and so on, then `head`.

        Args:
            channels: of the input, then of each convolution.
            classes: outputs.
            image: height and width of the input.
            rngs: random numbers of the initial weights.
        """
        check_counts("channels", channels, least=2)
        check_counts("image", image, least=2)
        check_least("classes", classes)
        if min(image) < 2 ** (len(channels) - 1):
            raise ValueError(
                f"expected an image of at least {2 ** (len(channels) - 1)} pixels a side, halved by each of "
                f"{len(channels) - 1} convolutions, got {image}"
            )
        self.convs = nnx.List([nnx.Conv(c_in, c_out, (3, 3), rngs=rngs) for c_in, c_out in pairwise(channels)])
        shrink = 2 ** len(self.convs)
        self.head = nnx.Linear((image[0] // shrink) * (image[1] // shrink) * channels[-1], classes, rngs=rngs)

    def __call__(self, inputs: Array) -> Array:
        """Map images `(b, h, w)` or `(b, h, w, c)` to logits `(b, classes)`."""
        x = inputs[..., None] if inputs.ndim == 3 else inputs
        for conv in self.convs:
            x = max_pool(jax.nn.relu(conv(x)))
        return self.head(jnp.reshape(x, (x.shape[0], -1)))


class DeepCNN(nnx.Module):
    """A deeper convolutional network: 3×3 convolutions, each with group normalisation and ReLU, then a global mean.

    After every second convolution a 2×2 max pooling halves the image; the mean over what is left of it makes the head
    small and the network fit any image. The default, six convolutions of 32, 32, 64, 64, 128, 128 channels, has 0.29
    million parameters.

    The normalisation is `nnx.GroupNorm`: its statistics are those of one example. Batch normalisation takes them over
    the batch, so what a client computes for one example would depend on the mix of its batch, and keeps running ones
    for evaluation; averaged over clients with different data these belong to no model that was ever trained.
    """

    @checked
    def __init__(self, channels: Sequence[int], classes: int, *, groups: int = 8, rngs: nnx.Rngs) -> None:
        """Make the layers `convs/0`, `norms/0` and so on, then `head`.

        Args:
            channels: of the input, then of each convolution.
            classes: outputs.
            groups: of channels that are normalised together, at most; the largest number that divides the channels.
            rngs: random numbers of the initial weights.
        """
        check_counts("channels", channels, least=2)
        check_least("classes", classes)
        check_least("groups", groups)
        self.convs = nnx.List(
            [nnx.Conv(c_in, c_out, (3, 3), use_bias=False, rngs=rngs) for c_in, c_out in pairwise(channels)]
        )
        self.norms = nnx.List(
            [nnx.GroupNorm(width, num_groups=math.gcd(width, groups), rngs=rngs) for width in channels[1:]]
        )
        self.head = nnx.Linear(channels[-1], classes, rngs=rngs)

    def __call__(self, inputs: Array) -> Array:
        """Map images `(b, h, w)` or `(b, h, w, c)` to logits `(b, classes)`."""
        x = inputs[..., None] if inputs.ndim == 3 else inputs
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = jax.nn.relu(norm(conv(x)))
            if number % 2:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.head(x.mean(axis=(1, 2)))
