"""Do ranks that differ pay at equal training FLOPs? What `equal_flops` found, on splits and seeds that it never saw.

Its federation of ten clients (6,000 images of Fashion-MNIST, 20 rounds of one local epoch, batch 64, SGD 0.03 with
momentum, maximum ranks 160, 160, 100) under `raflora`, splits of fewer classes a client, and a hundred clients of whom
a fifth takes part in each of 100 rounds; every seed has its own split, weights and batches (the adapters' start stays).
Compared with everybody's ratio at 0.4 are the two that looked best there, of at most the same FLOPs:

- `n^1`: ratios in proportion to a client's number of examples;
- `AutoRank`: in proportion to the ratios of the default policy, whose probe is paid from the same FLOPs.

Final accuracy in % on all test images, differences in points, paired over seeds, with 95 % t intervals; `early` is the
same after a quarter of the rounds. They are tested in `claims`.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.study.fresh_flops --json FILE
          python -m benchmarks.study.fresh_flops --quick       (embedded subset, one split and seed, two rounds)
          python -m benchmarks.study.fresh_flops --report      (runs nothing)
Expect:   half an hour on one core; what was stopped goes on
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autorank_jax import datasets
from autorank_jax.evaluation.costs import client_costs
from autorank_jax.federated.participation import everyone, sample_uniformly
from benchmarks import harness, script
from benchmarks.study import columns, equal_flops, probes
from benchmarks.study.columns import FEW, MANY, STUDIED
from benchmarks.study.options import RESULTS, make_parser
from benchmarks.study.paired import Difference, difference, in_points

SEEDS = range(200, 210)
SPLITS: Mapping[str, float] = {
    **dict.fromkeys(STUDIED, 1.0), FEW: 1.0, MANY: 0.2,
}  # fmt: skip
"""With the share of clients that takes part in a round; the fewer they are the more rounds there are."""
RULE, IMAGES, ROUNDS = "raflora", 6000, 20
APART = 1000
"""Added to the seeds of probes, whose batches are not those of the first round."""
DEFAULT = probes.Probe(epochs=2, ratio=0.1, share=0.25)
"""As `ar.probe` has it."""
CANDIDATES = ("uniform", "AutoRank", "n^1")
KEYS = ("dataset", "images", "rounds", "split", "seed")
DIFFERENCES = (
    ("minus uniform", "uniform", "final"),
    ("minus AutoRank", "AutoRank", "final"),
    ("early, minus uniform", "uniform", "early"),
)
COSTS = {"FLOPs %": "flops", "bytes %": "bytes", "slowest client's FLOPs %": "most"}
"""Of the uniform rank's."""
COLUMNS = ("split", "ranks", "seeds", *COSTS, "final", *(title for title, _, _ in DIFFERENCES))


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


def run_seed(trainer: equal_flops.Trainer, seed: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yield what each candidate reaches with the split and the weights of a seed.

    Args:
        trainer: of the split.
        seed: of weights and batches.
        rounds: as many as each client is expected to take part in.
    """
    federation = trainer.federation
    uniform = rounds * equal_flops.spent(federation, np.full(len(federation.size), equal_flops.UNIFORM))
    for name, (ratios, paid) in candidates(federation, seed, rounds).items():
        early, final = trainer.train(ratios, seed).mean(axis=1)  # over both halves of the test images
        flops = (paid + rounds * equal_flops.spent(federation, ratios)) / uniform
        cost = {"flops": flops, **beside_uniform(trainer, ratios)}
        yield {"ranks": name, **cost, "early": float(early), "final": float(final)}


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


def make_trainer(images: datasets.Dataset, split: str, rounds: int) -> equal_flops.Trainer:
    """Make what trains the clients of a split and all others of as many clients."""
    federation = equal_flops.make_federation(images, split)
    share = SPLITS[split]
    chosen = everyone if share == 1 else sample_uniformly(round(share * len(federation.size)))
    return equal_flops.Trainer(federation, RULE, round(rounds / share), chosen)


def published() -> list[dict[str, Any]]:
    """Return the published rows of whole runs."""
    rows = script.read(RESULTS / "costs.json").get("fresh_flops", {}).get("cells", [])
    return whole_runs(rows, "fashion_mnist", ROUNDS)


def whole_runs(rows: Sequence[Mapping[str, Any]], images: str, rounds: int) -> list[dict[str, Any]]:
    """Return the rows of a set of images and of so many rounds for each client."""
    shown = {(images, split, round(rounds / share)) for split, share in SPLITS.items()}
    return [{**row} for row in rows if (row["dataset"], row["split"], row["rounds"]) in shown]


def beyond(rows: Sequence[Mapping[str, Any]], split: str, one: str, other: str, when: str) -> Difference | None:
    """Return what one candidate has beyond another on a split, `when` "early" or "final"."""
    sides = [
        {row["seed"]: row[when] for row in rows if (row["split"], row["ranks"]) == (split, name)}
        for name in (one, other)
    ]
    return difference(*sides)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for every candidate and split, in Markdown."""
    found: list[harness.Row] = []
    for split, name in itertools.product(dict.fromkeys(row["split"] for row in rows), CANDIDATES):
        own = [row for row in rows if (row["split"], row["ranks"]) == (split, name)]
        row: harness.Row = {"split": split, "ranks": name, "seeds": len(own)}
        row |= {title: f"{100 * np.mean([one[key] for one in own]):.1f}" for title, key in COSTS.items()}
        row |= {"final": f"{100 * np.mean([one['final'] for one in own]):.1f}"}
        for title, other, when in DIFFERENCES:
            if CANDIDATES.index(name) > CANDIDATES.index(other):
                row[title] = in_points(beyond(rows, split, name, other, when))
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
        seeds, splits = (SEEDS[:1], list(SPLITS)[:1]) if options.quick else (SEEDS, list(SPLITS))
        trainers: dict[tuple[float, Any], equal_flops.Trainer] = {}
        there = {tuple(row[key] for key in KEYS) for row in every}
        with harness.shared_programs():
            for seed, split in itertools.product(seeds, splits):
                all_rounds = round(rounds / SPLITS[split])
                cell = dict(zip(KEYS, (images.name, len(images.y_train), all_rounds, split, seed), strict=True))
                if tuple(cell.values()) in there:
                    continue
                alike = SPLITS[split], columns.SPLITS[split]["clients"]  # one program for these
                if alike not in trainers:
                    trainers[alike] = make_trainer(images, split, rounds)
                trainer = trainers[alike]
                trainer.federation = equal_flops.make_federation(images, split, seed)
                found = [cell | row for row in run_seed(trainer, seed, rounds)]
                print(split, seed, *(f"{row['ranks']} {row['final']:.3f}" for row in found), flush=True)
                every = [*every, *found]
                harness.write_json(options.json, known | {"fresh_flops": {"cells": every} | script.about()})
        rows = whole_runs(every, images.name, rounds)
    print(table(rows) if rows else "No cell is complete yet.")


if __name__ == "__main__":
    main()
