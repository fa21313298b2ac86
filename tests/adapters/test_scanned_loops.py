"""What models do with scanned blocks beside handing each what the one before returned: the same, or a refusal."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import autorank_jax as ar

WIDTH, DEPTH = 4, 3
X = jnp.linspace(-1, 1, 5 * WIDTH).reshape(5, WIDTH)


class Part(nnx.Module):
    """A block that has what blocks of others have."""

    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.shift = jnp.linspace(0, 1, WIDTH)
        self.act = functools.partial(jax.nn.gelu, approximate=True)
        self.gain = 0.5

    @property
    def width(self):
        return self.up.kernel.shape[0]

    def __call__(self, x, local=None, wide=None):
        local, wide = 1.0 if local is None else local, 2.0 if wide is None else wide
        return x + self.gain * local * self.act(self.up(x + self.shift[None, :])) + wide


class Counting(Part):
    """Writes what it has seen."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.seen = nnx.Variable(jnp.zeros(()))

    def __call__(self, x, **settings):
        self.seen[...] += jnp.sum(x)
        return super().__call__(x, **settings)


class Sowing(Part):
    def __call__(self, x, **settings):
        self.sow(nnx.Intermediate, "aux", jnp.sum(x))
        return super().__call__(x, **settings)


def in_loop(change, kind=Part):
    """Return a model whose loop is changed."""

    class Looping(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.blocks = nnx.List([kind(rngs) for _ in range(DEPTH)])
            self.rngs = nnx.Rngs(5)

        def __call__(self, x):
            return change(self, x)

    return Looping()


def all_hidden(model, x):
    seen = []
    for block in model.blocks:
        x = block(x)
        seen.append(x)
    return sum(seen)


def first_again(model, x):
    first = model.blocks[0](x)
    for block in model.blocks:
        x = block(x)
    return x + first


def each_twice(model, x):
    for block in model.blocks:
        x = block(block(x))
    return x


def first_alone(model, x):
    return model.blocks[0](x)


def alternating(model, x):
    for number, block in enumerate(model.blocks):
        x = block(x, local=3.0) if number % 2 else block(x, wide=3.0)
    return x


def alternating_nones(model, x):
    for number, block in enumerate(model.blocks):
        x = block(x, 3.0, None) if number % 2 else block(x, None, 3.0)
    return x


def told_their_number(model, x):
    info = {}
    for number, block in enumerate(model.blocks):
        info["local"] = float(number)
        x = block(x, **info)
    return x


def setting(model, x):
    for block in model.blocks:
        block.gain = 2.0
        x = block(x)
    return x


def by_width(model, x):
    for block in model.blocks:
        x = block(x, local=1.0 / block.width)
    return x


def plainly(model, x):
    for block in model.blocks:
        x = block(x)
    return x


def under_jit(model, x):
    return nnx.jit(lambda model, x: functools.reduce(lambda x, block: block(x), model.blocks[:2], x))(model, x)


def handing_streams(model, x):
    for block in model.blocks:
        x = block(x, local=model.rngs)
    return x


NEXT_ALONE = "hands what a block returns to the next one alone"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of sow
@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (all_hidden, Part, NEXT_ALONE),
        (first_again, Part, NEXT_ALONE),
        (first_alone, Part, NEXT_ALONE),
        (under_jit, Part, ""),
        (each_twice, Part, "calls its blocks in order, each once, got number 0 after"),
        (alternating, Part, "hands all blocks the same other arguments"),
        (alternating_nones, Part, "hands all blocks the same other arguments"),
        (told_their_number, Part, "hands all blocks the same other arguments"),
        (setting, Part, "only calls its blocks, got 'gain' set of block 0"),
        (by_width, Part, "only calls its blocks, got 'width' of block 0"),
        (handing_streams, Part, "lets its blocks keep their random streams"),
        (plainly, Counting, "has blocks that keep no state, got 'seen' written"),
        (plainly, Sowing, "has blocks that keep no state, got 'aux' written"),
    ],
)
def test_nothing_is_silently_different(change, kind, said):
    task = ar.task_from_nnx(in_loop(change, kind), max_rank=1, where="*/up", scan_blocks="blocks")
    with pytest.raises(ValueError, match=r"^(scan_)?.*expected") as caught:
        task.predict(*task.server[::-1], X)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def of_known_kind(model, x):
    for block in model.blocks:
        x = block(x, local=2.0) if isinstance(block, Part) and block.gain == 0.5 else block(x)
    return x


def by_shape(model, x):
    for block in model.blocks:
        x = block(x, local=1.0 / x.shape[-1], wide=float(x.ndim))
    return x


@pytest.mark.parametrize(
    "change", [plainly, of_known_kind, by_shape, lambda model, x: plainly(model, plainly(model, x))]
)
def test_loops_that_a_scan_takes_as_they_are(change):
    model = in_loop(change)
    task = ar.task_from_nnx(model, max_rank=1, where="*/up", scan_blocks="blocks")
    np.testing.assert_allclose(task.predict(*task.server[::-1], X), model(X), rtol=1e-5)
    np.testing.assert_allclose(ar.merge(task, task.server)(X), model(X), rtol=1e-5)


def test_a_list_that_runs_twice_drops_something_else_the_second_time():
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return x + self.dropout(jnp.ones_like(x))

    def twice(model, x):
        x = jnp.zeros((64, x.shape[1]))
        return plainly(model, x), plainly(model, x)

    task = ar.task_from_nnx(in_loop(twice, Dropping), max_rank={}, train_dense=(), scan_blocks="blocks")
    first, second = task.predict(*task.server[::-1], X, jax.random.key(0))
    assert not np.array_equal(first, second)


def test_lists_of_functions_and_dicts_are_no_lists_of_blocks():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=r"equal blocks in 'layers', got block 1 with .*relu"):
        ar.task_from_nnx(nnx.Sequential(Part(rngs), nnx.relu, Part(rngs)), max_rank=1, scan_blocks="layers")
    model = in_loop(plainly)
    model.blocks = nnx.data({0: Part(rngs), 1: Part(rngs)})
    with pytest.raises(ValueError, match=r"of lists of blocks, got 'blocks': there are \[\]"):
        ar.task_from_nnx(model, max_rank=1, scan_blocks="blocks")


def test_lists_of_lists_run_as_one_scan():
    class Outer(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.blocks = nnx.List([nnx.Sequential(*(Part(rngs) for _ in range(2))) for _ in range(3)])

        def __call__(self, x):
            return functools.reduce(lambda x, stage: stage(x), self.blocks, x)

    model = Outer()
    task = ar.task_from_nnx(model, max_rank=1, where="*/up", scan_blocks=("blocks", "blocks/*/layers"))
    assert list(task.server.trainable.adapters) == ["blocks/{}/layers/{}/up"]
    np.testing.assert_allclose(task.predict(*task.server[::-1], X), model(X), rtol=1e-5)
