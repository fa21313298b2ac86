"""Numbers that comparisons let pass, such as NaN, and arrays in place of one number: each is told in one line."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax import aggregators
from autorank_jax.evaluation import personal_scores
from autorank_jax.federated import faults
from autorank_jax.ranks import budgets, mcda, policies
from autorank_jax.ranks.criteria import loss_entropy
from tests.test_bad_input import KEY, TRAINING, parts, state, stats, task


def private(noise_multiplier=0.0, **options):
    rule = aggregators.rbla()
    return aggregators.with_differential_privacy(
        rule, clip=1.0, noise_multiplier=noise_multiplier, denominator=2.0, **options
    )


CASES = {
    "learning rate NaN": (lambda: state(learning_rate=float("nan")), "learning_rate as finite numbers >= 0, got nan"),
    "learning rate inf": (lambda: state(learning_rate=float("inf")), "got inf"),
    "learning rate below 0": (lambda: state(learning_rate=np.array([0.1, -0.1])), "got -0.1"),
    "hyper-parameter NaN": (lambda: state(momentum=float("nan")), "expected momentum as numbers, got nan"),
    "weight below 0": (
        lambda: mcda.topsis(np.ones((2, 2)), [1, -1]), "expected weights as finite numbers >= 0, got -1",
    ),
    "weight NaN": (lambda: mcda.topsis(np.ones((2, 2)), [1, np.nan]), "got nan"),
    "loss below 0": (lambda: loss_entropy([[1.0, -2.0]]), "expected epoch_losses as finite numbers >= 0, got -2"),
    "more epochs than there are": (lambda: loss_entropy([[1.0, 2.0]], [3]), "whole numbers in 0..2, got 3"),
    "half an epoch": (lambda: loss_entropy([[1.0, 2.0]], [1.5]), "whole numbers in 0..2, got 1.5"),
    "size below 0": (
        lambda: policies.autorank(criteria=("size",))(KEY, stats(size=np.array([-1, 2]))),
        "expected stats.size as finite numbers >= 0, got -1",
    ),
    "size below 0 alone": (lambda: policies.by_size()(KEY, stats(size=np.array([-1, 2]))), "stats.size as finite"),
    "cap of 7": (
        lambda: budgets.with_caps(policies.uniform())(KEY, stats(max_ratio=np.array([1.0, 7]))),
        "expected stats.max_ratio in (0, 1], got 7, probably a rank: divide by the maximum",
    ),
    "a budget for each": (
        lambda: budgets.with_budget(policies.uniform(), np.array([0.5, 0.6])),
        "expected one mean_ratio, got an array of shape (2,)",
    ),
    "a coverage for each": (lambda: budgets.with_coverage(policies.uniform(), np.ones(2)), "expected one share"),
    "a drop-out for each": (lambda: faults.drop_out(np.ones(2)), "expected one probability, got an array of"),
    "layer weight below 0": (
        lambda: budgets.with_budget(policies.uniform(), 0.5, layer_weights=(1, -1)),
        "expected layer_weights as finite numbers above 0, got -1",
    ),
    "layer weight NaN": (
        lambda: budgets.mean_of_ratios(jnp.ones(2), stats(), layer_weights=(np.nan,)), "above 0, got nan",
    ),
    "ridge NaN": (lambda: aggregators.lora_fair(ridge=float("nan")), "expected a finite ridge >= 0, got nan"),
    "tail penalty NaN": (
        lambda: aggregators.with_tail_penalty(lambda *_: 0, 0.5, float("nan")), "finite tail penalty >= 0, got nan",
    ),
    "infinite noise": (lambda: private(noise_multiplier=float("inf")), "of at least 0 and finite, got inf"),
    "quantile of 50": (lambda: private(adaptive=aggregators.AdaptiveClip(quantile=50)), "a quantile in (0, 1)"),
    "rate below 0": (lambda: private(adaptive=aggregators.AdaptiveClip(rate=-1)), "a rate above 0"),
    "owners below 0": (
        lambda: private(owners={p: np.full(2, -1.0) for p in ("layers/0", "layers/1")}).init(task().server),
        "owners of 'layers/0' as finite numbers >= 0, got -1",
    ),
    "held-out examples of others": (
        lambda: personal_scores(
            KEY, TRAINING, aggregators.rbla(), state(), parts([0, 1], [2, 3]), task=task(), held_out=parts([4])
        ),
        "expected held-out examples of the 2 clients of the data, got those of 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_named(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)
