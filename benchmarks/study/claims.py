"""What the README says about AutoRank, and whether the result files still say so.

A claim is a difference, paired over seeds, of accuracies if it says nothing else. `higher` and `lower` have p < 0.05 in
a paired t test after Holm's correction over all claims; what is `open` has not: no difference is shown.

Command:  python -m benchmarks.study.claims              (prints the claims, and the finding of the README)
          python -m benchmarks.study.claims --write      (puts the finding into the README)
Expect:   seconds; an exit code of 1, and a line for each claim that does not follow from the result files
"""

import itertools
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.study import dialogues, fresh_flops, paper, policies_by_rules, text_tables
from benchmarks.study.cells import NOTHING
from benchmarks.study.columns import FEW, MANY, RANDOM, STAIRCASE, STUDIED
from benchmarks.study.forest import Forest, Mark, draw_forest
from benchmarks.study.fresh_flops import EDGE
from benchmarks.study.options import make_parser
from benchmarks.study.paired import Difference, difference, holm, in_points
from benchmarks.study.panels import CAPPED, FIRST, PRODUCTS, UNIFORM
from benchmarks.study.questions import ALL, BEYOND, Point, Table, shared_splits, sides
from benchmarks.study.runs import Reached, measured

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "## What the study says\n\n", "\n\n!["
"""What stands around the finding."""
WHERE = {STAIRCASE: "staircase", MANY: "100 clients, 20 a round", RANDOM: "random splits", FEW: "few classes a client"}
SCALED: Mapping[str, tuple[str, str, float | None, str]] = {
    "": (STAIRCASE, "final", None, "open"), "many": (MANY, "final", None, "higher"),
    "many early": (MANY, "early", None, "higher"), "many edge": (MANY, "final", EDGE[MANY], "open"),
    "many edge early": (MANY, "early", EDGE[MANY], "higher"),
    "random": (RANDOM, "final", None, "open"), "few": (FEW, "final", None, "open"),
}  # fmt: skip
"""What `fresh_flops` says of ranks by size and of AutoRank's: split, when, the rate if not the best, the word."""
PERSONAL = {"n^1": "ranks in proportion to size", "AutoRank": "AutoRank"}
UNIFORM_PRODUCTS, WHOLE = "uniform rank, AutoRank's bytes + raFLoRA", "whole weights + FedAvg"


class Claim(NamedTuple):
    """A difference, and what is said of it."""

    words: str
    where: str
    says: str  # "higher", "lower" or "open"
    found: Difference | None
    pairs: int = 5  # as many it needs
    drawn: bool = True

    def holds(self, p: float | None) -> bool:
        """Return whether that follows, with a corrected p."""
        if self.found is None or self.found.seeds < self.pairs or p is None:
            return False
        shown = "open" if p >= BEYOND else "higher" if self.found.mean > 0 else "lower"
        return self.says == shown


class Evidence(NamedTuple):
    """All runs that claims rest on."""

    columns: Mapping[tuple[str, str], Mapping[str, Mapping[int, Reached]]]  # `paper`: by dataset and split; by title
    first: tuple[Table, Sequence[str]]  # `policies_by_rules`: runs, and their splits
    fresh: Mapping[str, tuple[Table, Sequence[str]]]  # likewise, on fresh seeds, by dataset
    flops: Sequence[Mapping[str, Any]]  # `fresh_flops`
    texts: Sequence[Mapping[str, Any]]  # `text_finetune`
    dialogues: Mapping[str, Any]


def read() -> Evidence:
    """Read the result files."""
    found = paper.run_plan(paper.everything(paper.make_plan(paper.options_of([]))), NOTHING)
    plan = policies_by_rules.make_plan(policies_by_rules.options_of([]))
    grid, table, rates = policies_by_rules.read_all(plan)
    fresh = {}
    for one in policies_by_rules.fresh_plans(grid, [Point("autorank", "raflora", ALL, "all")]):
        seen, _ = policies_by_rules.run_plan(one, policies_by_rules.order(one), rates, NOTHING)
        fresh[one.dataset] = (seen, grid.splits)
    return Evidence(
        {key: {column.title: column.runs for column in columns} for key, columns in found.items()},
        (table, grid.splits),
        fresh,
        fresh_flops.published(),
        text_tables.published(),
        dialogues.published(),
    )


def claims(evidence: Evidence) -> dict[str, Claim]:
    """Return all claims by name."""

    def after_100(one: str, other: str, split: str = STAIRCASE, what: str = "final") -> Difference | None:
        columns = evidence.columns.get(("fashion_mnist", split), {})
        return difference(*measured(columns.get(one, {}), columns.get(other, {}), what))

    def over_splits(runs: tuple[Table, Sequence[str]], one: Point, other: Point) -> Difference | None:
        table, splits = runs
        there = shared_splits(table, one, other, splits)
        return difference(*sides(table, one, other, "final", there)) if there == list(splits) else None

    ours, plain = Point("autorank", "raflora", ALL, "all"), Point("uniform_bytes", "rbla", ALL, "all")
    products, rbla = (f"AutoRank minus one rank of the same bytes, {rule}" for rule in ("raFLoRA", "RBLA"))
    capped = "AutoRank capped minus one rank, RBLA"
    staircase, random = (f"Fashion-MNIST, {split}, 100 rounds" for split in ("staircase", "random split"))
    both = "both splits, 20 rounds"
    family = {
        "early": Claim(
            f"{products}, mean over the first 20 rounds", staircase, "higher",
            after_100(PRODUCTS, UNIFORM_PRODUCTS, what="early"),
        ),
        "early random": Claim(
            f"{products}, mean over the first 20 rounds", random, "open",
            after_100(PRODUCTS, UNIFORM_PRODUCTS, RANDOM, what="early"),
        ),
        "end": Claim(products, staircase, "open", after_100(PRODUCTS, UNIFORM_PRODUCTS)),
        "stopped": Claim(
            "AutoRank minus one rank, raFLoRA, mean over the FLOPs of the first 20 rounds", staircase, "lower",
            after_100(PRODUCTS, UNIFORM_PRODUCTS, what="early_flops"),
        ),
        "end random": Claim(products, random, "open", after_100(PRODUCTS, UNIFORM_PRODUCTS, RANDOM)),
        "size": Claim(
            "AutoRank minus ranks by size of the same bytes, raFLoRA", f"Fashion-MNIST, {both}", "open",
            over_splits(evidence.first, ours, ours._replace(policy="by_size_bytes")),
        ),
        "rbla": Claim(rbla, staircase, "lower", after_100(FIRST, UNIFORM)),
        "capped": Claim(capped, staircase, "open", after_100(CAPPED, UNIFORM)),
        "capped random": Claim(capped, random, "open", after_100(CAPPED, UNIFORM, RANDOM)),
        "fashion": Claim(
            "AutoRank, raFLoRA, minus one rank, RBLA", f"Fashion-MNIST, {both}, fresh seeds", "open",
            over_splits(evidence.fresh["fashion_mnist"], ours, plain),
        ),
        "mnist": Claim(
            "AutoRank, raFLoRA, minus one rank, RBLA", f"MNIST, {both}, fresh seeds", "higher",
            over_splits(evidence.fresh["mnist"], ours, plain),
        ),
        "whole": Claim(
            "AutoRank, raFLoRA, minus whole weights (FedAvg)", staircase, "lower", after_100(PRODUCTS, WHOLE)
        ),
        "texts": Claim(
            products, "MiniLM, 480 movie reviews, 4 rounds", "open",
            difference(*(text_tables.by_seed(evidence.texts, "raflora", one) for one in text_tables.POLICIES[:2])),
            pairs=3,
        ),
        "dialogues": Claim(
            "AutoRank over one rank of the same bytes, raFLoRA: clients' perplexity, as a share",
            "SmolLM2, 304 dialogues, 21 clients, 3 rounds", "open",
            dialogues.over_seeds("autorank", "raflora", evidence.dialogues), pairs=3, drawn=False,
        ),
    }  # fmt: skip
    for (name, (split, when, rate, says)), ranks in itertools.product(SCALED.items(), PERSONAL):
        found = fresh_flops.beyond(evidence.flops, split, ranks, "uniform", when, rate=rate)
        rounds = 100 if split == MANY else 20
        where = (
            f"6,000 images of Fashion-MNIST, {WHERE[split]}, {f'{rounds // 4} of ' * (when == 'early')}{rounds} rounds"
        )
        where += f", rate {rate}" * (rate is not None)
        words = f"{PERSONAL[ranks]} minus one rank, scaled to the same FLOPs, raFLoRA"
        family[f"{ranks} {name}"] = Claim(words, where, says, found, pairs=10)
    return family


def corrected(family: Mapping[str, Claim]) -> dict[str, float | None]:
    """Return Holm's p values over all claims, whatever they say."""
    ps = [one.found and one.found.p for one in family.values()]
    return dict(zip(family, holm(ps), strict=True))


def failures(family: Mapping[str, Claim]) -> list[str]:
    """Return a line for each claim that does not follow."""
    ps = corrected(family)
    return [f"{one.words}, {one.where}: not {one.says}" for name, one in family.items() if not one.holds(ps[name])]


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
    for where in dict.fromkeys(one.where for one in family.values() if one.drawn):
        forest.heading(where)
        for name, one in family.items():
            if one.where == where and one.drawn:
                forest.row(one.words, Mark(one.found, one.says != "open" and one.holds(ps[name])))
    return draw_forest(
        forest,
        ["final accuracy in points, where it says nothing else"],
        title="What the README claims",
        note="95 % intervals, paired over seeds; filled: p < 0.05 after Holm's correction over all",
        width=11,
    )


def costs(rows: Sequence[Mapping[str, Any]], what: str) -> str:
    """Return what personal ranks of many clients cost beside the uniform one, in %, means over seeds."""
    own = [[row[what] for row in fresh_flops.of_rate(rows, MANY, ranks)] or [np.nan] for ranks in PERSONAL]
    return " and ".join(f"{100 * np.mean(values):.0f}" for values in own)


def finding(evidence: Evidence, family: Mapping[str, Claim]) -> str:
    """Write what the README says."""
    said: Callable[[str], str] = lambda name: in_points(family[name].found)  # noqa: E731
    beyond = {name: " and ".join(said(f"{ranks} {name}") for ranks in PERSONAL) for name in SCALED}
    sent, most = (costs(evidence.flops, what) for what in ("bytes", "most"))
    ours, others = (
        [np.mean([run.spent for run in evidence.columns["fashion_mnist", s][name].values()]) for s in STUDIED]
        for name in (PRODUCTS, UNIFORM_PRODUCTS)
    )
    dearer = " to ".join(f"{ratio:.1f}" for ratio in sorted(np.divide(ours, others)))
    text = f"""
        On Fashion-MNIST: **Where ranks differ, use a rule that averages products** (`raflora`, the default): under RBLA
        AutoRank's end behind one rank of the same bytes ({said("rbla")}). **Where all clients train every round** no
        difference is shown at the end ({said("end")}, random split {said("end random")}), for {dearer} times the FLOPs
        with a full probe; in the first 20 of 100 AutoRank's are ahead on the staircase ({said("early")}; by FLOPs
        {said("stopped")}), not on the random split ({said("early random")}). **Where few of many do, tune the learning
        rate first:** at the best without divergence, ranks by size and AutoRank's, scaled to the same FLOPs, gain
        {beyond["many"]} (100 clients, 20 a round), for {sent} % of the bytes and {most} % of the slowest client's work;
        at a higher one {beyond["many edge early"]} after a quarter of the rounds, {beyond["many edge"]} at the end.
        With ten clients nothing is shown ({beyond[""]}). **Minus whole weights** (FedAvg): {said("whole")}.
        **Pretrained:** MiniLM {said("texts")}; perplexity of SmolLM2 {said("dialogues")} % (more is worse).
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
    text = finding(evidence, family)
    print(f"{table(family)}\n\np is corrected for all claims (Holm); open: no difference is shown.\n\n{text}")
    if failed := failures(family):
        sys.exit("\n".join(failed))
    if options.write:
        whole = README.read_text(encoding="utf-8")
        harness.write_text(README, whole.replace(BEGIN + in_readme(), BEGIN + text, 1))


if __name__ == "__main__":
    main()
