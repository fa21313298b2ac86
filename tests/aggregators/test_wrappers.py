"""Server optimisers, clipping and diagnostics around rules, the tail penalty, and the words of errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autorank_jax import aggregators
from autorank_jax.adapters.lora import cut
from autorank_jax.aggregators.diagnostics import effective_rank, relative_gap
from autorank_jax.engine.simulation import init_state
from autorank_jax.types import Adapter, Base, Client, ClientUpdate, Trainable
from tests import reference
from tests.aggregators.cases import (
    PRESENT,
    RANKS,
    SHAPES,
    Union,
    client_ranks,
    compile_round,
    make_data,
    make_server,
    sub_server,
    to_jax,
    to_numpy,
    train_client,
)
from tests.reference import products, server_optimizers
from tests.reference.aggregation import clip_client

in_64_bit = pytest.mark.usefixtures("x64", "standard_promotion")
ROWS = [
    row for row in np.flatnonzero(PRESENT) if RANKS["tall"][row] < 4 and RANKS["wide"][row] < 5
]  # nobody owns the top
OPTIMIZERS = {
    "momentum": (partial(optax.sgd, 0.7, momentum=0.9), server_optimizers.fedavgm(0.7, 0.9)),
    "adam": (partial(optax.adam, 0.1, eps=1e-3), server_optimizers.fedadam(0.1, eps=1e-3)),
    "yogi": (partial(optax.yogi, 0.1), server_optimizers.fedyogi(0.1)),
}
OPTIMIZED = [*[("rbla", name) for name in OPTIMIZERS], ("flexlora", "adam"), ("flora", "momentum"), ("rolora", "adam")]


def wrapped():
    groups = {}
    for rule, optimizer in OPTIMIZED:
        made = aggregators.with_server_optimizer(aggregators.make_rule(rule), OPTIMIZERS[optimizer][0]())
        groups[f"{rule}+{optimizer}"] = {f"{rule}+{optimizer}": made}
    groups["clipped"] = {"clipped": aggregators.with_norm_clipping(aggregators.rbla(), 1.5)}
    return Union(groups)


@pytest.fixture(scope="module")
def program():
    """One union of wrapped rules, compiled in the first test that runs it."""
    return wrapped()


def values_of(name, server):
    """What a rule averages, as a flat dict."""
    flat = server_optimizers.flatten(server)
    if name == "flexlora":
        flat = {("product", p): a @ b for p, (a, b) in server["adapters"].items()} | flat
    kinds = {"rbla": ("a", "b", "dense"), "rolora": ("a", "b", "dense"), "flora": ("kernel", "dense")}
    return {key: v for key, v in flat.items() if key[0] in kinds.get(name, ("product", "dense"))}


def reported(name, clients, number, keys):
    """Where somebody reported: at owned positions, of the factor that trains."""
    masks = {}
    for kind, path in keys:
        masks[kind, path] = np.array(True)
        if kind in ("a", "b"):
            best = max(c["ranks"][path] for c in clients)
            owned = np.arange(SHAPES[path][2]) < best
            rests = name == "rolora" and kind == ("a" if number % 2 == 0 else "b")
            masks[kind, path] = (owned[None, :] if kind == "a" else owned[:, None]) & (not rests)
    return masks


def write_back(name, values, server, start):
    """The server that holds optimised values."""
    flat = server_optimizers.flatten(server) | values
    if name == "flexlora":
        for path, factors in server["adapters"].items():
            flat["a", path], flat["b", path] = products.svd_factors(values["product", path], factors)
    if name == "flora":
        for path, (a, b) in start["adapters"].items():
            flat["a", path], flat["b", path] = a, np.zeros_like(b)
    return server_optimizers.unflatten({key: v for key, v in flat.items() if key[0] != "product"})


def assert_servers(got, want, *, by_product):
    close = partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-9)
    for path in SHAPES:
        (a, b), (want_a, want_b) = got["adapters"][path], want["adapters"][path]
        close(got["kernels"][path], want["kernels"][path])
        close(a @ b, want_a @ want_b)
        if not by_product:
            close(a, want_a)
            close(b, want_b)
    jax.tree.map(close, got["dense"], want["dense"])


@pytest.mark.slow
@in_64_bit
def test_server_optimizers_equal_the_oracle(program):
    start = make_server()
    state, memory, rules = program.start(), {}, {}
    present = np.isin(np.arange(len(PRESENT)), ROWS)
    for number in range(3):
        before = state.server
        idle = number == 1  # a round without survivors freezes everything
        data = make_data(present=present & ~idle)
        servers, state, _ = program.round(state, data, lanes=3, rank_levels=1)
        for name, optimizer in OPTIMIZED:
            case = f"{name}+{optimizer}"
            server = to_numpy(sub_server(before, case))
            turn = rules.get(case, {"round": 0})["round"] if name == "rolora" else 0
            trains = (turn % 2 == 1, turn % 2 == 0) if name == "rolora" else (True, True)
            clients = [] if idle else [train_client(server, row, client_ranks(row), trains) for row in ROWS]
            keys = values_of(name, server)
            if name == "flexlora":
                mean = {("product", p): products.mean_product(server, clients, p) for p in SHAPES}
                mean |= {("dense", k): v for k, v in reference.RULES["rbla"](server, clients)[0]["dense"].items()}
            else:
                initial = rules.get(case) if name == "rolora" else None
                new, rules[case] = reference.RULES[name](server, clients, state=initial)
                mean = values_of(name, new)
            seen = {key: np.array(False) for key in keys} if idle else reported(name, clients, turn, keys)
            values, memory[case] = server_optimizers.optimize(
                OPTIMIZERS[optimizer][1], keys, mean, memory.get(case), reported=seen
            )
            want = server if idle else write_back(name, values, server, start)
            assert_servers(to_numpy(servers[case]), want, by_product=name == "flexlora")
    assert int(state.aggregator["rbla+adam"]["rbla+adam"][1][0].count) == 2


@pytest.mark.slow
@in_64_bit
def test_clipping_equals_the_oracle(program):
    state, server = program.start(), make_server()
    servers, _, _ = program.round(state, make_data(), lanes=3, rank_levels=1)
    clients = [train_client(server, row, client_ranks(row)) for row in np.flatnonzero(PRESENT)]
    clipped = [clip_client(server, client, 1.5) for client in clients]
    want = reference.RULES["rbla"](server, clipped)[0]
    assert_servers(to_numpy(servers["clipped"]), want, by_product=False)
    assert not np.allclose(want["dense"]["bias"], reference.RULES["rbla"](server, clients)[0]["dense"]["bias"])


@in_64_bit
@pytest.mark.parametrize(("max_norm", "norm"), [(1.5, 1.5), (1e3, None)])
def test_what_a_client_keeps_is_clipped_too(max_norm, norm):
    server, other = to_jax(make_server()), to_jax(make_server(1))
    masks = {path: jnp.ones(shape[2]) for path, shape in SHAPES.items()}
    client = Client(jnp.zeros((), jnp.int32), masks, jnp.ones(()), server.trainable)
    update = ClientUpdate(other.trainable, server.trainable, client)
    kept = aggregators.with_norm_clipping(aggregators.local_only(), max_norm).client_keep(update, server)
    moved, whole = (jax.tree.map(np.subtract, end, server.trainable) for end in (kept, other.trainable))
    length = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(whole)))
    share = 1 if norm is None else norm / length
    jax.tree.map(lambda m, w: np.testing.assert_allclose(m, share * w, rtol=1e-9), moved, whole)


# -------------------------------------------------------------------------------------------------------- diagnostics


@in_64_bit
def test_diagnostics_tell_what_numpy_says():
    rule = aggregators.with_diagnostics(aggregators.with_norm_clipping(aggregators.rbla(), 100.0))
    server = make_server()
    state = init_state(
        to_jax(server), rule, {p: jnp.asarray(r) for p, r in RANKS.items()}, broken=np.zeros(len(PRESENT))
    )
    after, info = compile_round(rule, lanes=3)(jax.random.key(1), state, make_data())
    clients = [train_client(server, row, client_ranks(row)) for row in np.flatnonzero(PRESENT)]
    want = reference.RULES["rbla"](server, clients)[0]
    assert_servers(to_numpy(after.server), want, by_product=False)
    assert aggregators.rbla().report((), state.server, after.server) == {}
    assert len(info.diagnostics) == 3 * len(SHAPES)
    padded = reference.RULES["zero_pad"](server, clients)[0]
    for path, (a, b) in want["adapters"].items():
        energy = np.sum(a**2, 0) * np.sum(b**2, 1)
        np.testing.assert_allclose(info.diagnostics[f"energy/{path}"], energy, rtol=1e-9)
        shares = np.linalg.svd(a @ b, compute_uv=False)
        shares = shares[shares > 1e-12] / shares.sum()
        effective = np.exp(-np.sum(shares * np.log(shares)))
        np.testing.assert_allclose(info.diagnostics[f"effective_rank/{path}"], effective, rtol=1e-9)
        product = products.mean_product(server, clients, path)
        mean_a, mean_b = padded["adapters"][path]
        gap = np.linalg.norm(product - mean_a @ mean_b) / np.linalg.norm(product)
        np.testing.assert_allclose(info.diagnostics[f"gap/{path}"], gap, rtol=1e-9)


def test_diagnostics_of_nothing_are_zero():
    assert effective_rank(jnp.zeros((3, 2))) == 0
    assert relative_gap(jnp.zeros((3, 2)), jnp.ones((3, 2))) == 0
    np.testing.assert_allclose(effective_rank(jnp.eye(5)), 5, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- tail penalty


@in_64_bit
def test_tail_penalty_is_the_product_of_norms():
    server = to_jax(make_server())
    masks = {path: (jnp.arange(shape[2]) < 4).astype(float) for path, shape in SHAPES.items()}
    start = cut(server.trainable, masks)
    loss = aggregators.with_tail_penalty(lambda *_: jnp.array([1.0, 2.0]), 0.5, 0.3)
    want = sum(np.linalg.norm(a[:, 2:4]) * np.linalg.norm(b[2:4]) for a, b in start.adapters.values())
    got = jax.jit(lambda trainable: loss(None, trainable, start, None, None))(start)
    np.testing.assert_array_equal(got.losses, [1.0, 2.0])
    np.testing.assert_allclose(got.penalty, 0.3 * want)


def test_tail_penalty_has_a_gradient_where_lora_b_is_zero():
    start = Trainable({"l": Adapter(jnp.ones((3, 4)), jnp.zeros((4, 2)))}, {})
    loss = aggregators.with_tail_penalty(lambda *_: jnp.zeros(1), 0.5, 0.3)
    grads = jax.jit(jax.grad(lambda trainable: loss(None, trainable, start, None, None).penalty))(start)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


# -------------------------------------------------------------------------------------------------------------- errors


def twice_optimised():
    once = aggregators.with_server_optimizer(aggregators.rbla(), optax.sgd(1.0))
    return aggregators.with_server_optimizer(once, optax.sgd(1.0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: aggregators.make_rule("rbal"), "aggregation rule out of .*, got 'rbal', probably 'rbla'"),
        (lambda: aggregators.make_rule("median"), "aggregation rule out of .*, got 'median'$"),
        (lambda: aggregators.raflora(levels=(2, 2, 4)), r"strictly increasing rank levels >= 1, got \(2, 2, 4\)"),
        (lambda: aggregators.raflora(levels={"wide": (4, 2)}), r"increasing .*got \(4, 2\) for wide"),
        (lambda: aggregators.owner_merge(levels=(0, 2)), r"increasing .*got \(0, 2\)"),
        (lambda: aggregators.owner_merge(levels=()), r"increasing .*got \(\)"),
        (lambda: aggregators.florist(tau=0.0), r"tau in \(0, 1\], got 0.0"),
        (lambda: aggregators.florist(tau=1.01), r"tau in \(0, 1\], got 1.01"),
        (lambda: aggregators.florist(tau=float("nan")), r"tau in \(0, 1\], got nan"),
        (lambda: aggregators.flexlora(sigma="middle"), "sigma as one of .*, got 'middle'"),
        (lambda: aggregators.raflora(exact="yes"), "exact as True or False or one of auto, got 'yes'"),
        (lambda: aggregators.flora(restart="never"), "restart as one of start, fresh, got 'never'"),
        (lambda: aggregators.lora_fair(ridge=-1.0), "ridge >= 0, got -1.0"),
        (lambda: aggregators.hetlora(per="row"), "per as one of model, layer, got 'row'"),
        (lambda: aggregators.hetlora(prune=1.0), r"pruning leaves in \(0, 1\), got 1.0"),
        (lambda: aggregators.with_tail_penalty(max, 0.5, -1.0), "tail penalty >= 0, got -1.0"),
        (lambda: aggregators.with_tail_penalty(max, 0.0, 1.0), r"in \(0, 1\), got 0.0"),
        (lambda: aggregators.with_norm_clipping(aggregators.rbla(), 0.0), "positive max_norm, got 0.0"),
        (twice_optimised, "a rule without a server optimizer, got one that has it"),
    ],
)
def test_wrong_options(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", ["flora", "owner_merge", "fedex_lora"])
def test_a_merging_rule_without_a_base(name):
    server = to_jax(make_server())
    for frozen in ({"kernels": {}}, Base({"wide": server.frozen.kernels["wide"]}, ())):
        with pytest.raises(ValueError, match=rf"{name} merges adapters into the base: .*got none for \['conv', 'tall'"):
            aggregators.make_rule(name).init(server._replace(frozen=frozen))


@pytest.mark.parametrize(
    ("levels", "words"),
    [((2, 5), "up to its 4 rank positions"), ({"wide": (2,)}, "levels for every adapter, got none for 'conv'")],
)
@pytest.mark.parametrize("name", ["raflora", "owner_merge"])
def test_levels_that_do_not_fit(name, levels, words):
    with pytest.raises(ValueError, match=words):
        aggregators.make_rule(name, levels=levels).init(to_jax(make_server()))


@pytest.mark.parametrize(("name", "options"), [("fedsa_lora", {}), ("local_only", {}), ("hetlora", {"prune": 0.5})])
def test_a_rule_without_the_client_state_it_needs(name, options):
    rule, server = aggregators.make_rule(name, **options), to_jax(make_server())
    client = Client(jnp.zeros((), jnp.int32), {p: jnp.ones(s[2]) for p, s in SHAPES.items()}, jnp.ones(()), ())
    with pytest.raises(ValueError, match=f"{name} keeps a state for every client: expected it in State.clients"):
        rule.start(server, rule.init(server), client)
