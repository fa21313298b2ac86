"""What product rules lose by sketches: their error over the best one, on trajectories of real training.

Every product that a rule averages in a run with whole products is sketched besides, with the server of that round, and
split into factors of the maximum rank. `first %` and `later %` say by how much `‖P - AB‖_F` exceeds that of the
truncated SVD in the first round and in later ones, the worst over layers and keys; `columns` is how many random columns
a sketch has beside the rank positions (the rules take as many as positions, at least 16). `tail` is what the best one
loses, `‖P - AB‖_F / ‖P‖_F`, at most. Drift is the learning rate times 100. MLP 784-200-200-10, embedded Fashion-MNIST
subset.

With `--accuracy` whole runs are compared instead: final test accuracy in % of each rule with whole products, with
sketches, and `again` with whole products summed in another order (two lanes in place of one), which tells how far
rounding alone carries a run; differences in points, mean over seeds and the largest of one. AutoRank's ranks without a
probe up to 16, the first `--images` of Fashion-MNIST, one local epoch, batch 64, SGD 0.03 with momentum.

Command:  python -m benchmarks.study.sketch_error [--json FILE]     (--quick: one setting, two rounds)
          AUTORANK_JAX_DATA=DIR python -m benchmarks.study.sketch_error --accuracy [--images 60000] [--json FILE]
          python -m benchmarks.study.sketch_error --report    (runs nothing: prints the published rows)
Hardware: two CPU cores
Time and numbers to expect: a minute a setting, most of it compilation; see benchmarks/study/rules.md
"""

import argparse
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from autorank_jax import aggregators, datasets, federated
from autorank_jax.adapters.lora import max_ranks
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.aggregators import sketches
from autorank_jax.aggregators.products import split_product
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state, simulate
from autorank_jax.evaluation.metrics import make_evaluate
from autorank_jax.models.vision import MLP
from autorank_jax.ranks import policies
from autorank_jax.types import Adapter, Aggregator, Array, FederatedData, Key, RoundFn, Server, State, Sums, Task
from benchmarks import harness, script
from benchmarks.study.columns import SPLITS
from benchmarks.study.options import RESULTS, images, make_parser

WIDTH, KEYS, SHARES = 200, 3, (0.5, 1.0, 2.0)
COLUMNS = ("rule", "split", "rank", "cohort", "drift", "columns", "first %", "later %", "tail")
RUN_COLUMNS = (
    "rule", "split", "images", "whole", "sketch", "again", "sketch - whole", "sketch, most", "again - whole",
    "again, most",
)  # fmt: skip
SKETCHED = ("raflora", "flexlora", "florist", "lora_fair")
RUN_SPLITS = ("staircase", "dirichlet-0.4-10", "dirichlet-0.4-100")
WAYS = {"whole": (True, 1), "sketch": (False, 1), "again": (True, 2)}
"""Ways to run a rule: `exact`, and lanes."""
CRITERIA = ("size", "classes", "label_entropy", "gini_simpson")


class Setting(NamedTuple):
    """One trajectory."""

    rule: str = "raflora"
    split: str = "dirichlet-0.4-10"
    rank: int = 16
    cohort: int = 10
    rate: float = 0.03


SETTINGS = (
    Setting(), Setting("flexlora"), Setting(split="staircase"), Setting(rank=4), Setting(rank=4, cohort=40),
    Setting(cohort=40), Setting(rate=0.1), Setting("flexlora", "staircase", 4, 10, 0.1),
)  # fmt: skip


class Product(NamedTuple):
    """What a rule averaged in one layer, and the adapter that clients started from."""

    round: int
    matrix: Array
    old: Adapter


def watched(rule: Aggregator, like: Server) -> Aggregator:
    """Let a rule of whole products leave what it averages in its state."""
    step = rule.step
    assert step is not None
    blank = {path: jnp.zeros_like(a.lora_a @ a.lora_b) for path, a in like.trainable.adapters.items()}

    def update(key: Key, sums: Sums, _: Any, server: Server) -> tuple[Server, Any]:
        return rule.update(key, sums, (), server)[0], step.mean(sums, (), server)[0].matrices

    return rule._replace(
        init=lambda server: blank,  # noqa: ARG005
        start=lambda server, state, client: rule.start(server, (), client),  # noqa: ARG005
        trains=lambda state: rule.trains(()),  # noqa: ARG005
        update=update,
        step=None,
    )


def split_data(images: datasets.Dataset, split: str, seed: int, **options: Any) -> FederatedData:
    """Split the training images over clients as the study does."""
    options = dict(SPLITS[split]) | options
    parts = federated.partition.partition(
        options.pop("split"), images.y_train, options.pop("clients"), seed=seed, **options
    )
    return federated.from_parts(images.x_train, images.y_train, parts)


def make_task(seed: int, rank: int) -> Task:
    """Return the network with adapters of a rank, of ten at most in its head."""
    model = MLP((784, WIDTH, WIDTH, 10), rngs=nnx.Rngs(seed))
    return task_from_nnx(model, max_rank={f"layers/{n}": min(rank, 10 if n == 2 else WIDTH) for n in range(3)})


def follow(setting: Setting, rounds: int) -> Iterator[Product]:
    """Train, and yield the products of every round."""
    images = datasets.load_dataset("fashion_mnist_mini")
    data, task = split_data(images, setting.split, 0, clients=setting.cohort), make_task(0, setting.rank)
    widest, rng = max_ranks(task.server.trainable), np.random.default_rng(0)
    ranks = {path: rng.integers(1, width + 1, data.size.shape[0]) for path, width in widest.items()}
    rule = watched(aggregators.make_rule(setting.rule, exact=True), task.server)
    local = make_local_training(task, optax.sgd(setting.rate, momentum=0.9), batch_size=32)
    run, state = jax.jit(make_round(local, rule, lanes=2)), init_state(task.server, rule, ranks)
    for number in range(rounds):
        before = state.server.trainable.adapters
        state, _ = run(jax.random.key(1), state, data)
        for path, matrix in state.aggregator.items():
            if matrix.shape[1] == WIDTH:  # the head is too narrow for most sketches
                yield Product(number, matrix, before[path])


@functools.partial(jax.jit, static_argnums=2)
def split(key: Key, product: Product, columns: int) -> Adapter:
    """Split a product of which only a sketch is known."""
    old = product.old
    maps = sketches.draw_maps(key, old, columns)
    whole = sketches.sketch_product(product.matrix, jnp.eye(product.matrix.shape[1]), maps, old)
    return split_product(sketches.reconstruct(whole, maps, old), old, sigma="both")


def measure(setting: Setting, rounds: int) -> list[harness.Row]:
    """Return a row for each number of random columns."""
    worst: dict[tuple[int, str], float] = {}
    random = sorted({max(1, round(share * setting.rank)) for share in SHARES} | {max(setting.rank, 16)})
    for product in follow(setting, rounds):
        matrix = np.asarray(product.matrix, float)
        values = np.linalg.svd(matrix, compute_uv=False)
        best, when = np.linalg.norm(values[setting.rank :]), "later %" if product.round else "first %"
        for columns, seed in itertools.product(random, range(KEYS)):
            a, b = (np.asarray(f, float) for f in split(jax.random.key(seed), product, setting.rank + columns))
            over = 100 * (np.linalg.norm(matrix - a @ b) / best - 1)
            found = {when: over, "tail": best / np.linalg.norm(values)}
            worst |= {(columns, k): max(float(v), worst.get((columns, k), 0.0)) for k, v in found.items()}
    named = setting._asdict() | {"drift": 100 * setting.rate}
    return [named | {"columns": c} | {k: v for (n, k), v in worst.items() if n == c} for c in random]


def last_state(one_round: RoundFn, rounds: int, key: Key, state: State, data: FederatedData) -> State:
    """Train, and return where it ends."""
    return simulate(key, one_round, state, data, rounds=rounds)[0]


def compare(images: datasets.Dataset, rule: str, split: str, *, rounds: int, seeds: int) -> harness.Row:
    """Train a rule in all ways, and return its final accuracies and their differences."""
    final: dict[str, list[float]] = {way: [] for way in WAYS}
    task = make_task(0, 16)
    evaluate = jax.jit(make_evaluate(task, images.x_test, images.y_test))
    local = make_local_training(task, optax.sgd(0.03, momentum=0.9), batch_size=64)
    for way, (exact, lanes) in WAYS.items():
        made = aggregators.make_rule(rule, exact=exact)
        run = jax.jit(functools.partial(last_state, make_round(local, made, lanes=lanes), rounds))
        for seed in range(seeds):
            data, server = split_data(images, split, seed), make_task(seed, 16).server
            ratios, _ = policies.autorank(criteria=CRITERIA)(
                jax.random.key(0), federated.client_stats(data, classes=10)
            )
            ranks = policies.ranks_from_ratios(ratios, max_ranks(server.trainable))
            state = run(jax.random.key(seed), init_state(server, made, ranks), data)
            final[way].append(100 * float(evaluate(state)["accuracy"]))
    row: harness.Row = {"rule": rule, "split": split} | {way: round(float(np.mean(a)), 2) for way, a in final.items()}
    for way in ("sketch", "again"):
        apart = np.subtract(final[way], final["whole"])
        row |= {f"{way} - whole": round(float(apart.mean()), 2), f"{way}, most": round(float(abs(apart).max()), 2)}
    return row


def measure_accuracy(options: argparse.Namespace, known: Sequence[harness.Row]) -> Iterator[list[harness.Row]]:
    """Yield the rows of `compare` for every rule and split after each of them; those that are known are kept."""
    whole = datasets.load_dataset("fashion_mnist_mini" if options.quick else "fashion_mnist")
    part = whole._replace(x_train=whole.x_train[: options.images], y_train=whole.y_train[: options.images])
    rounds, seeds = (2, 1) if options.quick else (30, 3)
    rows = {(str(row["split"]), str(row["rule"]), row["images"]): row for row in known}
    for split, rule in itertools.product(RUN_SPLITS[: 1 if options.quick else None], SKETCHED):
        cell = (split, rule, len(part.y_train))
        if cell not in rows:
            row = compare(part, rule, split, rounds=rounds, seeds=seeds)
            rows[cell] = {"rule": rule, "split": split, "images": len(part.y_train)} | row
        yield list(rows.values())


def measure_errors(options: argparse.Namespace) -> Iterator[list[harness.Row]]:
    """Yield the rows of `measure` after every setting."""
    rows: list[harness.Row] = []
    for setting in SETTINGS[3:4] if options.quick else SETTINGS:
        rows += measure(setting, 2 if options.quick else options.rounds)
        yield rows


@harness.mistakes_in_words()
def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one setting, two rounds")
    parser.add_argument("--accuracy", action="store_true", help="accuracy of whole runs in place of errors")
    parser.add_argument("--images", type=images, default=60_000, help="training images of --accuracy")
    parser.add_argument("--json", type=Path, help="file to write to; runs and rows of the other kind in it stay")
    parser.add_argument("--report", action="store_true", help="measure nothing: show what is published")
    options = parser.parse_args(arguments)
    if options.report:
        published = script.read(RESULTS / "svds.json")
        print(harness.markdown_table(published["rows"], COLUMNS))
        if runs := published.get("accuracy"):
            print("", harness.markdown_table(runs, RUN_COLUMNS), sep="\n")
        return
    old = script.read(options.json)
    part = "accuracy" if options.accuracy else "rows"
    for rows in measure_accuracy(options, old.get("accuracy", ())) if options.accuracy else measure_errors(options):
        print(harness.markdown_table(rows, RUN_COLUMNS if options.accuracy else COLUMNS), flush=True)
        ran = {"versions": harness.versions(), "device": harness.device()}
        harness.write_json(options.json, old | {part: rows} | ran)


if __name__ == "__main__":
    main()
