"""The options of a federation of language models."""

import json

import jax.numpy as jnp
import pytest

from autorank_jax.experiment import language_setup
from autorank_jax.experiment.language_options import LanguageOptions
from autorank_jax.experiment.language_results import Clock
from autorank_jax.experiment.mistakes import ConfigurationError
from autorank_jax.federated.texts import text_clients
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


def test_groups_and_template_reach_the_clients(tmp_path, monkeypatch):
    lines = [
        {"prompt": "q", "completion": "r", "category": c, "topic": t} for c, t in zip("aabbbb", "xyxyzx", strict=True)
    ]
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = {}

    def make(*arguments, **options):
        seen.update(options)
        return text_clients(*arguments, **options)

    monkeypatch.setattr(language_setup, "text_clients", make)
    options = LanguageOptions(data=file, groups_by="topic", template="plain", hold_out=0.25)
    _, clients = language_setup.load(options, Clock(lambda _: None))
    assert clients.stats.label_counts.shape == (2, 3)
    assert seen["template"] == "plain"
