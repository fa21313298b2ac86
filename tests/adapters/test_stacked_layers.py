"""Layers stacked along a leading axis, by `nnx.vmap` or in a function that scans: one adapter, a matrix for each."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import autorank_jax as ar
from autorank_jax.adapters.lora import product
from autorank_jax.engine.flops import FlopModel
from autorank_jax.evaluation.costs import client_costs
from autorank_jax.types import Traffic, Travels

X = jnp.linspace(-1, 1, 8).reshape(2, 4)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.general = nnx.LinearGeneral(4, (2, 2), rngs=rngs)
        self.einsum = nnx.Einsum("bi,oi->bo", (4, 4), (4,), rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.einsum(self.general(self.linear(x)).reshape(x.shape)))


class Scanned(nnx.Module):
    def __init__(self):
        make = nnx.vmap(Block, in_axes=0, out_axes=0)
        self.blocks = make(nnx.Rngs(0).split(3))

    def __call__(self, x):
        return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


def function(params, x):
    def block(x, layer):
        return x + jnp.tanh(x @ layer["w"] + layer["bias"][None, :]), None

    return lax.scan(block, x, params["layers"])[0] @ params["head"]


def function_params():
    rng = np.random.default_rng(0)
    layers = {"w": rng.normal(size=(3, 4, 4)), "bias": rng.normal(size=(3, 4))}
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float32), {"layers": layers, "head": rng.normal(size=(4, 2))}
    )


def moved(task, seed=1):
    leaves, structure = jax.tree.flatten(task.server.trainable)
    rng = np.random.default_rng(seed)
    new = [leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return task.server._replace(trainable=jax.tree.unflatten(structure, new))


@pytest.mark.parametrize("kind", ["nnx", "function", "materialized"])
def test_stacked_layers_are_adapted_and_merged(kind):
    if kind == "nnx":
        model = Scanned()
        task, run = ar.task_from_nnx(model, max_rank=2), lambda merged: merged(X)
        paths = ["blocks/einsum", "blocks/general", "blocks/linear"]
    else:
        model = function_params()
        options = {"max_rank": {"layers/*": 2}, "stacked": "layers/*", "materialize": kind == "materialized"}
        task, run = ar.task_from_function(function, model, **options), lambda merged: function(merged, X)
        paths = ["layers/w"]
    adapters = task.server.trainable.adapters
    assert sorted(adapters) == paths
    assert {tuple(map(jnp.shape, adapter)) for adapter in adapters.values()} == {((3, 4, 2), (3, 2, 4))}
    server = moved(task)
    np.testing.assert_allclose(task.predict(*task.server[::-1], X), run(model), atol=1e-6)
    outputs = task.predict(server.frozen, server.trainable, X)
    assert jnp.max(jnp.abs(outputs - run(model))) > 0.1
    np.testing.assert_allclose(outputs, run(ar.merge(task, server)), atol=1e-5)


def test_patterns_of_stacks_must_match():
    with pytest.raises(ValueError, match=r"stacked patterns that match a leaf \(layers, d_in, d_out\), got 'layer/\*'"):
        ar.task_from_function(function, function_params(), max_rank=2, stacked="layer/*")


def test_stacks_are_exported_layer_by_layer(tmp_path):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    task = ar.task_from_function(
        function, function_params(), max_rank={"layers/*": 2}, stacked="layers/*", train_dense="layers/bias"
    )
    server = moved(task)
    names = {"layers/w": "model.{}.w", "layers": "model.{}"}.get
    folder = ar.export_peft(tmp_path, task, server, names=names)
    tensors, adapter = load_file(folder / "adapter_model.safetensors"), server.trainable.adapters["layers/w"]
    for number in range(3):
        a, b = (tensors[f"base_model.model.model.{number}.w.lora_{factor}.weight"] for factor in "AB")
        np.testing.assert_allclose((b @ a).T, product(adapter)[number], atol=1e-6)
        np.testing.assert_array_equal(
            tensors[f"base_model.model.model.{number}.bias"], server.trainable.dense["layers/bias"][number]
        )
    with pytest.raises(ValueError, match="for stacked layers alone, got 'w'"):
        ar.export_peft(tmp_path, task, server, names={"layers/w": "w"}.get)


def test_layers_are_exported_at_ranks_of_their_own(tmp_path):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    task = ar.task_from_function(function, function_params(), max_rank={"layers/*": 3}, stacked="layers/*")
    server, names = moved(task), {"layers/w": "model.{}.w"}.get
    ranks = np.array([2, 1, 3])
    folder = ar.export_peft(tmp_path, task, server, ranks={"layers/w": ranks}, names=names)
    tensors, (a, b) = load_file(folder / "adapter_model.safetensors"), server.trainable.adapters["layers/w"]
    for number, rank in enumerate(ranks):
        lora_a, lora_b = (tensors[f"base_model.model.model.{number}.w.lora_{factor}.weight"] for factor in "AB")
        np.testing.assert_array_equal(lora_a.T, a[number, :, :rank])
        np.testing.assert_array_equal(lora_b.T, b[number, :rank])
    config = json.loads((folder / "adapter_config.json").read_text())
    pattern = {rf"^model\.{number}\.w": rank for number, rank in enumerate(ranks.tolist())}
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (3, pattern, pattern)
    for wrong in ([2, 1, 4], [2, 1], [[2, 1, 3]], [2.0, 1.0, 3.0]):
        with pytest.raises(
            ValueError, match=r"ranks\['layers/w'\]: expected a whole number in 1..3, or 3 of them, got"
        ):
            ar.export_peft(tmp_path, task, server, ranks={"layers/w": np.array(wrong)}, names=names)


def test_stacks_cost_what_their_layers_cost():
    task = ar.task_from_function(function, function_params(), max_rank={"layers/*": 2}, stacked="layers/*")
    server, ranks = moved(task), {"layers/w": jnp.asarray([1, 2])}
    lora_b = server.trainable.adapters["layers/w"].lora_b.at[1, 1].set(0)  # one layer uses one position
    server.trainable.adapters["layers/w"] = server.trainable.adapters["layers/w"]._replace(lora_b=lora_b)
    traffic = Traffic(down=Travels(live=True))
    costs = client_costs(server, ranks, [5, 5], FlopModel(0, {"layers/w": 1}), local_epochs=1, traffic=traffic)
    np.testing.assert_array_equal(costs.parameters, [3 * 8, 2 * 3 * 8])
    np.testing.assert_array_equal(costs.bytes_up, [4 * 24, 4 * 48])
    np.testing.assert_array_equal(costs.bytes_down, [4 * 24, 4 * 8 * 5])
    by_layer = {"layers/w": jnp.asarray([[1, 2, 1], [2, 2, 2]])}
    mixed = client_costs(server, by_layer, [5, 5], FlopModel(0, {"layers/w": 1}), local_epochs=1, traffic=traffic)
    np.testing.assert_array_equal(mixed.parameters, [4 * 8, 2 * 3 * 8])
    np.testing.assert_array_equal(mixed.bytes_up, [4 * 32, 4 * 48])
    np.testing.assert_array_equal(mixed.bytes_down, [4 * 8 * 3, 4 * 8 * 5])
    np.testing.assert_allclose(mixed.flops, [5 * 4 / 3, 5 * 2])
    with pytest.raises(ValueError, match="or for each layer of a stack"):
        client_costs(server, {"layers/w": jnp.ones((1, 2))}, [5], FlopModel(0, {"layers/w": 1}), local_epochs=1)


def test_ranks_of_other_layers_are_refused():
    task = ar.task_from_function(function, function_params(), max_rank={"layers/*": 2}, stacked="layers/*")
    rule, data = ar.aggregators.rbla(), ar.from_parts(X, np.zeros(2, int), [[0], [1]])
    for wrong in ([[1, 2], [2, 1]], [[1, 2, 1]] * 3, 1):
        with pytest.raises(ValueError, match=r"ranks of shape \(clients,\) = .* or \(clients, \*layers\) for a stack"):
            ar.init_state(task.server, rule, {"layers/w": jnp.asarray(wrong)}, clients=2)
    with pytest.raises(ValueError, match=r"ranks of 'layers/w' in 1..2, got 1..3"):
        ar.init_state(task.server, rule, {"layers/w": jnp.asarray([[1, 3, 1]])})
    state = ar.init_state(task.server, rule, {"layers/w": jnp.asarray([[1, 2, 1], [2, 1, 1]])})
    one = ar.make_round(ar.make_local_training(task, optax.sgd(0.1), batch_size=1), rule)
    assert int(one(jax.random.key(0), state, data)[1].steps) == 2
    with pytest.raises(ValueError, match=r"ranks of 'layers/w' of shape \(2,\) or \(2, 3\), got \(2, 2\)"):
        one(jax.random.key(0), state._replace(ranks={"layers/w": jnp.ones((2, 2), int)}), data)
