"""Small federations, rounds compiled once for all tests, and the way from the library's values to the oracle's.

Model of the tests: weights, factors and biases are all drawn at random (a start with `lora_b = 0` would hide much), the
clients' ranks differ by layer, their sizes are uneven, and client 1 has fewer examples than one batch.
"""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from autorank_jax import aggregators
from autorank_jax.adapters.lora import max_ranks
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.engine import local
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.federated.data import from_parts
from autorank_jax.federated.participation import Cohort, everyone
from autorank_jax.models.vision import MLP
from autorank_jax.types import Adapter, Aggregator, LocalState, LocalTraining, Server, Trainable
from tests.reference import RULES, training

SIZES = (9, 3, 17, 4, 8, 12, 5)
CLIENTS = len(SIZES)
BATCH = 4
MAX_STEPS = 32  # that the recorder has room for
RECORDED = {"a": 7, "b": 3}  # its adapters


class Federation(NamedTuple):
    task: Any
    data: Any
    ranks: dict[str, np.ndarray]
    network: Any  # the oracle's


class PooledCNN(nnx.Module):
    """The oracle's convolutional network: 3×3 convolution, ReLU, global average pooling, linear layer."""

    def __init__(self, *, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.head = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jax.nn.relu(self.conv(x)).mean((1, 2)))


def random_values(tree, dtype, seed=0):
    """Replace every leaf by normal numbers of a tame size."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), dtype), tree)


def make_federation(model, network, shape, *, max_rank, dtype, sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    inputs, targets = rng.normal(size=(n, *shape)).astype(dtype), rng.integers(0, 3, n).astype(np.int32)
    parts = np.split(rng.permutation(n), np.cumsum(sizes)[:-1])
    with jax.enable_x64(dtype == "float64"):
        data = from_parts(inputs, targets, parts, ids=[7, 3, 11, 0, 5, 2, 9][: len(sizes)])
        task = task_from_nnx(model, max_rank=max_rank)
        task = task._replace(server=random_values(task.server, dtype, seed))
    widest = max_ranks(task.server.trainable)
    ranks = {path: rng.integers(1, width + 1, len(sizes)) for path, width in widest.items()}
    return Federation(task, data, ranks, network)


@cache
def mlp_federation(dtype="float64", sizes=SIZES):
    """An MLP 6-5-3, maximum ranks 5 and 3."""
    model, paths = MLP((6, 5, 3), rngs=nnx.Rngs(0)), ["layers/0", "layers/1"]
    widest = {"layers/0": 5, "layers/1": 3}
    return make_federation(model, training.mlp(paths), (6,), max_rank=widest, dtype=dtype, sizes=sizes)


@cache
def cnn_federation(dtype="float64", sizes=SIZES):
    """The oracle's convolutional network on 4×5 images of two channels, maximum ranks 6 and 2."""
    model, network = PooledCNN(rngs=nnx.Rngs(0)), training.conv_network("conv", "head", 3)
    return make_federation(model, network, (4, 5, 2), max_rank={"conv": 6, "head": 2}, dtype=dtype, sizes=sizes)


# -------------------------------------------------------------------------------------------------------------- rounds


def sgd_or_adamw(hparams):
    """SGD with momentum 0.5, or AdamW where `hparams["adam"]` is 1: one program for both. Adam is decay 0."""
    sgd = optax.sgd(hparams["learning_rate"], 0.5)
    adam = optax.adamw(hparams["learning_rate"], weight_decay=hparams["decay"])
    adaptive = hparams["adam"] > 0

    def update(grads, memory, params):
        (one, first), (two, second) = sgd.update(grads, memory[0], params), adam.update(grads, memory[1], params)
        return jax.tree.map(lambda s, a: jnp.where(adaptive, a, s), one, two), (first, second)

    return optax.GradientTransformation(lambda params: (sgd.init(params), adam.init(params)), update)


def side_by_side(*rules):
    """Aggregate the same clients by several rules: one program for all. The servers are left in the rule's state."""
    return Aggregator(
        lambda server: (server,) * len(rules),
        rules[0].start,
        rules[0].trains,
        lambda update, server, plan: tuple(rule.summand(update, server, plan) for rule in rules),
        lambda key, sums, _, server: (
            server,
            tuple(rule.update(key, s, (), server)[0] for rule, s in zip(rules, sums, strict=True)),
        ),
    )


def traced_once(fn):
    """Fail when `fn` is traced a second time."""
    calls = []

    def wrapped(*args):
        calls.append(1)
        assert len(calls) == 1, f"{fn.__name__} was traced again"
        return fn(*args)

    return wrapped


@cache
def fast_compilation():
    """Return compiler options that halve the time to compile; {} where this version of XLA does not know them."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    }
    try:
        jax.jit(lambda x: x, compiler_options=options)(0)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def jit_round(*args, **options):
    """Compile a round; a second compilation fails the test."""
    return jax.jit(traced_once(make_round(*args, **options)), compiler_options=fast_compilation())


BOTH_RULES = ("rbla", "zero_pad")


def both_rules():
    return side_by_side(*(getattr(aggregators, name)() for name in BOTH_RULES))


def mlp_local(federation, optimizer=sgd_or_adamw):
    return local.make_local_training(federation.task, optimizer, batch_size=BATCH)


@cache
def mlp_round(lanes, rank_levels, participation=everyone):
    """Both rules and both optimisers on the MLP in 64-bit."""
    return jit_round(
        mlp_local(mlp_federation()), both_rules(), lanes=lanes, rank_levels=rank_levels, participation=participation
    )


def start_state(federation, rule, *, ranks=None, **options):
    options = {"local_epochs": 2, "max_epochs": 3, "learning_rate": 0.1, "adam": 0.0, "decay": 0.0} | options
    return init_state(federation.task.server, rule, ranks or federation.ranks, **options)


# -------------------------------------------------------------------------------------------------------------- oracle


def to_oracle(server):
    return {
        "adapters": {p: (np.asarray(a.lora_a), np.asarray(a.lora_b)) for p, a in server.trainable.adapters.items()},
        "dense": {name: np.asarray(value) for name, value in server.trainable.dense.items()},
        "kernels": {path: np.asarray(kernel) for path, kernel in server.frozen.kernels.items()},
    }


def assert_server(server, expected, tolerance):
    """Compare a server, or what a client sends, with the oracle's."""
    got = to_oracle(server)
    for path, (a, b) in expected["adapters"].items():
        rank = a.shape[1]
        np.testing.assert_allclose(got["adapters"][path][0][:, :rank], a, rtol=0, atol=tolerance, err_msg=path)
        np.testing.assert_allclose(got["adapters"][path][1][:rank], b, rtol=0, atol=tolerance, err_msg=path)
    for name, value in expected["dense"].items():
        np.testing.assert_allclose(got["dense"][name], value, rtol=0, atol=tolerance, err_msg=name)


def oracle_clients(federation, server, batches, who, **options):
    """Train the clients of the rows `who` with the oracle: `(clients, {row: losses})`."""
    clients, losses = [], {}
    for row in who:
        ranks = {path: int(values[row]) for path, values in federation.ranks.items()}
        examples = [
            (np.asarray(federation.data.inputs)[b], np.asarray(federation.data.targets)[b]) for b in batches[row]
        ]
        weight = int(federation.data.size[row])
        client, losses[row] = training.train_client(
            server, ranks, examples, network=federation.network, weight=weight, **options
        )
        clients.append({**client, "id": int(federation.data.id[row])})
    return clients, losses


def oracle_round(federation, server, batches, who, rule, **options):
    clients, losses = oracle_clients(federation, server, batches, who, **options)
    return RULES[rule](server, clients)[0], losses


# ------------------------------------------------------------------------------------------------------------ recorder
# A round that trains nothing and writes down what every client was given.


class Record(NamedTuple):
    examples: Any  # (clients, max_steps, batch) 1 + example number, 0 where padded
    noise: Any  # (clients, max_steps) 24 bits of the step's key
    runs: Any  # (clients, max_steps) how often the step was made
    level: Any  # (clients,) the width at which the client trained


def recording():
    """Local training that counts. The inputs of the data are the example numbers; every example has loss 1."""

    def begin(hparams, start, client):  # noqa: ARG001
        return LocalState(start, jnp.zeros((), jnp.int32))

    def step(hparams, setting, state, batch, key):  # noqa: ARG001
        record, at = state.params.dense, state.optimizer
        bits = (jax.random.bits(key, (), jnp.uint32) >> 8).astype(record.noise.dtype)
        record = record._replace(
            examples=record.examples.at[at].set(jnp.where(batch.weight > 0, batch.inputs + 1, 0)),
            noise=record.noise.at[at].set(bits),
            runs=record.runs.at[at].add(1),
            level=jnp.full_like(record.level, state.params.adapters["a"].lora_a.shape[-1]),
        )
        return LocalState(state.params._replace(dense=record), at + 1), batch.weight

    return LocalTraining(begin, step, lambda state, client: state.params, BATCH)  # noqa: ARG005


def collect(clients):
    """Add up the records of all clients, each in its own row; they become the rule's state."""

    def empty(server):
        return jax.tree.map(lambda leaf: jnp.zeros((clients, *leaf.shape), leaf.dtype), server.trainable.dense)

    def summand(update, server, plan):  # noqa: ARG001
        return jax.tree.map(
            lambda total, leaf: total.at[update.client.row].add(jnp.where(update.client.weight > 0, leaf, 0)),
            empty(server),
            update.trained.dense,
        )

    rule = aggregators.rbla()
    keep = lambda key, sums, state, server: (server, sums)  # noqa: ARG005, E731
    return Aggregator(empty, rule.start, rule.trains, summand, keep)


def recording_server():
    adapters = {path: Adapter(jnp.zeros((1, width)), jnp.zeros((width, 1))) for path, width in RECORDED.items()}
    blank = Record(jnp.zeros((MAX_STEPS, BATCH)), jnp.zeros(MAX_STEPS), jnp.zeros(MAX_STEPS), jnp.zeros(()))
    return Server(Trainable(adapters, blank), ())


def number_examples(data):
    """Replace the inputs by the example numbers."""
    return data._replace(inputs=jnp.arange(len(data.targets), dtype=jnp.result_type(float)))


@cache
def recording_round(clients, examples, lanes, rank_levels, participation):  # noqa: ARG001
    options = {"lanes": lanes, "rank_levels": rank_levels, "participation": participation}
    return jit_round(recording(), collect(clients), **options)


def some_rows(key, data):
    """Take all rows in random order, each present with probability one half."""
    order, coin = jax.random.split(key)
    clients = data.size.shape[0]
    rows = jax.random.permutation(order, clients).astype(jnp.int32)
    return Cohort(rows, jax.random.bernoulli(coin, 0.5, (clients,)))


def record_round(key, data, *, epochs, ranks=None, lanes=1, rank_levels=1, rounds_done=0, participation=everyone):
    """Run the recorder in 64-bit on adapters `RECORDED`: `(state, info)`, the record in `state.aggregator`."""
    clients = len(data.size)
    assert epochs * -(-int(max(data.size)) // BATCH) <= MAX_STEPS
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        ranks = ranks or {path: np.ones(clients, int) for path in RECORDED}
        server = recording_server()
        state = init_state(server, collect(clients), ranks, local_epochs=epochs, max_epochs=3)
        state = state._replace(round=jnp.asarray(rounds_done, jnp.int32))
        record = recording_round(clients, len(data.order), lanes, rank_levels, participation)
        data = number_examples(jax.tree.map(jnp.asarray, data))
        state, info = record(key, state, data)
    return jax.tree.map(np.asarray, (state._replace(server=()), info))


def recorded_batches(key, data, *, epochs=2, rounds_done=0):
    """Return what every client is given in a round of that key: by row, the example numbers of each batch in order."""
    state, _ = record_round(key, data, epochs=epochs, rounds_done=rounds_done)
    examples = state.aggregator.examples.astype(int)
    return [[batch[batch > 0] - 1 for batch in rows if batch.any()] for rows in examples]
