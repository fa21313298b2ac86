"""What all benchmarks share."""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import harness


def test_programs_are_shared_within_the_block_alone():
    """Whatever is compiled afterwards must not be written to the folder that is gone: JAX would warn."""
    with harness.shared_programs():
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.jit(lambda x: x * 3.5)(jnp.arange(5.0))
        kept = list(Path(jax.config.jax_compilation_cache_dir).iterdir())
    assert kept
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.jit(lambda x: x * 4.5)(jnp.arange(5.0))
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
