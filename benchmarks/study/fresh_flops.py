"""Do ranks that differ pay at equal training FLOPs? What `equal_flops` found, on splits and seeds that it never saw.

Its federation of ten clients (6,000 images of Fashion-MNIST, 20 rounds of one local epoch, batch 64, SGD with momentum,
maximum ranks 160, 160, 100) under `raflora`, splits of fewer classes a client, and a hundred clients of whom a fifth
takes part in each of 100 rounds; every seed has its own split, weights and batches (the adapters' start stays).
Compared with everybody's ratio at 0.4 are the two that looked best there, of at most the same FLOPs:

- `n^1`: ratios in proportion to a client's number of examples;
- `AutoRank`: in proportion to the ratios of the default policy, whose probe is paid from the same FLOPs.

Each has its own learning rate on each split, the best on one half of the test images under four seeds used nowhere
else: 0.01, 0.03, 0.06 and so on are tried until a run of any of them diverges; that rate is left out for all. Final
accuracy in % on the other half, differences in points, paired over seeds, with 95 % t intervals; `early` is the same
after a quarter of the rounds, `same rate` at that of the uniform rank. `claims` tests the first.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.study.fresh_flops --json FILE
          python -m benchmarks.study.fresh_flops --quick       (embedded subset, one split and seed, two rounds)
          python -m benchmarks.study.fresh_flops --report      (runs nothing)
Expect:   an hour or two on one core; what was stopped goes on
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autorank_jax import datasets
from autorank_jax.evaluation.costs import client_costs
from autorank_jax.federated.participation import everyone, sample_uniformly
from benchmarks import harness, script
from benchmarks.study import equal_flops, probes
from benchmarks.study.columns import FEW, MANY, RANDOM, STAIRCASE
from benchmarks.study.options import RESULTS, make_parser
from benchmarks.study.paired import Difference, difference, in_points

TUNING, SEEDS = range(190, 194), range(200, 210)
RATES = (0.01, 0.03, 0.06, 0.1, 0.2, 0.4)
EDGE: Mapping[str, float] = {MANY: 0.1}
"""A rate to compare at besides, where one of twelve runs to tune with diverges, but none of those to test."""
LEARNT = 0.2
"""A run that ends below has learnt nothing, or has diverged where it ended above at a smaller rate."""
SPLITS: Mapping[str, float] = {
    STAIRCASE: 1.0, MANY: 0.2, RANDOM: 1.0, FEW: 1.0,
}  # fmt: skip
"""With the share of clients that takes part in a round; the fewer they are the more rounds there are."""
RULE, IMAGES, ROUNDS = "raflora", 6000, 20
APART = 1000
"""Added to the seeds of probes, whose batches are not those of the first round."""
DEFAULT = probes.Probe(epochs=2, ratio=0.1, share=0.25)
"""As `ar.probe` has it."""
CANDIDATES = ("uniform", "AutoRank", "n^1")
DIFFERENCES = (
    ("minus uniform", "uniform", "final"),
    ("minus AutoRank", "AutoRank", "final"),
    ("early, minus uniform", "uniform", "early"),
)
SAME = "same rate, minus uniform"
COSTS = {"FLOPs %": "flops", "bytes %": "bytes", "slowest client's FLOPs %": "most"}
"""Of the uniform rank's."""
LEGEND = "n^1: ranks in proportion to size; early: after a quarter of the rounds; costs: of the uniform rank's."
COLUMNS = ("split", "ranks", "rate", "seeds", *COSTS, "final", *(title for title, _, _ in DIFFERENCES), SAME)


def candidates(federation: equal_flops.Federation, seed: int, rounds: int) -> dict[str, tuple[np.ndarray, float]]:
    """Return ratios by name, and the FLOPs that are spent on them before the first round."""
    probed = probes.Federation(federation.data, equal_flops.make_task(seed), APART + seed)
    ratios, _ = probes.run_probe(probed, DEFAULT)
    paid = probes.spent(probed, DEFAULT, federation.flops)
    whole = equal_flops.spent(federation, np.full(len(ratios), equal_flops.UNIFORM))
    size = federation.size
    return {
        "uniform": (np.full(len(size), equal_flops.UNIFORM), 0.0),
        "AutoRank": (equal_flops.affordable(federation, ratios.astype(float), 1 - paid / (rounds * whole)), paid),
        "n^1": (equal_flops.affordable(federation, size / size.max()), 0.0),
    }


def run_one(trainer: equal_flops.Trainer, seed: int, rounds: int, ratios: np.ndarray, paid: float) -> dict[str, float]:
    """Return what a candidate reaches with the split and the weights of a seed, and what it costs.

    Args:
        trainer: of the split.
        seed: of weights and batches.
        rounds: as many as each client is expected to take part in.
        ratios: of the candidate.
        paid: FLOPs before the first round.
    """
    federation = trainer.federation
    uniform = rounds * equal_flops.spent(federation, np.full(len(federation.size), equal_flops.UNIFORM))
    (_, early), (validation, final) = trainer.train(ratios, seed)
    flops = (paid + rounds * equal_flops.spent(federation, ratios)) / uniform
    reached = {"validation": float(validation), "early": float(early), "final": float(final)}
    return {"flops": flops, **beside_uniform(trainer, ratios), **reached}


def beside_uniform(trainer: equal_flops.Trainer, ratios: np.ndarray) -> dict[str, float]:
    """Return bytes up, and the FLOPs of the client that trains most, over those of the uniform rank."""
    federation = trainer.federation
    own, uniform = (
        client_costs(
            equal_flops.make_task(0).server, equal_flops.ranks_of(each.astype(np.float32)), federation.size,
            federation.flops, local_epochs=1, traffic=trainer.rule.traffic,
        )
        for each in (ratios, np.full(len(ratios), equal_flops.UNIFORM))
    )  # fmt: skip
    most = own.flops.max() / uniform.flops.max()
    return {"bytes": float(own.bytes_up.sum() / uniform.bytes_up.sum()), "most": float(most)}


class Trainers:
    """Makes what trains the clients of a split: one program for all splits of as many clients, at each rate."""

    def __init__(self, images: datasets.Dataset, rounds: int) -> None:
        self.rounds = rounds
        self.made: dict[tuple[Any, ...], equal_flops.Trainer] = {}
        self.federation = functools.cache(lambda *whose: equal_flops.make_federation(images, *whose))
        self.candidates = functools.cache(lambda *whose: candidates(self.federation(*whose), whose[1], rounds))

    def of(self, split: str, seed: int, rate: float) -> equal_flops.Trainer:
        """Return the trainer at a rate, with the clients of a seed."""
        federation, share = self.federation(split, seed), SPLITS[split]
        alike = share, len(federation.size), rate
        if alike not in self.made:
            chosen = everyone if share == 1 else sample_uniformly(round(share * len(federation.size)))
            self.made[alike] = equal_flops.Trainer(federation, RULE, round(self.rounds / share), chosen, rate)
        self.made[alike].federation = federation
        return self.made[alike]


def published() -> list[dict[str, Any]]:
    """Return the published rows of whole runs."""
    rows = script.read(RESULTS / "costs.json").get("fresh_flops", {}).get("cells", [])
    return whole_runs(rows, "fashion_mnist", ROUNDS)


def whole_runs(rows: Sequence[Mapping[str, Any]], images: str, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of a set of images and of so many rounds for each client."""
    shown = {(images, split, round(rounds / share)) for split, share in SPLITS.items()}
    return [{**row} for row in rows if (row["dataset"], row["split"], row["rounds"]) in shown]


def best_rate(rows: Sequence[Mapping[str, Any]], split: str, ranks: str) -> float | None:
    """Return the rate of the best validation, the mean over the seeds to tune with; of equals the smaller."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if (row["split"], row["ranks"]) == (split, ranks) and row["seed"] in TUNING:
            found.setdefault(row["rate"], []).append(row["validation"])
    stable = [rate for rate in sorted(found) if not diverges(rows, split, rate)]
    return max(stable, key=lambda rate: np.mean(found[rate]), default=None)


def diverges(rows: Sequence[Mapping[str, Any]], split: str, rate: float) -> bool:
    """Return whether a run to tune with diverges, whosever it is."""
    tuned = [row for row in rows if row["split"] == split and row["seed"] in TUNING]
    learnt = {(row["ranks"], row["seed"]) for row in tuned if row["rate"] < rate and row["validation"] >= LEARNT}
    ended = {(row["ranks"], row["seed"]) for row in tuned if row["rate"] == rate and row["validation"] < LEARNT}
    return bool(learnt & ended)


def jobs(
    rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], tuning: Sequence[int], rates: Sequence[float], split: str
) -> Iterator[tuple[int, str, float]]:
    """Yield seed, candidate and rate of all runs on a split; `rows` grows meanwhile."""
    for rate in rates:
        for seed, name in itertools.product(tuning, CANDIDATES):
            yield seed, name, rate
        if diverges(rows, split, rate):
            break
    uniform = best_rate(rows, split, "uniform")
    for seed, name in itertools.product(seeds, CANDIDATES):
        for rate in sorted({best_rate(rows, split, name) or rates[0], uniform or rates[0], *edge(split)}):
            yield seed, name, rate


def edge(split: str) -> list[float]:
    """Return the rate to compare at besides, if any."""
    return [EDGE[split]] if split in EDGE else []


def of_rate(
    rows: Sequence[Mapping[str, Any]], split: str, ranks: str, rate: float | None = None
) -> list[Mapping[str, Any]]:
    """Return the rows of a candidate at a rate, or its best one, for the seeds that it was not tuned with."""
    place = split, ranks, best_rate(rows, split, ranks) if rate is None else rate
    return [row for row in rows if (row["split"], row["ranks"], row["rate"]) == place and row["seed"] in SEEDS]


def beyond(
    rows: Sequence[Mapping[str, Any]], split: str, one: str, other: str, when: str, *, rate: float | None = None
) -> Difference | None:
    """Return what one candidate has beyond another on a split, `when` "early" or "final".

    Both at a rate, or each at its best one.
    """
    sides = [{row["seed"]: row[when] for row in of_rate(rows, split, name, rate)} for name in (one, other)]
    return difference(*sides)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for every candidate, split and rate, in Markdown."""
    found: list[harness.Row] = []
    for split in dict.fromkeys(row["split"] for row in rows):
        uniform = best_rate(rows, split, "uniform")
        for rate, name in itertools.product((None, *edge(split)), CANDIDATES):
            own = of_rate(rows, split, name, rate)
            if not own:
                continue
            row: harness.Row = {"split": split, "ranks": name, "rate": own[0]["rate"], "seeds": len(own)}
            row |= {title: f"{100 * np.mean([one[key] for one in own]):.1f}" for title, key in COSTS.items()}
            row |= {"final": f"{100 * np.mean([one['final'] for one in own]):.1f}"}
            for title, other, when in DIFFERENCES:
                if CANDIDATES.index(name) > CANDIDATES.index(other):
                    row[title] = in_points(beyond(rows, split, name, other, when, rate=rate))
            if rate is None and name != "uniform":
                row[SAME] = in_points(beyond(rows, split, name, "uniform", "final", rate=uniform))
            found.append(row)
    return harness.markdown_table(found, COLUMNS)


@harness.mistakes_in_words()
def main(arguments: list[str] | None = None) -> None:
    """Train, print, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="the embedded subset, one split and seed, two rounds")
    parser.add_argument("--json", type=Path, help="file to write to; the seeds that it holds are not run again")
    parser.add_argument("--report", action="store_true", help="run nothing: show what is published")
    options = parser.parse_args(arguments)
    rows = published()
    if not options.report:
        known = script.read(options.json)
        every: list[dict[str, Any]] = known.get("fresh_flops", {}).get("cells", [])
        images = datasets.load_dataset("fashion_mnist_mini" if options.quick else "fashion_mnist")
        images = images._replace(x_train=images.x_train[:IMAGES], y_train=images.y_train[:IMAGES])
        rounds = 2 if options.quick else ROUNDS
        seeds, tuning, rates, splits = SEEDS, TUNING, RATES, tuple(SPLITS)
        if options.quick:
            seeds, tuning, rates, splits = SEEDS[:1], TUNING[:1], RATES[1:4:2], splits[:1]
        trainers = Trainers(images, rounds)
        with harness.shared_programs():
            for split in splits:
                here = {"dataset": images.name, "images": len(images.y_train), "rounds": round(rounds / SPLITS[split])}
                mine = [row for row in every if here.items() <= row.items() and row["split"] == split]
                for seed, name, rate in jobs(mine, seeds, tuning, rates, split):
                    cell = here | {"split": split, "seed": seed, "ranks": name, "rate": rate}
                    if any(cell.items() <= row.items() for row in mine):
                        continue
                    trainer = trainers.of(split, seed, rate)
                    row = cell | run_one(trainer, seed, rounds, *trainers.candidates(split, seed)[name])
                    print(f"{split}, seed {seed}, {name}, rate {rate}: {row['final']:.3f}", flush=True)
                    mine.append(row)
                    every.append(row)
                    harness.write_json(options.json, known | {"fresh_flops": {"cells": every} | script.about()})
        rows = whole_runs(every, images.name, rounds)
    print(f"{table(rows)}\n\n{LEGEND}" if rows else "No cell is complete yet.")


if __name__ == "__main__":
    main()
