"""The public check of rules passes every rule that there is and catches wrong ones, each by the line that names it."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

from autorank_jax import aggregators
from autorank_jax.aggregators.testing import check_aggregator
from autorank_jax.types import Client

slow = partial(pytest.param, marks=pytest.mark.slow)
WRAPPED = {
    "optimised": lambda: aggregators.with_server_optimizer(aggregators.rbla(), optax.sgd(0.5, momentum=0.9)),
    "clipped": lambda: aggregators.with_norm_clipping(aggregators.raflora(), 0.3),
    "diagnosed": lambda: aggregators.with_diagnostics(aggregators.flexlora()),
    "kept": lambda: aggregators.keep_local(aggregators.raflora(), ("deep", "bias")),
    "optimised, by hand": lambda: aggregators.with_server_optimizer(
        aggregators.rbla()._replace(step=None), optax.sgd(0.5, momentum=0.9)
    ),
    "kept of a rule that keeps": lambda: aggregators.keep_local(aggregators.fedsa_lora(), "wide/*"),
    "kept, merging": lambda: aggregators.keep_local(aggregators.fedex_lora(), "deep"),
    "sketched": lambda: aggregators.raflora(exact=False),
    "sketched, kept": lambda: aggregators.keep_local(aggregators.raflora(exact=False), ("deep", "bias")),
    "sketched, diagnosed": lambda: aggregators.with_diagnostics(aggregators.flexlora(exact=False)),
    "sketched, clipped": lambda: aggregators.with_norm_clipping(aggregators.florist(exact=False), 0.3),
    "sketched, optimised": lambda: aggregators.with_server_optimizer(
        aggregators.lora_fair(exact=False), optax.sgd(0.5, momentum=0.9)
    ),
    "pruning": lambda: aggregators.hetlora(prune=0.5),
}
RULES = dict(aggregators.RULES) | WRAPPED


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", RULES)
def test_rules_keep_the_invariances(name):
    check_aggregator(RULES[name]())


def wrong(**parts):
    return aggregators.rbla()._replace(step=None, **parts)


def undivided():
    """Sums in place of means."""

    def update(key, sums, state, server):  # noqa: ARG001
        moved = {p: jax.tree.map(jnp.add, server.trainable.adapters[p], a) for p, a in sums.adapters.items()}
        return server._replace(trainable=server.trainable._replace(adapters=moved)), state

    return wrong(update=update)


def by_place():
    """Clients weigh by the place they have in the data."""
    plain = aggregators.rbla()

    def summand(update, server, plan):
        client: Client = update.client
        heavier = client.weight * (1 + client.row.astype(client.weight.dtype))
        return plain.summand(update._replace(client=client._replace(weight=heavier)), server, plan)

    return wrong(summand=summand)


def unguarded():
    """A division by zero where nobody reports, and a mean over clients of full width only."""

    def summand(update, server, plan):  # noqa: ARG001
        own = server.trainable.adapters
        moved = {p: jax.tree.map(jnp.subtract, a, own[p]) for p, a in update.trained.adapters.items()}
        return jax.tree.map(lambda leaf: update.client.weight * leaf, moved), update.client.weight

    def update(key, sums, state, server):  # noqa: ARG001
        moved = jax.tree.map(lambda old, total: old + total / sums[1], server.trainable.adapters, sums[0])
        return server._replace(trainable=server.trainable._replace(adapters=moved)), state

    return wrong(summand=summand, update=update)


@pytest.mark.parametrize(
    ("make", "lines"),
    [
        slow(undivided, ["weights in another unit"]),
        slow(lambda: aggregators.raflora()._replace(exact_plan=False), ["a client that sends NaN"]),
        (unguarded, ["nobody reports", "rank levels"]),
        slow(by_place, ["order of clients"]),
    ],
)
def test_wrong_rules_are_caught(make, lines):
    with pytest.raises(AssertionError) as caught:
        check_aggregator(make(), rounds=1)
    said = str(caught.value)
    assert [line for line in lines if f"- {line}" not in said] == [], said
    assert said.count("\n- ") == len(lines), said


@pytest.mark.parametrize(
    ("summand", "message"),
    [
        (lambda update, *_: update.trained.adapters["none"], "that runs, got KeyError: 'none'"),
        (lambda update, *_: update.none, "that runs, got AttributeError: "),
        (lambda *_: 1 / 0, "that runs, got ZeroDivisionError: division by zero"),
    ],
)
def test_rules_that_fail_are_told_in_a_line(summand, message):
    with pytest.raises(AssertionError, match=message) as caught:
        check_aggregator(wrong(summand=summand))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_rules_that_always_give_nan_are_told_in_a_line():
    update = lambda key, sums, state, server: (jax.tree.map(lambda x: x * jnp.nan, server), state)  # noqa: ARG005, E731
    with pytest.raises(AssertionError, match="got NaN or infinity in a plain round"):
        check_aggregator(wrong(update=update), rounds=1)


def test_what_is_no_rule_is_refused():
    with pytest.raises(TypeError, match=r"got the function 'rbla', probably not called: rbla\(\)"):
        check_aggregator(aggregators.rbla)
