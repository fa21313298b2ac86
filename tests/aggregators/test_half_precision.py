"""Models in bfloat16: weights and sums keep the digits of float32, and what comes back has the model's types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax import aggregators
from autorank_jax.types import Adapter, Base, Client, ClientUpdate, Plan, Server, Trainable

WEIGHT, MANY = 257.0, 600  # neither is a number of bfloat16, nor are running totals
EIGHTH = 1 / 8  # what every client moves by, which is one


def model(move):
    adapter = Adapter(jnp.full((4, 1), 1 + move, jnp.bfloat16), jnp.full((1, 4), 1 + move, jnp.bfloat16))
    return Trainable({"a": adapter}, {"bias": jnp.full(3, move, jnp.bfloat16)})


@pytest.mark.parametrize(
    "rule",
    [
        aggregators.rbla(),
        aggregators.zero_pad(),
        aggregators.hetlora(),
        aggregators.flexlora(exact=True),
        aggregators.raflora(exact=True),
        aggregators.lora_fair(exact=True),
        aggregators.fedex_lora(),
        aggregators.with_norm_clipping(aggregators.rbla(), 1e3),
    ],
    ids=["rbla", "zero_pad", "hetlora", "flexlora", "raflora", "lora_fair", "fedex_lora", "clipped rbla"],
)
def test_many_equal_clients_of_any_weight_average_to_themselves(rule):
    server = Server(model(0.0), Base({"a": jnp.zeros((4, 4), jnp.bfloat16)}, ()))
    client = Client(jnp.zeros((), jnp.int32), {"a": jnp.ones(1)}, jnp.asarray(WEIGHT), ())
    total = jnp.asarray(WEIGHT * MANY)
    update = ClientUpdate(model(EIGHTH), server.trainable, client)
    summand = rule.summand(update, server, Plan({"a": total[None]}, total, total))
    sums = jax.tree.map(jnp.zeros_like, summand)
    for _ in range(MANY):
        sums = jax.tree.map(np.add, sums, summand)  # in the summands' own type, one after the other
    new, _ = rule.update(jax.random.key(0), jax.tree.map(jnp.asarray, sums), rule.init(server), server)
    assert jax.tree.map(lambda leaf: leaf.dtype, new) == jax.tree.map(lambda leaf: leaf.dtype, server)
    a, b = (np.asarray(factor, np.float64) for factor in new.trainable.adapters["a"])
    whole = a @ b + np.asarray(new.frozen.kernels["a"], np.float64)
    np.testing.assert_allclose(whole, (1 + EIGHTH) ** 2, rtol=3e-3)  # a factor is rounded to 2⁻⁹
    np.testing.assert_allclose(np.asarray(new.trainable.dense["bias"], np.float64), EIGHTH, rtol=1e-6)
