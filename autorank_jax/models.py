"""Small Flax NNX models to simulate with. Nothing in the package depends on them."""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from autorank_jax.types import Array


class MLP(nnx.Module):
    """A multi-layer perceptron with ReLU; `MLP((784, 200, 200, 10))` is the reference network of AutoRank."""

    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs) -> None:
        """Make the layers `layers/0`, `layers/1` and so on.

        Args:
            sizes: features of the input, the hidden layers and the output.
            rngs: random numbers of the initial weights.
        """
        self.layers = nnx.List([nnx.Linear(d_in, d_out, rngs=rngs) for d_in, d_out in pairwise(sizes)])

    def __call__(self, inputs: Array) -> Array:
        """Map `(b, ...)` to logits `(b, classes)`."""
        x = inputs.reshape(inputs.shape[0], -1)
        for layer in list(self.layers)[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class CNN(nnx.Module):
    """A small convolutional network: 3×3 convolutions with ReLU and 2×2 max pooling, then a linear layer."""

    def __init__(self, channels: Sequence[int], classes: int, *, image: tuple[int, int], rngs: nnx.Rngs) -> None:
        """Make the layers `convs/0` and so on, then `head`.

        Args:
            channels: of the input, then of each convolution.
            classes: outputs.
            image: height and width of the input.
            rngs: random numbers of the initial weights.
        """
        self.convs = nnx.List([nnx.Conv(c_in, c_out, (3, 3), rngs=rngs) for c_in, c_out in pairwise(channels)])
        shrink = 2 ** len(self.convs)
        self.head = nnx.Linear((image[0] // shrink) * (image[1] // shrink) * channels[-1], classes, rngs=rngs)

    def __call__(self, inputs: Array) -> Array:
        """Map images `(b, h, w)` or `(b, h, w, c)` to logits `(b, classes)`."""
        x = inputs[..., None] if inputs.ndim == 3 else inputs
        for conv in self.convs:
            x = nnx.max_pool(jax.nn.relu(conv(x)), (2, 2), (2, 2))
        return self.head(jnp.reshape(x, (x.shape[0], -1)))
