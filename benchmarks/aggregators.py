"""Every aggregation rule under every kind of rank: which rules hold up where rank and data are not nested?

Rules × splits (staircase; Dirichlet 0.3 × log-normal 1) × rank policies of equal bytes (AutoRank; one rank for all at
AutoRank's mean ratio over clients; AutoRank's ranks shuffled among clients, another permutation for every seed; its
ranks reversed), ten clients, MLP 784-200-200-10, one local epoch, batch 64, SGD 0.01 with momentum 0.9.

Command:  AUTORANK_JAX_DATA=DIR python benchmarks/aggregators.py     (full Fashion-MNIST, an hour or more on two cores)
          python benchmarks/aggregators.py --quick                   (embedded subset)
Writes:   a JSON per cell, so that an interrupted run goes on, then a table and a heat map in benchmarks/results
Expect:   see benchmarks/README.md
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from curves import GUESSING, percent
from grid import Cell, run_cells
from pictures import heat_map

from autorank_jax.experiment.config import GLOBAL_RULES, Experiment
from benchmarks import harness

SPLITS = ("staircase", "dirichlet_lognormal")
POLICIES = ("autorank", "uniform_bytes", "shuffled", "reversed")
RESULTS = Path(__file__).parent / "results"


def make_cells(rules: list[str], *, quick: bool, rounds: int, seeds: int) -> dict[str, Experiment]:
    """Return one experiment per split and rule."""
    return {
        f"{split}-{rule}": Experiment(
            dataset="fashion_mnist_mini" if quick else "fashion_mnist",
            split=split,
            alpha=0.3,
            sigma=1.0,
            rank_policies=POLICIES,
            aggregators=(rule,),
            rounds=rounds,
            local_epochs=5 if quick else 1,
            seeds=seeds,
            eval_every=5 if rounds % 5 == 0 else 1,
        )
        for rule in rules
        for split in SPLITS
    }


def finals(cell: Cell, policy: str) -> list[float]:
    """Return the last accuracy of each seed; a run that diverged guesses."""
    seeds, config = cell["accuracy"].get(policy, {}), cell["config"]
    last = [values[-1] for values in seeds.values() if len(values) == config["rounds"] and values[-1] is not None]
    return last + [GUESSING] * (config["seeds"] - len(last))


def table(cells: dict[str, Cell], rules: list[str]) -> list[harness.Row]:
    """Lay the final accuracies out, a row per rule."""
    rows = []
    for rule in rules:
        row: harness.Row = {"rule": f"`{rule}`"}
        for split in SPLITS:
            for policy in POLICIES:
                row[f"{split}, {policy}"] = percent(finals(cells[f"{split}-{rule}"], policy))
        rows.append(row)
    return rows


def draw(cells: dict[str, Cell], rules: list[str], path: Path, title: str) -> None:
    """Draw final accuracies as a heat map of rules against splits and policies."""
    columns = [(split, policy) for split in SPLITS for policy in POLICIES]
    heat_map(
        np.array([[100 * np.mean(finals(cells[f"{s}-{rule}"], p)) for s, p in columns] for rule in rules]),
        rules,
        ["\n".join((policy, *split.split("_"))) for split, policy in columns],
        path,
        title=title,
        label="test accuracy, %",
        breaks=(len(POLICIES),),
    )


@harness.mistakes_in_words()
def main(arguments: list[str] | None = None) -> None:
    """Run the cells that are missing, then print the table and draw the heat map."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the embedded subset")
    parser.add_argument("--rules", default=",".join(GLOBAL_RULES), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    mpl.use("Agg")
    rules, name = options.rules.split(","), "aggregators_mini" if options.quick else "aggregators"
    cells = make_cells(rules, quick=options.quick, rounds=options.rounds, seeds=options.seeds)
    found = run_cells(cells, options.out / name)
    rows = table(found, rules)
    columns = ["rule", *(f"{split}, {policy}" for split in SPLITS for policy in POLICIES)]
    print(harness.markdown_table(rows, columns))
    content = {"rows": rows, "rounds": options.rounds, "seeds": options.seeds, "versions": harness.versions()}
    harness.write_json(options.out / f"{name}.json", content | {"device": harness.device()})
    dataset = "Fashion-MNIST subset" if options.quick else "Fashion-MNIST"
    title = f"{dataset}: accuracy after {options.rounds} rounds, mean of {options.seeds} seeds, ten clients"
    draw(found, rules, options.out / f"{name}.png", title)


if __name__ == "__main__":
    main()
