"""The convolution of a base kernel: JAX's own, with a gradient for the inputs that XLA runs fast.

JAX differentiates a convolution by one whose kernel has its channels swapped by name. XLA's CPU backend takes the fast
path only where channels lie in the usual order: turning the small kernel first made that gradient many times faster.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autorank_jax.types import Array


def convolve(
    inputs: Array, kernel: Array, window_strides: Sequence[int], padding: str | Sequence[tuple[int, int]], **how: Any
) -> Array:
    """Convolve as `lax.conv_general_dilated` does, bit for bit.

    The gradient for the inputs is `gradient ∗ kernel` turned by half a turn, with inputs and outputs swapped: another
    order of the same sum. Strides, other layouts and groups keep JAX's own gradient.

    Args:
        inputs: `(b, *spatial, c_in)`.
        kernel: `(*window, c_in, c_out)`.
        window_strides: one for each spatial axis.
        padding: "SAME", "VALID" or pairs.
        how: further arguments of `lax.conv_general_dilated`.

    Returns:
        `(b, *spatial, c_out)`.
    """

    def plain(inputs: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(inputs, kernel, window_strides, padding, **how)

    if not _turns(inputs, kernel, window_strides, how):
        return plain(inputs, kernel)
    axes = kernel.ndim - 2
    dilation = tuple(how.get("rhs_dilation") or (1,) * axes)
    extent = [(size - 1) * d + 1 for size, d in zip(kernel.shape[:axes], dilation, strict=True)]
    pads = padding
    if isinstance(padding, str):
        pads = lax.padtype_to_pads(inputs.shape[1:-1], extent, window_strides, padding)
    back = [(e - 1 - low, e - 1 - high) for e, (low, high) in zip(extent, pads, strict=True)]

    def backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        inputs, kernel = saved
        turned = jnp.swapaxes(jnp.flip(kernel, range(axes)), -1, -2)
        turned = lax.optimization_barrier(turned)  # or XLA undoes it
        return (
            lax.conv_general_dilated(gradient, turned, window_strides, back, **how),
            jax.vjp(lambda k: plain(inputs, k), kernel)[1](gradient)[0],
        )

    differentiable = jax.custom_vjp(plain)
    differentiable.defvjp(lambda inputs, kernel: (plain(inputs, kernel), (inputs, kernel)), backward)
    return differentiable(inputs, kernel)


def _turns(inputs: Array, kernel: Array, strides: Sequence[int], how: dict[str, Any]) -> bool:
    """Return whether the gradient for the inputs is a convolution of the same kind, channels last."""
    axes = kernel.ndim - 2
    numbers = lax.conv_dimension_numbers(inputs.shape, kernel.shape, how.get("dimension_numbers"))
    channels_last = (0, axes + 1, *range(1, axes + 1))
    usual = lax.ConvDimensionNumbers(channels_last, (axes + 1, axes, *range(axes)), channels_last)
    ones = all(step == 1 for step in (*strides, *(how.get("lhs_dilation") or ())))
    groups = how.get("feature_group_count", 1) * how.get("batch_group_count", 1)
    return axes > 0 and numbers == usual and ones and groups == 1
