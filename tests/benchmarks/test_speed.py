"""The benchmarks of speed run at tiny settings, and their competitors train the very same round."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from autorank_jax.types import Batch
from benchmarks.speed import competitors, regression, rounds, rounds_report, startup, workloads
from benchmarks.speed.peers import common, jax_network

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny():
    return workloads.make_workload("tiny", quick=True)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "workload.npz"
    workloads.export_workload(tiny, jax.random.key(competitors.KEY), path)
    return common.load(str(path))


@pytest.fixture(scope="module")
def ours(tiny):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return competitors.make_ours(tiny, tiny.lanes).values()


def softmax_gradient(logits, labels):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    p[np.arange(len(labels)), labels] -= 1
    return p / len(labels)


def train_by_hand(workload, start, batches):
    """Train a two-layer perceptron on batches in float64 with gradients written down."""
    v = {name: value.astype(np.float64) for name, value in start.items()}
    w = {name: value.astype(np.float64) for name, value in workload.frozen.items()}
    one, two = workload.network["layers"]
    for batch in batches:
        x, y = workload.inputs[batch].astype(np.float64), workload.targets[batch]
        effective = [w[f"kernel:{p}"] + v[f"lora_a:{p}"] @ v[f"lora_b:{p}"] for p in (one, two)]
        before = x @ effective[0] + v[f"dense:{one}/bias"]
        hidden = np.maximum(before, 0)
        upper = softmax_gradient(hidden @ effective[1] + v[f"dense:{two}/bias"], y)
        lower = (upper @ effective[1].T) * (before > 0)
        slopes = {}
        for path, inputs, gradient in ((one, x, lower), (two, hidden, upper)):
            product = inputs.T @ gradient
            slopes[f"lora_a:{path}"] = product @ v[f"lora_b:{path}"].T
            slopes[f"lora_b:{path}"] = v[f"lora_a:{path}"].T @ product
            slopes[f"dense:{path}/bias"] = gradient.sum(0)
        v = {name: value - workload.learning_rate * slopes[name] for name, value in v.items()}
    return v


@pytest.mark.slow
def test_exported_round_is_ours(exported, ours):
    """A peer that reads nothing but the file and trains by hand arrives where we do."""
    totals = {name: np.zeros(value.shape) for name, value in exported.trainable.items()}
    for client in range(exported.clients):
        start = common.truncated(exported, client)
        trained = train_by_hand(exported, start, common.batches(exported, client))
        for name, value in trained.items():
            totals[name][tuple(map(slice, value.shape))] += exported.size[client] * (value - start[name])
    owners = common.owned_weights(exported)
    theirs = {name: value + totals[name] / owners[name] for name, value in exported.trainable.items()}
    assert competitors.difference(ours, theirs) < 1e-5


@pytest.mark.slow
def test_the_same_batches_train_one_model_of_the_mean_rank(tiny, exported):
    """One after the other, client by client, at rank 5: the clients' ranks are 2, 4, 6 and 8."""
    cut = {"lora_a": lambda value: value[:, :5], "lora_b": lambda value: value[:5], "dense": lambda value: value}
    start = {name: cut[name.partition(":")[0]](value) for name, value in exported.trainable.items()}
    batches = [batch for client in range(exported.clients) for batch in common.batches(exported, client)]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        got = competitors.make_same(tiny).values()
    expected = train_by_hand(exported, start, batches)
    assert competitors.difference(expected, got) < 1e-5
    assert competitors.difference(train_by_hand(exported, start, batches[:-1]), got) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer", pytest.param("cnn", marks=pytest.mark.slow)])
def test_peers_write_down_the_same_model(name, tmp_path):
    """Loss and gradients of the peers' own model are those of the task, away from the start, where B is zero."""
    workload = workloads.make_workload(name, quick=True)
    task, noise = workload.task, np.random.default_rng(0)
    server = task.server._replace(
        trainable=jax.tree.map(lambda v: v + 0.1 * noise.normal(size=v.shape).astype(np.float32), task.server.trainable)
    )
    moved = workload._replace(state=workload.state._replace(server=server))
    workloads.export_workload(moved, jax.random.key(0), tmp_path / "workload.npz")
    exported = common.load(str(tmp_path / "workload.npz"))
    chosen = common.batches(exported, 1)[0]
    inputs, targets = (np.asarray(leaf)[chosen] for leaf in (workload.data.inputs, workload.data.targets))
    weight = np.ones(len(chosen), np.float32)

    def ours(trainable):
        return task.loss(server.frozen, trainable, Batch(inputs, targets, weight), jax.random.key(0)).mean()

    loss = jax_network.make_loss(exported.network, exported.frozen)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        one, own = jax.jit(jax.value_and_grad(ours))(server.trainable)
        two, theirs = jax.jit(jax.value_and_grad(loss))(exported.trainable, exported.inputs[chosen], targets, weight)
    assert float(two) == pytest.approx(float(one), rel=1e-5)
    state = workload.state._replace(server=server._replace(trainable=own))
    assert competitors.difference(competitors.trained_values(state), theirs) < 1e-4


@pytest.mark.slow
def test_every_example_is_seen_once(exported):
    for client in range(exported.clients):
        seen = common.seen(exported, client)
        first = exported.start[client]
        own = np.arange(first, first + exported.size[client])  # the synthetic clients' examples lie in a row
        assert np.array_equal(np.sort(seen[0]), own)
        assert not np.array_equal(seen[0], own)


@pytest.mark.slow
def test_padded_batches_hold_the_batches(exported):
    examples, weights = common.padded_batches(exported)
    for client in range(exported.clients):
        flat = examples[client][weights[client] > 0]
        assert np.array_equal(flat, np.concatenate(common.batches(exported, client)))


@pytest.mark.slow
def test_the_gate_refuses_who_did_not_train(exported, ours):
    assert competitors.difference(ours, ours) == 0
    assert competitors.difference(ours, exported.trainable) >= 1
    with pytest.raises(competitors.PeerError, match="trained something else"):
        competitors.gate("idler", ours, exported.trainable)


def test_a_peer_that_is_not_installed_says_how_to(tmp_path):
    with pytest.raises(competitors.PeerError, match=r"setup\.sh .* torch"):
        competitors.Peer("torch_vmap", tmp_path, tmp_path / "workload.npz", tmp_path, patience=1)


def test_a_worker_converses(tmp_path):
    """A worker answers each command with one line, whatever else it prints."""
    worker = (
        "import sys; sys.argv[1:] = ['unused', sys.argv[1]]\n"
        "from common import serve\nimport numpy as np\n"
        "print('noise')\nserve(lambda: {'a': np.ones(2)}, lambda values: values)\n"
    )
    saved = tmp_path / "saved.npz"
    done = subprocess.run(
        [sys.executable, "-c", worker, str(saved)],
        input="run\nsave\n",
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT / "benchmarks" / "speed" / "peers",
    )
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert answers[0] == {"ready": True}
    assert answers[1]["seconds"] >= 0
    assert np.array_equal(np.load(saved)["a"], np.ones(2))


def test_turns_end_with_the_budget_and_survive_failures():
    calls = iter((1.0, 1.0))

    def fails():
        try:
            return next(calls)
        except StopIteration:
            raise competitors.PeerError("gone") from None

    entries = {
        name: competitors.Entry(run, dict, None, lambda: None, {})
        for name, run in (("quick", lambda: 0.1), ("dear", lambda: 2.0), ("failing", fails))
    }
    skipped = {}
    seconds = rounds.alternate(entries, argparse.Namespace(repeats=3, turn=0.2, budget=3), skipped)
    assert seconds == {"quick": [0.1] * 3, "dear": [2.0]}
    assert skipped == {"failing": "gone"}


def test_regression_tells_worse_from_noise():
    committed = {"tiny": {"lockstep": 1.0, "centralised": 0.8}}
    rows = regression.compare(committed, {"tiny": {"lockstep": 0.84, "centralised": 0.69, "loop": 3.0}}, 0.15)
    assert [row["worse"] for row in rows] == [True, False]


def test_results_are_merged_by_workload_and_competitor():
    about = {"versions": {}, "device": {}}

    def measured(**speeds):
        rows = [{"workload": "tiny", "competitor": c, "samples_per_second": s} for c, s in speeds.items()]
        return {
            "rows": rows,
            "ratios": {c: speeds["ours"] / s for c, s in speeds.items() if c != "ours"},
            "skipped": {},
        }

    content = rounds.merge({}, "tiny", measured(ours=4.0, loop=1.0), about)
    content = rounds.merge(content, "tiny", measured(ours=6.0, torch=2.0), about)
    assert content["ratios"]["tiny"] == {"loop": 4.0, "torch": 3.0}
    assert sorted(row["competitor"] for row in content["rows"]) == ["loop", "ours", "torch"]
    assert rounds.is_done(content, "tiny", ["loop", "torch"])
    assert not rounds.is_done(content, "tiny", ["loop", "drjax"])


def test_numbers_of_speeds_stand_clear_of_bars_and_names():
    ratios = {"tiny": {"flower": 30.0, "drjax": 1.2, "centralised": 0.4}, "cnn": {"drjax": 0.2}}
    device = {"platform": "cpu", "kind": "cpu", "cores": 2, "date": "2026-01-01"}
    content = {"rows": [{"repeats": 5}], "ratios": ratios, "device": device, "versions": {"jax": "0.10.2"}}
    for axes in rounds_report.draw(content).axes:
        ends = [max(1, bar.get_x() + bar.get_width(), bar.get_x()) for bar in axes.patches]
        assert ends
        assert [(text.xy[0], text.get_ha()) for text in axes.texts] == [(pytest.approx(end), "left") for end in ends]
        assert axes.get_xlim()[0] < 0.2
        assert axes.get_xlim()[1] > 30


def test_who_has_nobody_beside_it_is_not_drawn():
    assert rounds_report.compared({"ratios": {"tiny": {"ours, 1 device": 1.2}, "cnn": {}}}) == {}


@pytest.mark.slow
def test_the_field_holds_who_trained_the_same_round_and_why_others_do_not(tiny, tmp_path):
    options = argparse.Namespace(competitors=["lockstep", "torch"], devices=1, peers=tmp_path, patience=1)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        entries, gaps, skipped = competitors.line_up(tiny, (tiny.lanes,), options, tmp_path)
    assert list(entries) == ["ours", "lockstep"]
    assert gaps["lockstep"] < 1e-5
    assert "setup.sh" in skipped["torch"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        ("rounds", "--workloads", "tiny", "--competitors", "lockstep,loop"),
        ("scale", "--clients", "100"),
        ("rank_cost",),
        ("imbalance",),
        ("rule_cost", "--rules", "rbla", "private"),
    ],
    ids=lambda script: script[0],
)
def test_scripts_run_quickly(script, tmp_path):
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", f"benchmarks.speed.{script[0]}", *script[1:], "--quick", "--json", str(results)]
    subprocess.run(command, check=True, timeout=900, cwd=ROOT)
    content = json.loads(results.read_text())
    assert content["rows"]
    assert {"jax", "python"} <= set(content["versions"])
    assert script[0] == "rule_cost" or results.with_suffix(".png").stat().st_size > 0


def test_start_up_is_compared_with_the_release():
    def turn(factor):
        stages = {"help": 1.0, "first table": 8.0, "end": 20.0, "user CPU": 30.0}
        return {"empty": {s: v / factor for s, v in stages.items()}, "filled": {"end": 10.0 / factor}}

    rows = startup.compare({"0.1.0": [turn(1.0)] * 3, "working tree": [turn(2.0), turn(4.0), turn(8.0)]})
    ours = {(r["cache"], r["stage"]): r for r in rows if r["version"] == "working tree"}
    assert list(ours) == [("empty", s) for s in ("help", "first table", "end", "user CPU")] + [("filled", "end")]
    assert ours["empty", "first table"]["median"] == 2.0
    assert {row["times faster"] for row in ours.values()} == {4.0}
    table = startup.tables({"rows": rows})["start-up, seconds"]
    assert "| first table | 8 ± 0 | 2 ± 0.75 | 4 | – | – | – |" in table
    assert "| end | 20 ± 0 | 5 ± " in table
    assert "| 10 ± 0 | 2.5 ± " in table
