"""What a round costs: FLOPs against products counted by hand, bytes against the arrays that travel."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from autorank_jax import aggregators
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.engine.flops import FlopModel, training_flops
from autorank_jax.evaluation.costs import client_costs
from autorank_jax.federated.data import from_parts
from autorank_jax.models.vision import MLP
from autorank_jax.types import Adapter, Aggregator, Base, Server, Traffic, Trainable, Travels

SIZES = (5, 9, 3, 7)
RANKS = {"layers/0": np.array([1, 2, 4, 3]), "layers/1": np.array([1, 1, 2, 2])}
SHAPES = {"layers/0": (6, 8, 4), "layers/1": (8, 3, 2)}
FREE = FlopModel(0.0, dict.fromkeys(RANKS, 0.0))


@pytest.fixture(scope="module")
def task():
    return task_from_nnx(MLP((6, 8, 3), rngs=nnx.Rngs(0)), max_rank={p: shape[2] for p, shape in SHAPES.items()})


def make_data():
    parts = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
    return from_parts(np.zeros((sum(SIZES), 6), np.float32), np.zeros(sum(SIZES), np.int32), parts)


def trained(server, lived=()):
    """The server after some rounds: `lora_b` is not zero, but for positions that have died."""
    adapters = {p: Adapter(a.lora_a, jnp.ones_like(a.lora_b)) for p, a in server.trainable.adapters.items()}
    for path, count in dict(lived).items():
        adapters[path] = Adapter(adapters[path].lora_a, adapters[path].lora_b.at[count:].set(0))
    return server._replace(trainable=server.trainable._replace(adapters=adapters))


# --------------------------------------------------------------------------------------------------------------- FLOPs


def test_flops_are_those_of_the_products(task):
    flops = training_flops(task, make_data())
    # per rank: forward d_in + d_out, gradients of A (d_in), of B and of x A (d_out each); the second layer also of x
    assert flops.per_rank["layers/0"] == 2 * (2 * 6 + 3 * 8)
    assert flops.per_rank["layers/1"] == 2 * (3 * 8 + 3 * 3)
    products = 2 * (6 * 8 + 8 * 3) + 2 * 8 * 3  # forward through both kernels, gradient through the second
    assert products < flops.base < products + 200  # and the activations and the loss


@pytest.mark.parametrize("answer", [None, {}, {"bytes accessed": 1.0}])
def test_a_device_that_does_not_count_is_no_free_device(task, monkeypatch, answer):
    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", lambda _: answer)
    with pytest.raises(RuntimeError, match="expected XLA to count the FLOPs of a gradient, got no count on"):
        training_flops(task, make_data())


def test_costs_follow_ranks_and_sizes(task):
    flops = FlopModel(100.0, {"layers/0": 10.0, "layers/1": 1.0})
    each = client_costs(task.server, RANKS, np.array(SIZES), flops, local_epochs=3)
    parameters = [r0 * (6 + 8) + r1 * (8 + 3) + 8 + 3 for r0, r1 in zip(*RANKS.values(), strict=True)]
    np.testing.assert_array_equal(each.parameters, parameters)
    np.testing.assert_array_equal(each.flops, 3 * np.array(SIZES) * (100 + 10 * RANKS["layers/0"] + RANKS["layers/1"]))


def test_huge_models_do_not_overflow():
    wide = jax.ShapeDtypeStruct((2**20, 4096), np.float32), jax.ShapeDtypeStruct((4096, 2**20), np.float32)
    server = Server(Trainable({"a": Adapter(*wide)}, {}), ())
    each = client_costs(server, {"a": np.full(2, 4096)}, np.ones(2), FlopModel(0, {"a": 0}), local_epochs=1)
    assert math.isclose(each.parameters[0], 4096 * 2.0**21)
    assert each.bytes_up[0] == 4 * each.parameters[0]


# --------------------------------------------------------------------------------------------------------------- bytes

LIVED = {"layers/0": 3, "layers/1": 1}  # positions that FLoRIST's threshold left


def arrays(server, client, *, a=True, b=True, dense=True, most=None):
    """The arrays of a client of truncated matrices, by kind."""
    sent = list(jax.tree.leaves(server.trainable.dense)) if dense else []
    for path, adapter in server.trainable.adapters.items():
        rank = min(RANKS[path][client], (most or {}).get(path, 99))
        sent += [adapter.lora_a[:, :rank]] * a + [adapter.lora_b[:rank]] * b
    return sent


def merged(server):
    """Of each layer the smaller: the matrix, or the factors of all clients side by side."""
    sent = []
    for path, (a, b) in server.trainable.adapters.items():
        stack = [array for r in RANKS[path] for array in (a[:, :r], b[:r])]
        sent.append(min([server.frozen.kernels[path]], stack, key=lambda arrays: sum(map(np.size, arrays))))
    return [array for layer in sent for array in layer]


FACTORS = ("zero_pad", "rbla", "hetlora", "flexlora", "raflora", "lora_fair")
WAYS = dict.fromkeys(FACTORS, (arrays, arrays)) | {
    "florist": (arrays, lambda s, k: arrays(s, k, most=LIVED)),
    "flora": (arrays, lambda s, k: merged(s) + arrays(s, k, a=False, b=False)),
    "owner_merge": (arrays, lambda s, k: merged(s) + arrays(s, k, a=False, b=False)),
    "fedex_lora": (arrays, lambda s, k: merged(s) + arrays(s, k)),
    "ffa_lora": (lambda s, k: arrays(s, k, a=False),) * 2,
    "fedsa_lora": (lambda s, k: arrays(s, k, b=False),) * 2,
    "fedavg": (lambda s, k: arrays(s, k, a=False, b=False),) * 2,
    "local_only": (lambda s, k: [],) * 2,  # noqa: ARG005
}


def bytes_of(sent):
    return sum(np.asarray(array).nbytes for array in sent)


@pytest.mark.parametrize("name", aggregators.RULES)
def test_bytes_are_those_of_the_arrays_that_travel(task, name):
    server, rule = trained(task.server, LIVED), aggregators.make_rule(name)
    each = client_costs(server, RANKS, np.array(SIZES), FREE, local_epochs=1, traffic=rule.traffic)
    for client in range(len(SIZES)):
        if name == "rolora":
            rounds = [arrays(server, client, a=False), arrays(server, client, b=False)]
            want = [np.mean([bytes_of(sent) for sent in rounds])] * 2
        else:
            want = [bytes_of(way(server, client)) for way in WAYS[name]]
        assert [each.bytes_up[client], each.bytes_down[client]] == want


def test_a_stack_is_sent_where_it_is_smaller_than_the_matrices():
    a, b = jnp.ones((100, 4)), jnp.ones((4, 100))
    server = Server(Trainable({"l": Adapter(a, b)}, {}), Base({"l": jnp.ones((100, 100))}, ()))
    flops, ranks, traffic = FlopModel(0, {"l": 0}), {"l": np.array([1, 2, 4])}, aggregators.flora().traffic
    for attendance, columns in ((1.0, 7), (np.array([1, 0, 0.5]), 3)):
        each = client_costs(server, ranks, np.ones(3), flops, local_epochs=1, traffic=traffic, attendance=attendance)
        np.testing.assert_array_equal(each.bytes_down, 4 * columns * 200)
    many = {"l": np.full(30, 4)}
    each = client_costs(server, many, np.ones(30), flops, local_epochs=1, traffic=traffic)
    np.testing.assert_array_equal(each.bytes_down, 4 * 100 * 100)
    optimised = aggregators.with_server_optimizer(aggregators.flora(), optax.sgd(1.0, momentum=0.9)).traffic
    each = client_costs(server, ranks, np.ones(3), flops, local_epochs=1, traffic=optimised)
    np.testing.assert_array_equal(each.bytes_down, 4 * 100 * 100)  # factors do not tell an optimiser's step


def test_the_start_counts_all_positions_as_live(task):
    options = {"local_epochs": 1, "traffic": aggregators.florist().traffic}
    each = client_costs(task.server, RANKS, np.array(SIZES), FREE, **options)
    np.testing.assert_array_equal(each.bytes_down, each.bytes_up)


def test_numbers_have_the_size_of_their_type(task):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), task.server)
    options = {"local_epochs": 1, "traffic": aggregators.fedex_lora().traffic}
    whole, short = (client_costs(s, RANKS, np.array(SIZES), FREE, **options) for s in (task.server, half))
    np.testing.assert_array_equal(whole.bytes_up, 2 * short.bytes_up)
    np.testing.assert_array_equal(whole.bytes_down, 2 * short.bytes_down)


def test_rules_of_ones_own_send_everything_that_is_trained_both_ways():
    assert Aggregator(*[None] * 5).traffic == Traffic(Travels(1, 1, 1), Travels(1, 1, 1))


def test_pruned_clients_cost_their_pruned_ranks(task):
    rule = aggregators.hetlora(prune=0.5)
    clients = {"layers/0": np.array([4, 1, 4, 2]), "layers/1": np.array([2, 2, 1, 2])}
    ranks = rule.client_ranks({p: jnp.asarray(r) for p, r in RANKS.items()}, clients)
    np.testing.assert_array_equal(ranks["layers/0"], [1, 1, 4, 2])
    np.testing.assert_array_equal(ranks["layers/1"], [1, 1, 1, 2])
    each = client_costs(task.server, ranks, np.array(SIZES), FREE, local_epochs=1, traffic=rule.traffic)
    np.testing.assert_array_equal(each.parameters, [14 + 11 + 11, 14 + 11 + 11, 56 + 11 + 11, 28 + 22 + 11])
    assert aggregators.rbla().client_ranks(RANKS, ()) is RANKS
