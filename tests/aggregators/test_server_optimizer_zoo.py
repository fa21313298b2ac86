"""Optimisers of optax as the server's: each steps, or is refused in one line. Steps are traced; one is compiled."""

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

from autorank_jax import aggregators
from autorank_jax.types import Adapter, Aggregator, Base, Server, Trainable, Trains

SERVER = Server(
    Trainable({"a": Adapter(jnp.ones((3, 2)), jnp.ones((2, 4)))}, {"bias": jnp.ones(4)}),
    Base({"a": jnp.ones((3, 4))}, ()),
)


def first_position(key, sums, state, server):  # noqa: ARG001
    """Move the first rank position and the bias; nobody reports the second position."""
    moved = jax.tree.map(lambda leaf: leaf + 1, server.trainable)
    adapter, new = server.trainable.adapters["a"], moved.adapters["a"]
    first = Adapter(adapter.lora_a.at[:, 0].set(new.lora_a[:, 0]), adapter.lora_b.at[0].set(new.lora_b[0]))
    return server._replace(trainable=Trainable({"a": first}, moved.dense)), state


RULE = Aggregator(
    init=lambda _: (),
    start=lambda server, *_: server.trainable,
    trains=lambda _: Trains(),
    summand=lambda *_: (),
    update=first_position,
)


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def step(optimizer, server=SERVER):
    rule = aggregators.with_server_optimizer(RULE, optimizer)
    return rule.update(jax.random.key(0), (), rule.init(server), server)


WORKING = {
    "momentum": lambda: optax.sgd(1.0, momentum=0.9),
    "adamw": lambda: optax.adamw(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(1.0, 9)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "noise": lambda: optax.chain(optax.sgd(1.0), optax.add_noise(0.1, 0.5, 0)),
    "every other": lambda: optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation(),
    "if finite": lambda: optax.apply_if_finite(optax.adam(0.1), 2),
    "masked": lambda: optax.masked(optax.adam(0.1), matrices),
    "by part": lambda: optax.partition({True: optax.adam(0.1), False: optax.set_to_zero()}, matrices),
    "muon": lambda: contrib.muon(0.1),
    "sm3": lambda: optax.sm3(0.1),
    "adafactor": lambda: optax.adafactor(0.1),
    "prodigy": contrib.prodigy,
    "flattened": lambda: optax.flatten(optax.adam(0.1)),
}
REFUSED = {
    "lookahead": (lambda: optax.lookahead(optax.sgd(0.1), 2, 0.5), "no attribute 'fast'"),
    "polyak": (optax.polyak_sgd, "missing 1 required keyword-only argument: 'value'"),
    "schedule-free": (lambda: contrib.schedule_free_sgd(0.1), "means the values it moves"),
    "sam": (lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), "means the values it moves"),
    "mask of other values": (lambda: optax.masked(optax.adam(0.1), {"kernel": True}), "cannot start on them"),
}


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", WORKING)
def test_server_optimizers_step(name):
    with jax.numpy_rank_promotion("allow"):
        server, _ = jax.eval_shape(lambda: step(WORKING[name]()))
    assert jax.tree.map(jnp.shape, server) == jax.tree.map(jnp.shape, SERVER)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", REFUSED)
def test_server_optimizers_are_refused_in_one_line(name):
    make, what = REFUSED[name]
    with pytest.raises(ValueError, match=what) as raised:
        jax.eval_shape(lambda: step(make()))
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("standard_promotion")
def test_what_nobody_reported_rests_inside_parts_too():
    """Adam of a part keeps what it knows of a rank position that nobody reported."""
    parts = optax.partition({True: optax.adam(0.1), False: optax.set_to_zero()}, matrices)
    server, (_, memory) = jax.jit(lambda: step(parts))()
    mu = memory.inner_states[True].inner_state[0].mu.adapters["a"]
    assert (mu.lora_a != 0).any(axis=0).tolist() == [True, False]
    assert (mu.lora_b != 0).any(axis=1).tolist() == [True, False]
    assert (server.trainable.adapters["a"].lora_a[:, 1] == 1).all()
    assert (server.trainable.dense["bias"] == 1).all()
