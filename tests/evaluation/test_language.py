"""Greedy continuation equals the largest of the full logits, token after token, with adapters that matter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autorank_jax as ar
from autorank_jax.adapters import merge, task_from_causal_lm
from autorank_jax.evaluation import client_perplexities, continue_text, make_evaluate_language
from autorank_jax.types import Scored, Tokens
from tests.models.causal_cases import TINY, tiny


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


def test_ids_beyond_the_vocabulary_are_refused_before_anything_is_computed(task):
    ids = jnp.array([[3, 61]], jnp.int32)
    said = r"expected ids in 0\.\.60, got 3 to 61, probably of another tokenizer"
    with pytest.raises(ValueError, match=said):
        make_evaluate_language(task, ids, ids)
    with pytest.raises(ValueError, match=said):
        task.predict(task.server.frozen, task.server.trainable, ids)
    with pytest.raises(ValueError, match=said):
        continue_text(task, task.server, ids[0], tokens=2)
    data = ar.from_parts(ids, ids, [np.array([0])])
    state = ar.init_state(task.server, ar.aggregators.rbla(), None, clients=1)
    with pytest.raises(ValueError, match=said):
        client_perplexities(task, state, data)
    with pytest.raises(ValueError, match=f"at most {TINY.length} tokens a text"):
        continue_text(task, task.server, jnp.zeros(TINY.length, jnp.int32), tokens=1)
    packed = Tokens(jnp.zeros((1, TINY.length + 2), jnp.int32), jnp.ones((1, TINY.length + 2), jnp.int32))
    with pytest.raises(ValueError, match=f"at most {TINY.length} tokens a text.* got {TINY.length + 2}"):
        task.predict(task.server.frozen, task.server.trainable, packed)


def test_a_client_whose_ids_the_model_does_not_know_is_excluded(task):
    ids = jnp.array([[3, 4, 5], [3, 61, 5], [-1, 4, 5], [6, 7, 8], [6, 7, 8]], jnp.int32)
    targets = (ids % 61).at[4, 2].set(99)
    data = ar.from_parts(ids, targets, [np.array([n]) for n in range(5)])
    state = ar.init_state(task.server, ar.aggregators.rbla(), None, clients=5)
    local = ar.make_local_training(task, optax.sgd(0.1), batch_size=1)
    trained, info = jax.jit(ar.make_round(local, ar.aggregators.rbla()))(jax.random.key(0), state, data)
    assert int(info.excluded) == 3
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(trained.server.trainable))
    nats = task.predict(task.server.frozen, task.server.trainable, Scored(ids[:1], jnp.array([[4, 5, 99]])))
    assert np.isnan(np.asarray(nats)).tolist() == [[False, False, True]]  # a target that there is not


def test_odd_inputs_and_sizes_are_told(task):
    with pytest.raises(ValueError, match="expected ids as whole numbers"):
        task.predict(task.server.frozen, task.server.trainable, ["a b"])
    ids = jnp.array([[3, 4]], jnp.int32)
    with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
        make_evaluate_language(task, ids, ids, batch_size=0)
    with pytest.raises(ValueError, match="expected chunk >= 1, got 0"):
        task_from_causal_lm(tiny(), max_rank=2, chunk=0)
