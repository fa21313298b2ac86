"""What a task says of the model it was made of: nothing is frozen or stacked in silence."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import autorank_jax as ar
from autorank_jax.engine.checks import check_losses
from autorank_jax.types import Batch


class Own(nnx.Linear):
    """A subclass with a call of its own."""

    def __call__(self, x):
        return super().__call__(2 * x)


class Foreign(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones((4, 4)))

    def __call__(self, x):
        return x @ self.w[...]


class Mixed(nnx.Module):
    def __init__(self, rngs=None):
        rngs = rngs or nnx.Rngs(0)
        self.known, self.own, self.foreign = nnx.Linear(4, 4, rngs=rngs), Own(4, 4, rngs=rngs), Foreign()
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.foreign(self.own(self.drop(self.known(x))))


def test_layers_without_an_adapter_are_told():
    with pytest.warns(
        UserWarning,
        match="'foreign' because Foreign is no layer.*'own' because Own is a subclass.*by adapters.with_qwix",
    ):
        task = ar.task_from_nnx(Mixed(), max_rank=2)
    report = task.report
    assert report.adapted == {"known": 2}
    assert set(report.dense) == {"known/bias", "own/bias"}
    assert {"own/kernel", "foreign/w"} <= set(report.frozen)
    assert "not adapted: own, because Own is a subclass of Linear with a call of its own" in str(report)
    chosen = ar.task_from_nnx(Mixed(), max_rank={"known": 2})  # asked for, so nothing is warned about
    assert set(chosen.report.unadapted) == {"own", "foreign"}


def test_adapters_that_a_model_carries_are_told_where_to_go():
    class Carrying(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.second = nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.second(self.first(x))

    with pytest.warns(UserWarning, match="task_from_lora_params"):
        ar.task_from_nnx(Carrying(), max_rank=2)


def test_linen_and_functions_tell_too():
    module = nn.Sequential([nn.Dense(4), nn.ConvTranspose(2, (3,))])
    x = jnp.ones((1, 5, 4))
    with pytest.warns(UserWarning, match="because ConvTranspose is no layer that can be adapted"):
        task = ar.task_from_linen(module, module.init(jax.random.key(0), x), x, max_rank=2)
    assert len(task.report.unadapted) == 1
    params = {"w": jnp.ones((4, 3)), "cube": jnp.ones((2, 2, 2))}
    task = ar.task_from_function(lambda p, x: x @ p["w"], params, max_rank=1)
    assert task.report.unadapted == {"cube": "it has 3 axes, and a function is given adapters on matrices alone"}


def test_predict_with_a_key_is_training():
    task = ar.task_from_nnx(Mixed(), max_rank={"known": 2})
    server, x = task.server, jnp.ones((2, 4))
    still, one, two = (
        task.predict(server.frozen, server.trainable, x, *key) for key in ((), *((jax.random.key(n),) for n in (1, 2)))
    )
    assert not jnp.allclose(still, one)
    assert not jnp.allclose(one, two)
    assert jnp.array_equal(one, task.predict(server.frozen, server.trainable, x, jax.random.key(1)))


def test_models_of_several_outputs_are_told_to_choose():
    task = ar.task_from_function(lambda p, x: (x @ p["w"], x), {"w": jnp.ones((4, 3))}, max_rank=1)
    batch = Batch(jnp.ones((2, 4)), jnp.zeros(2, jnp.int32), jnp.ones(2))
    with pytest.raises(
        TypeError, match="classification_loss: expected outputs as one array, got a tuple of 2: a loss of your own"
    ):
        task.loss(task.server.frozen, task.server.trainable, batch, jax.random.key(0))
    with pytest.raises(ValueError, match="expected outputs of 2 axes and targets of 1, got shapes"):
        ar.classification_loss(jnp.ones((2, 3)), jax.nn.one_hot(jnp.zeros(2, jnp.int32), 3))
    with pytest.raises(ValueError, match="regression_loss: expected outputs and targets of one shape"):
        ar.regression_loss(jnp.ones((2, 3)), jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="take the mean over the other axes"):
        check_losses(optax.l2_loss(jnp.ones((2, 3))), 2, "a loss")


def test_ranks_that_gain_nothing_are_told():
    model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 2, rngs=nnx.Rngs(1)))
    task = ar.task_from_nnx(model, max_rank=5)
    assert "adapted: layers/0, maximum rank 5 (beyond 4 nothing is gained)" in str(task.report)
    with pytest.warns(UserWarning, match=r"above both sides of the layers 'layers/0' \(4 × 6\), 'layers/1' \(6 × 2\)"):
        ar.task_from_nnx(model, max_rank=7)


class Named(nnx.Linear):
    """A subclass without a call of its own, such as libraries make to say how weights are sharded."""

    def size(self):
        return self.kernel[...].size


class OfNamed(nnx.Module):
    def __init__(self, kind):
        self.layer = kind(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x) + (0 * self.layer.size() if hasattr(self.layer, "size") else 0)


class NamedDense(nn.Dense):
    pass


def updated(task):
    """Return what the model says where its adapters do something, and its report."""
    moved = jax.tree.map(lambda leaf: leaf + 0.5, task.server.trainable)
    return task.predict(task.server.frozen, moved, jnp.ones((2, 4))), task.report.adapted


def test_subclasses_without_a_call_of_their_own_are_the_layers_they_derive_from():
    ours, theirs = (ar.task_from_nnx(OfNamed(kind), max_rank=2) for kind in (Named, nnx.Linear))
    for one, other in zip(updated(ours), updated(theirs), strict=True):
        assert jnp.array_equal(one, other) if isinstance(one, jax.Array) else one == other == {"layer": 2}
    assert type(ar.merge(ours, ours.server).layer) is Named
    linen = []
    for kind in (NamedDense, nn.Dense):
        module = nn.Sequential([kind(3)])
        variables = module.init(jax.random.key(0), jnp.ones((2, 4)))
        linen.append(updated(ar.task_from_linen(module, variables, jnp.ones((2, 4)), max_rank=2)))
    assert jnp.array_equal(linen[0][0], linen[1][0])
    assert linen[0][1] == linen[1][1] == {"layers_0": 2}
