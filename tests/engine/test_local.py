"""Training of one client: under a rank it equals training truncated matrices, for every optimiser it claims."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from autorank_jax.adapters.lora import cut, max_ranks, narrow, rank_masks
from autorank_jax.engine import local
from autorank_jax.types import Batch, Client, Setting, Trains
from tests.engine.cases import assert_server, fast_compilation, mlp_federation, to_oracle
from tests.reference import training

RANKS = {"layers/0": 3, "layers/1": 2}
STEPS, BATCH = 5, 4

in_64_bit = pytest.mark.usefixtures("x64", "standard_promotion")


@cache
def problem():
    """Return the federation and five batches, the last of two examples; what pads it is large."""
    federation = mlp_federation()
    inputs = np.array(federation.data.inputs[: STEPS * BATCH]).reshape(STEPS, BATCH, -1)
    targets = np.array(federation.data.targets[: STEPS * BATCH]).reshape(STEPS, BATCH)
    weight = np.ones((STEPS, BATCH), np.float32)
    weight[-1, 2:], inputs[-1, 2:] = 0, 1e3
    return federation, Batch(inputs, targets, weight)


def train(trained, start, masks, *, trains=Trains(), hparams=None, batches=None):  # noqa: B008
    """Run one client through all batches: what it sends, and its losses `(steps, batch)`."""
    federation, default = problem()
    hparams, client = hparams or {}, Client(jnp.zeros((), jnp.int32), masks, jnp.ones(()), ())

    def run(start, batches):
        setting = Setting(client, start, federation.task.server.frozen, trains)
        step = lambda state, batch: trained.step(hparams, setting, state, batch, jax.random.key(0))  # noqa: E731
        state, losses = lax.scan(step, trained.begin(hparams, start, client), batches)
        return trained.end(state, client), losses

    return jax.jit(run, compiler_options=fast_compilation())(start, default if batches is None else batches)


def train_cut(trained, ranks=RANKS, **options):
    """Train zero-padded matrices of the server's width."""
    whole = problem()[0].task.server.trainable
    masks = rank_masks({path: jnp.array(rank) for path, rank in ranks.items()}, max_ranks(whole))
    return train(trained, cut(whole, masks), masks, **options)


def train_narrow(trained, ranks=RANKS, **options):
    """Train matrices of the rank's width."""
    masks = {path: jnp.ones(rank) for path, rank in ranks.items()}
    return train(trained, narrow(problem()[0].task.server.trainable, ranks), masks, **options)


def oracle(ranks=RANKS, **options):
    """Train truncated matrices with the oracle: what the client sends, and the mean loss of each step."""
    federation, batches = problem()
    examples = [(x[w > 0], y[w > 0]) for x, y, w in zip(*batches, strict=True)]
    server = to_oracle(federation.task.server)
    options = {"network": federation.network, "epochs": STEPS} | options
    return training.train_client(server, ranks, examples, **options)


def make(optimizer, **options):
    return local.make_local_training(problem()[0].task, optimizer, batch_size=BATCH, **options)


def assert_client(got, expected, tolerance=1e-9):
    sent, losses = got
    client, means = expected
    assert_server(problem()[0].task.server._replace(trainable=sent), client, tolerance)
    counts = np.asarray(problem()[1].weight).sum(1)
    np.testing.assert_allclose(np.asarray(losses).sum(1) / counts, means, rtol=0, atol=tolerance)


def assert_zero_beyond(sent, ranks=RANKS):
    for path, adapter in sent.adapters.items():
        assert (adapter.lora_a[:, ranks[path] :] == 0).all()
        assert (adapter.lora_b[ranks[path] :] == 0).all()


# ------------------------------------------------------------------------------------------------- truncated matrices

TWINS = {
    "sgd": (optax.sgd(0.1), lambda: training.sgd(0.1)),
    "momentum": (optax.sgd(0.1, 0.9), lambda: training.sgd(0.1, 0.9)),
    "adam": (optax.adam(0.1), lambda: training.adam(0.1)),
    "adamw": (optax.adamw(0.1, weight_decay=0.3), lambda: training.adamw(0.1, 0.3)),
}


@in_64_bit
@pytest.mark.parametrize("name", list(TWINS))
def test_training_under_a_rank_equals_the_truncated_twin(name):
    optimizer, make_twin = TWINS[name]
    got = train_cut(make(optimizer))
    assert_client(got, oracle(optimizer=make_twin()))
    assert_zero_beyond(got[0])


OTHERS = {
    "lion": optax.lion(0.05, weight_decay=0.2),
    "rmsprop": optax.rmsprop(0.05, momentum=0.5),
    "lamb": optax.lamb(0.05, weight_decay=0.2),
    "lars": optax.lars(0.5, weight_decay=0.2),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5, 0.9)),
}


@in_64_bit
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("lamb", "lars", "rmsprop"))) for name in OTHERS]
)
def test_training_under_a_rank_equals_training_truncated_matrices(name):
    got, losses = train_cut(make(OTHERS[name]))
    expected, other = train_narrow(make(OTHERS[name]))
    compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)  # noqa: E731
    jax.tree.map(compare, (narrow(got, RANKS), losses), (expected, other))
    assert_zero_beyond(got)
    start = problem()[0].task.server.trainable
    for path, adapter in expected.adapters.items():
        assert (np.abs(adapter.lora_b - start.adapters[path].lora_b[: RANKS[path]]) > 1e-3).any()


@in_64_bit
def test_unused_positions_have_no_gradient():
    federation, batches = problem()
    start = federation.task.server.trainable
    masks = rank_masks({path: jnp.array(rank) for path, rank in RANKS.items()}, max_ranks(start))
    batch = jax.tree.map(lambda leaf: leaf[0], batches)
    loss = lambda params: federation.task.loss(federation.task.server.frozen, params, batch, jax.random.key(0)).sum()  # noqa: E731
    assert_zero_beyond(jax.grad(loss)(cut(start, masks)))
    for path, adapter in jax.grad(loss)(start).adapters.items():
        assert (adapter.lora_a[:, RANKS[path] :] != 0).any()
        assert (adapter.lora_b[RANKS[path] :] != 0).any()


# ---------------------------------------------------------------------------------------------------- scales, FedProx

SCALES = {
    "constant": (lambda rank: jnp.full_like(rank, 1.7), ("constant", 1.7)),
    "alpha/rank": (local.alpha_over_rank(2.5), ("alpha/rank", 2.5)),
    "alpha/sqrt(rank)": (local.alpha_over_sqrt_rank(2.5), ("alpha/sqrt(rank)", 2.5)),
}


@in_64_bit
@pytest.mark.parametrize("proximal", [0.0, 0.7])
@pytest.mark.parametrize("rule", list(SCALES))
def test_scaled_and_pulled_training_equals_the_twin(rule, proximal):
    scale, named = SCALES[rule]
    loss = local.with_proximal_term(local.from_task_loss(problem()[0].task.loss), proximal)
    got = train_cut(make(optax.adam(0.05), loss=loss, scale=scale))
    options = {"scale": named, "proximal": proximal}  # recorded losses leave the pull out
    assert_client(got, oracle(optimizer=training.adam(0.05), **options))
    assert_zero_beyond(got[0])


@in_64_bit
def test_a_scale_does_not_change_what_is_sent_without_training():
    start = problem()[0].task.server.trainable
    client = Client(jnp.zeros((), jnp.int32), {p: jnp.ones(r) for p, r in max_ranks(start).items()}, jnp.ones(()), ())
    trained = make(optax.sgd(0.1), scale=local.alpha_over_rank(8.0))
    sent = trained.end(trained.begin({}, start, client), client)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-15), sent, start)


def test_proximal_term_by_hand():
    loss = local.with_proximal_term(lambda frozen, trainable, start, batch, key: jnp.array([1.0, 2.0]), 4.0)  # noqa: ARG005
    now, start = {"a": jnp.array([1.0, 3.0]), "b": jnp.array(2.0)}, {"a": jnp.array([0.0, 1.0]), "b": jnp.array(4.0)}
    losses, penalty = loss((), now, start, (), ())
    np.testing.assert_array_equal(losses, [1, 2])
    np.testing.assert_allclose(penalty, 2 * 9)
    np.testing.assert_allclose(local.with_proximal_term(loss, 2.0)((), now, start, (), ()).penalty, 3 * 9)


# --------------------------------------------------------------------------------------------- what a rule lets train


@in_64_bit
@pytest.mark.parametrize("as_arrays", [False, True])
@pytest.mark.parametrize("part", ["lora_a", "lora_b", "dense"])
def test_what_is_not_trained_is_sent_back_as_it_came(part, as_arrays):
    flags = {name: name != part for name in Trains._fields}
    given = {name: jnp.array(flag) for name, flag in flags.items()} if as_arrays else flags
    got = train_cut(make(optax.adamw(0.1, weight_decay=0.3)), trains=Trains(**given))
    names = {"lora_a": "train_a", "lora_b": "train_b", "dense": "train_dense"}
    twin = {names[name]: flag for name, flag in flags.items()}
    assert_client(got, oracle(optimizer=training.adamw(0.1, 0.3), **twin))
    start = problem()[0].task.server.trainable
    for path, adapter in got[0].adapters.items():
        rank = RANKS[path]
        assert (adapter.lora_a[:, :rank] == start.adapters[path].lora_a[:, :rank]).all() == (part == "lora_a")
        assert (adapter.lora_b[:rank] == start.adapters[path].lora_b[:rank]).all() == (part == "lora_b")
    for name, value in got[0].dense.items():
        assert (value == start.dense[name]).all() == (part == "dense")


# ---------------------------------------------------------------------------------------------------- batches, hparams


@in_64_bit
def test_padding_of_a_short_batch_counts_nowhere():
    _, batches = problem()
    inputs, targets = batches.inputs.copy(), batches.targets.copy()
    inputs[-1, 2:], targets[-1, 2:] = -7.0, 0
    trained = make(optax.sgd(0.1))
    one, other = train_cut(trained), train_cut(trained, batches=Batch(inputs, targets, batches.weight))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert (one[1][-1, 2:] == 0).all()


@in_64_bit
def test_optimizers_may_be_made_of_hparams():
    fixed = train_cut(make(optax.sgd(0.2, 0.5)))
    made = make(lambda h: optax.sgd(h["learning_rate"], h["momentum"]))
    got = train_cut(made, hparams={"learning_rate": jnp.array(0.2), "momentum": jnp.array(0.5)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), got, fixed)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: local.alpha_over_rank(-1.0), "expected a positive LoRA alpha, got -1.0"),
        (lambda: local.alpha_over_sqrt_rank(float("nan")), "expected a positive LoRA alpha, got nan"),
    ],
)
def test_mistakes_are_refused_at_once(build, message):
    with pytest.raises(ValueError, match=message):
        build()
