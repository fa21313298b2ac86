"""Do any ranks beat a uniform rank that costs as many training FLOPs? Powers of size, AutoRank's, and a search.

A small federation: ten clients share the first `--images` of Fashion-MNIST (staircase, and Dirichlet 0.4 × log-normal
1), 20 rounds of one local epoch, batch 64, SGD 0.03 with momentum; MLP 784-200-200-10, maximum ranks 160, 160, 100.
Everybody's ratio is 0.4, or ratios differ and cost at most as much: `Σ_k n_k FLOPs(r_k)`, integer ranks counted.
A candidate's ratios grow with a weight, `min(1, max(0.02, c · weight))`, with the largest `c` that is affordable:

- `n^p`: powers of a client's number of examples; below 0, small clients get the higher ranks;
- `AutoRank`: in proportion to its ratios (four criteria, no probe); `per FLOP`: to these over the number of examples,
  complexity by unit of cost;
- `searched`: hill climbing from the best of these: a step multiplies every ratio by a log-normal factor, and is kept
  where it is better on validation examples, the mean over two seeds. It climbs their noise, too: it may end behind
  others on fresh seeds, and what it reaches is no bound on what can be reached.

All of these are then trained with fresh seeds, which vary initial weights and the order of batches (the split and the
adapters' start stay), and tested: final accuracy in %, differences from the uniform rank in points, paired over seeds,
95 % t intervals, p values after Holm's correction for all rows. `early` is the same after a quarter of the rounds,
without a test. `FLOPs %` are over those of the uniform rank; a probe costs none here.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.study.equal_flops [--steps 40] [--json FILE]
          python -m benchmarks.study.equal_flops --quick       (embedded subset, one split and rule, two rounds)
          python -m benchmarks.study.equal_flops --report      (runs nothing)
Expect:   a quarter of an hour to half of one a cell on two cores; what was stopped goes on, a tested cell is closed
"""

import argparse
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import autorank_jax as ar
from autorank_jax import datasets
from autorank_jax.engine.flops import FlopModel, training_flops
from autorank_jax.federated.participation import Participation, everyone
from autorank_jax.types import Array, FederatedData, Key, State
from benchmarks import harness, script
from benchmarks.study.columns import SPLITS, STUDIED
from benchmarks.study.options import RESULTS, images, make_parser
from benchmarks.study.paired import difference, holm, in_points
from benchmarks.study.probes import MAX_RANKS, STATIC, example_flops

UNIFORM, LEAST = 0.4, 0.02
"""Everybody's ratio, and the least one of a candidate."""
POWERS = (-1.0, -0.5, -0.25, 0.25, 0.5, 1.0)
STEP = 0.5
"""Standard deviation of the logarithm of a step's factors."""
SELECTION, FRESH = range(2), range(100, 105)
"""Seeds that candidates are chosen with, and those that they are tested with."""
CELLS = tuple(itertools.product(STUDIED, ("raflora", "rbla")))
KEYS = ("dataset", "images", "split", "rule", "rounds")
"""What a cell is known by."""
COLUMNS = ("split", "rule", "ranks", "FLOPs %", "final", "minus uniform", "early, minus uniform", "ratios, by size")


ranks_of = jax.jit(lambda ratios: ar.ranks_from_ratios(ratios, MAX_RANKS))


class Federation(NamedTuple):
    """One split: who has what, and what a rank costs them."""

    data: FederatedData
    images: datasets.Dataset  # its test set is split into validation and test
    flops: FlopModel

    @property
    def size(self) -> np.ndarray:
        """Examples of every client."""
        return np.asarray(self.data.size, float)


def make_task(seed: int) -> ar.Task:
    """Make the network with the weights of a seed."""
    return ar.task_from_nnx(ar.models.MLP((784, 200, 200, 10), rngs=nnx.Rngs(seed)), max_rank=MAX_RANKS)


def make_federation(images: datasets.Dataset, split: str, seed: int = 0) -> Federation:
    """Split the images over clients; here the split is the same for all seeds, as ratios belong to clients."""
    options = dict(SPLITS[split])
    parts = ar.partition.partition(options.pop("split"), images.y_train, options.pop("clients"), seed=seed, **options)
    data = ar.from_parts(images.x_train, images.y_train, parts)
    return Federation(data, images, training_flops(make_task(0), data))


def spent(federation: Federation, ratios: np.ndarray) -> float:
    """Return the training FLOPs of one round at the integer ranks of some ratios."""
    ranks = ranks_of(ratios.astype(np.float32))
    each = example_flops(federation.flops, ranks)
    return float(np.sum(federation.size * each))


def affordable(federation: Federation, weights: np.ndarray, share: float = 1.0) -> np.ndarray:
    """Return ratios that grow with weights (> 0) and cost at most a share of what the uniform rank does."""
    most = share * spent(federation, np.full(len(weights), UNIFORM))
    low, high = 0.0, 1 / float(weights.min())
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(federation, _scaled(weights, middle)) <= most else (low, middle)
    return _scaled(weights, low)


def _scaled(weights: np.ndarray, factor: float) -> np.ndarray:
    return np.round(np.clip(factor * weights, LEAST, 1), 6)  # as they are stored


def first_candidates(federation: Federation) -> dict[str, np.ndarray]:
    """Return the ratios that need no search, by name."""
    size, stats = federation.size, ar.client_stats(federation.data, classes=10)
    scored = np.asarray(ar.policies.autorank(criteria=STATIC)(jax.random.key(0), stats)[0], float)
    weights = {f"n^{power:g}": size**power for power in POWERS} | {"AutoRank": scored, "per FLOP": scored / size}
    uniform = {"uniform": np.full(len(size), UNIFORM)}
    return uniform | {name: affordable(federation, weight / weight.max()) for name, weight in weights.items()}


class Trainer:
    """Trains one split under one rule: any ranks and seeds with one program."""

    def __init__(
        self,
        federation: Federation,
        rule: str,
        rounds: int,
        participation: Participation = everyone,
        learning_rate: float = 0.03,
    ) -> None:
        self.federation, self.rule = federation, ar.aggregators.make_rule(rule)
        self.quarter = max(1, rounds // 4)
        local = ar.make_local_training(make_task(0), optax.sgd(learning_rate, momentum=0.9), batch_size=64)
        one_round = ar.make_round(local, self.rule, lanes=1, participation=participation)
        x, y = federation.images.x_test, federation.images.y_test
        half = len(y) // 2  # validation first, then test
        tests = [ar.make_evaluate(make_task(0), x[part], y[part]) for part in (slice(half), slice(half, None))]

        def run(key: Key, state: State, data: FederatedData) -> Array:
            found = []
            for count in (self.quarter, rounds - self.quarter):
                state, _ = ar.simulate(key, one_round, state, data, rounds=count)
                found.append(jnp.stack([test(state)["accuracy"] for test in tests]))
            return jnp.stack(found)

        self.run = jax.jit(run)

    def train(self, ratios: np.ndarray, seed: int) -> np.ndarray:
        """Return accuracies `(2, 2)`: after a quarter of the rounds and all, on validation and test examples."""
        ranks = ranks_of(ratios.astype(np.float32))
        state = ar.init_state(make_task(seed).server, self.rule, ranks)
        return np.asarray(self.run(jax.random.key(seed), state, self.federation.data), float)


def validate(trainer: Trainer, ratios: np.ndarray, seeds: Sequence[int]) -> float:
    """Return the final accuracy on validation examples, the mean over seeds."""
    return float(np.mean([trainer.train(ratios, seed)[1, 0] for seed in seeds]))


def best(tried: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the candidate of the best validation; of equals the first."""
    return max(tried, key=lambda one: one["validation"])


def candidates(federation: Federation, tried: Sequence[Mapping[str, Any]], steps: int) -> Iterator[tuple[str, Any]]:
    """Yield what has not been tried: first what needs no search, then one step after the other from the best so far.

    `tried` grows meanwhile. A step depends on its number and on what was tried, so a stopped search goes on alike.
    """
    named = first_candidates(federation)
    for name in list(named)[len(tried) :]:
        yield name, named[name]
    for step in range(len(tried) - len(named), steps):
        factors = np.exp(STEP * np.random.default_rng(step).standard_normal(len(federation.size)))
        yield f"step {step + 1}", affordable(federation, np.array(best(tried)["ratios"]) * factors)


def search(cell: dict[str, Any], trainer: Trainer, seeds: Sequence[int], steps: int) -> Iterator[None]:
    """Add candidates to a cell, and stop after each."""
    for name, ratios in candidates(trainer.federation, cell["tried"], steps):
        score = validate(trainer, ratios, seeds)
        cell["tried"] += [{"ranks": name, "ratios": ratios.tolist(), "validation": score}]
        yield


def confirm(cell: dict[str, Any], trainer: Trainer, seeds: Sequence[int]) -> Iterator[None]:
    """Test what needs no search, and what the search found, with fresh seeds; stop after each."""
    named = [one for one in cell["tried"] if not one["ranks"].startswith("step")]
    found = [] if best(cell["tried"]) in named else [{**best(cell["tried"]), "ranks": "searched"}]
    for one in [*named, *found][len(cell["tested"]) :]:
        ratios = np.array(one["ratios"])
        tested = [trainer.train(ratios, seed)[:, 1].tolist() for seed in seeds]
        cost = spent(trainer.federation, ratios) / spent(trainer.federation, np.full(len(ratios), UNIFORM))
        cell["tested"] += [
            {
                "ranks": one["ranks"],
                "ratios": one["ratios"],
                "flops": cost,
                "early, final": tested,
                "seeds": list(seeds),
            }
        ]
        yield


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return a row for everything that was tested, in Markdown."""
    rows, found = [], []
    for cell in cells:
        order = np.argsort(cell["size"])
        for one in cell["tested"]:
            apart = [_apart(one, cell["tested"][0], when) for when in (1, 0)]
            found.append((cell, one, order, apart))
    ps = holm([apart[0].p if one["ranks"] != "uniform" else None for _, one, _, apart in found])
    for (cell, one, order, apart), p in zip(found, ps, strict=True):
        row: harness.Row = {name: cell[name] for name in ("split", "rule")}
        row |= {"ranks": one["ranks"], "FLOPs %": f"{100 * one['flops']:.1f}"}
        row["final"] = f"{100 * np.mean([final for _, final in one['early, final']]):.1f}"
        if one["ranks"] != "uniform":
            row |= {"minus uniform": in_points(apart[0], p), "early, minus uniform": in_points(apart[1])}
        rows.append(row | {"ratios, by size": " ".join(f"{one['ratios'][k]:.2f}" for k in order)})
    return harness.markdown_table(rows, COLUMNS)


def _apart(one: Mapping[str, Any], other: Mapping[str, Any], when: int) -> Any:
    sides = [dict(zip(x["seeds"], np.array(x["early, final"])[:, when], strict=True)) for x in (one, other)]
    return difference(*sides)


def run(
    options: argparse.Namespace, known: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield the cell at work and all cells after everything that was trained."""
    whole = datasets.load_dataset("fashion_mnist_mini" if options.quick else "fashion_mnist")
    part = whole._replace(x_train=whole.x_train[: options.images], y_train=whole.y_train[: options.images])
    rounds, steps = (2, 1) if options.quick else (20, options.steps)
    select, fresh = (SELECTION[:1], FRESH[:1]) if options.quick else (SELECTION, FRESH)
    cells = {tuple(cell[key] for key in KEYS): cell for cell in known}
    for split, rule in CELLS[: 1 if options.quick else None]:
        federation = make_federation(part, split)
        named = dict(zip(KEYS, (part.name, len(part.y_train), split, rule, rounds), strict=True))
        blank = named | {"size": federation.size.tolist(), "tried": [], "tested": []}
        cell = cells.setdefault(tuple(named.values()), blank)
        trainer = Trainer(federation, rule, rounds)
        searched = () if cell["tested"] else search(cell, trainer, select, steps)
        for _ in itertools.chain(searched, confirm(cell, trainer, fresh)):
            yield cell, list(cells.values())


@harness.mistakes_in_words()
def main(arguments: list[str] | None = None) -> None:
    """Search, confirm, print, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="the embedded subset, one split and rule, two rounds")
    parser.add_argument("--steps", type=int, default=40, help="of the search, 40")
    parser.add_argument("--images", type=images, default=6000, help="training images, 6000")
    parser.add_argument("--json", type=Path, help="file to write to; what it holds is not run again")
    parser.add_argument("--report", action="store_true", help="run nothing: show what is published")
    options = parser.parse_args(arguments)
    known = script.read(RESULTS / "costs.json" if options.report else options.json)
    cells = known.get("equal_flops", {}).get("cells", [])
    if not options.report:
        with harness.shared_programs():
            for cell, now in run(options, cells):
                cells, last = now, (cell["tested"] or cell["tried"])[-1]
                print(cell["split"], cell["rule"], last["ranks"], last.get("validation", ""), flush=True)
                harness.write_json(options.json, known | {"equal_flops": {"cells": cells} | script.about()})
    print(table(cells) if any(cell["tested"] for cell in cells) else "No cell is complete yet.")


if __name__ == "__main__":
    main()
