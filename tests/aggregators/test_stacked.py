"""Adapters of stacked layers: every rule treats them as the same layers one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax import aggregators
from autorank_jax.adapters.lora import cut, pad_like, rank_masks
from autorank_jax.types import Adapter, Base, Client, ClientUpdate, Plan, Server, Trainable

D_IN, D_OUT, R, LAYERS = 6, 5, 4, 2
WEIGHTS = (1.0, 2.5, 4.0)
RANKS = {"one for the stack": (1, 3, 2), "by layer": ((1, 2), (3, 1), (2, 3))}  # nobody owns the last position
NAMES = [f"layer{n}" for n in range(LAYERS)]
pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")


def apart(tree):
    """Take what is known by path of the stack apart into its layers."""
    return {name: jax.tree.map(lambda leaf, n=n: leaf[n], tree["stack"]) for n, name in enumerate(NAMES)}


def make_servers():
    rng = np.random.default_rng(0)
    adapter = Adapter(jnp.asarray(rng.normal(size=(LAYERS, D_IN, R))), jnp.asarray(rng.normal(size=(LAYERS, R, D_OUT))))
    kernels = {"stack": jnp.asarray(rng.normal(size=(LAYERS, D_IN, D_OUT)))}
    stacked = Server(Trainable({"stack": adapter}, {}), Base(kernels, ()))
    return stacked, Server(Trainable(apart({"stack": adapter}), {}), Base(apart(kernels), ()))


def ranks_of(paths, rank):
    """Return a client's ranks by path: those of its layers, together or apart."""
    if paths == ["stack"]:
        return {"stack": jnp.asarray(rank)}
    return dict(zip(paths, np.broadcast_to(rank, LAYERS), strict=True))


def one_round(rule, server, moves, ranks):
    """Return the server after a round of three clients, and what each client keeps."""
    paths, state = list(server.trainable.adapters), rule.init(server)
    own = [rank_masks(ranks_of(paths, rank), dict.fromkeys(paths, R)) for rank in ranks]
    owners = {path: sum(w * masks[path] for masks, w in zip(own, WEIGHTS, strict=True)) for path in paths}
    plan, sums, kept = Plan(owners, jnp.asarray(sum(WEIGHTS)), jnp.asarray(sum(WEIGHTS))), None, []
    for row, (masks, weight) in enumerate(zip(own, WEIGHTS, strict=True)):
        client = Client(jnp.asarray(row, jnp.int32), masks, jnp.asarray(weight), rule.client_init(server))
        start = cut(rule.start(server, state, client), masks)
        trained = cut(jax.tree.map(jnp.add, start, moves[row]), masks)
        update = ClientUpdate(trained, start, client)
        summand = rule.summand(update, server, plan)
        sums = summand if sums is None else jax.tree.map(jnp.add, sums, pad_like(summand, sums))
        kept.append(rule.client_keep(update, server))
    after, _ = rule.update(jax.random.key(0), sums, state, server)
    return after, kept, rule.report(sums, server, after)


def products(server):
    return {path: a.lora_a @ a.lora_b for path, a in server.trainable.adapters.items()}


RULES = {name: aggregators.make_rule(name) for name in aggregators.RULES} | {
    "lora_fair/exact": aggregators.lora_fair(ridge=0.0, owners=True),
    "florist/tau": aggregators.florist(tau=0.5),
    "clipped": aggregators.with_norm_clipping(aggregators.rbla(), 0.5),
    "keep_local": aggregators.keep_local(aggregators.rbla(), "*"),
    "hetlora/pruned": aggregators.hetlora(prune=0.5),
}


USUAL = ("rbla", "raflora", "flora", "lora_fair", "hetlora", "hetlora/pruned", "local_only")


def with_more(rule):
    return aggregators.with_diagnostics(rule)


@pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in RULES]
)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_a_stack_is_its_layers(name, ranks):
    rng = np.random.default_rng(6)  # of which one client prunes one layer
    rule = RULES[name] if name in ("keep_local", "local_only") else with_more(RULES[name])
    together, separate = make_servers()
    moves = [jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), together.trainable) for _ in WEIGHTS]
    both = jax.jit(
        lambda: (
            one_round(rule, together, moves, ranks),
            one_round(rule, separate, [Trainable(apart(move.adapters), {}) for move in moves], ranks),
        )
    )
    (ours, our_kept, our_report), (theirs, their_kept, their_report) = both()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), apart(products(ours)), products(theirs))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), apart(ours.frozen.kernels), theirs.frozen.kernels
    )
    if name == "local_only":
        our_kept = [Trainable(apart(kept.adapters), {}) for kept in our_kept]
    elif name == "hetlora/pruned":
        our_kept = [apart(kept) for kept in our_kept]
        assert {rank for kept in our_kept for rank in map(int, kept.values())} == {1, R}
    elif name == "fedsa_lora":
        our_kept = [apart(kept) for kept in our_kept]
    if name != "keep_local":
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), our_kept, their_kept)
    for what in {key.partition("/")[0] for key in our_report}:
        expected = np.stack([their_report[f"{what}/{layer}"] for layer in NAMES])
        np.testing.assert_allclose(our_report[f"{what}/stack"], expected, atol=1e-9)
