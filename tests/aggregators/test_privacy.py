"""Differential privacy: what one client can change in the sums, the noise, and the rule that is left without them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autorank_jax import aggregators
from autorank_jax.aggregators.privacy import (
    AdaptiveClip,
    expected_owners,
    set_expected_owners,
    with_differential_privacy,
)
from autorank_jax.engine.round import make_round
from autorank_jax.engine.sharding import client_mesh, replicate
from autorank_jax.engine.simulation import init_state
from autorank_jax.experiment.names import DIFFERENTIALLY_PRIVATE as PRIVATE
from autorank_jax.types import Adapter, Client, ClientUpdate, Plan, Server, Trainable
from tests.aggregators.cases import (
    FAST,
    PRESENT,
    RANKS,
    SHAPES,
    compile_round,
    fake_training,
    make_data,
    make_server,
    to_jax,
)

MAX_RANKS = {path: widest for path, (_, _, widest) in SHAPES.items()}
EQUAL = np.ones(len(PRESENT))
in_64_bit = pytest.mark.usefixtures("x64", "standard_promotion")


def private(name, *, clip=1.0, noise_multiplier=0.0, denominator=5.0, **more):
    rule = aggregators.make_rule(name)
    return with_differential_privacy(
        rule, clip=clip, noise_multiplier=noise_multiplier, denominator=denominator, **more
    )


def start(rule, broken=None):
    broken = np.zeros(len(PRESENT)) if broken is None else np.asarray(broken, float)
    ranks = {path: jnp.asarray(ranks) for path, ranks in RANKS.items()}
    return init_state(to_jax(make_server()), rule, ranks, broken=broken)


def adder(rule, server, prepared=()):
    """Compile what one client of a row adds, who moves all it owns by `move` times the numbers of a seed."""
    state, kept = rule.init(server), rule.client_init(server)
    plan = Plan({path: jnp.ones(widest) for path, widest in MAX_RANKS.items()}, jnp.ones(()), jnp.ones(()), prepared)
    ranks = {path: jnp.asarray(rows) for path, rows in RANKS.items()}

    def cut(trainable, masks):
        adapters = trainable.adapters.items()
        return Trainable(
            {p: Adapter(a * masks[p][None, :], b * masks[p][:, None]) for p, (a, b) in adapters}, trainable.dense
        )

    @jax.jit
    def add(row, seed, move, weight):
        masks = {path: (jnp.arange(widest) < ranks[path][row]).astype(float) for path, widest in MAX_RANKS.items()}
        client = Client(row, masks, weight, kept)
        begun = cut(rule.start(server, state, client), masks)
        noise = jax.random.normal(jax.random.key(seed), (200,))
        moved = cut(jax.tree.map(lambda leaf: leaf + move * noise[: leaf.size].reshape(leaf.shape), begun), masks)
        return rule.summand(ClientUpdate(moved, begun, client), server, plan)

    return add


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf))) for leaf in jax.tree.leaves(tree))))


@pytest.mark.parametrize("name", aggregators.RULES)
def test_rules_without_a_bound_are_refused(name):
    if name in PRIVATE:
        private(name)
        return
    with pytest.raises(ValueError, match=r"such as rbla.* are not done"):
        private(name)


def test_what_is_clipped_already_is_refused():
    with pytest.raises(ValueError, match="it is private already"):
        with_differential_privacy(private("rbla"), clip=1.0, noise_multiplier=1.0, denominator=5.0)


@in_64_bit
@pytest.mark.parametrize("name", PRIVATE)
def test_one_client_more_or_less_moves_the_sums_by_the_clip_at_most(name):
    """Sums are sums of what each client adds, so that is what has to be bounded."""
    clip, add = 0.5, adder(private(name, clip=0.5), to_jax(make_server()))
    for number, move in enumerate((0.0, 1e-3, 1.0, 1e6, 1e30, 1e200)):
        for weight in (0.5, 1.0, 1000.0):
            sums = add(number, number, move, weight)
            size = norm((sums.dense, sums.adapters))
            assert size <= clip
            assert (sums.weight, np.max(jax.tree.leaves(sums.owners)[0], initial=1)) == (1, 1)
            if 1 <= move < 1e100:
                assert size == pytest.approx(clip, rel=1e-6)  # not less than need be
    assert norm(add(0, 0, 1.0, 0.0)) == 0


def test_the_norm_of_numbers_in_32_bits_is_no_larger_either():
    server = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), to_jax(make_server()))
    add = adder(private("rbla", clip=0.1), server)
    sizes = [norm(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), add(row, seed, 3.0, 1.0)[1:4:2]))
             for row in range(3) for seed in range(20)]  # fmt: skip
    assert max(sizes) <= 0.1
    assert min(sizes) > 0.0999


@pytest.mark.slow
@in_64_bit
@pytest.mark.parametrize("name", ["rbla", "fedsa_lora"])
def test_without_noise_and_bound_the_rule_is_itself_bit_for_bit(name):
    owners = {path: np.sum(np.arange(w)[None, :] < np.array(RANKS[path])[PRESENT > 0][:, None], axis=0)
              for path, w in MAX_RANKS.items()}  # fmt: skip
    rule = aggregators.make_rule(name)
    same = private(name, clip=np.inf, owners=owners)
    data, key = make_data(weights=EQUAL), jax.random.key(3)
    plain, _ = compile_round(rule, lanes=2, rank_levels=2)(key, start(rule), data)
    ours, info = compile_round(same, lanes=2, rank_levels=2)(key, start(same), data)
    jax.tree.map(np.testing.assert_array_equal, ours.server, plain.server)
    assert info.participants == 5


@pytest.mark.slow
@in_64_bit
def test_what_is_not_finite_is_left_out_and_the_denominator_stays():
    rule, broken = private("rbla", clip=1e6), np.array([0, 2, 0, 0, 1, 0])
    run = compile_round(rule, lanes=2, rank_levels=2)
    found, info = run(jax.random.key(0), start(rule, broken), make_data(weights=EQUAL))
    masked = make_data(weights=EQUAL, present=PRESENT * (broken == 0))
    want, _ = run(jax.random.key(0), start(rule), masked)
    assert int(info.excluded) == 2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found.server, want.server)


def test_noise_has_its_deviation_and_is_drawn_anew_for_every_leaf_and_round():
    rule = private("rbla", clip=0.5, noise_multiplier=2.0, denominator=4.0)
    server, path = to_jax(make_server()), "tall"
    server = server._replace(
        trainable=server.trainable._replace(
            dense={"bias": jnp.zeros(20_000)}, adapters={path: Adapter(jnp.zeros((5000, 4)), jnp.zeros((4, 5000)))}
        )
    )
    nobody = rule.init(server), Plan({path: jnp.ones(4)}, jnp.ones(()), jnp.ones(()))
    client = Client(jnp.zeros((), jnp.int32), {path: jnp.ones(4)}, jnp.zeros(()), ())
    sums = rule.summand(ClientUpdate(server.trainable, server.trainable, client), server, nobody[1])
    drawn = []
    for seed in (0, 1):
        moved, _ = rule.update(jax.random.key(seed), sums, nobody[0], server)
        drawn += [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(moved.trainable)]
    for noise in drawn:
        assert np.std(noise) == pytest.approx(2.0 * 0.5 / 4.0, rel=0.03)
        assert abs(np.mean(noise)) < 0.01
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.03


def test_a_model_in_half_precision_is_summed_clipped_and_blurred_in_float32():
    """In bfloat16 no draw is beyond 2.9, and a rounded summand may be longer than the clip."""
    rule = private("fedavg", clip=0.1, noise_multiplier=10.0, denominator=1.0)
    server = Server(Trainable({}, {"bias": jnp.zeros(20_000, jnp.bfloat16)}), ())
    trained = Trainable({}, {"bias": jnp.full(20_000, 0.7, jnp.bfloat16)})
    client, nobody = Client(jnp.zeros((), jnp.int32), {}, jnp.ones(()), ()), Plan({}, jnp.ones(()), jnp.ones(()))
    sums = rule.summand(ClientUpdate(trained, server.trainable, client), server, nobody)
    assert sums.dense["bias"].dtype == jnp.float32
    assert 0.0999 < norm(np.asarray(sums.dense["bias"], np.float64)) <= 0.1
    moved = rule.update(jax.random.key(0), sums, rule.init(server), server)[0].trainable.dense["bias"]
    assert moved.dtype == jnp.bfloat16
    assert jnp.max(jnp.abs(moved)) > 3.2


@pytest.mark.slow
@in_64_bit
@pytest.mark.parametrize("broken", [False, True])
def test_private_rounds_on_two_devices_are_those_of_one(broken):
    """Every client is clipped and noise is drawn once, however many devices there are."""
    rule, flags = private("rbla", clip=0.5, noise_multiplier=0.7), np.zeros(len(PRESENT))
    flags[2] = broken
    begun, ends = start(rule, flags), []
    for mesh in (None, client_mesh()):
        run = jax.jit(make_round(fake_training(), rule, lanes=1, mesh=mesh), compiler_options=FAST)
        given = (jax.random.key(3), begun, make_data())
        key, now, data = given if mesh is None else replicate(given, mesh)
        for _ in range(2):
            now, info = run(key, now, data)
        assert int(info.excluded) == broken
        ends.append(jax.device_get(now.server.trainable))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-12), *ends)
    moved = ends[0].adapters["tall"].lora_a - np.asarray(begun.server.trainable.adapters["tall"].lora_a)
    assert np.abs(moved).max() > 0.01


@pytest.mark.parametrize("name", ["zero_pad", "rbla"])
def test_positions_that_nobody_can_own_get_no_noise(name):
    owners = {path: np.where(np.arange(widest) < 2, 3.0, 0.0) for path, widest in MAX_RANKS.items()}
    rule, server = private(name, noise_multiplier=1.0, owners=owners), to_jax(make_server())
    sums = jax.tree.map(jnp.zeros_like, adder(rule, server)(0, 0, 0.0, 1.0))
    moved = rule.update(jax.random.key(0), sums, rule.init(server), server)[0].trainable.adapters
    for path, (lora_a, lora_b) in moved.items():
        old = server.trainable.adapters[path]
        np.testing.assert_array_equal(lora_a[:, 2:], old.lora_a[:, 2:])
        np.testing.assert_array_equal(lora_b[2:], old.lora_b[2:])
        assert np.all(np.asarray(lora_a[:, :2]) != np.asarray(old.lora_a[:, :2]))


def test_positions_are_divided_by_their_expected_owners():
    counted = expected_owners({"a": np.array([1, 3, 2])}, {"a": 4}, rate=0.5)
    np.testing.assert_allclose(counted["a"], [1.5, 1.0, 0.5, 0.0])
    rule = private("rbla", clip=1.0, noise_multiplier=1.0, owners={p: np.full(w, 2.0) for p, w in MAX_RANKS.items()} |
                   {"tall": np.array([4.0, 2.0, 1.0, 0.0])})  # fmt: skip
    server = to_jax(make_server())
    sums = adder(rule, server)(0, 0, 0.0, 0.0)
    moved, _ = rule.update(jax.random.key(0), sums, rule.init(server), server)
    gap = np.abs(np.asarray(moved.trainable.adapters["tall"].lora_a - server.trainable.adapters["tall"].lora_a))
    assert np.all(gap[:, 3] == 0), "nobody can own it"
    assert np.all(gap[:, :3] > 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "clip: expected a number above 0"),
        ({"noise_multiplier": -1.0}, "noise_multiplier: expected a number of at least 0 and finite"),
        ({"noise_multiplier": np.inf}, "noise_multiplier: expected a number of at least 0 and finite"),
        ({"adaptive": AdaptiveClip(quantile=5.0)}, "adaptive: expected a quantile in"),
        ({"adaptive": AdaptiveClip(rate=-1.0)}, "adaptive: expected .* a rate above 0"),
        ({"denominator": 0.0}, "denominator: expected the number of clients"),
        ({"clip": np.inf, "noise_multiplier": 1.0}, "clip: expected a finite norm"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        private("rbla", **options)
    with pytest.raises(ValueError, match=r"expected rate in .* probably a percentage"):
        expected_owners({}, {}, rate=10.0)


def test_owners_of_another_model_are_refused():
    server = to_jax(make_server())
    rule = private("rbla", owners={"other": np.ones(3)})
    with pytest.raises(ValueError, match=r"owners: expected .* numbers for"):
        rule.init(server)
    with pytest.raises(TypeError, match="the state of a rule made by with_differential_privacy"):
        set_expected_owners(start(aggregators.rbla()), 0.5)


@pytest.mark.parametrize("around", [False, True], ids=["alone", "in a server optimizer"])
def test_expected_owners_are_data_of_the_state(around):
    rule = private("rbla", denominator=5.0)
    rule = aggregators.with_server_optimizer(rule, optax.sgd(1.0)) if around else rule
    state = set_expected_owners(start(rule), 0.5)
    want = expected_owners(RANKS, MAX_RANKS, 0.5)
    for path, owners in (state.aggregator[0] if around else state.aggregator).owners.items():
        np.testing.assert_allclose(owners, want[path])
    assert jax.tree.structure(state) == jax.tree.structure(start(rule))


@pytest.mark.slow
def test_an_adaptive_norm_moves_towards_its_quantile_and_shares_the_noise():
    adaptive = AdaptiveClip(quantile=0.5, rate=0.2, count_noise=1.0)
    quiet = private("rbla", clip=2.0, denominator=4.0, adaptive=adaptive)
    server = to_jax(make_server())
    state = quiet.init(server)
    add = adder(quiet, server, prepared=state.clip)
    sums = [add(row, row, move, 1.0) for row, move in enumerate((0.01, 0.01, 0.01))]  # three keep the norm
    sums += [add(0, 7, 50.0, 1.0), jax.tree.map(jnp.zeros_like, sums[0])]  # one does not, one is not there
    assert [float(one.below) for one in sums] == [0.5, 0.5, 0.5, -0.5, 0.0]
    assert norm((sums[3].moves.dense, sums[3].moves.adapters)) == pytest.approx(2.0, rel=1e-4)
    total = jax.tree.map(lambda *leaves: sum(leaves), *sums)
    _, after = quiet.update(jax.random.key(0), total, state, server)
    assert float(after.clip) == pytest.approx(2.0 * np.exp(-0.2 * (0.75 - 0.5)), rel=1e-5)

    noisy = private("rbla", clip=1.0, noise_multiplier=1.2, denominator=4.0, adaptive=adaptive)
    zeros, moved = jax.tree.map(jnp.zeros_like, total), []
    for seed in range(300):
        moved.append(float(jnp.log(noisy.update(jax.random.key(seed), zeros, noisy.init(server), server)[1].clip)))
    assert np.std(moved) == pytest.approx(0.2 * 1.0 / 4.0, rel=0.15)
    tall, _ = noisy.update(jax.random.key(1), zeros, noisy.init(server), server)
    draws = np.asarray(tall.trainable.adapters["tall"].lora_a - server.trainable.adapters["tall"].lora_a) * 4.0
    own = (1.2**-2 - 2.0**-2) ** -0.5
    assert np.std(draws) == pytest.approx(own, rel=0.25)
    assert own > 1.2
    with pytest.raises(ValueError, match="count_noise above noise_multiplier / 2 = 2, got"):
        private("rbla", noise_multiplier=4.0, adaptive=adaptive)
