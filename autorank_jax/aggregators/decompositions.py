"""The singular value decomposition, by the algorithm that suits the device."""

import jax
import jax.numpy as jnp
from jax import lax

from autorank_jax.types import Array


def svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Return `U (m, k), Σ (k,), Vᵀ (k, n)` of a matrix, `k = min(m, n)`, singular values descending.

    JAX's own choice, but on CUDA through the polar decomposition (cuSOLVER's gesvdp), which is made of matrix products:
    its defaults there are Jacobi rotations up to 1,024 rows and columns (gesvdj) and QR iterations beyond (gesvd).

    Args:
        matrix: `(m, n)` in float32 or float64.
    """
    return lax.platform_dependent(matrix, cuda=_polar, default=_default)


def singular_values(matrix: Array) -> Array:
    """Return the singular values of a matrix alone, `(k,)`, as `svd` has them."""
    return lax.platform_dependent(
        matrix, cuda=lambda m: _polar(m)[1], default=lambda m: jnp.linalg.svd(m, compute_uv=False)
    )


def _default(matrix: Array) -> tuple[Array, Array, Array]:
    return tuple(jnp.linalg.svd(matrix, full_matrices=False))


def _polar(matrix: Array) -> tuple[Array, Array, Array]:
    algorithm = jax.lax.linalg.SvdAlgorithm.POLAR
    return tuple(lax.linalg.svd(matrix, full_matrices=False, algorithm=algorithm))
