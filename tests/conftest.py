"""Strict JAX in every test: no implicit dtype or rank promotion, two CPU devices, compilation that is quick.

The workers of a test run share one compilation cache, in a folder that is gone afterwards.
"""

import atexit
import os
import shutil
import signal
import tempfile

from tests import QUICK

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=2 {QUICK}")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a worker per core: more threads would spin
if "AUTORANK_JAX_TEST_CACHE" not in os.environ:
    os.environ["AUTORANK_JAX_TEST_CACHE"] = tempfile.mkdtemp(prefix="autorank-jax-tests-")
    atexit.register(shutil.rmtree, os.environ["AUTORANK_JAX_TEST_CACHE"], ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["AUTORANK_JAX_TEST_CACHE"])  # also of processes started
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells take from what they start in the background
jax.config.update("jax_compilation_cache_dir", os.environ["AUTORANK_JAX_TEST_CACHE"])
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
