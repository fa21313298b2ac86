"""Decoders of Tunix: every matrix of their blocks is adapted, and equal blocks run in one scan."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import autorank_jax as ar
from autorank_jax.types import Adapter, Batch

pytest.importorskip("tunix")


@pytest.fixture(autouse=True)
def lenient_promotion():
    """Implicit promotion, which Tunix needs."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Tunix' own use of jax and flax
]

SIZES = {"num_layers": 3, "embed_dim": 16, "hidden_dim": 32, "num_heads": 4, "head_dim": 4, "num_kv_heads": 2}
ROTARY = {"vocab_size": 64, "rope_theta": 10_000, "norm_eps": 1e-5}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 8)))


class Decoder(nnx.Module):
    """Logits of ids alone, as a task wants them."""

    def __init__(self, model):
        self.model = model

    def __call__(self, ids):
        rows, length = ids.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length))
        return self.model(ids, positions, None, mask)[0]


def make(family):
    rngs = nnx.Rngs(0)
    if family.startswith("gemma"):
        from tunix.models.gemma import model as gemma  # noqa: PLC0415
        from tunix.models.gemma3 import model as gemma3  # noqa: PLC0415

        sizes = {**SIZES, "num_embed": 64}
        if family == "gemma3":
            return Decoder(
                gemma3.Gemma3(gemma3.ModelConfig(**sizes, sliding_window_size=4, param_dtype=jnp.float32), rngs=rngs)
            )
        kinds = [gemma.AttentionType.GLOBAL] * 3
        if family == "gemma2":
            kinds[1] = gemma.AttentionType.LOCAL_SLIDING
        config = gemma.ModelConfig(
            **sizes,
            final_logit_softcap=30.0,
            use_post_attn_norm=family == "gemma2",
            use_post_ffw_norm=family == "gemma2",
            attention_types=kinds,
            sliding_window_size=4,
        )
        return Decoder(gemma.Gemma(config, rngs=rngs))
    from tunix.models.llama3 import model as llama3  # noqa: PLC0415
    from tunix.models.qwen2 import model as qwen2  # noqa: PLC0415
    from tunix.models.qwen3 import model as qwen3  # noqa: PLC0415

    module, kind, tied = {
        "llama3": (llama3, llama3.Llama3, {"weight_tying": True}),
        "llama3-untied": (llama3, llama3.Llama3, {}),
        "qwen2": (qwen2, qwen2.Qwen2, {"use_tied_embedding": True}),
        "qwen3": (qwen3, qwen3.Qwen3, {}),
    }[family]
    return Decoder(kind(module.ModelConfig(**SIZES, **ROTARY, **tied), rngs=rngs))


def nats(logits, targets):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0], -1)


def task_of(carrying, **options):
    return ar.adapters.task_from_lora_params(carrying, preprocess=lambda ids: ids, loss=nats, **options)


def carrying(family):
    model = ar.adapters.with_qwix(make(family), IDS, rank=2, where="model/layers/.*")
    rng = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        variable[...] += jnp.asarray(0.1 * rng.normal(size=variable.shape), variable.dtype)
    return model


def gradient(task):
    batch = Batch(IDS, jnp.roll(IDS, -1, axis=1), jnp.ones(len(IDS)))
    return jax.grad(lambda t: jnp.sum(task.loss(task.server.frozen, t, batch, jax.random.key(0))))(
        task.server.trainable
    ).adapters


@pytest.mark.parametrize("family", ["llama3", "llama3-untied", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_every_matrix_of_the_blocks_is_adapted(family):
    task = task_of(carrying(family))
    vectors = ("norm/w", "norm/scale", "_bias", "/b")
    matrices = [
        name
        for name, value in task.server.frozen.rest.items()
        if "/layers/" in name and np.ndim(value) > 1 and not name.endswith(vectors)
    ]
    assert matrices
    assert sorted(task.server.trainable.adapters) == sorted(matrices)
    for path, (a, b) in gradient(task).items():
        assert jnp.max(jnp.abs(a)) > 0, path
        assert jnp.max(jnp.abs(b)) > 0, path


@pytest.mark.parametrize("family", ["llama3", "llama3-untied", "qwen2", "qwen3", "gemma"])
def test_equal_blocks_run_in_a_scan(family):
    model = carrying(family)
    listed, scanned = task_of(model), task_of(model, scan_blocks="model/layers")
    np.testing.assert_allclose(
        scanned.predict(*scanned.server[::-1], IDS), listed.predict(*listed.server[::-1], IDS), atol=1e-5
    )
    expected = gradient(listed)
    for path, (a, b) in gradient(scanned).items():
        for number in range(3):
            one = expected[path.format(number)]
            np.testing.assert_allclose(a[number], one.lora_a, atol=1e-5)
            np.testing.assert_allclose(b[number], one.lora_b, atol=1e-5)


def test_blocks_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match=r"equal blocks in 'model/layers', got block 1 with attn_type = .*LOCAL"):
        task_of(carrying("gemma2"), scan_blocks="model/layers")


def test_a_federated_round_of_mixed_ranks():
    task = task_of(carrying("llama3"), scan_blocks="model/layers")
    data = ar.from_parts(
        np.tile(IDS, (3, 1)), np.roll(np.tile(IDS, (3, 1)), -1, axis=1), [range(2), range(2, 6), range(6, 12)]
    )
    rule = ar.aggregators.make_rule("raflora")
    ranks = {path: jnp.asarray([1, 2, 2]) for path in ar.max_ranks(task)}
    state = ar.init_state(task.server, rule, ranks)
    local = ar.make_local_training(task, optax.sgd(0.5), batch_size=2)
    round_ = jax.jit(ar.make_round(local, rule))
    losses = []
    for number in range(4):
        state, info, *_ = round_(jax.random.key(number), state, data)
        losses.append(float(info.loss))
    assert losses[-1] < losses[0] - 0.01
    adapter = state.server.trainable.adapters["model/layers/{}/attn/q_proj/w"]
    assert isinstance(adapter, Adapter)
    merged = ar.merge(task, state.server)
    np.testing.assert_allclose(merged(IDS), task.predict(state.server.frozen, state.server.trainable, IDS), atol=1e-5)
