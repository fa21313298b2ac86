"""What the README says about AutoRank, and whether the result files still say so.

A claim is a difference of accuracies, paired over seeds, with a direction: `higher` and `lower` have p < 0.05 in a
paired t test after Holm's correction over all claims, `level` has not, and its 95 % interval lies within two points of
zero.

Command:  python -m benchmarks.study.claims              (prints the claims, and the finding of the README)
          python -m benchmarks.study.claims --write      (puts the finding into the README)
Expect:   seconds; an exit code of 1, and a line for each claim that does not follow from the result files
"""

import itertools
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks import harness, script
from benchmarks.study import fresh_flops, mixed_ranks, paper, policies_by_rules
from benchmarks.study.cells import NOTHING
from benchmarks.study.columns import AUTHOR
from benchmarks.study.forest import Forest, Mark, draw_forest
from benchmarks.study.options import RESULTS, make_parser
from benchmarks.study.paired import Difference, difference, holm, in_points
from benchmarks.study.questions import ALL, BEYOND, Point, shared_splits, sides
from benchmarks.study.runs import Reached, measured

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "## What the study says\n\n", "\n\n!["
"""What stands around the finding."""
NEAR = 0.02
"""Accuracy within which the interval of what is level lies."""
PAIR, UNIFORM = AUTHOR[0], AUTHOR[2]
PRODUCTS, UNIFORM_PRODUCTS = "AutoRank + raFLoRA", "uniform rank, AutoRank's bytes + raFLoRA"
CAPPED, WHOLE = "AutoRank, top ranks capped + RBLA", "whole weights + FedAvg"
FASHION = ("fashion_mnist", "staircase")


class Claim(NamedTuple):
    """A difference, and what is said of it."""

    words: str
    where: str
    says: str  # "higher", "lower" or "level"
    found: Difference | None

    def holds(self, p: float | None) -> bool:
        """Return whether that follows, with a corrected p."""
        if self.found is None or p is None:
            return False
        if self.says == "level":
            return p >= BEYOND and max(abs(self.found.low), abs(self.found.high)) <= NEAR
        return p < BEYOND and (self.found.mean > 0) == (self.says == "higher")


class Evidence(NamedTuple):
    """All runs that claims rest on."""

    columns: Mapping[
        tuple[str, str], Mapping[str, Mapping[int, Reached]]
    ]  # of `paper`, by dataset and split, and title
    fresh: Mapping[str, tuple[Any, tuple[str, ...]]]  # of `policies_by_rules`, fresh seeds: a table and its splits
    first: tuple[Any, tuple[str, ...]]  # its first seeds
    flops: list[dict[str, Any]]  # of `fresh_flops`
    probe: float  # cost of the default probe over 20 rounds
    lost: int  # runs of mixed ranks under RBLA whose highest ranks hold less than a fifth of all examples


def read() -> Evidence:
    """Read the result files."""
    found = paper.run_plan(paper.everything(paper.make_plan(paper.options_of([]))), NOTHING)
    plan = policies_by_rules.make_plan(policies_by_rules.options_of([]))
    grid, table, rates = policies_by_rules.read_all(plan)
    fresh = {}
    for one in policies_by_rules.fresh_plans(grid, [Point("autorank", "raflora", ALL, "all")]):
        seen, _ = policies_by_rules.run_plan(one, policies_by_rules.order(one), rates, NOTHING)
        fresh[one.dataset] = (seen, grid.splits)
    costs = script.read(RESULTS / "costs.json")
    cheap = [one["cost"] for one in costs["probes"]["cells"] if one["probe"] == fresh_flops.DEFAULT.label()]
    bands = mixed_ranks.bands(mixed_ranks.mixed_runs(paper.complete(found)))
    return Evidence(
        {key: {column.title: column.runs for column in columns} for key, columns in found.items()},
        fresh,
        (table, grid.splits),
        costs.get("fresh_flops", {}).get("cells", []),
        float(np.mean(cheap)),
        sum(len(band.runs) for band in bands if band.high <= 0.2 and band.fallen == len(band.runs)),
    )


def claims(evidence: Evidence) -> dict[str, Claim]:
    """Return all claims by name."""

    def after_100(one: str, other: str, what: str = "final") -> Difference | None:
        columns = evidence.columns[FASHION]
        return difference(*measured(columns.get(one, {}), columns.get(other, {}), what))

    def over_splits(runs: tuple[Any, tuple[str, ...]], one: Point, other: Point) -> Difference | None:
        table, splits = runs
        return difference(*sides(table, one, other, "final", shared_splits(table, one, other, splits)))

    ours, plain = Point("autorank", "raflora", ALL, "all"), Point("uniform_bytes", "rbla", ALL, "all")
    staircase = "Fashion-MNIST, staircase, 100 rounds"
    both = "both splits, 20 rounds"
    found = {
        "early": Claim(
            "AutoRank minus a uniform rank of the same bytes, raFLoRA, first fifth", staircase, "higher",
            after_100(PRODUCTS, UNIFORM_PRODUCTS, "early"),
        ),
        "end": Claim(
            "AutoRank minus a uniform rank of the same bytes, raFLoRA", staircase, "level",
            after_100(PRODUCTS, UNIFORM_PRODUCTS),
        ),
        "rbla": Claim(
            "AutoRank minus a uniform rank of the same bytes, RBLA", staircase, "lower", after_100(PAIR, UNIFORM)
        ),
        "capped": Claim(
            "the same with the highest ranks capped", staircase, "level", after_100(CAPPED, UNIFORM)
        ),
        "whole": Claim("whole weights (FedAvg) minus AutoRank, RBLA", staircase, "higher", after_100(WHOLE, PAIR)),
        "fashion": Claim(
            "AutoRank, raFLoRA, minus a uniform rank, RBLA", f"Fashion-MNIST, {both}, fresh seeds", "level",
            over_splits(evidence.fresh["fashion_mnist"], ours, plain),
        ),
        "mnist": Claim(
            "AutoRank, raFLoRA, minus a uniform rank, RBLA", f"MNIST, {both}, fresh seeds", "higher",
            over_splits(evidence.fresh["mnist"], ours, plain),
        ),
        "size": Claim(
            "AutoRank minus ranks by size of the same bytes, raFLoRA", f"Fashion-MNIST, {both}", "level",
            over_splits(evidence.first, ours, ours._replace(policy="by_size_bytes")),
        ),
    }  # fmt: skip
    flops = fresh_flops.differences(evidence.flops, "final")
    for split, name in itertools.product(fresh_flops.SPLITS, fresh_flops.COMPARED):
        words = "AutoRank (its probe paid)" if name == "AutoRank" else "ranks in proportion to size"
        where = f"Fashion-MNIST, 6,000 images, {'staircase' if split == 'staircase' else 'random splits'}, 20 rounds"
        found[f"{name} {split}"] = Claim(
            f"{words} minus a uniform rank of the same FLOPs, raFLoRA", where,
            "higher" if split == "staircase" else "level", flops.get((split, name)),
        )  # fmt: skip
    return found


def corrected(family: Mapping[str, Claim]) -> dict[str, float | None]:
    """Return Holm's p values over all claims."""
    return dict(zip(family, holm([one.found and one.found.p for one in family.values()]), strict=True))


def table(family: Mapping[str, Claim]) -> str:
    """Return the claims as Markdown."""
    ps = corrected(family)
    rows: list[harness.Row] = [
        {
            "claim": one.words,
            "where": one.where,
            "seeds": one.found and one.found.seeds,
            "points": in_points(one.found, ps[name]),
            "said": one.says,
            "follows": "yes" if one.holds(ps[name]) else "no",
        }
        for name, one in family.items()
    ]
    return harness.markdown_table(rows, list(rows[0]))


def draw(family: Mapping[str, Claim]) -> Figure:
    """Draw the claims, place by place."""
    forest, ps = Forest.empty(), corrected(family)
    for where in dict.fromkeys(one.where for one in family.values()):
        forest.heading(where)
        for name, one in family.items():
            if one.where == where:
                p = ps[name]
                forest.row(one.words, Mark(one.found, p is not None and p < BEYOND))
    return draw_forest(
        forest,
        ["final accuracy, where it says nothing else"],
        title="What the README claims",
        note="95 % intervals, paired over seeds; Holm's correction is over all rows",
        width=10.5,
    )


def finding(evidence: Evidence, family: Mapping[str, Claim]) -> str:
    """Write what the README says."""
    said: Callable[[str], str] = lambda name: in_points(family[name].found)  # noqa: E731
    first = evidence.columns[FASHION]
    times = np.mean([run.spent - run.probe for run in first[PRODUCTS].values()]) / np.mean(
        [run.spent for run in first[UNIFORM_PRODUCTS].values()]
    )
    text = f"""
        **Use AutoRank with a rule that averages products** (`raflora`, the default). For the bytes of one rank for all
        it learns faster (Fashion-MNIST's staircase, first fifth of 100 rounds: {said("early")} points) and ends level
        ({said("end")}), for {times:.1f} times the training FLOPs and a probe of {100 * evidence.probe:.1f} % of 20
        rounds. For the same FLOPs, the probe's among them, 20 rounds of 6,000 images end ahead on a staircase
        ({said("AutoRank staircase")}), level on random splits ({said("AutoRank dirichlet-0.4-10")}). Ranks in
        proportion to client size, without a probe, reach {said("n^1 staircase")} and {said("n^1 dirichlet-0.4-10")}; at
        equal bytes AutoRank has {said("size")} more. **Not with RBLA**, the rule of the paper's author: it
        ends {said("rbla")} from one rank for all. A rank position is averaged over its owners; where those of the
        highest hold less than 20 % of all examples, all {evidence.lost} runs end more than 5 points behind (picture).
        Capping the highest ranks (`covered`) mends that ({said("capped")}). With `raflora` it ends {said("fashion")}
        from one rank for all with RBLA, on MNIST {said("mnist")}. Whole weights are better still on a network this
        small: FedAvg ends {said("whole")} beyond AutoRank with RBLA.
    """
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False, break_long_words=False)


def in_readme() -> str:
    """Return the finding as it stands in the README."""
    return README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


@harness.mistakes_in_words()
def main(arguments: list[str] | None = None) -> None:
    """Print the claims and the finding, and fail where one does not follow."""
    parser = make_parser(__doc__)
    parser.add_argument("--write", action="store_true", help="put the finding into the README")
    options = parser.parse_args(arguments)
    evidence = read()
    family = claims(evidence)
    ps, text = corrected(family), finding(evidence, family)
    print(f"{table(family)}\n\n{text}")
    failed = [f"{one.words}, {one.where}: not {one.says}" for name, one in family.items() if not one.holds(ps[name])]
    if failed:
        sys.exit("\n".join(failed))
    if options.write:
        whole = README.read_text(encoding="utf-8")
        harness.write_text(README, whole.replace(BEGIN + in_readme(), BEGIN + text, 1))


if __name__ == "__main__":
    main()
