"""What must not change the result of a rule, for all rules; and what may."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autorank_jax import aggregators
from autorank_jax.adapters.lora import cut, rank_masks
from autorank_jax.types import Adapter, Trainable
from tests.aggregators.cases import FAST, SHAPES, Cohorts, aggregate, make_server, to_jax

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")

CLIENTS = 4
RANKS = {"conv": [1, 4, 2, 4], "tall": [4, 1, 3, 2], "wide": [5, 2, 5, 3]}
WEIGHTS = np.array([3.0, 1.0, 4.5, 2.0])
RULES = dict(aggregators.RULES)
SHARED = ("ffa_lora", "rolora")  # clients share the factor that rests: lora_a, in round 0
FROZEN = ("fedavg", "local_only")  # adapters do not move
EXACT = ("flexlora", "flora", "fedex_lora", "ffa_lora", "rolora")


def make_cohort(seed=1, ranks=RANKS, weight=WEIGHTS, *, shared=False):
    """Clients who start from the server and send random numbers, zero beyond their ranks."""
    rng, server = np.random.default_rng(seed), to_jax(make_server())
    masks = jax.vmap(lambda ranks: rank_masks(ranks, {path: shape[2] for path, shape in SHAPES.items()}))(
        {path: jnp.array(values, jnp.int32) for path, values in ranks.items()}
    )
    clients = len(weight)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * clients), server.trainable)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * jnp.asarray(rng.normal(size=leaf.shape)), stacked)
    if shared:
        moved = moved._replace(
            adapters={p: Adapter(stacked.adapters[p].lora_a, a.lora_b) for p, a in moved.adapters.items()}
        )
    start, trained = jax.vmap(cut)(stacked, masks), jax.vmap(cut)(moved, masks)
    return Cohorts(trained, start, masks, jnp.asarray(weight))


@cache
def step_of(name):
    """The jitted server step of a rule from the common server."""
    one = lambda cohort: aggregate(RULES[name](), to_jax(make_server()), cohort)[0]  # noqa: E731
    return jax.jit(one, compiler_options=FAST)


def merged(server):
    """What the model computes with: `W + A B`, and the dense parameters."""
    adapters = server.trainable.adapters
    weights = {p: server.frozen.kernels[p] + a.lora_a @ a.lora_b for p, a in adapters.items()}
    return jax.tree.map(np.asarray, (weights, server.trainable.dense))


def assert_close(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-9), got, want)


def cohort_for(name, **options):
    return make_cohort(shared=name in SHARED, **options)


@pytest.mark.parametrize("name", RULES)
def test_order_of_clients(name):
    cohort = cohort_for(name)
    turned = jax.tree.map(lambda leaf: leaf[jnp.array([2, 0, 3, 1])], cohort)
    assert_close(merged(step_of(name)(turned)), merged(step_of(name)(cohort)))


@pytest.mark.parametrize("name", RULES)
def test_unit_of_weights(name):
    cohort = cohort_for(name)
    scaled = cohort._replace(weight=cohort.weight * 1e-4)
    assert_close(merged(step_of(name)(scaled)), merged(step_of(name)(cohort)))


@pytest.mark.parametrize("name", RULES)
def test_a_client_without_weight_is_absent(name):
    cohort = cohort_for(name, weight=WEIGHTS * [1, 1, 0, 1])
    others = cohort_for(name, seed=9)
    other = jax.tree.map(lambda mine, theirs: mine.at[2].set(theirs[2]), cohort, others)._replace(weight=cohort.weight)
    assert_close(merged(step_of(name)(other)), merged(step_of(name)(cohort)))
    counted = other._replace(weight=jnp.asarray(WEIGHTS))
    assert name == "local_only" or not np.allclose(
        merged(step_of(name)(counted))[1]["bias"], merged(step_of(name)(cohort))[1]["bias"]
    )


@pytest.mark.parametrize("name", RULES)
def test_only_what_is_sent_matters(name):
    cohort, other, up = cohort_for(name), make_cohort(seed=9), RULES[name]().traffic.up
    want = step_of(name)(cohort)  # of round 0, in which rolora sends lora_b
    factors = {
        part: {
            p: a._replace(**{part: getattr(other.trained.adapters[p], part)})
            for p, a in cohort.trained.adapters.items()
        }
        for part in Adapter._fields
    }
    changed = {part: cohort.trained._replace(adapters=adapters) for part, adapters in factors.items()}
    changed["dense"] = cohort.trained._replace(dense=other.trained.dense)
    for part, trained in changed.items():
        got = step_of(name)(cohort._replace(trained=trained))
        moved = any(not np.allclose(g, w) for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True))
        assert moved == (getattr(up, part) > 0 and not (name == "rolora" and part == "lora_a"))


@pytest.mark.parametrize("name", [name for name in RULES if name not in FROZEN])
def test_one_client_of_full_rank_is_the_identity(name):
    full = {path: [shape[2]] * CLIENTS for path, shape in SHAPES.items()}
    cohort = cohort_for(name, ranks=full, weight=jnp.array([0.0, 5.0, 0.0, 0.0]))
    got, server = merged(step_of(name)(cohort)), to_jax(make_server())
    for path in SHAPES:
        a, b = (factor[1] for factor in cohort.trained.adapters[path])
        if name == "fedsa_lora":
            b = server.trainable.adapters[path].lora_b
        want = a @ b
        if name == "florist":  # tau < 1 leaves 1 % of the energy
            gap = np.linalg.norm(got[0][path] - server.frozen.kernels[path] - want) / np.linalg.norm(want)
            assert 0 <= gap <= 0.1
        else:
            assert_close(got[0][path] - server.frozen.kernels[path], want)
    assert_close(got[1], jax.tree.map(lambda leaf: leaf[1], cohort.trained.dense))


@pytest.mark.parametrize("name", ["rbla", "raflora", "fedex_lora", "lora_fair", "fedavg"])
def test_plain_descent_on_the_server_is_the_rule_itself(name):
    rule = aggregators.with_server_optimizer(RULES[name](), optax.sgd(1.0))
    step = jax.jit(lambda cohort: aggregate(rule, to_jax(make_server()), cohort)[0])
    assert_close(merged(step(make_cohort())), merged(step_of(name)(make_cohort())))


def test_equal_ranks_make_rbla_the_padded_mean():
    equal = {path: [shape[2] - 1] * CLIENTS for path, shape in SHAPES.items()}
    cohort = make_cohort(ranks=equal)
    rbla, padded = step_of("rbla")(cohort), step_of("zero_pad")(cohort)
    assert_close(rbla, padded)
    for path, (a, b) in to_jax(make_server()).trainable.adapters.items():
        np.testing.assert_allclose(rbla.trainable.adapters[path].lora_a[:, -1], a[:, -1], atol=0)
        np.testing.assert_allclose(rbla.trainable.adapters[path].lora_b[-1], b[-1], atol=0)
    mixed = make_cohort()
    assert not np.allclose(merged(step_of("rbla")(mixed))[0]["tall"], merged(step_of("zero_pad")(mixed))[0]["tall"])


@pytest.mark.parametrize("per", ["model", "layer"])
def test_hetlora_falls_back_on_sizes_where_no_product_has_a_norm(per):
    cohort, server = make_cohort(), to_jax(make_server())
    still = {path: Adapter(a.lora_a, jnp.zeros_like(a.lora_b)) for path, a in cohort.trained.adapters.items()}
    cohort = cohort._replace(trained=cohort.trained._replace(adapters=still))
    step = jax.jit(lambda rule_cohort: aggregate(aggregators.hetlora(per=per), server, rule_cohort)[0])
    assert_close(step(cohort), step_of("zero_pad")(cohort))


def mean_product(cohort, path):
    a, b = cohort.trained.adapters[path]
    return jnp.einsum("k,kir,kro->io", cohort.weight / jnp.sum(cohort.weight), a, b)


@pytest.mark.parametrize("name", RULES)
def test_exact_rules_move_by_the_mean_product(name):
    cohort, server = cohort_for(name), to_jax(make_server())
    got, exact = merged(step_of(name)(cohort))[0], []
    for path, (d_in, d_out, width) in SHAPES.items():
        product = mean_product(cohort, path)
        if width < min(d_in, d_out) and name == "flexlora":  # as far as max_rank positions can hold it
            u, s, vt = jnp.linalg.svd(product, full_matrices=False)
            product = (u[:, :width] * s[None, :width]) @ vt[:width]
        exact.append(np.allclose(got[path] - server.frozen.kernels[path], product, rtol=1e-9, atol=1e-9))
    # florist may keep a small layer whole
    assert all(exact) if name in EXACT else not (all(exact) if name == "florist" else any(exact))


def rotate(cohort, client, width):
    """Change the LoRA basis of one client's first positions: `A Q, Qᵀ B`."""
    adapters = {}
    for number, (path, (a, b)) in enumerate(cohort.trained.adapters.items()):
        n = width[path]
        q = np.eye(a.shape[-1])
        q[:n, :n] = np.linalg.qr(np.random.default_rng(number).normal(size=(n, n)))[0]
        adapters[path] = Adapter(a.at[client].set(a[client] @ q), b.at[client].set(q.T @ b[client]))
    return cohort._replace(trained=Trainable(adapters, cohort.trained.dense))


FULL_OF_TWO = {"conv": [1, 4, 2, 4], "tall": [4, 4, 3, 2], "wide": [5, 5, 5, 3]}


@pytest.mark.parametrize("name", ["flexlora", "flora", "fedex_lora", "florist", "hetlora", "rbla", "zero_pad"])
def test_basis_of_one_client(name):
    cohort = make_cohort(ranks=FULL_OF_TWO)
    turned = rotate(cohort, 1, {path: shape[2] for path, shape in SHAPES.items()})
    got, want = merged(step_of(name)(turned))[0], merged(step_of(name)(cohort))[0]
    if name in ("hetlora", "rbla", "zero_pad"):  # factors are averaged: the basis matters
        assert all(not np.allclose(got[path], want[path], rtol=1e-3, atol=1e-3) for path in SHAPES)
    else:
        assert_close(got, want)


@pytest.mark.parametrize("name", ["raflora", "owner_merge"])
def test_basis_among_positions_of_equal_owners(name):
    shared = {path: min(values) for path, values in FULL_OF_TWO.items()}  # everyone owns these
    assert max(shared.values()) > 1
    cohort = make_cohort(ranks=FULL_OF_TWO)
    want = merged(step_of(name)(cohort))[0]
    assert_close(merged(step_of(name)(rotate(cohort, 1, shared)))[0], want)
    across = merged(step_of(name)(rotate(cohort, 1, {path: shape[2] for path, shape in SHAPES.items()})))[0]
    assert not np.allclose(across["tall"], want["tall"], rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------ rank collapse


def energy_of_the_tail(name, *, rounds=30, width=6, shared=2, rate=0.02):
    """Share of the energy beyond the positions that everyone owns, after clients took small steps to one target.

    Clients have ranks 2, 2, 3, 4 and 6; the target has six equal singular values.
    """
    rng, rule = np.random.default_rng(2), aggregators.make_rule(name)
    target = jnp.asarray(np.linalg.qr(rng.normal(size=(9, width)))[0] @ np.linalg.qr(rng.normal(size=(8, width)))[0].T)
    u, s, vt = np.linalg.svd(np.asarray(target))
    adapter = Adapter(jnp.asarray(u[:, :width] * s[:width]), jnp.asarray(vt[:width]))
    server = to_jax({"adapters": {"l": adapter}, "dense": {}, "kernels": {"l": np.zeros((9, 8))}})
    ranks = jnp.array([2, 2, 3, 4, 6])
    masks = {"l": (jnp.arange(width)[None, :] < ranks[:, None]).astype(float)}

    def local(start):
        a, b = start.adapters["l"]
        gap = a @ b - target
        return Trainable({"l": Adapter(a - rate * gap @ b.T, b - rate * a.T @ gap)}, start.dense)

    @jax.jit
    def one(server):
        start = jax.vmap(cut, (None, 0))(server.trainable, masks)
        trained = jax.vmap(cut)(jax.vmap(local)(start), masks)
        return aggregate(rule, server, Cohorts(trained, start, masks, jnp.ones(5)))[0]

    for _ in range(rounds):
        server = one(server)
    a, b = server.trainable.adapters["l"]
    energy = np.sum(np.square(a), 0) * np.sum(np.square(b), 1)
    return np.sum(energy[shared:]) / np.sum(energy)


def test_flexlora_collapses_to_the_shared_positions_and_raflora_does_not():
    assert energy_of_the_tail("flexlora", rounds=0) == pytest.approx(4 / 6)
    early, late = (energy_of_the_tail("flexlora", rounds=rounds) for rounds in (3, 30))
    assert late < 0.02 < early < 0.5
    assert energy_of_the_tail("raflora") > 0.6
