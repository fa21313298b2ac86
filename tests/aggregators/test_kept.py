"""Layers that stay with their clients: what the rule does not see, what clients keep, what is not sent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import autorank_jax as ar
from autorank_jax import aggregators, evaluation
from autorank_jax.adapters.selection import choose_parts, leave_out
from autorank_jax.aggregators import keep_local, with_server_optimizer
from autorank_jax.engine import init_state
from autorank_jax.engine.flops import FlopModel
from autorank_jax.types import Base, Server
from tests.aggregators.cases import PRESENT, RANKS, SIZES, compile_round, make_data, make_server, to_jax

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")
KEPT = ("tall", "head")


def run(rule, rounds=2):
    server = to_jax(make_server())
    ranks = {path: jnp.asarray(of) for path, of in RANKS.items()}
    state, data = init_state(server, rule, ranks, broken=np.zeros(len(SIZES))), make_data()
    go = compile_round(rule, lanes=2, rank_levels=2)
    for _ in range(rounds):
        state, _ = go(jax.random.key(1), state, data)
    return state


@pytest.fixture(scope="module")
def plain():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return run(aggregators.rbla())


@pytest.mark.slow
def test_the_rule_sees_the_rest_and_clients_keep_their_own(plain):
    rule = keep_local(aggregators.rbla(), KEPT)
    state, start = run(rule), to_jax(make_server())
    for path in ("conv", "wide"):
        jax.tree.map(np.testing.assert_array_equal, *(s.server.trainable.adapters[path] for s in (state, plain)))
    np.testing.assert_array_equal(state.server.trainable.dense["bias"], plain.server.trainable.dense["bias"])
    before, after = start.trainable, state.server.trainable
    jax.tree.map(np.testing.assert_array_equal, after.adapters["tall"], before.adapters["tall"])
    np.testing.assert_array_equal(after.dense["head"], before.dense["head"])
    inner, own = state.clients
    assert inner == ()
    assert set(own.adapters) == {"tall"}
    assert own.dense["bias"] is None
    heads = np.asarray(own.dense["head"])
    away = int(np.flatnonzero(PRESENT == 0)[0])
    np.testing.assert_array_equal(heads[away], before.dense["head"])
    assert len(np.unique(heads.round(9), axis=0)) == len(SIZES)
    for row, rank in enumerate(RANKS["tall"]):  # beyond its rank, a client keeps what it had
        np.testing.assert_array_equal(
            own.adapters["tall"].lora_b[row, rank:], before.adapters["tall"].lora_b[rank:], err_msg=str(row)
        )


@pytest.mark.slow
@pytest.mark.parametrize("outside", [True, False])
def test_server_optimizers_go_around_or_inside(outside):
    optimizer = optax.sgd(0.5, momentum=0.9)
    if outside:
        rule = with_server_optimizer(keep_local(aggregators.rbla(), KEPT), optimizer)
    else:
        rule = keep_local(with_server_optimizer(aggregators.rbla(), optimizer), KEPT)
    state, alone = run(rule), run(with_server_optimizer(aggregators.rbla(), optimizer))
    for path in ("conv", "wide"):
        jax.tree.map(np.testing.assert_allclose, *(s.server.trainable.adapters[path] for s in (state, alone)))


def test_two_server_optimizers_are_refused_through_what_is_kept():
    once = keep_local(with_server_optimizer(aggregators.rbla(), optax.sgd(1.0)), KEPT)
    with pytest.raises(ValueError, match="expected a rule without a server optimizer, got one that has it"):
        with_server_optimizer(once, optax.sgd(1.0))


def test_what_stays_is_not_sent_and_still_held():
    server = to_jax(make_server())
    ranks, size = {p: np.array(of) for p, of in RANKS.items()}, SIZES
    flops = FlopModel(1.0, dict.fromkeys(RANKS, 1.0))
    rule = keep_local(aggregators.fedex_lora(), KEPT)
    whole, rest = (
        evaluation.client_costs(server, ranks, size, flops, local_epochs=1, traffic=traffic)
        for traffic in (aggregators.fedex_lora().traffic, rule.traffic)
    )
    head, (a, b) = server.trainable.dense["head"], server.trainable.adapters["tall"]
    factors = ranks["tall"] * 8 * (a.shape[0] + b.shape[1])
    np.testing.assert_allclose(whole.bytes_up - rest.bytes_up, factors + 8 * head.size)
    kernel = min(a.shape[0] * b.shape[1] * 8, ranks["tall"].sum() * 8 * (a.shape[0] + b.shape[1]))
    np.testing.assert_allclose(whole.bytes_down - rest.bytes_down, factors + 8 * head.size + kernel)
    np.testing.assert_array_equal(whole.parameters, rest.parameters)


def test_patterns_take_a_layer_with_its_adapter():
    trainable = to_jax(make_server()).trainable
    assert choose_parts(trainable, ("tall/*", "b*")) == ({"tall"}, {"bias"})
    rest = leave_out(trainable, ("tall/*", "b*"))
    assert (set(rest.adapters), rest.dense["bias"]) == ({"conv", "wide"}, None)
    with pytest.raises(ValueError, match=r"got 'tial': there are \['bias', 'conv', 'head', 't"):
        run(keep_local(aggregators.rbla(), "tial"))


def test_pruned_ranks_are_those_of_the_rule():
    server = to_jax(make_server())
    rule = keep_local(aggregators.hetlora(prune=0.5), "tall")
    ranks = {path: jnp.asarray(of) for path, of in RANKS.items()}
    state = init_state(server, rule, ranks)
    pruned = state.clients[0] | {"wide": jnp.ones_like(state.ranks["wide"])}
    found = rule.client_ranks(state.ranks, (pruned, state.clients[1]))
    assert set(np.asarray(found["wide"])) == {1}
    np.testing.assert_array_equal(found["tall"], RANKS["tall"])


@pytest.mark.slow
def test_clients_own_models_are_tested():
    """Two clients whose labels contradict each other agree with a head of their own only."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 4)).astype(np.float32)
    side = (x[:, 0] > 0).astype(np.int32)
    y = np.where(np.arange(40) < 20, side, 1 - side)
    task = ar.task_from_nnx(ar.models.MLP((4, 6, 2), rngs=nnx.Rngs(0)), max_rank=2, train_dense=("*/bias",))
    data = ar.from_parts(x, y, [np.arange(20), np.arange(20, 40)])
    rule = keep_local(aggregators.rbla(), "layers/1*")
    local = ar.make_local_training(task, optax.adam(0.1), batch_size=20)
    state = init_state(task.server, rule, None, clients=2, local_epochs=30)
    state = jax.jit(ar.make_round(local, rule))(jax.random.key(0), state, data)[0]
    scores = evaluation.personal_scores(jax.random.key(1), local, rule, state, data, task=task, held_out=data)
    own = np.asarray(scores.before)
    server = float(ar.make_evaluate(task, x, y)(state)["accuracy"])
    assert min(own) > server + 0.1


@pytest.mark.slow
def test_rules_made_by_hand_take_a_server_optimizer():
    by_hand = aggregators.rbla()._replace(step=None)
    optimizer = optax.sgd(0.5, momentum=0.9)
    got, want = (run(with_server_optimizer(rule, optimizer)) for rule in (by_hand, aggregators.rbla()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got.server, want.server)
    assert isinstance(got.server, Server)
    assert isinstance(got.server.frozen, Base)
    merging = with_server_optimizer(aggregators.fedex_lora()._replace(step=None), optimizer)
    with pytest.raises(ValueError, match="leaves the base alone, got one without a step whose update changes it"):
        run(merging)
    with pytest.raises(TypeError, match="expected optimizer as a GradientTransformation, got the function 'sgd'"):
        with_server_optimizer(by_hand, optax.sgd)


@pytest.mark.slow
def test_diagnostics_inside_a_server_optimizer():
    optimizer = optax.sgd(0.5, momentum=0.9)
    inside = run(with_server_optimizer(aggregators.with_diagnostics(aggregators.flexlora()), optimizer))
    plain = run(with_server_optimizer(aggregators.flexlora(), optimizer))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), inside.server, plain.server)
