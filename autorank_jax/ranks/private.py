"""Criteria of private clients: label counts released once with noise, everything else computed from them."""

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.interface import checked
from autorank_jax.types import ClientStats, Key


@checked
def private_counts(key: Key, stats: ClientStats, *, clip: float, noise_multiplier: float) -> ClientStats:
    """Release every client's label counts under differential privacy, and nothing else of its data.

    With `n_i` the counts of client `i`: `n_i min(1, C / ‖n_i‖) + σ C N(0, I)`, where what is below `2 σ C` becomes 0.
    A client's data move its own counts by at most `C` against a client without data, and by `2 C` against any other.
    Sizes, classes and entropies that policies compute from these counts cost nothing more. Loss curves are left out:
    they would cost a budget of their own. That there is such a client is not hidden.

    Args:
        key: random key.
        stats: true statistics; `extra` must be public, or None.
        clip: `C` > 0, the largest norm of a client's counts.
        noise_multiplier: `σ` ≥ 0; its ε is that of `evaluation.privacy.spent_epsilon(..., release=σ)`.

    Returns:
        Statistics of the noisy counts, floats of at least 0; `size` is their sum.

    Raises:
        ValueError: for numbers out of range.

    Source: the Gaussian mechanism, Dwork and Roth, "The Algorithmic Foundations of Differential Privacy" (2014).
    """
    for name, value, fits in (("clip", clip, clip > 0), ("noise_multiplier", noise_multiplier, noise_multiplier >= 0)):
        if not (fits and np.isfinite(value)):
            least = "above" if name == "clip" else "of at least"
            raise ValueError(f"expected {name} as a finite number {least} 0, got {value}")
    counts = jnp.asarray(stats.label_counts).astype(jnp.result_type(float))
    norm = jnp.linalg.norm(counts, axis=1, keepdims=True)
    about = jnp.finfo(counts.dtype)
    bound = clip * (1 - 16 * float(about.eps))  # rounding of the norm must not loosen it
    clipped = counts * jnp.minimum(1, bound / jnp.maximum(norm, about.tiny))
    scale = noise_multiplier * clip
    noisy = clipped + scale * jax.random.normal(key, counts.shape, counts.dtype)
    released = jnp.where(noisy > 2 * scale, noisy, 0)
    return stats._replace(size=jnp.sum(released, axis=1), label_counts=released, epoch_losses=None, epochs=None)
