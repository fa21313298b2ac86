"""The options of a federation of language models."""

import jax.numpy as jnp
import pytest

from autorank_jax.experiment.language_options import LanguageOptions
from autorank_jax.experiment.mistakes import ConfigurationError
from tests.models.causal_cases import tiny


def test_options_of_other_kinds():
    with pytest.raises(ConfigurationError) as caught:
        LanguageOptions(learning_rate="0.1", model=5, rounds=2.5, seed=True, quantize=None).validate()
    assert list(caught.value.problems) == [
        "model: expected a path, got 5",
        "quantize: expected a text, got None",
        "rounds: expected a whole number, got 2.5",
        "learning-rate: expected a number, got '0.1'",
        "seed: expected a whole number, got True",
    ]
    LanguageOptions(learning_rate=1, model="folder").validate()


def test_objects_are_named_not_shown():
    with pytest.raises(ConfigurationError) as caught:
        LanguageOptions(model=tiny(), rounds=jnp.zeros((9, 9))).validate()
    assert list(caught.value.problems) == [
        "model: expected a path, got a CausalLM",
        "rounds: expected a whole number, got an array float32[9, 9]",
    ]
    with pytest.raises(ConfigurationError, match=r"^policy: expected one of .*, got 'autorankautorank") as caught:
        LanguageOptions(policy="autorank" * 1000).validate()
    assert len(str(caught.value)) < 400
