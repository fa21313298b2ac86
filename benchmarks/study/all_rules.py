"""Every aggregation rule under every kind of rank: which rules hold up where rank and data are not nested?

Rules × splits (staircase; Dirichlet 0.3 × log-normal 1) × rank policies of equal bytes (AutoRank; a uniform rank at
AutoRank's mean ratio over clients; AutoRank's ranks shuffled among clients, another permutation for every seed; its
ranks reversed), ten clients, MLP 784-200-200-10, one local epoch, batch 64, SGD 0.01 with momentum 0.9.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.study.all_rules    (full Fashion-MNIST, over an hour on two cores)
          python -m benchmarks.study.all_rules --quick                  (embedded subset)
          python -m benchmarks.study.all_rules --report                 (runs nothing)
Writes:   a line per cell in benchmarks/study/results/all_rules.jsonl
Expect:   see benchmarks/study/rules.md
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from autorank_jax.experiment import Experiment
from autorank_jax.experiment.names import GLOBAL_RULES
from benchmarks import harness
from benchmarks.study.cell_file import CellFile
from benchmarks.study.cells import NOTHING, Bounds, run_cells
from benchmarks.study.columns import FULL_PROBE
from benchmarks.study.options import RESULTS, count, make_parser, words
from benchmarks.study.paired import Difference, corrected, difference, in_points
from benchmarks.study.runs import Reached, percent, runs_of, values

SPLITS: Mapping[str, str] = {"staircase": "staircase", "dirichlet_lognormal": "dirichlet-0.3-10"}
"""Titles by split."""
POLICIES: Mapping[str, str] = {
    "autorank": "AutoRank",
    "uniform_bytes": "uniform rank",
    "shuffled": "AutoRank's, shuffled",
    "reversed": "AutoRank's, reversed",
}
ROUNDS, SEEDS = 20, 3
Found = Mapping[tuple[str, str, str], Mapping[int, Reached]]
"""Runs by seed, by split, rule and policy."""


def make_cells(rules: Sequence[str], *, quick: bool, rounds: int, seeds: int) -> dict[str, Experiment]:
    """Return one experiment per split and rule."""
    return {
        f"{split}-{rule}": Experiment(
            dataset="fashion_mnist_mini" if quick else "fashion_mnist",
            split=split,
            alpha=0.3,
            sigma=1.0,
            rank_policies=tuple(POLICIES),
            aggregators=(rule,),
            rounds=rounds,
            local_epochs=5 if quick else 1,
            seeds=seeds,
            eval_every=5 if rounds % 5 == 0 else 1,
            rank_levels=4,
            **FULL_PROBE,
        )
        for rule in rules
        for split in SPLITS
    }


def run_rules(cells: Mapping[str, Experiment], file: CellFile, bounds: Bounds) -> Found:
    """Run what is missing within bounds, and return what is there."""
    found = run_cells(cells, file, bounds)
    return {
        (cell["options"]["split"], cell["options"]["aggregators"][0], policy): runs
        for cell in found.values()
        for policy, runs in runs_of(cell).items()
    }


def read(folder: Path) -> Found:
    """Return the runs of the usual setting that a folder holds."""
    cells = make_cells(GLOBAL_RULES, quick=False, rounds=ROUNDS, seeds=SEEDS)
    return run_rules(cells, CellFile(folder / "all_rules.jsonl"), NOTHING)


def rules_of(found: Found) -> list[str]:
    """Return the rules that have runs, in the order of the package."""
    there = {rule for _, rule, _ in found}
    return [rule for rule in GLOBAL_RULES if rule in there]


def finals(found: Found, split: str, rule: str, policy: str) -> dict[int, float]:
    """Return final accuracies by seed; a run that diverged guesses."""
    return values(found.get((split, rule, policy), {}), "final")


def differences(found: Found, other: str = "uniform_bytes") -> dict[tuple[str, str], tuple[Difference, float | None]]:
    """Return AutoRank minus another policy in final accuracy, with Holm's p over all rules and splits.

    Args:
        found: runs.
        other: the policy.

    Returns:
        By rule and split.
    """
    rows = {}
    for rule in rules_of(found):
        for split in SPLITS:
            one = difference(finals(found, split, rule, "autorank"), finals(found, split, rule, other))
            if one is not None:
                rows[rule, split] = one
    ps = corrected([{"final": row} for row in rows.values()], "final")
    return {key: (row, p) for (key, row), p in zip(rows.items(), ps, strict=True)}


def tables(found: Found) -> str:
    """Return the tables of what is there, in Markdown."""
    rows, gains = [], differences(found)
    for rule in rules_of(found):
        row: harness.Row = {"rule": f"`{rule}`"}
        for split, title in SPLITS.items():
            for policy, name in POLICIES.items():
                row[f"{title}: {name}"] = percent(list(finals(found, split, rule, policy).values()))
        rows.append(row)
    minus = []
    for rule in rules_of(found):
        row = {"rule": f"`{rule}`"}
        for split, title in SPLITS.items():
            one, p = gains.get((rule, split), (None, None))
            raw = "" if one is None or one.p is None else f" ({one.p:.2g} alone)"
            row[title] = in_points(one, p) + raw
        minus.append(row)
    return (
        "# Every rule under every kind of rank\n\nFinal accuracy in %, mean ± sample sd over seeds. All four kinds of "
        f"ranks send the same bytes.\n\n{harness.markdown_table(rows, list(rows[0]))}\n\n## AutoRank minus a uniform "
        "rank of the same bytes\n\nIn points: mean [95 % t interval], paired over seeds; p of a paired t test, "
        "Holm-corrected over all rules and splits, and alone.\n\n"
        f"{harness.markdown_table(minus, list(minus[0]))}\n"
    )


@harness.mistakes_in_words()
def main(arguments: list[str] | None = None) -> None:
    """Run the cells that are missing, then print and write the tables of what there is."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="the embedded subset")
    parser.add_argument("--rules", default="", help="comma-separated; default all")
    parser.add_argument("--rounds", type=int, default=None, help=f"default {ROUNDS}")
    parser.add_argument("--seeds", type=int, default=None, help=f"default {SEEDS}")
    parser.add_argument("--report", action="store_true", help="run nothing: show what there is")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    file = CellFile(options.out / ("all_rules_mini.jsonl" if options.quick else "all_rules.jsonl"))
    how = {"quick": options.quick, "rounds": count("rounds", options.rounds, ROUNDS)}
    how["seeds"] = count("seeds", options.seeds, SEEDS)
    rules = words("rules", options.rules, GLOBAL_RULES, GLOBAL_RULES)
    with harness.shared_programs():
        run_rules(make_cells(rules, **how), file, NOTHING if options.report else Bounds())
    if found := run_rules(make_cells(GLOBAL_RULES, **how), file, NOTHING):
        print(tables(found))
    else:
        print("No cell is complete yet.")


if __name__ == "__main__":
    main()
