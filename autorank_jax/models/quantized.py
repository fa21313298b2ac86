"""Frozen matrices in 8 or 4 bits a number, floats again where something is multiplied with them, and only there.

"int8": `W_ij ≈ s_j q_ij`, whole numbers `|q| ≤ 127` and a scale `s_j = max_i |W_ij| / 127` for each output. "nf4" (NF4
of QLoRA, arXiv 2305.14314): each output's numbers, one output after the other, in blocks of 64; of a block its largest
magnitude is kept, and of each number the nearest of 16 quantiles of a normal distribution, two to a byte. Scales are
float32: 8 and 4.5 bits a number. What is made of a matrix depends on no device: it is computed by NumPy.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.types import Array

Format = Literal["int8", "nf4"]
BLOCK = 64
"""Numbers that share a scale in NF4."""

NORMAL_FLOATS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""The numbers that NF4 has: quantiles of a normal distribution over the largest of them, 0 among them (QLoRA)."""


@jax.tree_util.register_pytree_node_class
class Quantized:
    """A matrix, or a stack of them, of which few bits a number are held: `x @ m` is `x W` in the dtype of `x`.

    One that is scanned over is made floats one layer after the other, in the backward pass again.
    """

    __array_ufunc__ = None  # NumPy arrays on the left defer to it

    def __init__(self, codes: Array, scale: Array, form: tuple[Format, tuple[int, int], Any]) -> None:
        """Hold a matrix.

        Args:
            codes: `(*layers, d_in, d_out)` int8, or `(*layers, blocks, 32)` uint8 of "nf4".
            scale: `(*layers, d_out)` or `(*layers, blocks)` float32.
            form: the format, `(d_in, d_out)`, and the dtype of the matrix that it stands for.
        """
        self.codes, self.scale, self.form = codes, scale, form

    @property
    def shape(self) -> tuple[int, ...]:
        """Return `(*layers, d_in, d_out)`."""
        return (*self.scale.shape[:-1], *self.form[1])

    @property
    def ndim(self) -> int:
        """Return the axes of the matrix and its layers."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Return how many numbers it stands for."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes that are held."""
        return self.codes.nbytes + self.scale.nbytes

    @property
    def dtype(self) -> Any:
        """Return the dtype of the matrix that it stands for."""
        return self.form[2]

    def astype(self, dtype: Any) -> Array:
        """Return the matrix in floats, rounded from float32."""
        (d_in, d_out), layers = self.form[1], self.scale.shape[:-1]
        if self.form[0] == "int8":
            return (self.codes.astype(jnp.float32) * self.scale[..., None, :]).astype(dtype)
        shifts = jnp.asarray([4, 0], jnp.uint8).reshape((1,) * self.codes.ndim + (2,))
        numbers = ((self.codes[..., None] >> shifts) & 15).reshape(*self.codes.shape[:-1], BLOCK)
        floats = jnp.asarray(NORMAL_FLOATS).at[numbers].get(mode="promise_in_bounds") * self.scale[..., None]
        whole = floats.reshape(*layers, -1)[..., : d_in * d_out].astype(dtype)
        return jnp.swapaxes(whole.reshape(*layers, d_out, d_in), -1, -2)

    def __rmatmul__(self, inputs: Array) -> Array:
        """Return `inputs @ W`."""
        product = jax.checkpoint(lambda x, kept: x @ kept.astype(x.dtype), prevent_cse=False)  # keeps no floats
        return product(inputs, self)

    def tree_flatten(self) -> tuple[tuple[Array, Array], Any]:
        """Return codes and scales."""
        return (self.codes, self.scale), self.form

    @classmethod
    def tree_unflatten(cls, form: Any, children: tuple[Array, Array]) -> "Quantized":
        """Build it of codes and scales."""
        return cls(*children, form)


def is_quantizable(name: str) -> bool:
    """Say whether a parameter of a causal decoder is one that is quantised: a matrix inside the blocks."""
    return name.startswith("layers/") and name.endswith("/kernel")


def quantize_stack(matrices: Iterable[tuple[str, np.ndarray]], form: Format, dtype: Any) -> Quantized:
    """Quantise the matrices of one layer after the other, so that only one of them need be in floats at a time.

    Args:
        matrices: `(d_in, d_out)` each, of one shape, with its name for errors.
        form: "int8" or "nf4".
        dtype: of the matrices that they stand for.

    Returns:
        The stack, `(layers, d_in, d_out)`.

    Raises:
        ValueError: for numbers that are not finite.
    """
    parts, sides = [], (0, 0)
    for name, matrix in matrices:
        sides = (int(matrix.shape[0]), int(matrix.shape[1]))
        wide = matrix.astype(np.float32)
        if not np.isfinite(wide).all():
            raise ValueError(f"expected finite numbers to quantise, got others in {name!r}")
        parts.append(to_int8(wide) if form == "int8" else to_nf4(wide))
    codes, scale = (jnp.asarray(np.stack(part)) for part in zip(*parts, strict=True))
    return Quantized(codes, scale, (form, sides, jnp.dtype(dtype)))


def to_int8(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes `(d_in, d_out)` and scales `(d_out,)` of a float32 matrix."""
    scale = np.abs(matrix).max(axis=0) / np.float32(127)
    return np.rint(matrix / _divisor(scale)).astype(np.int8), scale


def to_nf4(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return packed codes `(blocks, 32)`, the first of two in the high bits, and scales `(blocks,)`."""
    flat = matrix.T.reshape(-1)
    blocks = np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1)
    blocks = blocks / _divisor(scale)[:, None]
    codes = np.zeros(blocks.shape, np.uint8)
    for middle in (NORMAL_FLOATS[1:] + NORMAL_FLOATS[:-1]) / 2:
        codes += blocks > middle
    return codes[:, ::2] << 4 | codes[:, 1::2], scale


def _divisor(scale: np.ndarray) -> np.ndarray:
    """Return scales to divide by: nothing where all numbers are 0."""
    return np.where(scale > 0, scale, np.float32(1))
