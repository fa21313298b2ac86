"""What a round, a state or a loss is given wrongly is said in one line: expected, got, probably."""

# ruff: noqa: ARG005

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autorank_jax import aggregators
from autorank_jax.adapters.lora import max_ranks
from autorank_jax.engine import init_state, local, make_local_training, make_round, simulate
from autorank_jax.engine.round import make_plan
from autorank_jax.federated.participation import Cohort, everyone
from autorank_jax.types import Adapter, Aggregator, Penalised, Trains
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
        (lambda: one_round(state=state(clients=2)), "a state of the 3 clients of the data, got ranks.*(2,)"),
        (lambda: one_round(state=state(clients=5)), "a state of the 3 clients of the data, got ranks.*(5,)"),
        (lambda: state(ranks={"layers/0": np.array([0.5, 1.0, 0.2])}), "integer ranks, got float.*ranks_from_ratios"),
        (lambda: state(ranks={"layers/0": jnp.ones(3)}), "integer ranks, got float32"),
        (
            lambda: one_round(state=state(), loss=mean_loss),
            r"a local loss of every example, shape \(4,\), got \(\), pro",
        ),
        (lambda: one_round(state=state(aggregators.rolora())), "expected State.aggregator as this rule makes it"),
        (lambda: one_round(state=state(aggregators.fedsa_lora())), "expected State.clients as this rule makes it"),
        (lambda: one_round(state=state(), rule=aggregators.local_only()), "expected State.clients as this rule makes"),
        (
            lambda: one_round(optax.lookahead(optax.sgd(1.0), 2, 0.5), state=state()),
            "such as optax.lookahead, use the optimizer inside",
        ),
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


def losses(make):
    """Make a local loss that is something else."""
    return lambda *given: make(local.from_task_loss(task().loss)(*given))


def cohort(row, present):
    return lambda key, data: Cohort(row, present)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: one_round(state=state(), loss=losses(lambda x: (x, 0))),
            "local loss as an array, got a tuple of 2; a p",
        ),
        (lambda: one_round(state=state(), loss=losses(lambda x: x.astype(int))), "local loss as floats, got int32"),
        (
            lambda: one_round(state=state(), loss=losses(lambda x: Penalised(x, x))),
            r"penalty of shape \(\), got \(4,\)",
        ),
        (lambda: one_round(state=state(), report=lambda memory, params: None), "report to return what is built like"),
        (
            lambda: one_round(state=state()._replace(hparams={"learning_rate": jnp.ones(())})),
            r"hparams with local_epochs, got \['learning_rate'\]",
        ),
        (lambda: state(ranks={"layers/0": np.ones(0, int)}, clients=None), "clients >= 1, got 0"),
        (lambda: of_cohort(lambda key, data: data.size > 0), "that return a Cohort"),
        (lambda: of_cohort(cohort(jnp.arange(3.0), jnp.ones(3, bool))), "rows as integers, got float32"),
        (lambda: of_cohort(cohort(jnp.arange(9), jnp.ones(9, bool))), "of at most all 3 clients"),
        (lambda: of_cohort(everyone, faults=[lambda key, number, data, cohort: None]), "return a Cohort.*got None"),
        (lambda: of_cohort(everyone, weigh=lambda data: 1.0), r"one weight of every client, \(3,\), got shape \(\)"),
    ],
)
def test_what_own_functions_return_is_looked_at(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1


def of_cohort(participation, **options):
    trained = make_local_training(task(), optax.sgd(0.1), batch_size=4)
    return jax.eval_shape(make_round(trained, RULE, participation=participation, **options), KEY, state(), data())


def outside(state):
    return state._replace(ranks={"layers/0": jnp.array([1, 2, 3])})


def epochs(number):
    return state()._replace(hparams={"local_epochs": number})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: outside(state()), r"ranks of 'layers/0' in 1..2, got 1..3, probably ranks made for a larger max_rank"),
        (lambda: state()._replace(ranks={"layers/0": jnp.array([0, 1, 2])}), r"in 1..2, got 0..2"),
        (lambda: epochs(jnp.int32(0)), "local_epochs of hparams as one whole number >= 1, got 0"),
        (lambda: epochs(-1), "as one whole number >= 1, got -1"),
        (lambda: epochs(1.9), "as one whole number >= 1, got 1.9"),
        (lambda: epochs(jnp.ones(2, int)), r"as one whole number >= 1, got an array int32.2."),
    ],
)
def test_ranks_and_epochs_put_into_a_state_are_looked_at(make, message):
    trained = make_local_training(task(), optax.sgd(0.1), batch_size=4)
    with pytest.raises(ValueError, match=message):
        make_round(trained, RULE)(KEY, make(), data())


def test_ranks_that_only_jit_sees_own_what_their_masks_say():
    plan = jax.jit(lambda state: make_plan(state, everyone(KEY, data()), jnp.array([1.0, 2.0, 4.0]), jnp.ones(())))
    ranks = {"layers/0": jnp.array([-1, 1, 9])}
    np.testing.assert_array_equal(plan(state()._replace(ranks=ranks)).owners["layers/0"], [6.0, 4.0])


def own(**parts):
    """Make local training of which a part is another."""
    return make_local_training(task(), optax.sgd(0.1), batch_size=4)._replace(**parts)


def of_own(local):
    return jax.eval_shape(make_round(local, RULE), KEY, state(), data())


def narrow(server, *_):
    a, b = server.trainable.adapters["layers/0"]
    return server.trainable._replace(adapters={"layers/0": Adapter(a[:, :1], b)})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: of_own(own(begin=lambda *_: ())), "begin to return a LocalState, got ()"),
        (lambda: of_own(own(step=lambda h, s, state, b, key: state)), r"step to return \(state, losses\), got a Local"),
        (
            lambda: of_own(own(step=lambda h, s, state, b, key: (state, jnp.zeros(())))),
            r"losses of local training's step of every example, shape \(4,\), got \(\), probably a mean",
        ),
        (
            lambda: of_own(own(step=lambda h, s, state, batch, key: (state._replace(optimizer=1), batch.weight))),
            "step to return what is built like",
        ),
        (
            lambda: of_own(own(end=lambda state, client: jax.tree.map(jnp.sum, state.params))),
            r"training's end to return shapes and dtypes as they are, got float32\[\] in place of float32\[4, 2\]",
        ),
        (
            lambda: one_round(state=state(), report=lambda memory, params: jax.tree.map(jnp.sum, params)),
            r"report to return shapes and dtypes as they are, got float32\[\]",
        ),
        (lambda: one_round(rule=rule_of(start=narrow), state=state()), r"start to return .* got float32\[4, 1\] in pl"),
        (lambda: kept(lambda update, server: jnp.zeros(2)), r"client_keep to return .* got float32\[2\] in place of"),
        (lambda: kept(lambda update, server: jnp.zeros(3, int)), r"got int32\[3\] in place of float32\[3\]"),
        (lambda: one_round(state=state(), scale=lambda rank: jnp.ones(2)), "LoRA scale of one finite number, not 0"),
        (lambda: one_round(state=state(), scale=lambda rank: 0), "LoRA scale of one finite number, not 0.*got 0"),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_what_own_functions_return_has_its_shapes(call, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def kept(keep):
    rule = rule_of(client_init=lambda server: jnp.zeros(3), client_keep=keep)
    return one_round(rule=rule, state=state(rule))


@pytest.mark.usefixtures("standard_promotion")
def test_own_functions_may_be_of_numpy_and_python():
    rows = np.arange(2), np.ones(2, bool)
    options = {"weigh": lambda data: [1.0, 2.0, 3.0]}
    assert of_cohort(cohort(*rows), **options)[1].loss.shape == ()
    scaled = {"scale": lambda rank: 2.0, "loss": losses(lambda x: local.with_penalty(x, 0.5))}
    assert one_round(state=state(), **scaled)[1].loss.shape == ()


@pytest.mark.parametrize("batch_size", [10**9, 10**12])
def test_no_batch_is_larger_than_the_data(batch_size):
    trained = make_local_training(task(), optax.sgd(0.1), batch_size=batch_size)
    traced = jax.make_jaxpr(make_round(trained, RULE))(KEY, state(), data())
    examples = data().order.shape[0]
    assert f"[{examples}," in str(traced)
    assert f"{min(batch_size, 2**31 - 1)}," not in str(traced)


def rule_of(**parts):
    """Make a rule that does nothing, but for what is given."""
    nothing = {
        "init": lambda server: (),
        "start": lambda server, state, client: server.trainable,
        "trains": lambda state: Trains(),
        "summand": lambda update, server, plan: update.client.weight,
        "update": lambda key, sums, state, server: (server, state),
    }
    return Aggregator(**nothing | parts)


ODD_SUMS = {
    "a whole number": lambda update, server, plan: 1,
    "small integers": lambda update, server, plan: jnp.ones(3, jnp.uint8),
    "bools": lambda update, server, plan: update.client.weight > 0,
    "nothing": lambda update, server, plan: (),
    "None": lambda update, server, plan: None,
    "nested": lambda update, server, plan: {"a": {"b": [update.client.weight, {"c": (np.ones(2),)}]}},
    "half precision": lambda update, server, plan: jax.tree.map(lambda x: x.astype(jnp.bfloat16), update.trained),
    "of the plan": lambda update, server, plan: {p: plan.owners[p] * update.client.weight for p in plan.owners},
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ODD_SUMS)
def test_rules_may_sum_whatever_is_numbers(name):
    rule = rule_of(summand=ODD_SUMS[name])
    one_round(rule=rule, state=state(rule))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"summand": lambda update, server, plan: "sum"}, "summand of arrays of numbers, got 'sum' in it"),
        ({"summand": lambda update, server, plan: jax.random.key(0)}, "summand of arrays of numbers, got an array key"),
        ({"update": lambda key, sums, state, server: server}, "update to return .server, state., .*got a Server"),
        (
            {"update": lambda key, sums, state, server: (state, server)},
            "return a server built like that before, got",
        ),
        (
            {"init": lambda server: jnp.int32(0), "update": lambda key, sums, state, server: (server, state + 0.5)},
            "shapes and dtypes of the state as they are, got an array float32.. in place of an array int32..",
        ),
        ({"start": lambda server, state, client: server}, "the rule's start to return what is built like a Trainable"),
        ({"trains": lambda state: True}, "the rule's trains to return a Trains.*got True"),
        ({"client_keep": lambda update, server: update.trained}, "the rule's client_keep to return .*got a Trainable"),
        ({"summand": lambda update: ()}, "the rule's summand as a function of 3 arguments, got the function"),
        ({"init": lambda server: "zero"}, "the rule's init of arrays, got 'zero' in it"),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_rules_that_return_something_else_are_refused(parts, message):
    rule = rule_of(**parts)
    with pytest.raises(TypeError, match=message) as caught:
        one_round(rule=rule, state=state(rule))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("standard_promotion")
def test_a_state_that_changes_its_form_serves_one_round_but_no_loop():
    rule = rule_of(init=lambda server: (), update=lambda key, sums, state, server: (server, {"new": jnp.ones(())}))
    trained = make_local_training(task(), optax.sgd(0.1), batch_size=4)
    step, first = make_round(trained, rule), state(rule)
    assert set(jax.eval_shape(step, KEY, first, data())[0].aggregator) == {"new"}
    with pytest.raises(TypeError, match="return a state built like that before, got a dict"):
        jax.eval_shape(lambda key: simulate(key, step, first, data(), rounds=2), KEY)


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
