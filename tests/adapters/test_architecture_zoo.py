"""Architectures of users: each trains under an adapter on every layer that can have one, or says in one line why not.

Losses and their gradients are traced; nothing is compiled.
"""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import autorank_jax as ar
from autorank_jax.types import Batch

pytestmark = pytest.mark.usefixtures("standard_promotion")  # Flax's own layers need it
IMAGES, IDS, ROWS = jnp.ones((2, 8, 8, 1)), jnp.zeros((2, 6), jnp.int32), jnp.ones((2, 5))


@pytest.fixture
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


class Chain(nnx.Module):
    """Layers one after the other, the mean over what is left between batch and channels, and a head."""

    def __init__(self, *layers, width, before=lambda x: x, out=3):
        self.layers, self.before = nnx.List(layers), before
        self.head = nnx.Linear(width, out, rngs=nnx.Rngs(9))

    def __call__(self, x):
        x = self.before(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(jnp.mean(x, axis=tuple(range(1, x.ndim - 1))))


class Residual(nnx.Module):
    def __init__(self, *inner):
        self.inner = nnx.List(inner)

    def __call__(self, x):
        y = x
        for layer in self.inner:
            y = nnx.relu(layer(y))
        return x + y


class Mixer(nnx.Module):
    """One linear layer over the positions, one over the channels."""

    def __init__(self):
        self.tokens, self.channels = nnx.Linear(64, 64, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1))

    def __call__(self, x):
        x = x.reshape(x.shape[0], 64, -1)
        return self.channels(jnp.swapaxes(self.tokens(jnp.swapaxes(x, 1, 2)), 1, 2))


class Experts(nnx.Module):
    """A softmax gate over small networks that see every example."""

    def __init__(self):
        self.gate = nnx.Linear(5, 2, rngs=nnx.Rngs(0))
        self.experts = nnx.List([nnx.Linear(5, 4, rngs=nnx.Rngs(k)) for k in (1, 2)])

    def __call__(self, x):
        share = jax.nn.softmax(self.gate(x))
        return sum(share[:, k : k + 1] * expert(x) for k, expert in enumerate(self.experts))


class Shared(nnx.Module):
    """One layer used twice."""

    def __init__(self):
        self.layer = nnx.Linear(5, 5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(nnx.relu(self.layer(x)))


class Recurrent(nnx.Module):
    def __init__(self, cell):
        self.embed, self.rnn = nnx.Embed(7, 4, rngs=nnx.Rngs(0)), nnx.RNN(cell(4, 4, rngs=nnx.Rngs(1)))

    def __call__(self, ids):
        return self.rnn(self.embed(ids))


class Same(nnx.Module):
    """Two layers of one weight."""

    def __init__(self):
        self.one, self.two = linear(5, 5), linear(5, 5)
        self.two.kernel = self.one.kernel

    def __call__(self, x):
        return self.two(self.one(x))


class Tied(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(7, 4, rngs=nnx.Rngs(0))

    def __call__(self, ids):
        return self.embed.attend(self.embed(ids))[:, 0]


class Outputs(nnx.Module):
    """A model that returns what `wrap` makes of its logits."""

    def __init__(self, wrap):
        self.layer, self.wrap = nnx.Linear(5, 3, rngs=nnx.Rngs(0)), wrap

    def __call__(self, x):
        return self.wrap(self.layer(x))


class Attending(nnx.Module):
    def __init__(self):
        self.embed, self.attend = (
            nnx.Embed(7, 4, rngs=nnx.Rngs(0)),
            nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(1)),
        )

    def __call__(self, ids):
        return self.attend(self.embed(ids))


class Containers(nnx.Module):
    """Layers in a dict and a list, one of them twice, beside what is no layer."""

    def __init__(self):
        self.named = nnx.Dict({"one": linear(5, 4), "two": linear(4, 4)})
        self.listed = nnx.List([linear(4, 4)])
        self.again, self.nothing, self.sizes = self.named["two"], None, (5, 4)

    def __call__(self, x):
        return self.again(self.listed[0](self.named["two"](self.named["one"](x))))


class Counting(nnx.Module):
    """A layer beside a variable that changes whenever it is called."""

    def __init__(self):
        self.layer, self.calls = linear(5, 4), nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls.set_value(self.calls[...] + 1)
        return self.layer(x)


class Stacked(nnx.Module):
    """Normalised layers with dropout, stacked and scanned over."""

    def __init__(self):
        make = nnx.vmap(lambda rngs: Chain(nnx.LayerNorm(5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), width=5, out=5))
        self.blocks = make(nnx.Rngs(0).split(3))

    def __call__(self, x):
        return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)


class Wanting(nnx.Module):
    """A model that wants more than its inputs."""

    def __init__(self):
        self.layer = linear(5, 3)

    def __call__(self, x, *, train):
        return self.layer(x) if train else x


def both_ways(seed=0):
    forward, backward = (nnx.RNN(nnx.GRUCell(4, 4, rngs=nnx.Rngs(k))) for k in (seed, seed + 1))
    return nnx.Bidirectional(forward, backward)


def linear(d_in, d_out, seed=0, **options):
    return nnx.Linear(d_in, d_out, rngs=nnx.Rngs(seed), **options)


def conv(c_in, c_out, window=(3, 3), **options):
    return nnx.Conv(c_in, c_out, window, rngs=nnx.Rngs(0), **options)


NNX = {
    "one layer": (lambda: linear(5, 3), ROWS),
    "deep MLP": (lambda: Chain(*(linear(5, 5, k) for k in range(4)), width=5), ROWS),
    "residual MLP": (lambda: Chain(Residual(linear(5, 5), linear(5, 5, 1)), width=5), ROWS),
    "sequential": (lambda: nnx.Sequential(linear(5, 4), nnx.relu, linear(4, 3, 1)), ROWS),
    "without biases": (lambda: Chain(linear(5, 4, use_bias=False), width=4), ROWS),
    "layer norm and dropout": (
        lambda: Chain(linear(5, 4), nnx.LayerNorm(4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)), width=4),
        ROWS,
    ),
    "RMS norm": (lambda: Chain(linear(5, 4), nnx.RMSNorm(4, rngs=nnx.Rngs(0)), width=4), ROWS),
    "residual CNN, group norm": (
        lambda: Chain(
            conv(1, 4), Residual(conv(4, 4), nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0)), conv(4, 4)), width=4
        ),
        IMAGES,
    ),
    "strided and dilated": (lambda: Chain(conv(1, 4, strides=2), conv(4, 4, kernel_dilation=2), width=4), IMAGES),
    "one by one": (lambda: Chain(conv(1, 4, (1, 1)), width=4), IMAGES),
    "convolution over time": (
        lambda: Chain(conv(4, 4, (3,)), width=4, before=lambda ids: jax.nn.one_hot(ids, 4)),
        IDS,
    ),
    "stacked, with dropout": (Stacked, ROWS),
    "mixer": (lambda: Chain(conv(1, 4), Mixer(), width=4), IMAGES),
    "mixture of experts": (lambda: Chain(Experts(), width=4), ROWS),
    "shared layer": (lambda: Chain(Shared(), width=5), ROWS),
    "embedding bag": (lambda: Chain(nnx.Embed(7, 4, rngs=nnx.Rngs(0)), width=4), IDS),
    "tied embedding": (Tied, IDS),
    "LSTM": (lambda: Chain(Recurrent(nnx.OptimizedLSTMCell), width=4), IDS),
    "GRU": (lambda: Chain(Recurrent(nnx.GRUCell), width=4), IDS),
    "simple recurrence": (lambda: Chain(Recurrent(nnx.SimpleCell), width=4), IDS),
    "vision transformer": (
        lambda: ar.models.Transformer(8, 3, ar.models.Size(8, 1, 2, 8, 8), rngs=nnx.Rngs(0)),
        IMAGES[..., 0],
    ),
    "bilinear head": (lambda: Chain(nnx.LinearGeneral((5,), (2, 4), rngs=nnx.Rngs(0)), width=4), ROWS),
    "attention of Flax": (lambda: Chain(Attending(), width=4), IDS),
    "containers": (lambda: Chain(Containers(), width=4), ROWS),
    "a counter": (lambda: Chain(Counting(), width=4), ROWS),
    "both ways": (lambda: Chain(both_ways(), width=8, before=lambda ids: jax.nn.one_hot(ids, 4)), IDS),
    "einsum": (lambda: Chain(nnx.Einsum("bi,ij->bj", (5, 4), (4,), rngs=nnx.Rngs(0)), width=4), ROWS),
    "instance norm": (lambda: Chain(conv(1, 4), nnx.InstanceNorm(4, rngs=nnx.Rngs(0)), width=4), IMAGES),
    "PReLU": (lambda: Chain(linear(5, 4), nnx.PReLU(), width=4), ROWS),
    "half precision": (lambda: Chain(linear(5, 4, param_dtype=jnp.bfloat16), width=4), ROWS),
    "dropout of inputs": (lambda: Chain(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), linear(5, 4), width=4), ROWS),
    "tuple out, one chosen": (lambda: Outputs(lambda logits: (logits, {})[0]), ROWS),
}


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.GroupNorm(2)(nn.relu(nn.Conv(4, (3, 3), strides=2)(x)))
        return nn.Dense(3)(nn.avg_pool(x, (2, 2)).reshape(len(x), -1))


class LinenLSTM(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return nn.Dense(3)(nn.RNN(nn.OptimizedLSTMCell(4))(nn.Embed(7, 4)(ids))[:, -1])


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 4)(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.Dense(3)(jnp.mean(x + nn.Dense(4)(nn.gelu(nn.Dense(8)(x))), axis=1))


class LinenSetup(nn.Module):
    def setup(self):
        self.layers = [nn.Dense(5), nn.Dense(3)]

    def __call__(self, x):
        return self.layers[1](nn.relu(self.layers[0](x)))


class LinenRemat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.remat(nn.Dense)(5)(x))


LINEN = {
    "CNN": (LinenCNN, IMAGES),
    "attention": (LinenAttention, IDS),
    "setup": (LinenSetup, ROWS),
    "recomputed": (LinenRemat, ROWS),
    "sequential": (lambda: nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)]), ROWS),
    "one layer": (lambda: nn.DenseGeneral((3,)), ROWS),
}


def gradients(task, inputs):
    batch = Batch(inputs, jnp.zeros(len(inputs), jnp.int32), jnp.ones(len(inputs)))

    def loss(trainable):
        return jnp.mean(task.loss(task.server.frozen, trainable, batch, jax.random.key(0)))

    return jax.eval_shape(jax.grad(loss), task.server.trainable)


@pytest.mark.parametrize("name", NNX)
def test_nnx_architectures_train(name):
    make, inputs = NNX[name]
    task = ar.task_from_nnx(make(), max_rank=2)
    assert task.report.adapted
    assert gradients(task, inputs).adapters.keys() == task.report.adapted.keys()


def linen_task(make, inputs):
    module = make()
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    return ar.task_from_linen(module, variables, inputs, max_rank=2)


@pytest.mark.parametrize("name", LINEN)
def test_linen_architectures_train(name):
    make, inputs = LINEN[name]
    task = linen_task(make, inputs)
    assert task.report.adapted
    assert gradients(task, inputs).adapters.keys() == task.report.adapted.keys()


def test_what_stays_frozen_is_told():
    with pytest.warns(
        UserWarning, match="without an adapter: 'OptimizedLSTMCell_0/hf' because DenseParams is no layer"
    ):
        task = linen_task(LinenLSTM, IDS)
    assert set(task.report.adapted) == {"Dense_0", "Embed_0"}


REFUSED = {
    "batch norm": (lambda: Chain(linear(5, 4), nnx.BatchNorm(4, rngs=nnx.Rngs(0)), width=4), ROWS, "BatchNorm"),
    "grouped convolution": (lambda: Chain(conv(1, 4), conv(4, 4, feature_group_count=2), width=4), IMAGES, "group"),
    "tuple": (lambda: Outputs(lambda logits: (logits, logits)), ROWS, "tuple"),
    "dict": (lambda: Outputs(lambda logits: {"logits": logits}), ROWS, "dict"),
    "scalar": (lambda: Outputs(jnp.sum), ROWS, "expected"),
    "statistics of spectra": (
        lambda: Chain(nnx.SpectralNorm(linear(5, 4), rngs=nnx.Rngs(0)), width=4),
        ROWS,
        "without mutable statistics",
    ),
    "shapes alone": (lambda: nnx.eval_shape(lambda: linear(5, 3)), ROWS, "probably of nnx.eval_shape"),
    "other width": (lambda: linear(6, 3), ROWS, "inputs that the model takes, got an array float32.2, 5."),
    "more arguments": (Wanting, ROWS, "missing 1 required keyword-only argument: 'train'"),
    "labels for inputs": (lambda: linear(5, 3), jnp.zeros(4, int), "probably labels in place of inputs"),
    "one weight, two layers": (lambda: Chain(Same(), width=5), ROWS, "belongs to another layer too"),
    "no parameters": (lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), ROWS, "expected"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line(name):
    make, inputs, what = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=what) as raised:
        gradients(ar.task_from_nnx(make(), max_rank=2), inputs)
    assert "\n" not in str(raised.value)
