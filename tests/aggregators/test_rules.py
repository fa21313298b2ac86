"""Every aggregation rule, in the engine, against NumPy loops over clients with truncated matrices."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax import aggregators
from autorank_jax.experiment import names
from autorank_jax.types import Client, ClientUpdate, Plan, Trains
from tests import reference
from tests.aggregators.cases import (
    PRESENT,
    RANKS,
    SHAPES,
    WEIGHTS,
    Union,
    client_ranks,
    make_data,
    make_server,
    sub_server,
    to_jax,
    to_numpy,
    train_client,
)
from tests.reference import aggregation
from tests.reference.pruning import self_prune

LEVELS = {"conv": (2,), "tall": (1, 3, 4), "wide": (2, 5)}
GAMMA = 0.7
OPTIONS = {
    "hetlora/layer": {"per": "layer"},
    "flexlora/left": {"sigma": "left"},
    "flexlora/right": {"sigma": "right"},
    "hetlora/pruned": {"prune": GAMMA},
    "raflora/levels": {"levels": LEVELS, "sigma": "right"},
    "owner_merge/levels": {"levels": LEVELS},
    "ffa_lora/owners": {"owners": True},
    "rolora/owners": {"owners": True},
    "fedsa_lora/padded": {"owners": False},
    "fedex_lora/owners": {"owners": True},
    "florist/tau": {"tau": 0.8, "sigma": "right"},
    "lora_fair/owners": {"ridge": 0.3, "owners": True},
    "lora_fair/exact": {"ridge": 0.0},
}
PLAIN = {name: {} for name in aggregators.RULES}
CASES = PLAIN | OPTIONS
SPLIT_BY_SVD = ("flexlora", "raflora", "florist")
slow = partial(pytest.param, marks=pytest.mark.slow)
ROUNDS, ABSENT = 3, int(np.flatnonzero(PRESENT == 0)[0])
in_64_bit = pytest.mark.usefixtures("x64", "standard_promotion")  # integers of the engine are 32-bit


def build(case):
    return aggregators.make_rule(case.split("/")[0], **CASES[case])


def trains(case, number):
    name = case.split("/")[0]
    return {"ffa_lora": (False, True), "rolora": (number % 2 == 1, number % 2 == 0)}.get(name, (True, True))


class Oracle:
    """One rule over rounds, with what its clients keep."""

    def __init__(self, case, server):
        self.case, self.name, self.state, self.kept = case, case.split("/")[0], None, {}
        if self.name in ("flora", "owner_merge"):
            self.state = {"lora_a": {path: a for path, (a, _) in server["adapters"].items()}}
        options = CASES[case]
        if self.case == "fedsa_lora/padded" or self.name != "hetlora":
            self.rule = partial(reference.RULES[self.name], **options) if self.name != "local_only" else None
        else:
            self.rule = partial(aggregation.hetlora, per=options.get("per", "model"))

    def train(self, server, row, number):
        ranks = client_ranks(row)
        if self.name == "fedsa_lora":
            server = aggregation.fedsa_start(server, self.state, row)
        if self.name == "local_only":
            server = self.kept.get(row, server)
        if self.case == "hetlora/pruned":
            ranks = {path: min(rank, self.kept.get((row, path), rank)) for path, rank in ranks.items()}
        client = train_client(server, row, ranks, trains(self.case, number))
        if self.name == "local_only":
            self.kept[row] = over(server, client)
        if self.case == "hetlora/pruned":
            client = self_prune(server, client, GAMMA)
            self.kept.update({(row, path): rank for path, rank in client["ranks"].items() if rank < ranks[path]})
        return client

    def round(self, server, rows, number):
        clients = [self.train(server, row, number) for row in rows]
        if self.rule is None:
            return server
        new, self.state = self.rule(server, clients, state=self.state)
        return new


def over(server, client):
    """Write a client's truncated matrices over whole ones."""
    whole = aggregation.copy_server(server)
    for path, (a, b) in client["adapters"].items():
        whole["adapters"][path][0][:, : a.shape[1]] = a
        whole["adapters"][path][1][: b.shape[0]] = b
    return whole | {"dense": client["dense"]}


def assert_same(got, want, case, *, by_product):
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    for path in SHAPES:
        close(got["kernels"][path], want["kernels"][path], err_msg=f"{case} {path} kernel")
        (a, b), (want_a, want_b) = got["adapters"][path], want["adapters"][path]
        if by_product:
            close(a @ b, want_a @ want_b, err_msg=f"{case} {path} product")
            np.testing.assert_array_equal(np.all(b == 0, axis=1), np.all(want_b == 0, axis=1))
            close(a[:, np.all(b == 0, axis=1)], want_a[:, np.all(b == 0, axis=1)], err_msg=f"{case} {path} rest")
            close(np.linalg.norm(a, axis=0), np.linalg.norm(want_a, axis=0), err_msg=f"{case} {path} sigma")
        else:
            close(a, want_a, err_msg=f"{case} {path} lora_a")
            close(b, want_b, err_msg=f"{case} {path} lora_b")
    for name, value in want["dense"].items():
        close(got["dense"][name], value, err_msg=f"{case} {name}")


@cache
def make_union(which):
    """Rules side by side: without options (`inexact`: those that need no exact plan), or with options."""
    groups = {}
    for case in OPTIONS if which == "options" else PLAIN:
        rule, name = build(case), case.split("/")[0]
        own = name in ("ffa_lora", "rolora", "local_only")  # fedavg looks at dense parameters alone
        group = name if own else case if name == "fedsa_lora" or case == "hetlora/pruned" else "shared"
        if which != "inexact" or not rule.exact_plan:
            groups.setdefault(group.replace("/", "_"), {})[case] = rule
    return Union(groups)


def follow(rules, lanes, rank_levels):
    """Run rounds, each checked against the oracle from where the library stood; return what clients keep in both."""
    oracles = {case: Oracle(case, make_server()) for cases in rules.groups.values() for case in cases}
    state, rows = rules.start(), np.flatnonzero(PRESENT)
    for number in range(ROUNDS):
        before = state.server
        servers, state, info = rules.round(state, make_data(), lanes=lanes, rank_levels=rank_levels)
        for group, cases in rules.groups.items():
            server = to_numpy(sub_server(before, group))
            for case in cases:
                want = oracles[case].round(server, rows, number)
                by_product = oracles[case].name in SPLIT_BY_SVD
                assert_same(to_numpy(servers[case]), want, case, by_product=by_product)
        assert (int(info.participants), int(info.excluded)) == (len(rows), 0)
    return {case: kept for cases in state.clients.values() for case, kept in cases.items()}, oracles


@in_64_bit
@pytest.mark.parametrize(
    ("which", "lanes", "rank_levels"),
    [slow("inexact", 1, 1), ("plain", 3, 1), slow("plain", 3, 2), slow("plain", 1, 2), slow("plain", 6, 1)],
)
def test_rounds_equal_the_oracle(which, lanes, rank_levels):
    clients, oracles = follow(make_union(which), lanes, rank_levels)
    assert_fedsa(clients["fedsa_lora"], oracles["fedsa_lora"])
    assert_local(clients["local_only"], oracles["local_only"])


@pytest.mark.slow
@in_64_bit
def test_options_equal_the_oracle():
    clients, oracles = follow(make_union("options"), 3, 2)
    assert_fedsa(clients["fedsa_lora/padded"], oracles["fedsa_lora/padded"])
    assert_pruned(clients["hetlora/pruned"], oracles["hetlora/pruned"])


def test_fedavg_trains_dense_parameters_alone():
    assert aggregators.fedavg().trains(()) == Trains(lora_a=False, lora_b=False, dense=True)


def assert_fedsa(kept, oracle):
    for path, (_, b) in make_server()["adapters"].items():
        for row in np.flatnonzero(PRESENT):
            np.testing.assert_allclose(kept[path][row], oracle.state[row][path], atol=1e-9)
        np.testing.assert_array_equal(kept[path][ABSENT], b)


def assert_local(kept, oracle):
    server = make_server()
    for path, factors in server["adapters"].items():
        for index, factor in enumerate(kept.adapters[path]):
            for row in np.flatnonzero(PRESENT):
                np.testing.assert_allclose(factor[row], oracle.kept[row]["adapters"][path][index], atol=1e-9)
            np.testing.assert_array_equal(factor[ABSENT], factors[index])
    for name, value in kept.dense.items():
        np.testing.assert_allclose(value[0], oracle.kept[0]["dense"][name], atol=1e-9)


def assert_pruned(kept, oracle):
    assert len(oracle.kept) >= 3, "some clients prune"
    for path, (_, _, widest) in SHAPES.items():
        want = [oracle.kept.get((row, path), widest) for row in range(len(WEIGHTS))]
        assert kept[path].tolist() == want


@in_64_bit
@pytest.mark.parametrize(
    ("which", "lanes", "rank_levels"),
    [slow("inexact", 1, 1), ("plain", 3, 1), slow("plain", 3, 2), slow("plain", 1, 2)],
)
def test_non_finite_clients_are_absent(which, lanes, rank_levels):
    rules, broken = make_union(which), np.array([0, 2, 0, 0, 1, 0])
    got, state, info = rules.round(rules.start(broken), make_data(), lanes=lanes, rank_levels=rank_levels)
    masked = make_data(present=PRESENT * (broken == 0))
    want, masked_state, masked_info = rules.round(rules.start(), masked, lanes=lanes, rank_levels=rank_levels)
    assert (int(info.excluded), int(masked_info.excluded)) == (2, 0)
    assert int(info.participants) == int(masked_info.participants) + 2
    # rounding alone may differ: the zeros of absent clients pass through compensated sums
    check = partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-13)
    for case in got:
        if case.startswith(SPLIT_BY_SVD):
            assert_same(to_numpy(got[case]), to_numpy(want[case]), case, by_product=True)
        else:
            jax.tree.map(check, to_numpy(got[case]), to_numpy(want[case]))
    jax.tree.map(check, state.clients, masked_state.clients)


@in_64_bit
@pytest.mark.parametrize("everyone", ["absent", "broken"])
def test_a_round_without_survivors_changes_nothing(everyone):
    rules = make_union("plain")
    before = rules.start(int(everyone == "broken"))
    data = make_data(present=PRESENT * 0) if everyone == "absent" else make_data()
    servers, after, info = rules.round(before, data, lanes=3, rank_levels=1)
    for server in servers.values():
        jax.tree.map(np.testing.assert_array_equal, server, to_jax(make_server()))
    jax.tree.map(np.testing.assert_array_equal, after.clients, before.clients)
    assert int(info.excluded) == (5 if everyone == "broken" else 0)


@pytest.mark.parametrize("name", ["flora", "owner_merge"])
def test_fresh_restarts_draw_a_new_lora_a_of_the_starts_distribution_each_round(name):
    rule, server = aggregators.make_rule(name, restart="fresh"), to_jax(make_server())  # normal numbers, not uniform
    memory, seen = rule.init(server), {a.lora_a.tobytes() for a in server.trainable.adapters.values()}
    step = jax.jit(lambda key: rule.update(key, rule.summand(*one_client(server)), memory, server))
    for number in range(2):
        new, memory = step(jax.random.key(number))
        for path, (a, b) in new.trainable.adapters.items():
            assert np.all(b == 0)
            start = server.trainable.adapters[path].lora_a
            np.testing.assert_array_equal(np.sort(a, axis=None), np.sort(start, axis=None))
            assert np.mean(np.asarray(a) == start) < 0.5
            seen.add(a.tobytes())
    assert len(seen) == 9


def one_client(server):
    masks = {path: jnp.ones(shape[2]) for path, shape in SHAPES.items()}
    client = Client(jnp.zeros((), jnp.int32), masks, jnp.ones(()), ())
    return ClientUpdate(server.trainable, server.trainable, client), server, Plan(masks, jnp.ones(()), jnp.ones(()))


@pytest.mark.parametrize("name", aggregators.RULES)
def test_a_rule_is_known_wherever_rules_are_told_apart(name):
    """What trains, what stays with clients: the experiment and the oracle say the same of a rule as the rule itself."""
    rule, server = aggregators.make_rule(name), to_jax(make_server())
    kept = {leaf.shape for leaf in jax.tree.leaves(rule.client_init(server)) if leaf.ndim == 2}
    assert (name in names.PERSONAL_RULES) == bool(kept)
    state = rule.init(server)
    for number in range(2):
        flags = rule.trains(state)
        assert (name in names.WHOLE_RULES) == (not flags.lora_a and not flags.lora_b)
        if name not in names.WHOLE_RULES:
            assert trains(name, number) == (flags.lora_a, flags.lora_b)
        state = rule.step.advance(state) if name == "rolora" else state
    assert f"| `{name}` |" in aggregators.__doc__


def test_every_rank_from_one_to_the_maximum_occurs():
    for path, (_, _, widest) in SHAPES.items():
        assert set(RANKS[path]) == set(range(1, widest + 1)), path
