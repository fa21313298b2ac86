"""What clients' optimisers are given, whose parameters are sent, their random numbers, and rates by round."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from autorank_jax import aggregators
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.checkpoint import restore_state, save_state
from autorank_jax.engine import init_state, make_local_training, make_round, simulate
from autorank_jax.engine.optimizers import (
    at_round,
    begin_optimizer,
    follow_client,
    make_transformation,
    params_to_send,
    scale_updates,
    step_optimizer,
)
from autorank_jax.federated.data import from_parts
from autorank_jax.models.vision import MLP
from autorank_jax.types import Adapter, Batch, Client, Setting, Trainable, Trains
from tests.engine.cases import fast_compilation

CLIENTS = 3
pytestmark = pytest.mark.usefixtures("standard_promotion")


@cache
def task():
    return task_from_nnx(MLP((4, 3), rngs=nnx.Rngs(0)), max_rank=2, key=1)


@cache
def data():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 4)).astype(np.float32), rng.integers(0, 3, 24).astype(np.int32)
    return from_parts(x, y, np.split(np.arange(24), CLIENTS))


def run(optimizer, *, rule=None, rounds=1, key=0, **options):
    """Run rounds; the rule keeps what clients sent, where it is `local_only`."""
    rule = rule or aggregators.local_only()
    local = make_local_training(task(), optimizer, batch_size=4)
    state = init_state(task().server, rule, None, clients=CLIENTS, **options)
    go = jax.jit(
        lambda state, data: simulate(jax.random.key(key), make_round(local, rule), state, data, rounds=rounds),
        compiler_options=fast_compilation(),
    )
    return go(state, data())


def bias(state):
    return np.asarray(state.clients.dense["layers/0/bias"])


@pytest.mark.slow
def test_random_optimizers_draw_by_client_and_round():
    noise = optax.chain(optax.set_to_zero(), optax.add_noise(1.0, 0.0, 0))
    once, twice = (bias(run(noise, rounds=rounds)[0]) for rounds in (1, 2))
    second = twice - once
    draws = np.concatenate([once, second])
    assert len(np.unique(draws.round(4))) == draws.size, "clients or rounds share their noise"
    assert np.allclose(once, bias(run(noise)[0]))  # the same key, the same numbers
    other = optax.chain(optax.set_to_zero(), optax.add_noise(1.0, 0.0, 1))
    assert not np.allclose(once, bias(run(other)[0])), "the optimiser's own seed counts"


def test_keys_are_renewed_and_nothing_else():
    memory = {"count": jnp.zeros((), jnp.int32), "raw": jax.random.PRNGKey(0), "key": jax.random.key(0)}
    one, two = (follow_client(memory, jax.random.key(number)) for number in (1, 2))
    assert one["count"] is memory["count"]
    assert not np.array_equal(one["raw"], memory["raw"])
    assert not np.array_equal(one["raw"], two["raw"])
    assert not np.array_equal(*(jax.random.key_data(m["key"]) for m in (one, two)))


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("raw", [True, False])
def test_keys_of_any_kind_and_number_are_renewed(kind, raw):
    with jax.default_prng_impl(kind):
        keys = jax.random.split(jax.random.PRNGKey(0) if raw else jax.random.key(0), 3)
        one, two = (np.asarray(keys_of(follow_client({"keys": keys}, jax.random.key(n))["keys"], raw)) for n in (1, 2))
    assert one.shape == keys_of(keys, raw).shape
    assert len({tuple(key) for key in np.concatenate([one, two, keys_of(keys, raw)])}) == 9


def keys_of(keys, raw):
    return keys if raw else jax.random.key_data(keys)


@pytest.mark.parametrize("error", [RuntimeError, IndexError, ZeroDivisionError])
def test_whatever_an_optimizer_raises_is_one_line(error):
    def fail(*_):
        raise error("boom\nand more")

    ones = Trainable({}, {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match=f"cannot start on them .{error.__name__}: boom") as caught:
        begin_optimizer(optax.GradientTransformation(fail, fail), ones)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"cannot make updates of them .{error.__name__}: boom"):
        step_optimizer(optax.GradientTransformation(lambda _: (), fail), ones, (), ones)
    with pytest.raises(TypeError, match=f"got one that fails with {error.__name__}: boom"):
        make_transformation(lambda h: fail(h), {})  # noqa: PLW0108


def train_one(optimizer, steps, **options):
    """Steps of one client of full rank outside the engine: its state, and what it sends."""
    local = make_local_training(task(), optimizer, batch_size=8, **options)
    server, masks, examples = task().server, {"layers/0": jnp.ones(2)}, data()
    client = Client(jnp.zeros((), jnp.int32), masks, jnp.ones(()), ())
    setting = Setting(client, server.trainable, server.frozen, Trains())
    state = local.begin({}, server.trainable, client)
    batch = Batch(examples.inputs[:8], examples.targets[:8], jnp.ones(8))
    step = jax.jit(lambda state: local.step({}, setting, state, batch, jax.random.key(0))[0])
    for _ in range(steps):
        state = step(state)
    return state, local.end(state, client)


def test_schedule_free_sends_what_it_means():
    state, sent = train_one(contrib.schedule_free_sgd(0.5), 3)
    meant = contrib.schedule_free_eval_params(state.optimizer, state.params)
    jax.tree.map(np.testing.assert_array_equal, sent, meant)
    assert not np.allclose(sent.dense["layers/0/bias"], state.params.dense["layers/0/bias"])
    chained, inner = train_one(optax.chain(optax.clip(9.0), contrib.schedule_free_sgd(0.5)), 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), inner, sent)
    assert isinstance(chained.optimizer, tuple)


@pytest.mark.parametrize("steps", [3, 4])
def test_sam_never_sends_an_adversarial_point(steps):
    sam = contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.5)), sync_period=2)
    state, sent = train_one(sam, steps)
    away = steps % 2 == 1
    expected = state.optimizer.cache if away else state.params
    jax.tree.map(np.testing.assert_array_equal, sent, expected)
    assert away != np.allclose(sent.dense["layers/0/bias"], state.params.dense["layers/0/bias"])


def test_what_is_sent_is_the_callers_to_say():
    def doubled(memory, params):  # noqa: ARG001
        return jax.tree.map(lambda leaf: 2 * leaf, params)

    state, sent = train_one(optax.sgd(0.1), 1, report=doubled)
    np.testing.assert_array_equal(sent.dense["layers/0/bias"], 2 * state.params.dense["layers/0/bias"])
    plain = Trainable({}, {"w": jnp.ones(2)})
    assert params_to_send(optax.sgd(0.1, momentum=0.9).init(plain), plain) is plain


def test_rates_by_round_are_schedules_of_the_state():
    def by_rate(hparams):
        return optax.sgd(hparams["learning_rate"])

    rates = (0.4, 0.1, 0.0)
    table = lambda number: jnp.asarray(rates)[number]  # noqa: E731
    rule = aggregators.rbla()
    scheduled, history = run(by_rate, rule=rule, rounds=3, learning_rate=table)
    state = init_state(task().server, rule, None, clients=CLIENTS, learning_rate=1.0)
    step = jax.jit(make_round(make_local_training(task(), by_rate, batch_size=4), rule))
    for rate in rates:
        hparams = state.hparams | {"learning_rate": jnp.asarray(rate, jnp.float32)}
        state, info = step(jax.random.key(0), state._replace(hparams=hparams), data())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        scheduled.server.trainable,
        state.server.trainable,
    )
    np.testing.assert_allclose(history.info.loss[-1], info.loss, rtol=1e-5)
    assert callable(scheduled.hparams["learning_rate"])


def test_optax_schedules_fit():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.2, 5, 20)
    hparams = init_state(task().server, aggregators.rbla(), None, clients=1, learning_rate=schedule).hparams
    for number in (0, 5, 12):
        rate = at_round(hparams, jnp.asarray(number, jnp.int32))["learning_rate"]
        np.testing.assert_allclose(rate, schedule(number), rtol=1e-6)
        assert rate.dtype == jnp.float32
        assert not rate.weak_type


def test_states_with_schedules_are_saved_and_restored(tmp_path):
    rule = aggregators.rbla()
    state = init_state(task().server, rule, None, clients=2, learning_rate=optax.constant_schedule(0.3))
    save_state(tmp_path, state._replace(round=state.round + 7), step=7)
    found = restore_state(tmp_path, state).state
    assert found.round == 7
    assert at_round(found.hparams, found.round)["learning_rate"] == pytest.approx(0.3)


def test_a_rate_that_nobody_looks_at_is_refused():
    rate = {"learning_rate": jnp.asarray(0.5)}
    for ignoring in (optax.sgd(0.1), lambda _: optax.sgd(0.1)):
        make_transformation(ignoring, {})
        with pytest.raises(
            ValueError, match="uses the state's learning_rate, got one that ignores it: make it like lambda h: opt"
        ):
            make_transformation(ignoring, rate)
    with pytest.raises(ValueError, match="ignores it"):
        run(optax.sgd(0.1), learning_rate=0.1)
    for using in (
        lambda h: optax.sgd(h["learning_rate"]),
        lambda h: optax.sgd(h.get("learning_rate", 1)),
        lambda h: optax.sgd(**h),
    ):
        make_transformation(using, rate)


def test_numbers_that_the_state_does_not_have_are_named():
    with pytest.raises(ValueError, match=r"got 'momentum' of the optimizer: init_state\(..., mom"):
        make_transformation(lambda h: optax.sgd(h["learning_rate"], h["momentum"]), {})
    rates = []
    make_transformation(lambda h: optax.sgd(rates.append(h["learning_rate"]) or 0.1), {})
    assert rates[0] == pytest.approx(0.01)
    with pytest.raises(
        TypeError,
        match="expected an optimizer as optax makes them, got None, probably of a function that does not return it",
    ):
        make_transformation(lambda _: None, {})


def test_a_number_of_nearly_the_name_asked_for_is_told():
    by_rate = lambda h: optax.sgd(h["learning_rate"])  # noqa: E731
    for name, meant in {
        "learning_rte": "learning_rate",
        "lr": "learning_rate",
        "local_epoch": "local_epochs",
        "max_epoch": "max_epochs",
        "client": "clients",
    }.items():
        for optimizer in (by_rate, optax.sgd(0.1)):
            with pytest.raises(ValueError, match=f"asks for, got '{name}', probably '{meant}'"):
                make_transformation(optimizer, {name: 0.1, "local_epochs": 1})
    for optimizer in (by_rate, optax.sgd(0.1)):
        with pytest.raises(ValueError, match="uses the state's weight_decay, got one that ignores it"):
            make_transformation(optimizer, {"weight_decay": 0.1})
    for asking in (
        lambda h: optax.sgd(h["learning_rate"] * (2 if "twice" in h else 1)),
        lambda h: optax.sgd(dict(h.items())["learning_rate"]),
        lambda h: optax.sgd({**h}["learning_rate"]),
    ):
        make_transformation(asking, {"learning_rate": 0.1, "twice": 1})


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (jnp.ones(2), r"one learning_rate in a round, got shape \(2,\)"),
        (lambda number: jnp.ones(1), r"one learning_rate in a round, got shape \(1,\)"),  # noqa: ARG005
        (lambda number: None, "learning_rate as a schedule that gives a number for a traced round"),  # noqa: ARG005
        (lambda number: 0.1 if number < 2 else 0.01, "jnp.where and optax.join_schedules take the place of if"),
    ],
)
def test_learning_rates_of_other_forms_are_refused(rate, message):
    with pytest.raises(ValueError, match=message) as caught:
        jax.eval_shape(lambda number: at_round({"learning_rate": rate}, number), jnp.int32(0))
    assert "\n" not in str(caught.value)


def test_states_of_optimizers_may_be_python_numbers_but_keep_their_shapes():
    def counting(after):
        return optax.with_extra_args_support(
            optax.GradientTransformation(lambda _: 0, lambda grads, memory, _=None: (grads, after(memory)))
        )

    ones = Trainable({}, {"b": jnp.ones(2)})
    made = counting(lambda memory: memory + 1)
    assert step_optimizer(made, ones, begin_optimizer(made, ones), ones)[1] == 1
    with pytest.raises(ValueError, match="got another structure or other shapes"):
        step_optimizer(counting(lambda _: jnp.zeros(3)), ones, begin_optimizer(made, ones), ones)


def test_updates_are_scaled_by_part_and_layer():
    ones = Trainable(
        {"head": Adapter(jnp.ones((2, 1)), jnp.ones((1, 2)))}, {"head/bias": jnp.ones(2), "b": jnp.ones(2)}
    )
    scale = scale_updates(lora_b=16, dense=3, layers={"head*": 0.5})
    scaled, _ = scale.update(ones, scale.init(ones))
    got = [float(leaf.ravel()[0]) for leaf in (*scaled.adapters["head"], scaled.dense["head/bias"], scaled.dense["b"])]
    assert got == [0.5, 8, 1.5, 3]
    with pytest.raises(ValueError, match=r"got 'tail': there are \['b', 'head', 'head/bias'\]"):
        scale_updates(layers={"tail": 2}).init(ones)
    with pytest.raises(ValueError, match="expected factors of updates >= 0, got -1 for 'lora_b'"):
        scale_updates(lora_b=-1)


def test_lora_plus_moves_b_faster():
    plain, plus = (
        train_one(optax.chain(optax.sgd(0.01), scale_updates(lora_b=factor)), 1)[1].adapters["layers/0"].lora_b
        for factor in (1.0, 16.0)
    )
    np.testing.assert_allclose(plus, 16 * plain, rtol=1e-5)
