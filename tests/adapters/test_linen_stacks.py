"""Linen layers in a scan: one adapter a stack, as the same layers one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import autorank_jax as ar
from autorank_jax.types import Adapter, Batch

DEPTH, WIDTH = 2, 4
RANK = 3
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(18, WIDTH)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, 18))


class Block(nn.Module):
    """Layers of several kinds, behind each other."""

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.DenseGeneral((2, 2), name="general")(nn.LayerNorm(name="norm")(x)).reshape(x.shape)
        h = nn.Einsum((WIDTH, WIDTH), "bi,oi->bo", name="einsum")(jnp.tanh(h))
        return x + nn.Dense(WIDTH, name="dense")(jnp.tanh(h)), None


class Scanned(nn.Module):
    axis: int = 0
    depth: int = DEPTH
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        blocks = nn.scan(block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=self.depth)
        return nn.Dense(3, name="head")(blocks(name="blocks")(x, None)[0])


class Unrolled(nn.Module):
    @nn.compact
    def __call__(self, x):
        for number in range(DEPTH):
            x, _ = Block(name=f"block{number}")(x)
        return nn.Dense(3, name="head")(x)


def variables_of(module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), X)
    return jax.tree.map(lambda leaf: jnp.asarray(0.7 * RNG.normal(size=leaf.shape), leaf.dtype), shapes)


def apart(tree, number):
    return jax.tree.map(lambda leaf: leaf[number], tree)


def pair(**options):
    """Return tasks of the scanned and of the unrolled module, with the same weights and adapters that do something."""
    variables = variables_of(Scanned())
    params = variables["params"]
    blocks = {f"block{n}": apart(params["blocks"], n) for n in range(DEPTH)}
    together = ar.task_from_linen(Scanned(**options), variables, X, max_rank=RANK, train_dense=())
    separate = ar.task_from_linen(
        Unrolled(), {"params": blocks | {"head": params["head"]}}, X, max_rank=RANK, train_dense=()
    )
    ours, theirs = together.server.trainable.adapters, separate.server.trainable.adapters
    for path, adapter in ours.items():
        new = Adapter(*(jnp.asarray(0.5 * RNG.normal(size=leaf.shape), leaf.dtype) for leaf in adapter))
        ours[path] = new
        theirs |= split(path, new)
    return together, separate


def split(path, tree):
    """Return what there is of a stack by paths of its layers."""
    layer = path.partition("/")[2]
    return {f"block{n}/{layer}": apart(tree, n) for n in range(DEPTH)} if layer else {path: tree}


def separated(trees):
    return {name: part for path, tree in trees.items() for name, part in split(path, tree).items()}


def close(ours, theirs, **tolerance):
    assert sorted(ours) == sorted(theirs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), ours, theirs)


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_scan_is_its_layers(remat):
    together, separate = pair(remat=remat)
    shapes = {path: adapter.lora_a.shape for path, adapter in together.server.trainable.adapters.items()}
    stacks = ("blocks/dense", "blocks/einsum", "blocks/general")
    assert shapes == dict.fromkeys(stacks, (DEPTH, WIDTH, RANK)) | {"head": (WIDTH, RANK)}
    assert together.report.unadapted == {}
    batch = Batch(X, Y, jnp.ones(18))

    def run(task):
        server = task.server
        loss = lambda t: jnp.sum(task.loss(server.frozen, t, batch, jax.random.key(0)))  # noqa: E731
        return task.predict(server.frozen, server.trainable, X), jax.grad(loss)(server.trainable).adapters

    (logits, gradients), (expected, others) = jax.jit(lambda: (run(together), run(separate)))()
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert jnp.max(jnp.abs(gradients["blocks/dense"].lora_a)) > 0.1
    close(separated(gradients), others, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("axis", "depth"), [(1, WIDTH), (-1, DEPTH)])
def test_other_axes_are_refused(axis, depth):
    module = Scanned(axis=axis, depth=depth)
    variables = variables_of(module)
    with pytest.raises(ValueError, match=r"stacked along the first axis.*got others among blocks/dense") as caught:
        ar.task_from_linen(module, variables, X, max_rank=2, where="*/dense")
    assert "\n" not in str(caught.value)
    assert sorted(ar.max_ranks(ar.task_from_linen(module, variables, X, max_rank=2, where="head"))) == ["head"]


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat_scan(Once, lengths=(2, 3))(name="blocks")(x)


class Once(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(WIDTH, name="dense")(jnp.tanh(x))


class Side(nn.Module):
    """The same layers side by side, each of which is given all inputs."""

    @nn.compact
    def __call__(self, x):
        sides = nn.vmap(Once, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
        return jnp.sum(sides(name="blocks")(x), axis=0)


@pytest.mark.parametrize(("module", "layers"), [(Nested(), (2, 3)), (Side(), (2,))])
def test_nested_and_mapped_layers_are_stacks_too(module, layers):
    variables = variables_of(module)
    task = ar.task_from_linen(module, variables, X, max_rank=2)
    (path,) = task.server.trainable.adapters
    assert task.server.trainable.adapters[path].lora_b.shape == (*layers, 2, WIDTH)
    task.server.trainable.adapters[path] = Adapter(
        *(jnp.asarray(RNG.normal(size=leaf.shape), leaf.dtype) for leaf in task.server.trainable.adapters[path])
    )
    run = jax.jit(lambda: (task.predict(*task.server[::-1], X), module.apply(ar.merge(task, task.server), X)))
    ours, merged = run()
    np.testing.assert_allclose(ours, merged, atol=1e-4)
    assert jnp.max(jnp.abs(ours - module.apply(variables, X))) > 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize("rule", [name for name in ar.aggregators.RULES if name != "fedavg"])
def test_a_round_of_any_rule_is_that_of_the_layers(rule):
    made, merged = ar.aggregators.make_rule(rule), []
    ranks = {"blocks/dense": [1, 3], "blocks/einsum": [2, 2], "blocks/general": [3, 1], "head": [1, 2]}
    data = ar.from_parts(np.asarray(X), np.asarray(Y), [range(7), range(7, 18)])
    tasks = pair()
    for task, given in zip(tasks, (ranks, {n: v for p, r in ranks.items() for n, v in split_ranks(p, r)}), strict=True):
        state = ar.init_state(task.server, made, {path: jnp.asarray(rank) for path, rank in given.items()})
        local = ar.make_local_training(task, optax.sgd(0.1), batch_size=4)
        server = jax.jit(ar.make_round(local, made, rank_levels=1))(jax.random.key(1), state, data)[0].server
        merged.append(ar.merge(task, server)["params"])
    start = ar.merge(tasks[0], tasks[0].server)["params"]
    moved = jnp.max(jnp.abs(merged[0]["blocks"]["dense"]["kernel"] - start["blocks"]["dense"]["kernel"]))
    assert rule == "local_only" or moved > 1e-3
    for number in range(DEPTH):
        close(apart(merged[0]["blocks"], number), merged[1][f"block{number}"], atol=2e-5)
    close(merged[0]["head"], merged[1]["head"], atol=2e-5)


def split_ranks(path, rank):
    return [(name, rank) for name in split(path, np.zeros(DEPTH))]
