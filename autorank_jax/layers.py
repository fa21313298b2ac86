"""Flax NNX layers with an adapter: subclasses that a matched layer's class is swapped for.

`ADAPTED[type]` names the subclass, and its static method `adapter_shape(layer)` the `(d_in, d_out)` of the adapter.
Swapping the class of a layer keeps its path, its attributes and tied weights; wrapping it would not.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax

from autorank_jax.types import Array


class Factor(nnx.Variable):
    """One factor of an adapter."""


class AdaptedLinear(nnx.Linear):
    """`y = x W + b + (x A) B`."""

    lora_a: nnx.Variable
    lora_b: nnx.Variable

    @staticmethod
    def adapter_shape(layer: nnx.Linear) -> tuple[int, int]:
        """Return `(d_in, d_out)`."""
        return layer.in_features, layer.out_features

    def __call__(self, inputs: Array, *args: object, **kwargs: object) -> Array:
        """Apply the layer to `(..., d_in)`."""
        outputs = super().__call__(inputs, *args, **kwargs)
        lora_a, lora_b = self.lora_a[...], self.lora_b[...]
        return outputs + ((inputs.astype(lora_a.dtype) @ lora_a) @ lora_b).astype(outputs.dtype)


class AdaptedConv(nnx.Conv):
    """A convolution whose update is a k×k convolution to `r` channels (A) and a 1×1 convolution (B).

    A is applied to patches, as a matrix product: under `vmap` over clients a convolution with a kernel per client would
    become a grouped convolution, which is slow on every backend.
    """

    lora_a: nnx.Variable
    lora_b: nnx.Variable

    @staticmethod
    def adapter_shape(layer: nnx.Conv) -> tuple[int, int]:
        """Return `(kh·kw·c_in, c_out)`."""
        if layer.feature_group_count != 1:
            raise ValueError(
                f"expected a convolution with feature_group_count=1, got {layer.feature_group_count}, "
                "probably a depthwise layer: leave it out of `where`"
            )
        if (
            layer.input_dilation not in (1, None)
            or not isinstance(layer.padding, str | int)
            or layer.padding == "CAUSAL"
        ):
            raise ValueError(
                f"expected a convolution with padding 'SAME' or 'VALID' and no input dilation, got "
                f"padding={layer.padding!r}, input_dilation={layer.input_dilation!r}: leave it out of `where`"
            )
        return math.prod(layer.kernel_size) * layer.in_features, layer.out_features

    def __call__(self, inputs: Array, *args: object, **kwargs: object) -> Array:
        """Apply the layer to `(b, *spatial, c_in)`."""
        outputs = super().__call__(inputs, *args, **kwargs)
        lora_a, lora_b = self.lora_a[...], self.lora_b[...]
        cols = patches(
            inputs.astype(lora_a.dtype), self.kernel_size, self.strides, self.kernel_dilation, str(self.padding)
        )
        return outputs + ((cols @ lora_a) @ lora_b).astype(outputs.dtype)


def _per_axis(value: int | Sequence[int] | None, axes: int) -> tuple[int, ...]:
    if value is None:
        value = 1
    return (value,) * axes if isinstance(value, int) else tuple(value)


def patches(
    inputs: Array,
    kernel_size: tuple[int, ...],
    strides: int | Sequence[int] | None,
    dilation: int | Sequence[int] | None,
    padding: str,
) -> Array:
    """Gather the window under every output position: `(b, *spatial, c) -> (b, *out, Π kernel_size · c)`.

    The last axis is ordered as a flattened `(*kernel_size, c)` kernel, so `patches(x) @ kernel.reshape(-1, c_out)` is
    the convolution.
    """
    axes = len(kernel_size)
    strides, dilation = _per_axis(strides, axes), _per_axis(dilation, axes)
    extent = tuple((k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True))
    pads = lax.padtype_to_pads(inputs.shape[1:-1], extent, strides, padding)
    padded = jnp.pad(inputs, [(0, 0), *pads, (0, 0)])
    out = [(n - e) // s + 1 for n, e, s in zip(padded.shape[1:-1], extent, strides, strict=True)]
    shifted = []
    for tap in range(math.prod(kernel_size)):
        offset = [int(o) * d for o, d in zip(_unravel(tap, kernel_size), dilation, strict=True)]
        limit = [o + (n - 1) * s + 1 for o, n, s in zip(offset, out, strides, strict=True)]
        shifted.append(
            lax.slice(padded, (0, *offset, 0), (padded.shape[0], *limit, padded.shape[-1]), (1, *strides, 1))
        )
    return jnp.concatenate(shifted, axis=-1)


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    digits = []
    for size in reversed(shape):
        index, digit = divmod(index, size)
        digits.append(digit)
    return tuple(reversed(digits))


ADAPTED: dict[type, Any] = {nnx.Linear: AdaptedLinear, nnx.Conv: AdaptedConv}
