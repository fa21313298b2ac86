"""What a round, a state or a loss is given wrongly is said in one line: expected, got, probably."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autorank_jax import aggregators
from autorank_jax.adapters.lora import max_ranks
from autorank_jax.engine import init_state, local, make_local_training, make_round, simulate
from tests.engine.test_optimizers import CLIENTS, data, task

RULE = aggregators.rbla()
KEY = jax.random.key(0)


def state(rule=RULE, *, clients=CLIENTS, ranks=None):
    return init_state(task().server, rule, ranks, clients=clients)


def one_round(optimizer=None, *, rule=RULE, state=None, data=data, key=KEY, **options):
    """Trace a round; nothing is compiled."""
    trained = make_local_training(task(), optimizer or optax.sgd(0.1), batch_size=4, **options)
    return jax.eval_shape(make_round(trained, rule), key, state, data())


def mean_loss(*given):
    return jnp.mean(local.from_task_loss(task().loss)(*given))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_round(state=state(clients=2)), "a state of the 3 clients of the data, got ranks.*(2,).*anoth"),
        (lambda: one_round(state=state(clients=5)), "a state of the 3 clients of the data, got ranks.*(5,).*anoth"),
        (lambda: state(ranks={"layers/0": np.array([0.5, 1.0, 0.2])}), "integer ranks, got float.*ranks_from_ratios"),
        (lambda: state(ranks={"layers/0": jnp.ones(3)}), "integer ranks, got float32"),
        (
            lambda: one_round(state=state(), loss=mean_loss),
            r"a local loss of every example, shape \(4,\), got \(\), pro",
        ),
        (lambda: one_round(state=state(aggregators.rolora())), "expected State.aggregator as this rule makes it"),
        (lambda: one_round(state=state(aggregators.fedsa_lora())), "expected State.clients as this rule makes it"),
        (lambda: one_round(state=state(), rule=aggregators.local_only()), "expected State.clients as this rule makes"),
        (lambda: one_round(optax.lookahead(optax.sgd(1.0), 2, 0.5), state=state()), "probably one that needs param"),
        (lambda: one_round(optax.sgd, state=state()), "probably not called: optax.sgd"),
    ],
)
def test_values_that_do_not_fit_are_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: one_round(rule=aggregators.rbla),
            r"got the function 'rbla', probably not called: rbla\(",
        ),
        (lambda: state(aggregators.rbla), r"got the function 'rbla', probably not called: rbla\(\)"),
        (lambda: make_round(task(), RULE), "expected local training, got a Task; make_local_training"),
        (lambda: make_local_training(None, optax.sgd(1.0), batch_size=4), "expected a task, got None; task_from_nnx"),
        (lambda: init_state(task(), RULE, None, clients=3), "expected a server, got a Task, probably.*task.server"),
        (
            lambda: one_round(state=state(), key=0),
            r"expected key as a random key, got an array int.*, probably a seed: jax.random.key",
        ),
        (
            lambda: one_round(state=data(), data=state),
            "for the state and a State for the data, probably in another order",
        ),
    ],
)
def test_arguments_in_the_wrong_place_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_weights_are_one_of_every_client():
    trained = make_local_training(task(), optax.sgd(0.1), batch_size=4)
    wrong = make_round(trained, RULE, weigh=lambda _: jnp.ones(2))
    with pytest.raises(ValueError, match=r"expected one weight of every client, \(3,\), got shape \(2,\)"):
        jax.eval_shape(wrong, KEY, state(), data())


def test_states_are_made_inside_jit():
    ranks, model, examples = {"layers/0": jnp.array([1, 2, 2])}, task(), data()

    @jax.jit
    def inside():
        trained = make_local_training(model, optax.sgd(0.1), batch_size=8)
        start = init_state(model.server, RULE, ranks)
        return simulate(KEY, make_round(trained, RULE), start, examples, rounds=1)[0].ranks

    np.testing.assert_array_equal(inside()["layers/0"], [1, 2, 2])


def test_max_ranks_of_a_task_or_a_server():
    assert max_ranks(task()) == max_ranks(task().server) == max_ranks(task().server.trainable) == {"layers/0": 2}
    with pytest.raises(TypeError, match="expected a Trainable or a server or a task, got"):
        max_ranks({})


def test_without_ranks_everybody_has_the_maximum():
    np.testing.assert_array_equal(state().ranks["layers/0"], [2, 2, 2])
    with pytest.raises(ValueError, match="expected clients=, got none"):
        init_state(task().server, RULE, None)
