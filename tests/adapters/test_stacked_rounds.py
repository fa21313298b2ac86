"""A round with stacked layers is the round with the same layers one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import autorank_jax as ar
from autorank_jax.types import Adapter

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64", "standard_promotion")]
DEPTH, WIDTH = 3, 4


def scanned(params, x):
    x = lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["layers"])[0]
    return x @ params["head"]


def unrolled(params, x):
    for number in range(DEPTH):
        x = x + jnp.tanh(x @ params[f"layer{number}"])
    return x @ params["head"]


@pytest.mark.parametrize("rule", ["rbla", "raflora", "florist", "fedex_lora", "hetlora"])
def test_a_round_with_a_stack_is_the_round_with_its_layers(rule):
    rng = np.random.default_rng(0)
    weights, head = jnp.asarray(rng.normal(size=(DEPTH, WIDTH, WIDTH))), jnp.asarray(rng.normal(size=(WIDTH, 3)))
    options = {"max_rank": 4, "where": "layer*", "materialize": False, "preprocess": lambda x: x}
    together = ar.task_from_function(scanned, {"layers": weights, "head": head}, stacked="layers", **options)
    separate = ar.task_from_function(
        unrolled, {f"layer{n}": w for n, w in enumerate(weights)} | {"head": head}, **options
    )
    a, b = jnp.asarray(rng.normal(size=(DEPTH, WIDTH, 4))), jnp.asarray(0.1 * rng.normal(size=(DEPTH, 4, WIDTH)))
    together.server.trainable.adapters["layers"] = Adapter(a, b)
    for number in range(DEPTH):
        separate.server.trainable.adapters[f"layer{number}"] = Adapter(a[number], b[number])
    data = ar.from_parts(rng.normal(size=(30, WIDTH)), rng.integers(0, 3, 30), [range(4), range(4, 18), range(18, 30)])
    made, products = ar.aggregators.make_rule(rule), []
    for task, lanes, levels in ((together, 2, 2), (separate, 1, 1)):
        state = ar.init_state(task.server, made, {path: jnp.asarray([1, 4, 2]) for path in ar.max_ranks(task)})
        local = ar.make_local_training(task, optax.sgd(0.1), batch_size=4, scale=ar.engine.local.alpha_over_rank(2.0))
        server = jax.jit(ar.make_round(local, made, lanes=lanes, rank_levels=levels))(jax.random.key(1), state, data)[
            0
        ].server
        merged = ar.merge(task, server)
        products.append(
            merged["layers"] if task is together else jnp.stack([merged[f"layer{n}"] for n in range(DEPTH)])
        )
    assert jnp.max(jnp.abs(products[0] - weights)) > 0.01
    np.testing.assert_allclose(*products, atol=1e-9)
