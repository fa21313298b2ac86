"""Whole rounds of language models beside steps by hand: what is published, and that both are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax.models.causal_config import CausalConfig
from autorank_jax.models.causal_lm import causal_losses, init_causal_lm
from autorank_jax.types import Scored
from benchmarks import script
from benchmarks.report import FOLDER
from benchmarks.speed import language_by_hand, language_rounds
from benchmarks.speed.language_memory import Training

TINY = CausalConfig(vocabulary=64, width=64, depth=2, heads=2, kv_heads=1, head_dim=32, hidden=96, tied=True)
TRAINING = Training(TINY, jnp.float32, 2, 1, 8, 2)


@pytest.fixture
def relaxed():
    """What is written by hand leaves promotion to JAX."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def published():
    rows = script.read(FOLDER / "speed" / "results" / "gpu_program.json")["language_rounds"]["rows"]
    return {(row["model"], row["program"]): row for row in rows}


@pytest.mark.parametrize("model", ["1B", "8B"])
def test_a_round_takes_little_more_than_steps_by_hand(model):
    rows = published()
    plain, by_hand = rows[model, language_rounds.PLAIN], rows[model, language_rounds.BY_HAND]
    rbla, raflora = rows[model, "rbla"], rows[model, "raflora"]
    for floor in (plain, by_hand):
        for ratios in (language_rounds.ratios(row, floor) for row in (rbla, raflora)):
            assert ratios["memory_ratio"] <= 1.2
            assert ratios["step_ratio"] <= 1.15
            assert ratios["whole_ratio"] <= 1
    assert language_rounds.both(raflora) + raflora["output_bytes"] <= 76e9
    assert {(row["lanes"], row["texts"], row["length"]) for row in rows.values()} == {(16, 2, 512)}


def test_deep_models_compile_as_quickly():
    rows = script.read(FOLDER / "speed" / "results" / "gpu_program.json")["language_depths"]["rows"]
    assert [row["depth"] for row in rows] == [4, 32]
    assert rows[0]["operations"] == rows[1]["operations"]
    assert language_rounds.seconds_of(rows[1]) <= 1.5 * language_rounds.seconds_of(rows[0])


@pytest.mark.slow
@pytest.mark.usefixtures("relaxed")
def test_programs_are_compiled_and_counted(monkeypatch):
    monkeypatch.setitem(language_rounds.MODELS, "small", TRAINING)
    rows = next(
        rows
        for rows in language_rounds.rows_of([], ["small"], list(language_rounds.PROGRAMS), h100=False)
        if len(rows) == len(language_rounds.PROGRAMS)
    )
    adapters = 2 * 2 * (64 * 4 * 2 + 32 * 2 + 64 * 2 + 96 * 3 + 64) * 2 * 4  # lanes, blocks, sides, rank, bytes
    assert all(row["argument_bytes"] > adapters / 4 and row["step"] > 0 for row in rows)
    told = language_rounds.tables({"language_rounds": {"rows": rows}})["language_rounds"]
    assert "| small | by hand, no rotation | 2 × 1 × 8 | 2 |" in told
    assert rows[2]["turn"] < rows[3]["turn"] + rows[3]["outside"]


@pytest.mark.slow
@pytest.mark.usefixtures("relaxed")
def test_what_is_written_by_hand_learns_as_the_decoder_does():
    model = init_causal_lm(TINY)
    names = {"q": "self_attn/q_proj", "k": "self_attn/k_proj", "v": "self_attn/v_proj", "o": "self_attn/o_proj"}
    names |= {name: f"mlp/{name}_proj" for name in ("gate", "up", "down")}
    base = {short: model.params[f"layers/{name}/kernel"] for short, name in names.items()}
    base["before_attention"] = model.params["layers/input_layernorm/scale"]
    base["before_feed"] = model.params["layers/post_attention_layernorm/scale"]
    outer = {"tokens": model.params["embed_tokens/embedding"], "norm": model.params["norm/scale"]}
    shapes, *_ = language_by_hand.arguments(TINY, jnp.float32, lanes=1, texts=1, length=8, rank=2)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) * 0.1, jnp.float32), shapes)
    ids = jnp.asarray(rng.integers(0, 64, (1, 1, 1, 8)), jnp.int32)  # of one step

    def ours(adapters):
        added = {f"layers/{names[n]}/kernel": base[n] + a[0] @ b[0] for n, (a, b) in adapters.items()}
        losses = causal_losses(TINY, model.params | added, Scored(ids[0, 0], jnp.roll(ids[0, 0], -1, axis=1)))
        return jnp.mean(losses)

    expected = jax.jit(jax.grad(ours))(adapters)
    _, momentum = jax.jit(language_by_hand.make_training(TINY, rotary=True))(
        adapters, jax.tree.map(jnp.zeros_like, adapters), (base, outer), ids
    )
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=2e-5), momentum, expected)
