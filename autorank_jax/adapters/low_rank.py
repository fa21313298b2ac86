"""Equations of low-rank updates: how the weight of each kind of layer is read as a matrix, and `x ↦ (x A) B` for it.

Free of any framework: the layers of Flax NNX, Flax Linen and plain functions share them. `W` is `(d_in, d_out)`, the
adapter's product is in its units, and no equation ever forms it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from autorank_jax.types import Array


class Form(NamedTuple):
    """How the weight of a layer, or the stacked weights of several, is read as a matrix, or a batch of matrices."""

    kind: str  # "linear", "conv" or "embed"
    shape: tuple[int, ...]  # of one layer's weight, as the layer stores it
    order: tuple[int, ...]  # its axes, those of the inputs first
    inputs: int  # how many of them are inputs
    layers: tuple[int, ...] = ()  # leading axes over which layers are stacked

    @property
    def d_in(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.shape[axis] for axis in self.order[: self.inputs])

    @property
    def d_out(self) -> int:
        """Columns of the matrix."""
        return math.prod(self.shape[axis] for axis in self.order[self.inputs :])

    def matrix(self, weight: Array) -> Array:
        """Read a weight `(*layers, *shape)` as a matrix `(*layers, d_in, d_out)`."""
        return weight.transpose(self._axes(self.order)).reshape(*self.layers, self.d_in, self.d_out)

    def weight(self, matrix: Array) -> Array:
        """Write a matrix as the layer stores its weight: the inverse of `matrix`."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return matrix.reshape(*self.layers, *(self.shape[axis] for axis in self.order)).transpose(self._axes(back))

    def _axes(self, order: Sequence[int]) -> tuple[int, ...]:
        stacked = len(self.layers)
        return (*range(stacked), *(axis + stacked for axis in order))


def linear_form(shape: Sequence[int], inputs: int = 1, *, stacked: int = 0) -> Form:
    """Return the form of a kernel `(*layers, *inputs, *outputs)`, the first `stacked` axes of which are layers."""
    layers, one = tuple(shape[:stacked]), tuple(shape[stacked:])
    return Form("linear", one, tuple(range(len(one))), inputs, layers)


def conv_form(shape: Sequence[int]) -> Form:
    """Return the form of a kernel `(*window, c_in, c_out)`: `d_in = Π window · c_in`."""
    return Form("conv", tuple(shape), tuple(range(len(shape))), len(shape) - 1)


def embed_form(shape: Sequence[int]) -> Form:
    """Return the form of a table `(entries, features)`."""
    return Form("embed", tuple(shape), (0, 1), 1)


def einsum_form(equation: str | None, shape: Sequence[int]) -> Form:
    """Return the form of the kernel of `inputs,kernel->outputs`: contracted axes are inputs, the others outputs.

    Raises:
        ValueError: if an axis of the kernel is neither, as one kernel per head (`bhi,hio->bho`) is.
    """
    lhs, kernel, out = _operands(equation)
    contracted = [axis for axis, letter in enumerate(kernel) if letter in lhs and letter not in out]
    produced = [axis for axis, letter in enumerate(kernel) if letter in out and letter not in lhs]
    odd = [letter for axis, letter in enumerate(kernel) if axis not in (*contracted, *produced)]
    summed = [letter for letter in lhs if letter not in kernel and letter not in out]
    repeated = any(term.count(letter) > 1 for term in (lhs, kernel, out) for letter in term)
    if odd or summed or repeated or not contracted or not produced:
        raise ValueError(
            f"expected an equation that maps inputs through one matrix, such as '...i,io->...o', got {equation!r}, "
            f"where {odd or summed or list(kernel)} is neither contracted nor produced once: leave the layer out"
        )
    return Form("linear", tuple(shape), (*contracted, *produced), len(contracted))


def _operands(equation: str | None) -> tuple[str, str, str]:
    """Split an equation; an ellipsis of the inputs becomes `.`."""
    if equation is None:
        raise ValueError("expected an einsum layer with its equation, got one that is told it when it is called")
    operands, out = equation.replace(" ", "").replace("...", ".").split("->")
    lhs, kernel = operands.split(",")
    return lhs, kernel, out


def linear_update(inputs: Array, lora_a: Array, lora_b: Array) -> Array:
    """Return `(x A) B` for inputs `(..., d_in)`, computed in the dtype of the factors."""
    return (inputs.astype(lora_a.dtype) @ lora_a) @ lora_b


def general_update(inputs: Array, lora_a: Array, lora_b: Array, axis: Sequence[int], form: Form) -> Array:
    """Return `(x A) B` where several axes of the inputs are contracted and several come out at the end."""
    axes = sorted(a % inputs.ndim for a in axis)
    moved = jnp.moveaxis(inputs, axes, range(-len(axes), 0))
    flat = moved.reshape(*moved.shape[: -len(axes)], form.d_in)
    out = linear_update(flat, lora_a, lora_b)
    return out.reshape(*out.shape[:-1], *(form.shape[a] for a in form.order[form.inputs :]))


def einsum_update(equation: str | None, inputs: Array, lora_a: Array, lora_b: Array, form: Form) -> Array:
    """Return `(x A) B` for `inputs,kernel->outputs`, with the rank axis in place of what is contracted."""
    lhs, kernel, out = _operands(equation)
    into = "".join(kernel[axis] for axis in form.order[: form.inputs])
    outof = "".join(kernel[axis] for axis in form.order[form.inputs :])
    rank = next(letter for letter in "rstuvwxyzabcdefghijklmnopq" if letter not in lhs + kernel + out)
    hidden = "".join(letter for letter in lhs if letter not in into) + rank
    a = lora_a.reshape(*(form.shape[axis] for axis in form.order[: form.inputs]), -1)
    b = lora_b.reshape(-1, *(form.shape[axis] for axis in form.order[form.inputs :]))
    first, second = (
        term.replace(".", "...") for term in (f"{lhs},{into}{rank}->{hidden}", f"{hidden},{rank}{outof}->{out}")
    )
    return jnp.einsum(second, jnp.einsum(first, inputs.astype(a.dtype), a), b)


def embed_update(ids: Array, lora_a: Array, lora_b: Array) -> Array:
    """Return `A[ids] B`."""
    return jnp.take(lora_a, ids, axis=0) @ lora_b


def attend_update(query: Array, lora_a: Array, lora_b: Array) -> Array:
    """Return `x (A B)ᵀ = (x Bᵀ) Aᵀ`, the update of logits over an embedding's entries."""
    return (query.astype(lora_b.dtype) @ lora_b.T) @ lora_a.T


class Window(NamedTuple):
    """How a convolution slides."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]  # "SAME", "VALID" or pairs


def make_window(
    size: int | Sequence[int],
    strides: int | Sequence[int] | None,
    dilation: int | Sequence[int] | None,
    padding: str | int | Sequence[int | tuple[int, int]],
) -> Window:
    """Normalise how a Flax convolution slides.

    Raises:
        ValueError: for circular, reflecting and causal padding.
    """
    size = (size,) if isinstance(size, int) else tuple(size)
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(
                f"expected a convolution with padding 'SAME', 'VALID' or numbers, got {padding!r}: leave it out"
            )
        pads: str | tuple[tuple[int, int], ...] = padding
    else:
        each = (padding,) * len(size) if isinstance(padding, int) else padding
        pads = tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in each)
    return Window(size, _per_axis(strides, len(size)), _per_axis(dilation, len(size)), pads)


def check_convolution(groups: int, input_dilation: int | Sequence[int] | None, mask: object) -> None:
    """Raise `ValueError` for convolutions that are no product of patches with one matrix."""
    dilated = any(d != 1 for d in _per_axis(input_dilation, 1))
    if groups != 1 or dilated or mask is not None:
        raise ValueError(
            f"expected a convolution with feature_group_count=1, input_dilation=1 and no mask, got {groups}, "
            f"{input_dilation} and {'a' if mask is not None else 'no'} mask: leave it out of `where`"
        )


def conv_update(inputs: Array, lora_a: Array, lora_b: Array, window: Window) -> Array:
    """Return a k×k convolution to `r` channels (A) and a 1×1 convolution (B) of `(..., *spatial, c_in)`.

    A is applied to patches, as a matrix product: under `vmap` over clients a convolution with a kernel per client would
    become a grouped convolution, which is slow on every backend.
    """
    trailing = inputs.shape[-len(window.size) - 1 :]
    cols = patches(
        inputs.astype(lora_a.dtype).reshape(-1, *trailing),
        window.size,
        window.strides,
        window.dilation,
        window.padding,
    )
    out = (cols @ lora_a) @ lora_b
    return out.reshape(*inputs.shape[: inputs.ndim - len(trailing)], *out.shape[1:])


def patches(
    inputs: Array,
    kernel_size: tuple[int, ...],
    strides: int | Sequence[int] | None,
    dilation: int | Sequence[int] | None,
    padding: str | Sequence[tuple[int, int]],
) -> Array:
    """Gather the window under every output position: `(b, *spatial, c) -> (b, *out, Π kernel_size · c)`.

    The last axis is ordered as a flattened `(*kernel_size, c)` kernel, so `patches(x) @ kernel.reshape(-1, c_out)` is
    the convolution.
    """
    axes = len(kernel_size)
    strides, dilation = _per_axis(strides, axes), _per_axis(dilation, axes)
    extent = tuple((k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True))
    pads = padding
    if isinstance(padding, str):
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


def _per_axis(value: int | Sequence[int] | None, axes: int) -> tuple[int, ...]:
    if value is None:
        value = 1
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _unravel(index: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    digits = []
    for size in reversed(shape):
        index, digit = divmod(index, size)
        digits.append(digit)
    return tuple(reversed(digits))


@jax.tree_util.register_pytree_node_class
class LowRank:
    """A matrix `W + A B` that is never formed: `x @ m` is `x W + (x A) B`.

    A function whose parameters hold one in place of an array pays, for every client, for the factors alone. One that
    scans over stacked layers is handed those of one layer after the other.
    """

    __array_ufunc__ = None  # NumPy arrays on the left defer to it

    def __init__(self, weight: Array, lora_a: Array, lora_b: Array) -> None:
        """Hold a weight `(..., d_in, d_out)` and its factors."""
        self.weight, self.lora_a, self.lora_b = weight, lora_a, lora_b

    @property
    def shape(self) -> tuple[int, ...]:
        """Return `(..., d_in, d_out)`."""
        return self.weight.shape

    def __rmatmul__(self, inputs: Array) -> Array:
        """Return `inputs @ (W + A B)`."""
        outputs = inputs @ self.weight
        return outputs + linear_update(inputs, self.lora_a, self.lora_b).astype(outputs.dtype)

    def tree_flatten(self) -> tuple[tuple[Array, Array, Array], None]:
        """Return the three arrays."""
        return (self.weight, self.lora_a, self.lora_b), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Array, Array, Array]) -> "LowRank":  # noqa: ARG003
        """Build it of the three arrays."""
        return cls(*children)
