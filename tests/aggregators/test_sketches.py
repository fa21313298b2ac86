"""Product rules on sketches: what is exact, how far the rest is from the best, and what the compiled program holds."""

import inspect
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autorank_jax import aggregators
from autorank_jax.adapters.lora import cut, per_layer
from autorank_jax.aggregators import sketches
from autorank_jax.aggregators.base import ClientSums
from autorank_jax.aggregators.products import split_product
from autorank_jax.engine.round import make_round
from autorank_jax.engine.sharding import client_mesh, replicate
from autorank_jax.engine.simulation import init_state
from autorank_jax.types import Adapter, Server, Trainable
from tests import reference
from tests.aggregators.cases import FAST, Cohorts, aggregate, fake_training, make_data
from tests.reference import products
from tests.reference.sketches import approximate

in_64_bit = pytest.mark.usefixtures("x64", "standard_promotion")
slow = partial(pytest.param, marks=pytest.mark.slow)
SKETCHED = {name for name, make in aggregators.RULES.items() if "exact" in inspect.signature(make).parameters}
SOME = ("raflora", *(slow(name) for name in sorted(SKETCHED - {"raflora"})))
LAYERS = {"tall": (96, 72, 4), "like": (96, 72, 4), "head": (96, 6, 4)}  # d_in, d_out, max_rank
SPLIT = jax.jit(
    lambda sketch, maps, old: split_product(sketches.reconstruct(sketch, maps, old), old, sigma="both"),
    compiler_options=FAST,
)
CLIENTS, RANKS = 12, np.array([1, 3, 2, 4, 4, 2, 4, 3, 4, 2, 4, 3])  # 36 positions: more than a sketch has columns


def make_server(*, first=False, dtype=float, layers=LAYERS):
    """A server before the first round, or one whose factors an SVD has split."""
    rng, adapters = np.random.default_rng(0), {}
    for path, (d_in, d_out, rank) in layers.items():
        size = 1.0 if first else 0.5 ** np.arange(rank)
        a = np.linalg.qr(rng.normal(size=(d_in, rank)))[0] * np.sqrt(size)
        b = np.linalg.qr(rng.normal(size=(d_out, rank)))[0].T * np.sqrt(np.ones(rank) * size)[:, None]
        adapters[path] = Adapter(jnp.asarray(a, dtype), jnp.asarray(b * (not first), dtype))
    return Server(Trainable(adapters, {"bias": jnp.zeros(3, dtype)}), ())


def make_cohort(server, drift=0.02, *, factors=("lora_a", "lora_b"), seed=1):
    """Clients who moved from the server, each by directions of its own and by shared ones."""
    rng = np.random.default_rng(seed)
    masks = {
        path: jnp.asarray(np.arange(a.lora_a.shape[1])[None, :] < RANKS[:, None], float)
        for path, a in server.trainable.adapters.items()
    }

    def moved(value, name):
        size = drift * (name in factors)
        shared, own = rng.normal(size=(1, *value.shape)), rng.normal(size=(CLIENTS, *value.shape))
        return value[None] + jnp.asarray(size * (4 * shared + own) / max(value.shape) ** 0.5, value.dtype)

    trained = {
        path: Adapter(*(moved(v, name) for name, v in adapter._asdict().items()))
        for path, adapter in server.trainable.adapters.items()
    }
    dense = {"bias": jnp.asarray(rng.normal(size=(CLIENTS, 3)), server.trainable.dense["bias"].dtype)}
    start = jax.tree.map(lambda leaf: jnp.stack([leaf] * CLIENTS), server.trainable)
    trained, start = (jax.vmap(cut)(tree, masks) for tree in (Trainable(trained, dense), start))
    return Cohorts(trained, start, masks, jnp.arange(1.0, CLIENTS + 1))


def by_oracle(name, server, cohort, **options):
    """The dense rule in NumPy, and the product that it averages."""
    own = {"adapters": to_numpy(server), "dense": {}, "kernels": {}}
    clients = []
    for k in np.flatnonzero(cohort.weight):
        rank = dict.fromkeys(server.trainable.adapters, int(RANKS[k]))
        adapters = {p: (a[k][:, : RANKS[k]], b[k][: RANKS[k]]) for p, (a, b) in cohort.trained.adapters.items()}
        clients.append({"adapters": adapters, "dense": {}, "weight": float(cohort.weight[k]), "ranks": rank})
    average = products.owner_product if name == "raflora" else products.mean_product
    new = reference.RULES[name](own, clients, **options)[0]["adapters"]
    return new, {path: average(own, clients, path) for path in LAYERS}


def to_numpy(server):
    return {path: tuple(np.asarray(f, float) for f in adapter) for path, adapter in server.trainable.adapters.items()}


@cache
def compiled(name, options, dtype=float):
    """The program of one server step on made-up clients, for the shapes of `make_server`."""
    rule, server = aggregators.make_rule(name, **dict(options)), make_server(dtype=dtype)
    run = jax.jit(lambda server, cohort, key: aggregate(rule, server, cohort, key=key)[0], compiler_options=FAST)
    return run.lower(server, make_cohort(server), jax.random.key(0)).compile()


def step(name, server, cohort, *, key=3, **options):
    return compiled(name, tuple(options.items()))(server, cohort, jax.random.key(key))


# ------------------------------------------------------------------------------------------------------- one product


@in_64_bit
@pytest.mark.parametrize("first", [True, False])
def test_a_reconstruction_equals_the_oracle(first):
    rng, old = np.random.default_rng(2), make_server(first=first).trainable.adapters["tall"]
    product = rng.normal(size=(96, 72))
    maps = sketches.draw_maps(jax.random.key(0), old)
    sketch = sketches.sketch_product(jnp.asarray(product), jnp.eye(72), maps, old)
    left, core, right, energy = jax.jit(sketches.reconstruct)(sketch, maps, old)
    want, norm = approximate(product, *map(np.asarray, maps), 4, sketches.sketch_columns(old))
    np.testing.assert_allclose(left @ core @ right, want, atol=1e-10 * np.linalg.norm(product))
    np.testing.assert_allclose(energy, norm, rtol=1e-10)
    np.testing.assert_allclose(norm, np.sum(product**2), rtol=0.1)
    own = [np.linalg.qr(np.asarray(own))[0] for own in (maps.left[:4].T, maps.right[:, :4])]
    np.testing.assert_allclose(own[0].T @ want, own[0].T @ product, atol=1e-10)
    np.testing.assert_allclose(want @ own[1], product @ own[1], atol=1e-10)
    if not first:
        np.testing.assert_allclose(
            np.abs(own[0].T @ old.lora_a), np.diag(np.linalg.norm(old.lora_a, axis=0)), atol=1e-10
        )


@in_64_bit
@pytest.mark.parametrize("case", ["axes", "zero", "repeated", "small", "nothing"])
def test_servers_of_lower_rank(case):
    """A product of rank 3 comes back whole, whatever the server's factors are; and nothing comes back as nothing."""
    rng, (a, b) = np.random.default_rng(3), make_server().trainable.adapters["tall"]
    if case == "zero":
        a, b = a.at[:, 1].set(0), b.at[2:].set(0)
    if case == "repeated":
        a, b = a.at[:, 1:].set(a[:, :1] * 3), b.at[3].set(b[0] + b[1])
    if case == "small":
        a, b = a.at[:, 2].set(1e-12), b * 1e-30
    product = rng.normal(size=(96, 3)) @ rng.normal(size=(3, 72)) * (case != "nothing")
    if (
        case == "axes"
    ):  # the clients moved `lora_b` alone: QR of what is beside `lora_a`, nothing, gives these very axes
        a, b = jnp.eye(96, a.shape[1]), jnp.zeros_like(b)
        product = np.asarray(a)[:, :3] @ rng.normal(size=(3, 72))
    old = Adapter(a, b)
    maps = sketches.draw_maps(jax.random.key(1), old)
    sketch = sketches.sketch_product(jnp.asarray(product), jnp.eye(72), maps, old)
    new = SPLIT(sketch, maps, old)
    np.testing.assert_allclose(new.lora_a @ new.lora_b, product, atol=1e-9 * np.linalg.norm(product))
    live = 0 if case == "nothing" else 3
    assert np.all(new.lora_b[live:] == 0)
    np.testing.assert_array_equal(new.lora_a[:, live:], old.lora_a[:, live:])


@pytest.mark.slow
@in_64_bit
def test_stacked_layers_are_sketched_each_by_maps_of_its_own():
    rng, old = np.random.default_rng(4), make_server().trainable.adapters["tall"]
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1], leaf]), old)
    d_in, d_out, _ = LAYERS["tall"]
    a, b = jnp.asarray(rng.normal(size=(3, d_in, 3))), jnp.asarray(rng.normal(size=(3, 3, d_out)))
    maps = sketches.draw_maps(jax.random.key(1), stack)
    assert not np.array_equal(maps.left[0, 4:], maps.left[2, 4:])
    sketch = sketches.sketch_product(a, b, maps, stack)
    left, core, right, _ = per_layer(sketches.reconstruct, sketch, maps, stack)
    np.testing.assert_allclose(left @ core @ right, a @ b, atol=1e-9 * np.linalg.norm(a @ b))


def test_which_layers_are_sketched():
    def layer(d_in, d_out, rank):
        return Adapter(
            jax.ShapeDtypeStruct((d_in, rank), jnp.float32), jax.ShapeDtypeStruct((rank, d_out), jnp.float32)
        )

    auto = partial(sketches.is_sketched, exact="auto")
    assert auto(layer(4096, 4096, 64))
    assert auto(layer(2048, 512, 32))
    assert not any(map(auto, [layer(784, 200, 160), layer(784, 100, 16), layer(200, 200, 160), layer(200, 10, 10)]))
    for exact, sides in ((False, (8, 9)), (True, ())):
        for side in (7, 8, 9):
            assert sketches.is_sketched(layer(side, 4096, 4), exact=exact) == (side in sides)


# ------------------------------------------------------------------------------------------------------------- rules


@in_64_bit
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(("first", "drift", "bound"), [(True, 0.3, 1.1), (False, 0.02, 1.005)])
def test_rules_on_sketches_come_close_to_the_best(name, first, drift, bound):
    server = make_server(first=first)
    cohort = make_cohort(server, drift)
    got, (want, whole) = to_numpy(step(name, server, cohort, exact=False)), by_oracle(name, server, cohort)
    for path, (a, b) in got.items():
        least, error = (np.linalg.norm(whole[path] - left @ right) for left, right in (want[path], (a, b)))
        assert least * (1 - 1e-9) <= error <= least * (bound if path != "head" else 1 + 1e-9)
        np.testing.assert_array_equal(np.all(b == 0, axis=1), np.all(want[path][1] == 0, axis=1))
        if name == "lora_fair":
            np.testing.assert_allclose(a, want[path][0], atol=1e-12)
        else:
            live = ~np.all(b == 0, axis=1)
            np.testing.assert_allclose(np.linalg.norm(a, axis=0)[live], np.linalg.norm(b, axis=1)[live], rtol=1e-9)


@in_64_bit
@pytest.mark.parametrize("name", SOME)
def test_what_is_of_first_order_in_the_clients_moves_is_exact(name):
    for moved in ("lora_a", "lora_b"):
        server = make_server()
        cohort = make_cohort(server, 0.5, factors=(moved,))
        cohort = cohort._replace(weight=cohort.weight * (RANKS < 4))  # nobody owns the last position
        got, (want, _) = to_numpy(step(name, server, cohort, exact=False)), by_oracle(name, server, cohort)
        for path in LAYERS:
            np.testing.assert_allclose(np.matmul(*got[path]), np.matmul(*want[path]), atol=1e-11)


@pytest.mark.slow
@in_64_bit
@pytest.mark.parametrize(("ridge", "owners"), [(0.0, True), (0.3, False), (0.3, True)])
def test_the_correction_of_a_product_that_is_known_whole(ridge, owners):
    server, options = make_server(), {"ridge": ridge, "owners": owners}
    cohort = make_cohort(server, 0.5, factors=("lora_b",))
    got = to_numpy(step("lora_fair", server, cohort, exact=False, **options))
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-10), got, by_oracle("lora_fair", server, cohort, **options)[0]
    )


@pytest.mark.slow
@in_64_bit
@pytest.mark.parametrize(("tau", "kept"), [(0.72, 4), (0.4, 2)])
def test_energy_beside_the_sketch_counts_for_the_threshold(tau, kept):
    """Of 100, four positions hold 40, 20, 10, 5; 72 % of what the approximation alone holds is in three of them."""
    rng, rule = np.random.default_rng(5), aggregators.florist(tau=tau, exact=False)
    u, v = (np.linalg.qr(rng.normal(size=(side, 72)))[0] for side in (96, 72))
    product = jnp.asarray((u * np.sqrt([40, 20, 10, 5, *[25 / 68] * 68])) @ v.T)
    layers = {"tall": LAYERS["tall"]}
    server, key = make_server(layers=layers), jax.random.key(6)
    maps = rule.prepare(key, (), server)["tall"]
    sketch = sketches.sketch_product(product, jnp.eye(72), maps, server.trainable.adapters["tall"])
    low = sketches.reconstruct(sketch, maps, server.trainable.adapters["tall"])
    assert np.sum(low.core**2) < 0.94 * 100
    sums = ClientSums(jnp.ones(()), {"bias": jnp.zeros(3)}, {"tall": jnp.ones(4)}, {}, {"tall": sketch})
    new, _ = rule.update(key, sums, (), server)
    assert np.sum(np.any(new.trainable.adapters["tall"].lora_b != 0, axis=1)) == kept


# ---------------------------------------------------------------------------------------- the program, and the key


@in_64_bit
@pytest.mark.parametrize("name", SOME)
def test_the_program_holds_no_whole_product_and_decomposes_nothing_large(name):
    text = compiled(name, (("exact", False),)).as_text()
    assert re.search(r"f64\[[\d,]*96,6\]", text), "the head is summed whole"
    assert not re.search(r"f64\[[\d,]*(96,72|72,96)\]", text)
    decomposed = {re.search(r"f64\[[\d,]*\]", line)[0] for line in text.splitlines() if "lapack_dges" in line}
    small = {"f64[2,4,4]", "f64[2,24,24]"}  # the server's directions, and the core of two layers of one shape
    assert decomposed - {"f64[96,6]"} == (small if name != "lora_fair" else small - {"f64[2,24,24]"})


@in_64_bit
def test_random_directions_follow_the_key():
    server = make_server(first=True)
    cohort = make_cohort(server, 0.3)
    one, again, other = (
        np.matmul(*to_numpy(step("raflora", server, cohort, exact=False, key=k))["tall"]) for k in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, again)
    assert 1e-9 < np.linalg.norm(one - other) / np.linalg.norm(one) < 1e-2
    maps = sketches.make_prepare(exact=False)(jax.random.key(0), (), server)
    assert not np.any(maps["tall"].left[4:] == maps["like"].left[4:])


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_factors_in_half_precision():
    server = make_server(dtype=jnp.bfloat16)
    cohort = make_cohort(server, 0.2)
    new = compiled("raflora", (("exact", False),), jnp.bfloat16)(server, cohort, jax.random.key(3))
    want, whole = by_oracle("raflora", server, cohort)
    for path, (a, b) in new.trainable.adapters.items():
        assert (a.dtype, b.dtype) == (jnp.bfloat16, jnp.bfloat16)
        least, error = (np.linalg.norm(whole[path] - x @ y) for x, y in (want[path], to_numpy(new)[path]))
        assert error < 1.02 * least + 0.01 * np.linalg.norm(whole[path])


def test_wrappers_that_need_whole_products_prepare_nothing():
    server, key = make_server(), jax.random.key(0)

    def prepared(rule):
        maps = jax.eval_shape(lambda server: rule.prepare(key, rule.init(server), server), server)
        return set(maps)

    rule = aggregators.raflora(exact=False)
    by_hand = rule._replace(step=None)
    optimised = partial(aggregators.with_server_optimizer, optimizer=optax.sgd(1.0))
    assert prepared(rule) == prepared(optimised(by_hand)) == {"tall", "like"}
    assert prepared(aggregators.with_diagnostics(aggregators.with_norm_clipping(rule, 1.0))) == {"tall", "like"}
    assert prepared(aggregators.keep_local(rule, "like")) == {"tall"}
    assert prepared(optimised(rule)) == prepared(aggregators.raflora(exact=True)) == set()


@pytest.mark.slow
@in_64_bit
@pytest.mark.parametrize("broken", [False, True])
def test_rounds_on_two_devices_are_those_of_one(broken):
    """Test matrices are the same on every device, and of the same round everywhere."""
    rule, server = aggregators.raflora(exact=False), make_server(first=True)
    ranks = {path: jnp.asarray(RANKS[:6]) for path in LAYERS}
    state = init_state(server, rule, ranks, broken=np.array([0, 0, float(broken), 0, 0, 0]))
    ends = []
    for mesh, lanes, levels in ((None, 1, 1), (client_mesh(), 2, 2)):
        run = jax.jit(make_round(fake_training(), rule, lanes=lanes, rank_levels=levels, mesh=mesh))
        given = (jax.random.key(1), state, make_data())
        key, now, data = given if mesh is None else replicate(given, mesh)
        for _ in range(2):
            now, info = run(key, now, data)
        assert int(info.excluded) == broken
        ends.append({path: np.matmul(*factors) for path, factors in to_numpy(now.server).items()})
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-9), *ends)
