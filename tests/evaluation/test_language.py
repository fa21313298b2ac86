"""Greedy continuation equals the largest of the full logits, token after token, with adapters that matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax.adapters import merge, task_from_causal_lm
from autorank_jax.evaluation import continue_text
from tests.models.causal_cases import tiny


@pytest.fixture(scope="module")
def task():
    return task_from_causal_lm(tiny(), max_rank=2)


def test_greedy_continuation_is_the_argmax_of_full_logits(task):
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), task.server.trainable.adapters
    )
    server = task.server._replace(trainable=task.server.trainable._replace(adapters=moved))
    prompt = jnp.array([5, 17, 3], jnp.int32)
    found = np.asarray(jax.jit(lambda server: continue_text(task, server, prompt, tokens=5))(server))
    whole = np.concatenate([prompt, found])
    logits = np.asarray(merge(task, server)(jnp.asarray(whole[None])))[0]
    np.testing.assert_array_equal(found, logits[2:-1].argmax(-1))
    assert len(set(found.tolist())) > 1
    base = np.asarray(jax.jit(lambda server: continue_text(task, server, prompt, tokens=5))(task.server))
    assert found.tolist() != base.tolist()


@pytest.mark.parametrize(("prompt", "tokens"), [([], 3), ([[1, 2]], 3), ([1, 2], 0)])
def test_empty_prompts_and_no_tokens_are_refused(task, prompt, tokens):
    with pytest.raises(ValueError, match="expected a prompt of shape"):
        continue_text(task, task.server, jnp.array(prompt, jnp.int32), tokens=tokens)
