"""The options of a federation of language models."""

import pytest

from autorank_jax.experiment.language_options import LanguageOptions
from autorank_jax.experiment.mistakes import ConfigurationError


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
