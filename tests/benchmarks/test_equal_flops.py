"""Ranks of equal FLOPs: what is affordable, a search that goes on where it stopped, the table."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from autorank_jax.datasets import load_dataset
from benchmarks.study import equal_flops


@pytest.fixture(scope="module")
def federation():
    return equal_flops.make_federation(load_dataset("fashion_mnist_mini"), "staircase")


@pytest.fixture
def trained(monkeypatch):
    """A trainer that finds high ranks of the sixth client good; and what it was asked for."""
    seen = []

    class Fake:
        def __init__(self, federation, _rule, _rounds):
            self.federation = federation

        def train(self, ratios, seed):
            seen.append((tuple(ratios), seed))
            good = ratios[5] / 2 + seed * 1e-4
            return np.array([[0.3, good / 4], [good, good / 2]])  # early, final × validation, test

    monkeypatch.setattr(equal_flops, "Trainer", Fake)
    monkeypatch.setattr(equal_flops.datasets, "load_dataset", lambda _: load_dataset("fashion_mnist_mini"))
    monkeypatch.setattr(equal_flops, "CELLS", equal_flops.CELLS[:2])
    return seen


def test_candidates_cost_what_the_uniform_rank_does_and_no_more(federation):
    found = equal_flops.first_candidates(federation)
    most = equal_flops.spent(federation, found["uniform"])
    assert found["uniform"].tolist() == [0.4] * 10
    for name, ratios in found.items():
        assert 0.99 * most < equal_flops.spent(federation, ratios) <= most, name
        assert equal_flops.LEAST <= ratios.min() <= ratios.max() <= 1
    assert (np.diff(found["n^1"]) > 0).all()  # every client has more data than the one before
    assert (np.diff(found["n^-1"]) <= 0).all()
    per_flop = found["AutoRank"] / federation.size
    free = (found["per FLOP"] > equal_flops.LEAST) & (found["per FLOP"] < 1)
    assert np.ptp((found["per FLOP"] / per_flop)[free]) < 1e-3 * (found["per FLOP"] / per_flop)[free].max()


def test_cost_is_that_of_integer_ranks(federation):
    flops = federation.flops
    each = flops.base + sum(flops.per_rank[path] * int(0.4 * most) for path, most in equal_flops.MAX_RANKS.items())
    assert equal_flops.spent(federation, np.full(10, 0.4)) == pytest.approx(each * federation.size.sum())


def test_a_search_climbs_and_goes_on_where_it_was_stopped(trained, tmp_path, monkeypatch):
    arguments = ["--steps", "3"]
    equal_flops.main([*arguments, "--json", str(tmp_path / "whole.json")])
    whole = json.loads((tmp_path / "whole.json").read_text())["equal_flops"]["cells"]
    tried = whole[0]["tried"]
    assert [one["ranks"] for one in tried[-2:]] == ["step 2", "step 3"]
    assert [one["ranks"] for one in whole[0]["tested"]][::9] == ["uniform", "searched"]
    first, tested = tried[0], whole[0]["tested"][0]
    assert first["validation"] == pytest.approx(0.2 + 0.5e-4)
    assert tested["early, final"][1] == pytest.approx([0.2101 / 4, 0.2101 / 2])  # on test examples
    assert whole[0]["tested"][-1]["ratios"] == max(tried, key=lambda one: one["validation"])["ratios"]
    calls, train = len(trained), equal_flops.Trainer.train
    for after in (11, 40, 80):  # within the search, the test, and the second cell's search
        with monkeypatch.context() as patch:
            start = len(trained)

            def failing(self, ratios, seed, start=start, after=after):
                if len(trained) - start == after:
                    raise KeyboardInterrupt
                return train(self, ratios, seed)

            patch.setattr(equal_flops.Trainer, "train", failing)
            with pytest.raises(SystemExit, match="what is finished is kept"):
                equal_flops.main([*arguments, "--json", str(tmp_path / f"{after}.json")])
        equal_flops.main([*arguments, "--json", str(tmp_path / f"{after}.json")])
        assert json.loads((tmp_path / f"{after}.json").read_text())["equal_flops"]["cells"] == whole
        assert len(trained) - start <= calls + 5  # at most what one candidate takes was trained twice


def test_the_table_pairs_seeds_and_corrects_for_all_rows(tmp_path, monkeypatch, capsys):
    def tested(name, finals):
        row = {"ranks": name, "ratios": [0.1, 0.9], "flops": 0.996, "seeds": [1, 2, 3]}
        return row | {"early, final": [[final / 2, final] for final in finals]}

    rows = [tested("uniform", [0.5, 0.6, 0.7]), tested("one", [0.52, 0.63, 0.71]), tested("two", [0.5, 0.59, 0.7])]
    cell = {"split": "s", "rule": "r", "size": [9, 1], "tried": [], "tested": rows}
    (tmp_path / "costs.json").write_text(json.dumps({"equal_flops": {"cells": [cell]}}))
    monkeypatch.setattr(equal_flops, "RESULTS", tmp_path)
    equal_flops.main(["--report"])
    said = capsys.readouterr().out
    assert "| s | r | uniform | 99.6 | 60.0 | – | – | 0.90 0.10 |" in said
    assert "| s | r | one | 99.6 | 62.0 | +2.0 [-0.5, +4.5], p 0.15 | +1.0 [-0.2, +2.2] |" in said
    assert "| s | r | two | 99.6 | 59.7 | -0.3 [-1.8, +1.1], p 0.42 |" in said
    monkeypatch.setattr(equal_flops, "RESULTS", tmp_path / "none")
    equal_flops.main(["--report"])
    assert capsys.readouterr().out == "No cell is complete yet.\n"


def test_where_no_step_is_better_nothing_is_tested_twice(federation):
    named = [{"ranks": "uniform", "ratios": [0.4] * 10, "validation": 0.9}]
    cell = {"tried": [*named, {"ranks": "step 1", "ratios": [0.3] * 10, "validation": 0.8}], "tested": []}
    trainer = SimpleNamespace(federation=federation, train=lambda *_: np.zeros((2, 2)))
    list(equal_flops.confirm(cell, trainer, [1]))
    assert [one["ranks"] for one in cell["tested"]] == ["uniform"]


def test_too_few_images_and_other_rounds(tmp_path, trained, capsys):
    with pytest.raises(SystemExit, match="2"):
        equal_flops.main(["--images=-5"])
    assert "argument --images: expected a whole number of at least 1000, got -5" in capsys.readouterr().err
    file = tmp_path / "one.json"
    equal_flops.main(["--quick", "--json", str(file)])
    quick = len(trained)
    equal_flops.main(["--steps", "0", "--json", str(file)])  # of the same images, but of other rounds: another cell
    assert len(trained) > quick
    assert [cell["rounds"] for cell in json.loads(file.read_text())["equal_flops"]["cells"]] == [2, 20, 20]


@pytest.mark.slow
def test_a_quick_run_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(equal_flops, "first_candidates", lambda f: {"uniform": np.full(len(f.size), 0.4)})
    equal_flops.main(["--quick", "--json", str(tmp_path / "one.json")])
    (cell,) = json.loads((tmp_path / "one.json").read_text())["equal_flops"]["cells"]
    assert [one["ranks"] for one in cell["tried"]] == ["uniform", "step 1"]
    assert 0.1 < cell["tried"][0]["validation"] < 1
    early, final = cell["tested"][0]["early, final"][0]
    assert 0.1 < early < final < 1
