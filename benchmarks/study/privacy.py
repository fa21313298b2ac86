"""What differential privacy costs: accuracy over ε, for AutoRank's ranks, a uniform rank of equal bytes, and full rank.

1,000 clients (Dirichlet 0.3 × log-normal 1), of whom each takes part in a round with probability 0.1; RBLA with fixed
denominators; MLP 784-200-200-10; 100 rounds of one local epoch, batch 32, SGD 0.1 without momentum, clip 1, δ = 1e-5.
Ranks are public, and AutoRank goes without the probe. ε = ∞ is RBLA as it is without privacy: neither clip nor noise,
and clients weigh as many examples as they have, over the owners who came. So the step from ∞ to the largest budget is
that of equal weights and clipping, too.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.study.privacy       (full Fashion-MNIST)
          python -m benchmarks.study.privacy --quick                     (embedded subset, 50 clients)
          python -m benchmarks.study.privacy --report                    (runs nothing)
Writes:   a line per ε in benchmarks/study/results/privacy.jsonl; the table, and privacy.png beside it
Expect:   see benchmarks/study/README.md
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from autorank_jax.experiment import Experiment
from benchmarks import harness
from benchmarks.study.cell_file import CellFile
from benchmarks.study.cells import NOTHING, Bounds, run_cells
from benchmarks.study.columns import FULL_PROBE
from benchmarks.study.options import RESULTS, count, make_parser
from benchmarks.study.paired import difference, in_points
from benchmarks.study.runs import Reached, percent, runs_of, values

BUDGETS = (1.0, 2.0, 4.0, 8.0, float("inf"))
POLICIES: Mapping[str, str] = {"autorank": "AutoRank", "uniform_bytes": "uniform rank", "full": "full rank"}
COLOURS = {"autorank": "#0072B2", "uniform_bytes": "#D55E00", "full": "#009E73"}
SEEDS = 3
Found = Mapping[float, Mapping[str, Mapping[int, Reached]]]
"""Runs by seed, by budget and policy."""


def make_cells(*, quick: bool, seeds: int) -> dict[str, Experiment]:
    """Return one experiment per budget."""

    def experiment(budget: float) -> Experiment:
        private = {} if budget == float("inf") else {"dp_epsilon": budget, "dp_clip": 1.0}
        return Experiment(
            **FULL_PROBE,
            dataset="fashion_mnist_mini" if quick else "fashion_mnist",
            split="dirichlet_lognormal",
            clients=50 if quick else 1000,
            criteria=("size", "classes", "label_entropy", "gini_simpson"),
            rank_policies=tuple(POLICIES),
            aggregators=("rbla",),
            rounds=3 if quick else 100,
            local_epochs=1,
            batch_size=32,
            learning_rate=0.1,
            momentum=0.0,
            participation=0.1,
            sampling="independent",
            seeds=seeds,
            eval_every=1 if quick else 10,
            rank_levels=2,
            **private,
        )

    return {f"epsilon-{budget:g}": experiment(budget) for budget in BUDGETS}


def run_budgets(cells: Mapping[str, Experiment], file: CellFile, bounds: Bounds) -> Found:
    """Run what is missing within bounds, and return what is there."""
    return {
        float(name.removeprefix("epsilon-")): runs_of(cell) for name, cell in run_cells(cells, file, bounds).items()
    }


def finals(found: Found, budget: float, policy: str) -> dict[int, float]:
    """Return final accuracies by seed; a run that diverged guesses."""
    return values(found.get(budget, {}).get(policy, {}), "final")


def table(found: Found) -> str:
    """Return the table of what is there, in Markdown."""
    rows = []
    for budget in found:
        row: harness.Row = {"ε": "∞" if budget == float("inf") else f"{budget:g}"}
        row |= {name: percent(list(finals(found, budget, policy).values())) for policy, name in POLICIES.items()}
        gain = difference(finals(found, budget, "autorank"), finals(found, budget, "uniform_bytes"))
        rows.append(row | {"AutoRank - uniform": in_points(gain, None)})
    return harness.markdown_table(rows, list(rows[0]))


def draw(found: Found, about: str) -> Figure:
    """Draw final accuracy over ε, a line per policy through the means, from its worst seed to its best."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    budgets = list(found)
    for shift, (policy, name) in enumerate(POLICIES.items()):
        reached = 100 * np.array([list(finals(found, budget, policy).values()) for budget in budgets])
        means = reached.mean(axis=1)
        beyond = np.abs([means - reached.min(axis=1), reached.max(axis=1) - means])
        places = [place + 0.06 * (shift - 1) for place in range(len(budgets))]
        axes.errorbar(places, means, beyond, color=COLOURS[policy], marker="o", capsize=3, label=name)
    axes.set_xticks(range(len(budgets)), ["∞" if b == float("inf") else f"{b:g}" for b in budgets])
    axes.set(xlabel="ε at δ = 1e-5, after the last round", ylabel="final test accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    seeds = max(len(runs) for policies in found.values() for runs in policies.values())
    figure.suptitle("What privacy costs under RBLA, by ranks", x=0.01, ha="left", fontsize=11.5, weight="bold")
    axes.set_title(f"{about}; bars: worst to best of {seeds} seeds", fontsize=9, loc="left")
    return figure


def caption(cells: Mapping[str, Experiment]) -> str:
    """Say what was run."""
    one = next(iter(cells.values()))
    return f"{one.clients:,} clients, {100 * one.participation:g} % a round, {one.rounds} rounds"


def draw_published() -> Figure:
    """Draw what is published."""
    cells = make_cells(quick=False, seeds=SEEDS)
    return draw(run_budgets(cells, CellFile(RESULTS / "privacy.jsonl"), NOTHING), caption(cells))


@harness.mistakes_in_words()
def main(arguments: list[str] | None = None) -> None:
    """Run the cells that are missing, then print the table and draw the picture of what there is."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="the embedded subset")
    parser.add_argument("--seeds", type=int, default=None, help=f"default {SEEDS}")
    parser.add_argument("--report", action="store_true", help="run nothing: show what there is")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    file = CellFile(options.out / ("privacy_mini.jsonl" if options.quick else "privacy.jsonl"))
    cells = make_cells(quick=options.quick, seeds=count("seeds", options.seeds, SEEDS))
    with harness.shared_programs():
        found = run_budgets(cells, file, NOTHING if options.report else Bounds())
    if not found:
        print("No cell is complete yet.")
        return
    print(table(found))
    if not options.report:
        draw(found, caption(cells)).savefig(file.path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
