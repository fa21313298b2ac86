"""MiniLM on reviews: which runs a seed needs, and what they are compared with."""

import dataclasses
import json

import numpy as np
import pytest

from benchmarks.study import text_finetune, text_tables

TEXT_ROWS = [
    {"rule": "rbla", "policy": policy, "rate": rate, "seed": seed, "accuracy": accuracy, "loss": loss}
    for policy, rate, seed, accuracy, loss in [
        ("autorank", 0.1, 1000, 0.9, 0.7), ("autorank", 0.2, 1000, 0.8, 0.6), ("autorank", 0.4, 1000, 0.7, np.nan),
        ("autorank", 0.2, 0, 0.6, 0.5), ("autorank", 0.2, 1, 0.7, 0.5), ("autorank", 0.2, 2, 0.83, 0.5),
        ("uniform, equal bytes", 0.1, 0, 0.5, 0.6), ("uniform, equal bytes", 0.1, 1, 0.6, 0.6),
        ("uniform, equal bytes", 0.1, 2, 0.7, 0.6),
    ]
]  # fmt: skip


def test_text_runs_at_the_rate_of_least_loss_and_only_what_is_not_there():
    options = text_finetune.Options(
        aggregators=("rbla",), policies=("autorank",), learning_rates=(0.1, 0.2, 0.4), head_rate=0.3
    )
    tuning = text_finetune.wanted(options, [], text_tables.TUNING_SEED)
    assert tuning == [("rbla", "autorank", rate) for rate in (0.1, 0.2, 0.4)]
    assert text_finetune.wanted(options, TEXT_ROWS, 0) == [("rbla", "autorank", 0.2), ("–", "head alone", 0.3)]
    known = {"rows": TEXT_ROWS, "options": json.loads(json.dumps(text_finetune.shown(options)))}
    more = dataclasses.replace(options, seeds=9, aggregators=("rbla", "flora"))
    assert text_finetune.known_rows(more, known) == TEXT_ROWS
    with pytest.raises(SystemExit, match="of rounds 3, got one of 10"):
        text_finetune.known_rows(dataclasses.replace(options, rounds=3), known)


def test_text_policies_are_compared_with_the_uniform_rank_of_their_rule():
    head = {"rule": "–", "policy": "head alone", "rate": 0.3, "accuracy": 0.5, "loss": 0.7}
    alone = [head | {"seed": seed} for seed in range(3)]
    found = {row["policy"]: row for row in text_tables.means(TEXT_ROWS + alone)}
    assert found["autorank"]["minus uniform, equal bytes"] == "+11.0 [+6.7, +15.3], p 0.0082"
    assert found["autorank"]["accuracy, %"] == "71.0 ± 11.5"  # the tuning seed apart
    assert found["autorank"]["rate"] == 0.2
    assert found["uniform, equal bytes"]["minus head alone"] == "+10.0 [-14.8, +34.8]"
    assert "minus uniform, equal bytes" not in found["head alone"]
