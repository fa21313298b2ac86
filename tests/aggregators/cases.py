"""A federation without a model: fake local training, and many rules side by side in one compiled round.

Clients nudge their numbers deterministically. Rules that train alike share a sub-model, so that one compiled program
checks all of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.aggregators.base import make_summand
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.federated.participation import Cohort
from autorank_jax.types import (
    Adapter,
    Aggregator,
    Base,
    Client,
    ClientUpdate,
    FederatedData,
    LocalState,
    LocalTraining,
    Plan,
    Server,
    Trainable,
)

SHAPES = {"conv": (18, 4, 4), "tall": (7, 11, 4), "wide": (5, 3, 5)}  # d_in, d_out, max_rank; conv: 3·3·2 inputs
# the top position of "tall" belongs to the absent client alone
RANKS = {"conv": [1, 2, 4, 3, 2, 4], "tall": [3, 1, 2, 4, 3, 1], "wide": [2, 5, 1, 4, 3, 5]}
SIZES = np.array([3, 1, 4, 2, 6, 5], np.int32)
WEIGHTS = np.array([3.0, 1.0, 4.5, 2.0, 6.0, 0.7])
PRESENT = np.array([1, 1, 1, 0, 1, 1])
BATCH = 2


def make_server(seed=0, *, lora_b=1.0):
    """Random weights as a dict of the oracle."""
    rng = np.random.default_rng(seed)
    adapters = {
        path: (rng.normal(size=(d_in, r)), lora_b * rng.normal(size=(r, d_out)))
        for path, (d_in, d_out, r) in SHAPES.items()
    }
    kernels = {path: rng.normal(size=shape[:2]) for path, shape in SHAPES.items()}
    return {
        "adapters": adapters,
        "dense": {"bias": rng.normal(size=3), "head": rng.normal(size=(2, 3))},
        "kernels": kernels,
    }


def to_jax(server):
    adapters = {path: Adapter(*map(jnp.asarray, factors)) for path, factors in server["adapters"].items()}
    dense, kernels = jax.tree.map(jnp.asarray, (server["dense"], server["kernels"]))
    return Server(Trainable(adapters, dense), Base(kernels, ()))


def to_numpy(server):
    host = jax.tree.map(np.asarray, server)
    adapters = {path: tuple(adapter) for path, adapter in host.trainable.adapters.items()}
    return {"adapters": adapters, "dense": dict(host.trainable.dense), "kernels": dict(host.frozen.kernels)}


def nudge(xp, value, row, leaf):
    """Move every number by something that depends on its place, the client and the number itself."""
    place = leaf + 1.1 * row
    for axis, size in enumerate(value.shape):
        shape = [1] * value.ndim
        shape[axis] = size
        place = place + (1.7 + 0.6 * axis) * np.arange(size, dtype=float).reshape(shape)
    return value + 0.3 * xp.sin(place + 3.0 * value)


def numbered(path):
    return sum(map(ord, path.split("|")[-1])) * 0.37


def fake_training():
    """Local training that nudges; `hparams["broken"]` makes a client send NaN (1) or Inf (2)."""

    def step(hparams, setting, state, *_):
        row = setting.client.row.astype(jnp.float64)
        trains = setting.trains if isinstance(setting.trains, dict) else {"": setting.trains}
        broken = hparams["broken"][setting.client.row]
        poison = jnp.where(broken == 1, jnp.nan, jnp.where(broken == 2, jnp.inf, 0.0))

        def move(value, path, flag, mask=None):
            new = jnp.where(flag, nudge(jnp, value, row, numbered(path)) + poison, value)
            return new if mask is None else jnp.where(mask > 0, new, 0)

        adapters = {}
        for path, (a, b) in state.params.adapters.items():
            flags = trains[path.split("|")[0] if "|" in path else ""]
            mask = setting.client.masks[path]
            adapters[path] = Adapter(
                move(a, path + "a", flags.lora_a, mask[None, :]), move(b, path + "b", flags.lora_b, mask[:, None])
            )
        dense = jax.tree_util.tree_map_with_path(lambda path, v: move(v, path[-1].key, True), state.params.dense)
        return LocalState(Trainable(adapters, dense), ()), jnp.zeros(BATCH)

    return LocalTraining(
        begin=lambda _, start, __: LocalState(start, ()),
        step=step,
        end=lambda state, _: state.params,
        batch_size=BATCH,
    )


def train_client(server, row, ranks, trains=(True, True)):
    """The same in NumPy, with truncated matrices: a client of the oracle."""
    adapters = {p: (a[:, : ranks[p]].copy(), b[: ranks[p]].copy()) for p, (a, b) in server["adapters"].items()}
    dense = {name: value.copy() for name, value in server["dense"].items()}
    for _ in range(-(-SIZES[row] // BATCH)):
        for path, (a, b) in adapters.items():
            new_a = nudge(np, a, row, numbered(path + "a")) if trains[0] else a
            adapters[path] = (new_a, nudge(np, b, row, numbered(path + "b")) if trains[1] else b)
        dense = {name: nudge(np, value, row, numbered(name)) for name, value in dense.items()}
    return {"adapters": adapters, "dense": dense, "weight": float(WEIGHTS[row]), "ranks": dict(ranks), "id": row}


def client_ranks(row):
    return {path: ranks[row] for path, ranks in RANKS.items()}


# ------------------------------------------------------------------------------------------------------------- engine


def make_data(weights=WEIGHTS, present=PRESENT):
    """Weights and presence are data, so that changing them compiles nothing."""
    n, start = int(SIZES.sum()), np.concatenate([[0], np.cumsum(SIZES)[:-1]]).astype(np.int32)
    owner = np.repeat(np.arange(len(SIZES)), SIZES)
    inputs = {
        "weight": jnp.asarray(np.asarray(weights, float)[owner]),
        "present": jnp.asarray(np.asarray(present)[owner]),
    }
    order, ids = jnp.arange(n, dtype=jnp.int32), jnp.arange(len(SIZES), dtype=jnp.int32)
    return FederatedData(inputs, jnp.zeros(n, jnp.int32), order, jnp.asarray(start), jnp.asarray(SIZES), ids)


def compile_round(rule, *, lanes=1, rank_levels=1):
    return jax.jit(
        make_round(
            fake_training(),
            rule,
            lanes=lanes,
            rank_levels=rank_levels,
            participation=lambda _, data: Cohort(
                jnp.arange(len(SIZES), dtype=jnp.int32), data.inputs["present"][data.start] > 0
            ),
            weigh=lambda data: data.inputs["weight"][data.start],
        ),
        compiler_options=FAST,
    )


# -------------------------------------------------------------------------------------------------------------- union
# Rules that start clients alike and let them train alike form a group, which trains one sub-model, `"group|path"`.
# Its first rule hands out the start and moves the sub-model on. Rules of one summand share its sums. Server steps are
# compiled apart, once for all lanes. All that is for the sake of compile time.

FAST = {  # compile time is what counts
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}


def join(parts):
    """One server of many."""
    adapters = {f"{group}|{p}": a for group, s in parts.items() for p, a in s.trainable.adapters.items()}
    kernels = {f"{group}|{p}": k for group, s in parts.items() for p, k in s.frozen.kernels.items()}
    dense = {group: s.trainable.dense for group, s in parts.items()}
    return Server(Trainable(adapters, dense), Base(kernels, ()))


def part(tree, group):
    """The entries of one group."""
    return {path.split("|")[1]: value for path, value in tree.items() if path.split("|")[0] == group}


def sub_trainable(trainable, group):
    return Trainable(part(trainable.adapters, group), trainable.dense[group])


def sub_server(server, group):
    return Server(sub_trainable(server.trainable, group), Base(part(server.frozen.kernels, group), ()))


def sub_update(update, group, case):
    client = update.client._replace(masks=part(update.client.masks, group), state=update.client.state[group][case])
    return ClientUpdate(sub_trainable(update.trained, group), sub_trainable(update.start, group), client)


EVERYTHING = make_summand(factors=True, products=True)
PARTIAL = {make_summand(factors=f, products=p): EVERYTHING for f in (False, True) for p in (False, True)}


def summands(rules):
    """The case whose sums serve a case: of rules that weigh clients alike, and of those that weigh owners alike."""
    first = {}
    keys = {
        case: case.replace("owner_merge", "raflora") if rule.exact_plan else PARTIAL.get(rule.summand, rule.summand)
        for case, rule in rules.items()
    }
    return {case: first.setdefault(key, case) for case, key in keys.items()}


def union(groups):
    """Sum for many rules in one round. The server stays as it is; `(states, sums)` come back as the rule's state."""
    leaders = {group: next(iter(rules.items())) for group, rules in groups.items()}

    def nested(call, only=lambda rules: rules):
        return {
            group: {case: call(group, case, rules[case]) for case in dict.fromkeys(only(rules))}
            for group, rules in groups.items()
        }

    def start(server, state, client):
        parts = {}
        for group, (case, rule) in leaders.items():
            own = client._replace(masks=part(client.masks, group), state=client.state[group][case])
            handed = rule.start(sub_server(server, group), state[group][case], own)
            parts[group] = Server(handed, Base({}, ()))
        return join(parts).trainable

    def summand(update, server, plan):
        def one(group, case, rule):
            cut = plan._replace(owners=part(plan.owners, group))
            summed = PARTIAL.get(rule.summand, rule.summand)
            return summed(sub_update(update, group, case), sub_server(server, group), cut)

        return nested(one, lambda rules: summands(rules).values())

    def keep(update, server):
        return nested(lambda g, c, rule: rule.client_keep(sub_update(update, g, c), sub_server(server, g)))

    return Aggregator(
        init=lambda server: nested(lambda g, _, rule: rule.init(sub_server(server, g))),
        start=start,
        trains=lambda state: {g: rule.trains(state[g][case]) for g, (case, rule) in leaders.items()},
        summand=summand,
        update=lambda _, sums, state, server: (server, (state, sums)),
        client_init=lambda server: nested(lambda g, _, rule: rule.client_init(sub_server(server, g))),
        client_keep=keep,
        exact_plan=any(rule.exact_plan for rules in groups.values() for rule in rules.values()),
    )


class Union:
    """Many rules side by side: sums compiled for lanes and rank levels, server steps compiled once."""

    def __init__(self, groups):
        self.groups, self.rule, self.rounds = groups, union(groups), {}
        self.step = jax.jit(self._step, compiler_options=FAST)

    def _step(self, key, sums, states, server):
        servers, after = {}, {group: {} for group in self.groups}
        for group, rules in self.groups.items():
            for case, rule in rules.items():
                own = sums[group][summands(rules)[case]]
                new, memory = rule.update(key, own, states[group][case], sub_server(server, group))
                servers[case], after[group][case] = new, memory
        leaders = {group: servers[next(iter(rules))] for group, rules in self.groups.items()}
        return servers, after, join(leaders)

    def start(self, broken=0):
        """The state before the first round, every group from the same server."""
        server = join({group: to_jax(make_server()) for group in self.groups})
        ranks = {f"{group}|{path}": jnp.asarray(ranks) for group in self.groups for path, ranks in RANKS.items()}
        return init_state(server, self.rule, ranks, broken=np.broadcast_to(np.asarray(broken, float), WEIGHTS.shape))

    def round(self, state, data, *, lanes, rank_levels):
        """One round: `(server of each case, next state, info)`."""
        if (lanes, rank_levels) not in self.rounds:
            self.rounds[lanes, rank_levels] = compile_round(self.rule, lanes=lanes, rank_levels=rank_levels)
        state, info = self.rounds[lanes, rank_levels](jax.random.key(1), state, data)
        servers, after, joined = self.step(jax.random.key(2), state.aggregator[1], state.aggregator[0], state.server)
        return servers, state._replace(server=joined, aggregator=after), info


# ----------------------------------------------------------------------------------------------------- without engine


class Cohorts(NamedTuple):
    """Stacked clients at full width, for calling a rule without the engine."""

    trained: Trainable
    start: Trainable
    masks: dict
    weight: jax.Array


def aggregate(rule, server, cohort, *, state=None, key=None):
    """One server step: sum over clients, then update."""
    clients = cohort.weight.shape[0]
    kept = jax.tree.map(lambda leaf: jnp.stack([leaf] * clients), rule.client_init(server))
    owners = {p: jnp.sum(cohort.weight[:, None] * mask, axis=0) for p, mask in cohort.masks.items()}
    state, key = rule.init(server) if state is None else state, jax.random.key(0) if key is None else key
    total = jnp.sum(cohort.weight)
    plan = Plan(owners, total, total, rule.prepare(key, state, server))

    def one(trained, start, masks, weight, own):
        client = Client(jnp.zeros((), jnp.int32), masks, weight, own)
        return rule.summand(ClientUpdate(trained, start, client), server, plan)

    sums = jax.vmap(one)(cohort.trained, cohort.start, cohort.masks, cohort.weight, kept)
    sums = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)
    return rule.update(key, sums, state, server)
