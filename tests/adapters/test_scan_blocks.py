"""Equal blocks of an NNX model's list in one scan: the same numbers, programs that do not grow, or a refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import autorank_jax as ar
from autorank_jax.types import Adapter, Batch

WIDTH, DEPTH = 4, 3
X = jnp.linspace(-1, 1, 5 * WIDTH).reshape(5, WIDTH)
BATCH = Batch(X, jnp.arange(5) % 3, jnp.ones(5))


class Block(nnx.Module):
    def __init__(self, rngs, rate=0.0, number=0):
        self.up = nnx.Linear(WIDTH, 6, rngs=rngs)
        self.down = nnx.Linear(6, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.number = number

    def __call__(self, x, scale=1.0, cache=None):
        return cache, x + scale * self.dropout(self.down(jnp.tanh(self.up(x))))


def each(blocks, x, scale):
    for block in blocks:
        assert block.number == 0
        _, x = block(x, scale)
    return x


def by_number(blocks, x, scale):
    for n in range(len(blocks)):
        _, x = blocks[n](x=x, scale=scale)
    return x


def doubled(blocks, x, scale):
    for block in blocks:
        x = 2 * block(x, scale)[1]
    return x


def scaled(blocks, x, scale):
    for n, block in enumerate(blocks):
        _, x = block(x, n * scale)
    return x


def in_parts(blocks, x, scale):
    for block in blocks:
        x = x + scale * block.down(jnp.tanh(block.up(x)))
    return x


LOOPS = {
    "each": each,
    "by number": by_number,
    "some": lambda blocks, x, scale: each(blocks[:2], x, scale),
    "backwards": lambda blocks, x, scale: each(reversed(blocks), x, scale),
    "doubled": doubled,
    "scaled": scaled,
    "in parts": in_parts,
}


class Model(nnx.Module):
    """Runs its blocks in a loop of its own."""

    def __init__(self, depth=DEPTH, rate=0.0, loop="each", numbered=False):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(rngs, rate, n * numbered) for n in range(depth)])
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)
        self.loop = loop

    def __call__(self, x):
        return self.head(LOOPS[self.loop](self.blocks, x, jnp.asarray(0.5)))


def make(model, scanned=True, **options):
    options = {"max_rank": 2, "where": "blocks/*", "scan_blocks": "blocks" if scanned else (), **options}
    return ar.task_from_nnx(model, **options)


def moved(task, seed=1):
    """Return the server of a task with other trainable parameters, those of single blocks the same as in a stack."""
    rng = np.random.default_rng(seed)
    leaves, structure = jax.tree.flatten(task.server.trainable)
    new = [leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return task.server._replace(trainable=jax.tree.unflatten(structure, new))


def taken_apart(trainable):
    adapters = {
        path.format(n): Adapter(a[n], b[n]) if "{}" in path else Adapter(a, b)
        for path, (a, b) in trainable.adapters.items()
        for n in (range(len(a)) if "{}" in path else [0])
    }
    dense = {
        name.format(n): value[n] if "{}" in name else value
        for name, value in trainable.dense.items()
        for n in (range(len(value)) if "{}" in name else [0])
    }
    return trainable._replace(adapters=adapters, dense=dense)


@pytest.mark.parametrize("loop", ["each", "by number"])
@pytest.mark.parametrize("checkpoint", [(), "blocks/*"])
def test_a_scan_is_the_same_model(loop, checkpoint):
    model = Model(loop=loop)
    scanned, listed = make(model, checkpoint=checkpoint), make(model, scanned=False)
    assert sorted(scanned.server.trainable.adapters) == ["blocks/{}/down", "blocks/{}/up"]
    assert scanned.server.trainable.adapters["blocks/{}/up"].lora_a.shape == (DEPTH, WIDTH, 2)
    server = moved(scanned)
    alone = taken_apart(server.trainable)
    assert jax.tree.map(jnp.shape, alone) == jax.tree.map(jnp.shape, listed.server.trainable)
    np.testing.assert_allclose(scanned.predict(*scanned.server[::-1], X), model(X), atol=1e-6)
    outputs = scanned.predict(server.frozen, server.trainable, X)
    np.testing.assert_allclose(outputs, listed.predict(listed.server.frozen, alone, X), atol=1e-6)
    assert jnp.max(jnp.abs(outputs - model(X))) > 0.1

    def gradient(task, frozen, trainable):
        return jax.grad(lambda t: jnp.sum(task.loss(frozen, t, BATCH, jax.random.key(0))))(trainable)

    together = taken_apart(gradient(scanned, server.frozen, server.trainable))
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5),
        together,
        gradient(listed, listed.server.frozen, alone),
    )
    merged = ar.merge(scanned, server)
    assert isinstance(merged.blocks, nnx.List)
    assert isinstance(merged.blocks[2], Block)
    np.testing.assert_allclose(merged(X), outputs, atol=1e-5)


def test_the_program_does_not_grow_with_the_number_of_blocks():
    lengths = []
    for depth in (4, 32):
        task = make(Model(depth))
        gradient = jax.grad(lambda t, task=task: jnp.sum(task.loss(task.server.frozen, t, BATCH, jax.random.key(0))))
        lengths.append(len(str(jax.make_jaxpr(gradient)(task.server.trainable)).splitlines()))
    assert lengths[0] == lengths[1]


def test_every_block_drops_something_else():
    task = make(Model(rate=0.5), max_rank={})
    first, second = (
        task.predict(task.server.frozen, task.server.trainable, X, jax.random.key(seed)) for seed in (0, 1)
    )
    assert not np.allclose(first, second)
    keys = [name for name in task.server.frozen.rest if name.endswith("key")]
    assert {task.server.frozen.rest[name].shape for name in keys} == {(DEPTH,)}


def test_a_round_with_scanned_blocks_aggregates_each():
    model = Model()
    data = ar.from_parts(np.tile(X, (6, 1)), np.arange(30) % 3, [range(4), range(4, 18), range(18, 30)])
    merged = []
    for scanned in (True, False):
        task = make(model, scanned=scanned)
        server = moved(make(model))
        if not scanned:
            server = task.server._replace(trainable=taken_apart(server.trainable))
        rule = ar.aggregators.make_rule("rbla")
        state = ar.init_state(server, rule, {path: jnp.asarray([1, 2, 2]) for path in ar.max_ranks(task)})
        local = ar.make_local_training(task, optax.sgd(0.1), batch_size=4)
        state, *_ = jax.jit(ar.make_round(local, rule))(jax.random.key(1), state, data)
        merged.append(ar.merge(task, state.server)(X))
    assert not np.allclose(merged[0], model(X), atol=0.01)
    np.testing.assert_allclose(*merged, atol=1e-5)


def test_lists_inside_of_lists():
    class Stage(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])

        def __call__(self, x):
            for block in self.blocks:
                _, x = block(x)
            return x

    model = nnx.Sequential(*(Stage(nnx.Rngs(seed)) for seed in range(3)), nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0)))
    task = ar.task_from_nnx(model, max_rank=2, where="*/up", scan_blocks="layers/*/blocks")
    assert sorted(task.server.trainable.adapters) == [f"layers/{n}/blocks/{{}}/up" for n in range(3)]
    stages = nnx.Sequential(*model.layers[:3])
    task = ar.task_from_nnx(stages, max_rank=2, where="*/up", scan_blocks=("layers/*/blocks", "layers"))
    assert task.server.trainable.adapters["layers/{}/blocks/{}/up"].lora_a.shape == (3, 2, WIDTH, 2)
    np.testing.assert_allclose(task.predict(*task.server[::-1], X), stages(X), atol=1e-6)
    np.testing.assert_allclose(ar.merge(task, task.server)(X), stages(X), atol=1e-6)


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ("some", "hands what a block returns to the next one alone, got another use of it in 'blocks'"),
        ("backwards", "hands each block what the one before returned, got something else for number 2"),
        ("doubled", "hands what a block returns to the next one alone, got another use of it in 'blocks'"),
        ("scaled", "hands all blocks the same other arguments, got some that differ"),
        ("in parts", "only calls its blocks, got 'down' of block 0"),
    ],
)
def test_loops_that_a_scan_would_change_are_refused(loop, message):
    task = make(Model(loop=loop))
    with pytest.raises(ValueError, match=message):
        task.predict(*task.server[::-1], X)


def test_what_is_no_list_of_equal_blocks_is_refused():
    rngs = nnx.Rngs(0)

    def refused(blocks, message, pattern="blocks"):
        model = Model()
        model.blocks = nnx.List(blocks)
        with pytest.raises(ValueError, match=message):
            make(model, scan_blocks=pattern)

    one = Block(rngs)
    other = Block(rngs)
    other.up = nnx.Linear(WIDTH, 6, use_bias=False, rngs=rngs)
    wide = Block(rngs)
    wide.up, wide.down = nnx.Linear(WIDTH, 7, rngs=rngs), nnx.Linear(7, WIDTH, rngs=rngs)
    tied = Block(rngs)
    tied.up.kernel = one.up.kernel
    refused([one, Block(rngs)], r"of lists of blocks, got 'layers': there are \['blocks'\]", "layers")
    refused([one, nnx.Linear(WIDTH, WIDTH, rngs=rngs)], "equal blocks in 'blocks', got block 1 with Linear for Block")
    refused([one, other], r"got block 1 with nothing for float32 \(6,\) at 'up/bias'")
    refused([one, wide], r"got block 1 with float32 \(7, 4\) for float32 \(6, 4\) at 'down/kernel'")
    refused([one, Block(rngs, number=5)], "got block 1 with number = 5 for 0")
    refused([one, tied], "parameters and random streams of their own, got shared ones in 'blocks'")


def test_a_parameter_shared_with_the_rest_of_the_model_is_refused():
    model = Model()
    model.tied = model.blocks[1].up.kernel
    with pytest.raises(ValueError, match="parameters and random streams of their own"):
        make(model)


def test_blocks_have_to_return_what_they_take():
    class Wider(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0), dtype=jnp.bfloat16) for _ in range(2)])

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    task = ar.task_from_nnx(Wider(), max_rank=1, scan_blocks="blocks")
    with pytest.raises(ValueError, match=r"return what they take .*got bfloat16 \(5, 4\) for float32 \(5, 4\)"):
        task.predict(*task.server[::-1], X)


def test_blocks_that_carry_their_own_adapters():
    class Carrying(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(3)
            self.blocks = nnx.List([nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=rngs) for _ in range(DEPTH)])

        def __call__(self, x):
            for block in self.blocks:
                x = x + 0.0 if block is None else block(x)
            return x

    model = Carrying()
    for block in model.blocks:
        block.lora.lora_b[...] = jnp.ones((2, WIDTH))
    task = ar.adapters.task_from_lora_params(model, scan_blocks="blocks")
    adapter = task.server.trainable.adapters["blocks/{}/lora"]
    assert tuple(map(jnp.shape, adapter)) == ((DEPTH, WIDTH, 2), (DEPTH, 2, WIDTH))
    np.testing.assert_allclose(task.predict(*task.server[::-1], X), model(X), atol=1e-5)
    changed = moved(task)
    np.testing.assert_allclose(
        ar.merge(task, changed)(X), task.predict(changed.frozen, changed.trainable, X), atol=1e-5
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of qwix
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("where", [".*", "blocks/.*"])
def test_blocks_that_qwix_adapted(where, quantize):
    pytest.importorskip("qwix")
    model = Model()
    carrying = ar.adapters.with_qwix(model, X, rank=2, where=where, quantize=quantize)
    for _, variable in nnx.to_flat_state(nnx.state(carrying, nnx.LoRAParam)):
        variable[...] += 0.1
    listed, scanned = (ar.adapters.task_from_lora_params(carrying, scan_blocks=patterns) for patterns in ((), "blocks"))
    paths = {"blocks/{}/up/kernel", "blocks/{}/down/kernel"} | ({"head/kernel"} if where == ".*" else set())
    assert set(scanned.server.trainable.adapters) == paths

    def gradient(task):
        total = jax.jit(lambda t: jnp.sum(task.loss(task.server.frozen, t, BATCH, jax.random.key(0))))
        return jax.grad(total)(task.server.trainable)

    expected = gradient(listed).adapters
    for path, (a, b) in taken_apart(gradient(scanned)).adapters.items():
        np.testing.assert_allclose(a, expected[path].lora_a, atol=1e-5)
        np.testing.assert_allclose(b, expected[path].lora_b, atol=1e-5)
    merged = ar.merge(scanned, scanned.server)
    np.testing.assert_allclose(merged(X), carrying(X), atol=1e-5)


def test_scanned_blocks_are_exported_by_their_numbers(tmp_path):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    task = make(Model(), train_dense=())
    server = moved(task)
    tensors = load_file(ar.export_peft(tmp_path, task, server) / "adapter_model.safetensors")
    assert len(tensors) == DEPTH * 4
    np.testing.assert_array_equal(
        tensors["base_model.model.blocks.2.up.lora_A.weight"].T, server.trainable.adapters["blocks/{}/up"].lora_a[2]
    )
