"""Strict JAX in every test: no implicit dtype or rank promotion, two CPU devices, compilation that is quick."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """64-bit arithmetic inside one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """Implicit dtype promotion, which optax.adam needs (`decay ** count` with an integer count)."""
    with jax.numpy_dtype_promotion("standard"):
        yield
