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


def tasks():
    """Return a model with its layers in a stack, the same with its layers apart, and three clients."""
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
    parts = [range(4), range(4, 18), range(18, 30)]
    return together, separate, ar.from_parts(rng.normal(size=(30, WIDTH)), rng.integers(0, 3, 30), parts)


def private_rbla():
    rule = ar.aggregators.rbla()
    return ar.aggregators.with_differential_privacy(rule, clip=0.1, noise_multiplier=0.0, denominator=3)


RULES = {name: ar.aggregators.make_rule(name) for name in ("rbla", "raflora", "florist", "fedex_lora", "hetlora")} | {
    "hetlora, pruned": ar.aggregators.hetlora(prune=0.5),
    "private": private_rbla(),
}
RANKS = {"one for the stack": np.array([1, 4, 2]), "by layer": np.array([[1, 1, 2], [1, 4, 3], [2, 2, 1]])}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_rounds_with_a_stack_are_those_with_its_layers(rule, ranks):
    together, separate, data = tasks()
    merged, costs = [], []
    for task, lanes, levels in ((together, 2, 2), (separate, 1, 1)):
        apart = dict(zip(sorted(ar.max_ranks(task)), np.broadcast_to(ranks.T, (DEPTH, 3)), strict=False))
        state = ar.init_state(task.server, rule, {"layers": ranks} if task is together else apart)
        state = ar.aggregators.set_expected_owners(state, 0.5) if rule is RULES["private"] else state
        local = ar.make_local_training(task, optax.sgd(0.1), batch_size=4, scale=ar.engine.local.alpha_over_rank(2.0))
        one = jax.jit(ar.make_round(local, rule, lanes=lanes, rank_levels=levels))
        for _ in range(2):
            state, _ = one(jax.random.key(1), state, data)
        model = ar.merge(task, state.server)
        merged.append(model["layers"] if task is together else jnp.stack([model[f"layer{n}"] for n in range(DEPTH)]))
        flops = ar.engine.flops.FlopModel(1.0, {path: 6.0 * DEPTH / len(apart) for path in apart})
        at = rule.client_ranks(state.ranks, state.clients)
        costs.append(
            ar.evaluation.client_costs(state.server, at, data.size, flops, local_epochs=1, traffic=rule.traffic)
        )
    assert jnp.max(jnp.abs(merged[0] - together.server.frozen.kernels["layers"])) > 0.01
    np.testing.assert_allclose(*merged, atol=1e-9)
    for ours, theirs in zip(*costs, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
