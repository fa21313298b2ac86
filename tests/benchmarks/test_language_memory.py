"""What a quantised base takes in compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from autorank_jax.models.causal_config import CausalConfig
from autorank_jax.models.causal_lm import init_causal_lm
from benchmarks.speed import language_memory

TINY = CausalConfig(vocabulary=64, width=64, depth=4, heads=2, kv_heads=1, head_dim=32, hidden=96)
TRAINING = language_memory.Training(TINY, jnp.float32, 2, 1, 8, 2)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_shapes_are_those_of_quantised_models(quantize):
    found, expected = language_memory.shapes_of(TRAINING, quantize), init_causal_lm(TINY, quantize=quantize).params
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert [(a.shape, a.dtype) for a in jax.tree.leaves(found)] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(expected)
    ]


@pytest.mark.slow
def test_arguments_shrink_by_what_the_base_does(monkeypatch):
    monkeypatch.setitem(language_memory.MODELS, "small", TRAINING)
    rows = [language_memory.measure("small", quantize, h100=False) for quantize in ("none", "nf4")]
    saved = rows[0]["base_bytes"] - rows[1]["base_bytes"]
    numbers = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert saved == numbers * 4 - numbers // 2 - numbers // 64 * 4
    assert rows[0]["argument_bytes"] - rows[1]["argument_bytes"] == saved
    assert rows[1]["temporary_bytes"] - rows[0]["temporary_bytes"] < numbers  # a quarter of the stacks in floats
    assert "| small | nf4 | 2 × 1 × 8 | 2 |" in language_memory.tables({"memory": {"rows": rows}})["language_memory"]
