"""Causal decoders whose base is in 8 or 4 bits: as the same decoder with the same numbers in floats."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import autorank_jax as ar
from autorank_jax.models.causal_checkpoint import load_causal_lm
from autorank_jax.models.causal_config import CausalConfig, parse_config
from autorank_jax.models.causal_lm import init_causal_lm
from autorank_jax.models.quantized import Quantized
from autorank_jax.types import Batch
from tests.models.causal_cases import CONFIG, tiny, write_folder

SIZES = CausalConfig(vocabulary=61, width=64, depth=2, heads=4, kv_heads=2, head_dim=16, hidden=96, tied=False)
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, 61, (6, 9)), jnp.int32)
BATCH = Batch(IDS[:3], IDS[3:], jnp.ones(3))
NUMBERS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)  # of the blocks' matrices
OUTPUTS = 2 * (2 * 64 + 2 * 32 + 2 * 96 + 64)


def in_floats(model):
    """Return the decoder with floats of the same numbers."""
    floats = {n: v.astype(v.dtype) if isinstance(v, Quantized) else v for n, v in model.params.items()}
    return model._replace(params=floats)


def moved(task):
    leaves, structure = jax.tree.flatten(task.server.trainable)
    rng = np.random.default_rng(1)
    new = [leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return task.server._replace(trainable=jax.tree.unflatten(structure, new))


@pytest.fixture(scope="module", params=["int8", "nf4"])
def case(request):
    """Return the format, a quantised decoder, its task, and the task of the same numbers in floats."""
    model = init_causal_lm(SIZES, quantize=request.param)
    options = {"max_rank": {"*_proj": 3}, "chunk": 4}
    return (request.param, model, *(ar.task_from_causal_lm(m, **options) for m in (model, in_floats(model))))


def test_logits_are_near_those_without(case):
    form, model, _, _ = case
    whole = init_causal_lm(SIZES)
    ours, same, theirs = jax.jit(lambda: (model(IDS), in_floats(model)(IDS), whole(IDS)))()
    np.testing.assert_allclose(ours, same, atol=1e-5)
    error = jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)
    assert 1e-3 < error < {"int8": 0.03, "nf4": 0.4}[form]  # three times that of the matrices


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_the_same_numbers_in_floats(case):
    _, _, ours, theirs = case
    server = moved(theirs)

    def both(trainable):
        def one(task):
            return lambda t: jnp.sum(task.loss(task.server.frozen, t, BATCH, jax.random.key(0)))

        return [jax.value_and_grad(one(task))(trainable) for task in (ours, theirs)]

    (value, gradient), (expected, other) = jax.jit(both)(server.trainable)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for path, adapter in other.adapters.items():
        assert jnp.max(jnp.abs(adapter.lora_a)) > 1e-4
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), gradient.adapters[path], adapter)


def test_the_base_takes_its_bytes_and_is_never_whole_in_floats(case):
    form, _, ours, theirs = case
    scales = 4 * (OUTPUTS if form == "int8" else NUMBERS // 64)
    saved = 4 * NUMBERS - NUMBERS // (1 if form == "int8" else 2) - scales
    held = [sum(leaf.nbytes for leaf in jax.tree.leaves(task.server.frozen)) for task in (ours, theirs)]
    assert held[1] - held[0] == saved

    lanes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), ours.server.trainable)
    gradient = jax.grad(lambda t: jnp.sum(ours.loss(ours.server.frozen, t, BATCH, jax.random.key(0))))
    text = str(jax.make_jaxpr(jax.vmap(gradient))(lanes))
    assert "f32[64,96]" in text  # one block's up_proj
    assert "f32[2,64,96]" not in text  # all blocks'
    assert "f32[3,64,96]" not in text  # one for each client


def test_what_is_frozen_is_told_and_merged(case, tmp_path):
    form, model, ours, theirs = case
    kernels = [name for name in model.params if isinstance(model.params[name], Quantized)]
    assert sorted(kernels) == sorted(f"{path}/kernel" for path in ar.max_ranks(ours))
    assert ours.report.quantized == dict.fromkeys(kernels, form)
    assert f"frozen as {form}: layers/mlp/up_proj/kernel" in str(ours.report)
    assert not set(kernels) & set(ours.report.frozen)
    server = moved(ours)
    merged = ar.merge(ours, server).params
    expected = ar.merge(theirs, moved(theirs)).params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, expected)
    safetensors = pytest.importorskip("safetensors")
    folder = ar.export_peft(tmp_path, ours, server, names=ar.models.causal_name, base_model="BASE")
    with safetensors.safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata()["base_quantization"] == form
        found = file.get_tensor("base_model.model.model.layers.1.mlp.up_proj.lora_A.weight")
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    np.testing.assert_array_equal(found.T, server.trainable.adapters["layers/mlp/up_proj"].lora_a[1])


def test_only_a_part_may_be_adapted():
    model = init_causal_lm(SIZES._replace(depth=1), quantize="nf4")
    task = ar.task_from_causal_lm(model, max_rank=2, where="*/q_proj")
    assert task.report.quantized["layers/mlp/up_proj/kernel"] == "nf4"
    merged = ar.merge(task, task.server).params
    assert isinstance(merged["layers/mlp/up_proj/kernel"], Quantized)
    assert not isinstance(merged["layers/self_attn/q_proj/kernel"], Quantized)
    said = r"expected train_dense patterns of floats, got '\*/up_proj/\*' with 'layers/mlp/up_proj/kernel' as nf4"
    with pytest.raises(ValueError, match=said):
        ar.task_from_causal_lm(model, max_rank=2, where="*/q_proj", train_dense="*/up_proj/*")
    with pytest.raises(ValueError, match=r"flora merges adapters into the base.*a quantised base has none"):
        ar.init_state(task.server, ar.aggregators.flora(), None, clients=2)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_folders_are_quantised_as_they_are_read(tmp_path, form):
    sizes = parse_config(CONFIG)
    write_folder(tmp_path, tiny(sizes), CONFIG, files=2)
    loaded = load_causal_lm(tmp_path, quantize=form)
    expected = tiny(sizes).params["layers/mlp/down_proj/kernel"]
    found = loaded.params["layers/mlp/down_proj/kernel"]
    assert found.shape == expected.shape
    error = np.abs(np.asarray(found.astype(jnp.float32)) - expected).max() / np.abs(expected).max()
    assert error < {"int8": 0.5 / 127, "nf4": 0.16}[form]
    half = load_causal_lm(tmp_path, quantize=form, dtype=jnp.bfloat16)
    assert {value.dtype for value in half.params.values()} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(half.params["layers/mlp/down_proj/kernel"].codes, found.codes)
    for name, value in half.params.items():
        assert isinstance(value, Quantized) == (name.startswith("layers/") and name.endswith("/kernel"))


@pytest.mark.parametrize("wrong", ["int4", True, 8])
def test_formats_are_two(tmp_path, wrong):
    with pytest.raises((ValueError, TypeError), match="expected quantize as one of int8, nf4 or None, got"):
        load_causal_lm(tmp_path, quantize=wrong)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_round_trains(case, dtype):
    form = case[0]
    model = init_causal_lm(SIZES, quantize=form, dtype=dtype)
    task, rule = ar.task_from_causal_lm(model, max_rank=4, chunk=4), ar.aggregators.raflora()
    data = ar.from_parts(IDS, jnp.roll(IDS, -1, 1), [range(4), range(4, 6)])
    ranks = {path: jnp.asarray([1, 4]) for path in ar.max_ranks(task)}
    local = ar.make_local_training(task, optax.sgd(0.5), batch_size=2)
    round_fn = jax.jit(ar.make_round(local, rule, rank_levels=1, lanes=2))
    state, losses = ar.init_state(task.server, rule, ranks, local_epochs=4), []
    for _ in range(3):
        state, info = round_fn(jax.random.key(0), state, data)
        losses.append(float(info.loss))
    assert losses[2] < losses[0]
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(state.server.trainable))
    words = jax.jit(lambda server: ar.evaluation.continue_text(task, server, IDS[0], tokens=3))(state.server)
    assert words.shape == (3,)
