"""Adapters written in PEFT's layout: read back here; `test_peft.py` has the real one read them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.adapters.peft import export_peft
from autorank_jax.adapters.task import merge
from autorank_jax.models.bert import bert_name
from autorank_jax.models.transformer import Encoder, Size, TextClassifier

safetensors = pytest.importorskip("safetensors.numpy", reason="the package safetensors is not installed")

SMALL = Size(width=8, depth=2, heads=2, hidden=12, length=10)


class Mixed(nnx.Module):
    """One layer of every kind that can be exported."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.conv = nnx.Conv(4, 6, (3,), rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, ids):
        return self.head(jnp.mean(jax.nn.relu(self.conv(self.embed(ids))), axis=1))


def trained(task, seed=1):
    """Pretend that everything trainable has been trained."""
    leaves, structure = jax.tree.flatten(task.server.trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)]
    return task.server._replace(trainable=jax.tree.unflatten(structure, moved))


def bert_names(path):
    """Name layers as BertModel does, which has no head."""
    return None if path == "head" else bert_name(path.removeprefix("encoder/"))


def bert_task():
    model = TextClassifier(Encoder(20, SMALL, rngs=nnx.Rngs(0)), 2, rngs=nnx.Rngs(1))
    ranks = {"encoder/blocks/*/attention/*": 3, "encoder/blocks/1/up": 5, "encoder/blocks/0/down": 2}
    return task_from_nnx(model, max_rank=ranks, train_dense=("*/bias", "head/*"))


def test_exported_factors_multiply_to_the_update(tmp_path):
    task = task_from_nnx(Mixed(nnx.Rngs(0)), max_rank={"embed": 2, "conv": 3, "head": 4})
    server = trained(task)
    tensors = safetensors.load_file(export(tmp_path, task, server) / "adapter_model.safetensors")
    prefix = "base_model.model."
    a, b = tensors[f"{prefix}head.lora_A.weight"], tensors[f"{prefix}head.lora_B.weight"]
    before, after = task.server.frozen.kernels, merge(task, server)
    np.testing.assert_allclose((b @ a).T, after.head.kernel[...] - before["head"], atol=1e-6)
    a, b = tensors[f"{prefix}embed.lora_embedding_A"], tensors[f"{prefix}embed.lora_embedding_B"]
    np.testing.assert_allclose((b @ a).T, after.embed.embedding[...] - before["embed"], atol=1e-6)
    a, b = tensors[f"{prefix}conv.lora_A.weight"], tensors[f"{prefix}conv.lora_B.weight"]
    assert a.shape == (3, 4, 3)
    assert b.shape == (6, 3, 1)
    update = np.einsum("or,rck->kco", b[..., 0], a)
    np.testing.assert_allclose(update, after.conv.kernel[...] - before["conv"].reshape(3, 4, 6), atol=1e-6)


def export(folder, task, server, **options):
    return export_peft(folder / "adapter", task, server, **options)


def test_every_module_has_its_rank_and_scale_one(tmp_path):
    task = bert_task()
    folder = export(tmp_path, task, task.server, names=bert_names, base_model="some/model")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"
    assert config["task_type"] is None
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert len(config["rank_pattern"]) == len(config["target_modules"]) == 10
    assert sorted(set(config["rank_pattern"].values())) == [2, 3, 5]
    assert config["bias"] == "all"


def test_a_clients_adapter_is_cut_to_its_rank(tmp_path):
    task = task_from_nnx(Mixed(nnx.Rngs(0)), max_rank={"embed": 2, "conv": 3, "head": 4})
    server, ranks = trained(task), {"conv": np.int32(3), "embed": 1, "head": jnp.int32(2)}
    folder = export(tmp_path, task, server, ranks=ranks)
    tensors = safetensors.load_file(folder / "adapter_model.safetensors")
    head = server.trainable.adapters["head"]
    a, b = (tensors[f"base_model.model.head.lora_{f}.weight"] for f in "AB")
    np.testing.assert_allclose((b @ a).T, head.lora_a[:, :2] @ head.lora_b[:2], atol=1e-6)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^conv": 3, "^embed": 1, "^head": 2}
    for wrong in ({**ranks, "head": 5}, {**ranks, "head": 0.5}, {**ranks, "head": jnp.ones(3, int)}):
        with pytest.raises((ValueError, TypeError), match=r"ranks.*got"):
            export(tmp_path, task, server, ranks=wrong)
    with pytest.raises(ValueError, match="expected one for each of"):
        export(tmp_path, task, server, ranks={"head": 1})


def test_export_refuses_what_the_adapters_do_not_tell(tmp_path):
    task = bert_task()
    base = task.server.frozen
    moved = base._replace(kernels={path: kernel + 1 for path, kernel in base.kernels.items()})
    with pytest.raises(ValueError, match=r"merges into the base.*use merge"):
        export(tmp_path, task, task.server._replace(frozen=moved), names=bert_names)
    with pytest.raises(ValueError, match="built by hand"):
        export(tmp_path, task._replace(origin=None), task.server)
    with pytest.raises(ValueError, match="one module name for each adapted layer"):
        export(tmp_path, task, task.server, names=lambda _: "same")
    frozen = task_from_nnx(Mixed(nnx.Rngs(0)), max_rank={}, train_dense="*")
    with pytest.raises(ValueError, match="with adapters, got one without"):
        export(tmp_path, frozen, frozen.server)
    whole = task_from_nnx(Mixed(nnx.Rngs(0)), max_rank={"head": 2}, train_dense="conv/*")
    with pytest.raises(ValueError, match="conv/kernel"):
        export(tmp_path, whole, whole.server)


def test_names_and_servers_of_another_kind_are_refused(tmp_path):
    def task(width):
        return task_from_nnx(nnx.Linear(width, 3, rngs=nnx.Rngs(0)), max_rank=2)

    one, other = task(4), task(5).server
    with pytest.raises(TypeError, match="names that return text or None, got 3 for ''"):
        export_peft(tmp_path, one, one.server, names=lambda _: 3)
    with pytest.raises(TypeError, match="names as a function of 1 argument or None, got "):
        export_peft(tmp_path, one, one.server, names=["a"])
    for call in (lambda: export_peft(tmp_path, one, other), lambda: merge(one, other)):
        with pytest.raises(ValueError, match="a server of this task"):
            call()
    assert not list(tmp_path.iterdir())
