"""What AutoRank's probe may cost: how well cheaper probes give the ranks of the full one.

The full probe trains every client five epochs at full rank. Cheaper ones train at a tenth of the rank, for two epochs,
on a quarter of a client's examples (32 at least), or not at all. `τ` is Kendall's rank correlation (tau-b) of the
clients' ratios with those under the full probe, the mean over splits and seeds, `worst` the least mean of a split;
`moved` is the mean change of a ratio, `τ of the criterion` the correlation of the entropies of the losses themselves.
`cost %` is training FLOPs over those of 20 rounds at the ranks of the full probe, the mean over splits, `dearest` that
of the dearest split. `again` is the full probe with other batches: as near as one of the same cost comes to itself.
MLP 784-200-200-10, maximum ranks 160, 160, 100, batch 64, SGD 0.01 with momentum 0.9.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.study.probes [--json FILE]     (Fashion-MNIST)
          python -m benchmarks.study.probes --quick                                (embedded subset, one split and seed)
          python -m benchmarks.study.probes --report                               (runs nothing)
Expect:   minutes a split and seed; see benchmarks/study/README.md
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from scipy.stats import kendalltau

import autorank_jax as ar
from autorank_jax import datasets
from autorank_jax.adapters.lora import equal_ranks
from autorank_jax.engine.flops import FlopModel, training_flops
from autorank_jax.engine.probe import part_sizes
from autorank_jax.ranks.criteria import CRITERIA, NEEDS_LOSSES
from benchmarks import harness, script
from benchmarks.study.columns import SPLITS
from benchmarks.study.options import RESULTS, make_parser

CURVES = "tau of the criterion"
ROUNDS = 20
"""What the cost is compared with."""
MAX_RANKS = {"layers/0": 160, "layers/1": 160, "layers/2": 100}
STATIC = tuple(name for name in CRITERIA if name not in NEEDS_LOSSES)


class Probe(NamedTuple):
    """How clients are probed."""

    epochs: int = 5
    ratio: float = 1.0
    share: float = 1.0
    seed: int = 0

    def label(self) -> str:
        """Name it in a table."""
        if not self.epochs:
            return "none: four criteria"
        words = f"{self.epochs} epochs, {self.ratio:g} of the rank, {self.share:g} of the data"
        return words + (" again" if self.seed else "")


FULL = Probe()
PROBES = (
    Probe(seed=1), Probe(ratio=0.1), Probe(epochs=2), Probe(epochs=2, ratio=0.1), Probe(epochs=3, ratio=0.1),
    Probe(share=0.25), Probe(ratio=0.1, share=0.25), Probe(epochs=2, ratio=0.1, share=0.25), Probe(epochs=0),
)  # fmt: skip


class Federation(NamedTuple):
    """One split of one seed."""

    data: ar.FederatedData
    task: ar.Task
    seed: int


def make_federation(images: datasets.Dataset, split: str, seed: int) -> Federation:
    """Split the images and make the network."""
    options = dict(SPLITS[split])
    parts = ar.partition.partition(options.pop("split"), images.y_train, options.pop("clients"), seed=seed, **options)
    model = ar.models.MLP((784, 200, 200, 10), rngs=nnx.Rngs(seed))
    data = ar.from_parts(images.x_train, images.y_train, parts)
    return Federation(data, ar.task_from_nnx(model, max_rank=MAX_RANKS), seed)


def run_probe(federation: Federation, how: Probe) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the clients' ratios under a probe, and the entropies of their losses where there was one."""
    if not how.epochs:
        stats = ar.client_stats(federation.data, classes=10)
        return np.asarray(ar.policies.autorank(criteria=STATIC)(jax.random.key(0), stats)[0]), None
    local = ar.make_local_training(federation.task, optax.sgd(0.01, momentum=0.9), batch_size=64)
    state = ar.init_state(federation.task.server, ar.aggregators.rbla(), None, clients=len(federation.data.size))
    stats = ar.probe(
        jax.random.key(federation.seed + 1000 * how.seed), local, state, federation.data,
        epochs=how.epochs, ratio=how.ratio, share=how.share, lanes=2, classes=10,
    )  # fmt: skip
    ratios, info = ar.policies.autorank()(jax.random.key(0), stats)
    return np.asarray(ratios), np.asarray(info.matrix)[:, info.criteria.index("loss_entropy")]


def spent(federation: Federation, how: Probe, flops: FlopModel) -> float:
    """Return the training FLOPs of a probe."""
    examples = float(part_sizes(federation.data.size, how.share).sum())
    ranks = equal_ranks(MAX_RANKS, 1, how.ratio)
    return how.epochs * examples * float(example_flops(flops, ranks).sum())


def example_flops(flops: FlopModel, ranks: dict[str, Any]) -> Any:
    """Return training FLOPs of an example at some ranks."""
    return flops.base + sum(flops.per_rank[path] * np.asarray(rank) for path, rank in ranks.items())


def compare(federation: Federation) -> Iterator[dict[str, Any]]:
    """Yield how each probe does on one split and seed."""
    flops = training_flops(federation.task, federation.data)
    full, entropy = run_probe(federation, FULL)
    ranks = ar.ranks_from_ratios(full, MAX_RANKS)
    rounds = ROUNDS * float(np.sum(np.asarray(federation.data.size) * example_flops(flops, ranks)))
    for how in (FULL, *PROBES):
        ratios, own = (full, entropy) if how == FULL else run_probe(federation, how)
        yield {
            "probe": how.label(),
            "tau": float(kendalltau(full, ratios).statistic),
            CURVES: None if own is None else float(kendalltau(entropy, own).statistic),
            "moved": float(np.mean(np.abs(full - ratios))),
            "cost": spent(federation, how, flops) / rounds,
        }


def table(cells: list[dict[str, Any]]) -> str:
    """Return a row for every probe, in Markdown."""
    rows: list[harness.Row] = []
    for name in dict.fromkeys(cell["probe"] for cell in cells):
        own = [cell for cell in cells if cell["probe"] == name]
        splits = dict.fromkeys(cell["split"] for cell in own)

        def mean(what: str, split: str = "", own: list[dict[str, Any]] = own) -> float:
            return float(np.mean([cell[what] for cell in own if split in ("", cell["split"])]))

        worst = min(splits, key=lambda split: mean("tau", split))
        rows.append(
            {
                "probe": name,
                "τ": f"{mean('tau'):.2f}",
                "worst": f"{mean('tau', worst):.2f} ({worst})",
                "τ of the criterion": None if own[0][CURVES] is None else f"{mean(CURVES):.2f}",
                "moved": f"{mean('moved'):.3f}",
                "cost %": f"{100 * mean('cost'):.1f}",
                "dearest": f"{100 * max(mean('cost', split) for split in splits):.1f}",
            }
        )
    return harness.markdown_table(rows, list(rows[0]))


@harness.mistakes_in_words()
def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="the embedded subset, one split and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--json", type=Path, help="file to write to; the splits and seeds that it holds are not run again"
    )
    parser.add_argument("--report", action="store_true", help="run nothing: show what is published")
    options = parser.parse_args(arguments)
    if options.report:
        published = script.read(RESULTS / "costs.json").get("probes", {}).get("cells")
        print(table(published) if published else "No cell is complete yet.")
        return
    images = datasets.load_dataset("fashion_mnist_mini" if options.quick else "fashion_mnist")
    splits = ["staircase"] if options.quick else [name for name in SPLITS if name != "central"]
    known = script.read(options.json)
    cells: list[dict[str, Any]] = known.get("probes", {}).get("cells", [])
    there = {(cell["dataset"], cell["split"], cell["seed"]) for cell in cells}
    seeds = range(1 if options.quick else options.seeds)
    with harness.shared_programs():
        for seed, split in itertools.product(seeds, splits):
            if (images.name, split, seed) in there:
                continue
            named = {"dataset": images.name, "split": split, "seed": seed}
            cells += [named | row for row in compare(make_federation(images, split, seed))]
            print(f"after {split}, seed {seed}:\n\n{table(cells)}\n", flush=True)
            harness.write_json(options.json, known | {"probes": {"cells": cells} | script.about()})


if __name__ == "__main__":
    main()
