"""Equal FLOPs on fresh splits: what is compared costs the same, probe included; resuming; the table."""

import inspect
import itertools
import json

import jax
import numpy as np
import pytest

import autorank_jax as ar
from autorank_jax.datasets import load_dataset
from benchmarks.study import equal_flops, fresh_flops, probes


def test_autorank_pays_for_its_probe(monkeypatch):
    federation = equal_flops.make_federation(load_dataset("fashion_mnist_mini"), "dirichlet-0.4-10", 7)
    given = np.linspace(0.1, 1, 10, dtype=np.float32)
    monkeypatch.setattr(probes, "run_probe", lambda *_: (given, None))
    found = fresh_flops.candidates(federation, 7, rounds=20)
    whole = 20 * equal_flops.spent(federation, np.full(10, 0.4))
    assert found["uniform"][1] == found["n^1"][1] == 0
    assert found["AutoRank"][1] == probes.spent(federation, fresh_flops.DEFAULT, federation.flops) > 0.01 * whole
    for name, (ratios, paid) in found.items():
        assert 0.995 * whole < paid + 20 * equal_flops.spent(federation, ratios) <= whole, name
    free = (found["AutoRank"][0] > equal_flops.LEAST) & (found["AutoRank"][0] < 1)
    assert np.ptp((found["AutoRank"][0] / given)[free]) < 1e-4
    other = equal_flops.make_federation(load_dataset("fashion_mnist_mini"), "dirichlet-0.4-10", 8)
    assert other.size.tolist() != federation.size.tolist()
    arguments = inspect.signature(ar.probe).parameters
    assert fresh_flops.DEFAULT[:3] == tuple(arguments[name].default for name in ("epochs", "ratio", "share"))


def test_runs_go_on_where_they_were_stopped_and_each_has_its_own_rate(tmp_path, monkeypatch, capsys):
    seen, file = [], tmp_path / "one.json"
    best = {"uniform": 0.03, "AutoRank": 0.03, "n^1": 0.1}

    class Fake:
        def __init__(self, federation, _rule, rounds, participation, learning_rate):
            self.federation, self.rate = federation, learning_rate
            cohort = participation(jax.random.key(0), federation.data).row
            assert rounds * len(cohort) == 20 * len(federation.size)  # each client is expected in as many rounds

    def run_one(trainer, seed, rounds, name, paid):
        assert (rounds, paid) == (20, 0)
        seen.append((seed, name, trainer.rate))
        if len(seen) == 4:
            raise KeyboardInterrupt
        gain = {"uniform": 0.0, "AutoRank": 0.001 * (seed - 200), "n^1": 0.02}[name]
        gain -= 0.1 * (trainer.rate != best[name])
        validation = {("uniform", 0.2): 0.9, ("AutoRank", 0.2): 0.1}.get((name, trainer.rate), 0.5 + gain)
        validation = 0.15 if (name, trainer.rate) == ("n^1", 0.01) else validation  # it has hardly begun to learn
        reached = {"validation": validation, "early": 0.3, "final": 0.5 + seed / 1000 + gain}
        return {"flops": 0.999, "bytes": 0.6, "most": 1.8, **reached}

    monkeypatch.setattr(fresh_flops, "TUNING", range(190, 192))
    monkeypatch.setattr(fresh_flops, "SPLITS", {"staircase": 1.0, "dirichlet-0.4-100": 0.2})
    monkeypatch.setattr(equal_flops, "Trainer", Fake)
    monkeypatch.setattr(fresh_flops, "run_one", run_one)
    monkeypatch.setattr(fresh_flops, "candidates", lambda *_: {name: (name, 0) for name in best})
    monkeypatch.setattr(fresh_flops.datasets, "load_dataset", lambda _: load_dataset("fashion_mnist_mini"))
    with pytest.raises(SystemExit, match="what is finished is kept"):
        fresh_flops.main(["--json", str(file)])
    assert len(json.loads(file.read_text())["fresh_flops"]["cells"]) == 3
    fresh_flops.main(["--json", str(file)])
    tuned = itertools.product(range(190, 192), best, (0.01, 0.03, 0.06, 0.1, 0.2))
    tested = [(seed, name, rate) for seed in fresh_flops.SEEDS for name in best for rate in sorted({0.03, best[name]})]
    at_edge = [(seed, name, 0.1) for seed in fresh_flops.SEEDS for name in ("uniform", "AutoRank")]
    ran = [*2 * [*tuned, *tested], *at_edge]
    assert sorted(seen[:3] + seen[4:]) == sorted(ran)
    said = capsys.readouterr().out
    assert "| staircase | uniform | 0.03 | 10 | 99.9 | 60.0 | 180.0 | 70.5 | – | – | – | – |" in said
    cost = "10 | 99.9 | 60.0 | 180.0"
    sized = f"| staircase | n^1 | 0.1 | {cost} | 72.5 | +2.0 [+2.0, +2.0] | +1.6 [+1.3, +1.8] | +0.0 [+0.0, +0.0] | "
    assert sized + "-8.0 [-8.0, -8.0] |" in said
    ours = f"| dirichlet-0.4-100 | AutoRank | 0.03 | {cost} | 70.9 | +0.5 [+0.2, +0.7] | – | +0.0 [+0.0, +0.0] | "
    assert ours + "+0.5 [+0.2, +0.7] |" in said
    assert f"| dirichlet-0.4-100 | n^1 | 0.1 | {cost} | 72.5 | +12.0 [+12.0, +12.0] |" in said  # at the edge
    cells = json.loads(file.read_text())
    quick = [row | {"rounds": 2, "final": 0.0, "validation": 1.0} for row in cells["fresh_flops"]["cells"]]
    file.write_text(json.dumps({"fresh_flops": {"cells": quick + cells["fresh_flops"]["cells"]}}))
    fresh_flops.main(["--json", str(file)])  # what was run quickly is no part of it
    assert capsys.readouterr().out == said[said.index("| split") :]


@pytest.mark.slow
def test_a_quick_run_trains(tmp_path):
    fresh_flops.main(["--quick", "--json", str(tmp_path / "one.json")])
    rows = json.loads((tmp_path / "one.json").read_text())["fresh_flops"]["cells"]
    assert [row["ranks"] for row in rows[:6]] == 2 * ["uniform", "AutoRank", "n^1"]
    assert [row["rate"] for row in rows[:6]] == 3 * [0.03] + 3 * [0.1]
    assert len({row["final"] for row in rows[:6]}) == 6  # rates and ranks are those that are trained with
    own = [row for row in rows if row["ranks"] == "uniform"]
    assert {(row["bytes"], row["most"]) for row in own} == {(1, 1)}
    assert all(row["bytes"] < 0.7 for row in rows if row["ranks"] != "uniform")
    assert all(row["most"] > 1.2 for row in rows if row["ranks"] == "n^1")  # the largest client has most rank
    assert all(0.1 < row["early"] < row["final"] < 1 and 0.97 < row["flops"] <= 1 for row in rows)
    assert len({row["validation"] for row in rows} & {row["final"] for row in rows}) <= 1  # other images
