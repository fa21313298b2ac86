"""What cheaper probes are compared by: FLOPs, ranks without a probe, the table."""

import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest

import autorank_jax as ar
from autorank_jax.datasets import load_dataset
from autorank_jax.engine.flops import FlopModel
from autorank_jax.experiment import Experiment, LanguageOptions
from autorank_jax.experiment.language import PROBE_RATIO
from benchmarks.study import probes
from benchmarks.study.options import RESULTS

FLOPS = FlopModel(10.0, dict.fromkeys(probes.MAX_RANKS, 1.0))


def test_cost_is_epochs_by_examples_by_rank():
    federation = probes.make_federation(load_dataset("fashion_mnist_mini"), "staircase", 0)
    examples = int(federation.data.size.sum())
    assert probes.spent(federation, probes.FULL, FLOPS) == 5 * examples * (10 + 160 + 160 + 100)
    assert probes.spent(federation, probes.Probe(epochs=2, ratio=0.1), FLOPS) == 2 * examples * (10 + 16 + 16 + 10)
    assert probes.spent(federation, probes.Probe(epochs=0), FLOPS) == 0


def test_ranks_without_a_probe_come_from_four_criteria():
    federation = probes.make_federation(load_dataset("fashion_mnist_mini"), "staircase", 0)
    ratios, curves = probes.run_probe(federation, probes.Probe(epochs=0))
    assert curves is None
    assert ratios.shape == (10,)
    assert (np.diff(ratios) > 0).all()  # the staircase: every client has more classes and more data
    assert [ratios.min(), ratios.max()] == [np.float32(0.1), 1.0]


def test_the_table_has_the_worst_and_the_dearest_split(tmp_path, monkeypatch, capsys):
    cells = [
        {"split": split, "seed": 0, "probe": "cheap", "tau": tau, probes.CURVES: tau / 2, "moved": 0.02, "cost": cost}
        for split, tau, cost in (("one", 1.0, 0.06), ("two", 0.25, 0.04), ("two", 0.75, 0.02))
    ]
    (tmp_path / "costs.json").write_text(json.dumps({"probes": {"cells": cells}}))
    monkeypatch.setattr(probes, "RESULTS", tmp_path)
    probes.main(["--report"])
    assert "| cheap | 0.67 | 0.50 (two) | 0.33 | 0.020 | 4.0 | 6.0 |" in capsys.readouterr().out


def test_probes_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    seen, file = [], tmp_path / "probes.json"
    monkeypatch.setattr(probes, "make_federation", lambda _images, split, seed: (split, seed))

    def compare(federation):
        seen.append(federation)
        if len(seen) == 3:
            raise KeyboardInterrupt
        yield {"probe": "one", "tau": 1.0, probes.CURVES: None, "moved": 0.0, "cost": 0.1}

    monkeypatch.setattr(probes, "compare", compare)
    monkeypatch.setattr(probes.datasets, "load_dataset", lambda name: SimpleNamespace(name=name))
    arguments = ["--seeds", "2", "--json", str(file)]
    with pytest.raises(SystemExit, match="what is finished is kept"):
        probes.main(arguments)
    probes.main(arguments)
    assert sorted({*seen}) == sorted(seen[:2] + seen[3:])
    assert {seed for _, seed in seen} == {0, 1}
    assert len(json.loads(file.read_text())["probes"]["cells"]) == len(seen) - 1


def test_where_nothing_is_published_that_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(probes, "RESULTS", tmp_path)
    probes.main(["--report"])
    assert capsys.readouterr().out == "No cell is complete yet.\n"


def test_the_default_is_the_cheapest_probe_that_gives_nearly_the_full_ones_ranks():
    """Kendall's τ of at least 0.9 on every split."""
    published = json.loads((RESULTS / "costs.json").read_text())["probes"]["cells"]
    ranked = {}
    for how in (probes.FULL, *probes.PROBES):
        own = [cell for cell in published if cell["probe"] == how.label()]
        splits = {cell["split"] for cell in own}
        worst = min(np.mean([cell["tau"] for cell in own if cell["split"] == split]) for split in splits)
        ranked[how] = worst, np.mean([cell["cost"] for cell in own])
    near = [how for how, (worst, _) in ranked.items() if worst >= 0.9 and how.epochs]
    best = min(near, key=lambda how: ranked[how][1])
    assert ranked[best][1] < 0.05  # of the FLOPs of 20 rounds
    default, arguments = Experiment(), inspect.signature(ar.probe).parameters
    assert best[:3] == (default.probe_epochs, default.probe_ratio, default.probe_share)
    assert best[:3] == tuple(arguments[name].default for name in ("epochs", "ratio", "share"))
    assert best[1:3] == (PROBE_RATIO, LanguageOptions().probe_share)
