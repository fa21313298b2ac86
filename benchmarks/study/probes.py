"""What AutoRank's probe may cost: how well cheaper probes give the ranks of the full one.

The full probe trains every client five epochs at full rank. Cheaper ones train at a tenth of the rank, for two epochs,
on a quarter of a client's examples (32 at least), or not at all. `τ` is Kendall's rank correlation (tau-b) of the
clients' ratios with those under the full probe, the mean over splits and seeds, `worst` the worst of them; `moved` is
the mean change of a ratio. `cost %` is training FLOPs over those of 20 rounds at the ranks of the full probe, the mean
over splits. `again` is the full probe with other batches: as near as a probe of the same cost comes to itself.
MLP 784-200-200-10, maximum ranks 160, 160, 100, batch 64, SGD 0.01 with momentum 0.9.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.study.probes [--json FILE]     (Fashion-MNIST)
          python -m benchmarks.study.probes --quick                                (embedded subset, one split and seed)
          python -m benchmarks.study.probes --report                               (runs nothing)
Not run in full yet.
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
from autorank_jax.ranks.criteria import CRITERIA, NEEDS_LOSSES
from benchmarks import harness, script
from benchmarks.study.columns import SPLITS
from benchmarks.study.options import RESULTS, make_parser

ROUNDS = 20
"""What the cost is compared with."""
LEAST = 32
"""Examples of a client that a probe on a part sees, where it has them."""
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


def part_of(parts: list[np.ndarray], share: float) -> list[np.ndarray]:
    """Return a share of every client's examples, but some; which lie in random order within a client."""
    return [part[: max(round(share * len(part)), min(LEAST, len(part)))] for part in parts]


class Federation(NamedTuple):
    """One split of one seed."""

    images: datasets.Dataset
    parts: list[np.ndarray]
    task: ar.Task
    seed: int

    def data(self, share: float = 1.0) -> ar.FederatedData:
        """Return a share of every client's examples."""
        return ar.from_parts(self.images.x_train, self.images.y_train, part_of(self.parts, share))


def make_federation(images: datasets.Dataset, split: str, seed: int) -> Federation:
    """Split the images and make the network."""
    options = dict(SPLITS[split])
    parts = ar.partition.partition(options.pop("split"), images.y_train, options.pop("clients"), seed=seed, **options)
    model = ar.models.MLP((784, 200, 200, 10), rngs=nnx.Rngs(seed))
    order = np.random.default_rng(seed)
    return Federation(images, [order.permutation(p) for p in parts], ar.task_from_nnx(model, max_rank=MAX_RANKS), seed)


def ratios_of(federation: Federation, how: Probe) -> np.ndarray:
    """Return the clients' ratios under a probe."""
    stats = ar.client_stats(federation.data(), classes=10)
    if not how.epochs:
        return np.asarray(ar.policies.autorank(criteria=STATIC)(jax.random.key(0), stats)[0])
    local = ar.make_local_training(federation.task, optax.sgd(0.01, momentum=0.9), batch_size=64)
    rule = ar.aggregators.rbla()
    state = ar.init_state(federation.task.server, rule, None, clients=len(federation.parts))
    found = ar.probe(
        jax.random.key(federation.seed + 1000 * how.seed), local, state, federation.data(how.share),
        epochs=how.epochs, ratio=how.ratio, lanes=2, classes=10,
    )  # fmt: skip
    stats = stats._replace(epoch_losses=found.epoch_losses, epochs=found.epochs)
    return np.asarray(ar.policies.autorank()(jax.random.key(0), stats)[0])


def spent(federation: Federation, how: Probe, flops: FlopModel) -> float:
    """Return the training FLOPs of a probe."""
    examples = sum(map(len, part_of(federation.parts, how.share)))
    ranks = equal_ranks(MAX_RANKS, 1, how.ratio)
    return how.epochs * examples * float(example_flops(flops, ranks).sum())


def example_flops(flops: FlopModel, ranks: dict[str, Any]) -> Any:
    """Return training FLOPs of an example at some ranks."""
    return flops.base + sum(flops.per_rank[path] * np.asarray(rank) for path, rank in ranks.items())


def compare(federation: Federation) -> Iterator[dict[str, Any]]:
    """Yield how each probe does on one split and seed."""
    flops = training_flops(federation.task, federation.data())
    full = ratios_of(federation, FULL)
    ranks = ar.ranks_from_ratios(full, MAX_RANKS)
    sizes = np.array([len(part) for part in federation.parts])
    rounds = ROUNDS * float(np.sum(sizes * example_flops(flops, ranks)))
    yield {"probe": FULL.label(), "tau": 1.0, "moved": 0.0, "cost": spent(federation, FULL, flops) / rounds}
    for how in PROBES:
        ratios = ratios_of(federation, how)
        yield {
            "probe": how.label(),
            "tau": float(kendalltau(full, ratios).statistic),
            "moved": float(np.mean(np.abs(full - ratios))),
            "cost": spent(federation, how, flops) / rounds,
        }


def table(cells: list[dict[str, Any]]) -> str:
    """Return a row for every probe, in Markdown."""
    rows: list[harness.Row] = []
    for name in dict.fromkeys(cell["probe"] for cell in cells):
        own = [cell for cell in cells if cell["probe"] == name]
        taus = [cell["tau"] for cell in own]
        moved, cost = (100 * float(np.mean([cell[what] for cell in own])) for what in ("moved", "cost"))
        worst = min(own, key=lambda cell: cell["tau"])
        rows.append(
            {
                "probe": name,
                "τ": f"{np.mean(taus):.2f}",
                "worst": f"{worst['tau']:.2f} ({worst['split']})",
                "moved": f"{moved / 100:.3f}",
                "cost %": f"{cost:.1f}",
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
        published = script.read(RESULTS / "probes.json").get("cells")
        print(table(published) if published else "No cell is complete yet.")
        return
    images = datasets.load_dataset("fashion_mnist_mini" if options.quick else "fashion_mnist")
    splits = ["staircase"] if options.quick else [name for name in SPLITS if name != "central"]
    known = script.read(options.json)
    cells: list[dict[str, Any]] = known.get("cells", [])
    there = {(cell["split"], cell["seed"]) for cell in cells}
    seeds = range(1 if options.quick else options.seeds)
    with harness.shared_programs():
        for seed, split in itertools.product(seeds, splits):
            if (split, seed) in there:
                continue
            cells += [{"split": split, "seed": seed} | row for row in compare(make_federation(images, split, seed))]
            print(f"after {split}, seed {seed}:\n\n{table(cells)}\n", flush=True)
            content = {"cells": cells, "versions": harness.versions(), "device": harness.device()}
            harness.write_json(options.json, content)


if __name__ == "__main__":
    main()
