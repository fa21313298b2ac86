"""What the tests of the command line share."""

import dataclasses
import io
import re

import numpy as np
from rich.console import Console

from autorank_jax.cli import main as cli
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.results import Costs, Results, Row, Run, Scores

CRITERIA = ("size", "label_entropy")
COSTS = Costs(trained_parameters=100.0, bytes_up=400.0, bytes_down=300.0, flops=1e6, slowest_client=6e5)


def fails(capsys, *arguments):
    """Run a command that must fail with exit code 2, and return what it says, one line per mistake."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert all(re.fullmatch(r"[a-z ]+\S*: \d+\.\d s", line) for line in captured.out.splitlines())  # stages before it
    lines = captured.err.splitlines()
    assert lines
    assert all(line.startswith("autorank-jax: ") for line in lines)
    assert "Traceback" not in captured.err
    return captured.err


def make_scores(seed, policies=("autorank", "full")):
    ratios = {policy: np.array([0.1, 1.0]) if policy == "autorank" else np.ones(2) for policy in policies}
    return Scores(
        seed=seed,
        criteria=CRITERIA,
        size=np.array([10, 30]),
        label_counts=np.array([[10, 0], [15, 15]]),
        matrix=np.array([[10.0, 0.0], [30.0, 0.6931472]]),
        weights=np.array([0.25 + 0.5 * seed, 0.75 - 0.5 * seed]),
        closeness=np.array([0.0, 1.0]),
        ratios=ratios,
        ranks={policy: {"layers/0": np.maximum(1, (10 * r).astype(int))} for policy, r in ratios.items()},
        probe_flops=5e6,
    )


def make_run(policy, seed, curve, aggregator="rbla"):
    probe = 5e6 if policy == "autorank" else 0.0
    rows = tuple(
        Row(policy, aggregator, seed, n, accuracy, 1.0, 2.0, 2, 0, 0, 0, 2, probe + n * 1e6, n * 700.0, 0.5)
        for n, accuracy in enumerate(curve, 1)
    )
    ratios = (0.55, 0.775) if policy == "autorank" else (1.0, 1.0)
    return Run(policy, aggregator, seed, rows, COSTS, *ratios, probe)


def make_results(aggregators=("rbla",)):
    experiment = Experiment(
        dataset="synthetic", clients=2, rank_policies=("autorank", "full"), rounds=3, seeds=2, targets=(0.5, 0.95),
        aggregators=aggregators,
    )  # fmt: skip
    curves = {("autorank", 0): (0.2, 0.6, 0.5), ("autorank", 1): (0.1, 0.4, 0.7)}
    curves |= {("full", 0): (0.2, None, 0.96), ("full", 1): (0.3, None, 0.4)}
    runs = [make_run(*key, curve, rule) for rule in aggregators for key, curve in curves.items()]
    scores = (make_scores(0), make_scores(1))
    seconds = dict.fromkeys(aggregators, 1.5)
    return Results(dataclasses.asdict(experiment), scores, tuple(runs), seconds, "a cpu", {"jax": "0"})


def printed(*tables):
    console = Console(record=True, width=80, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.export_text()
