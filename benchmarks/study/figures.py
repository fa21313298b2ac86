"""All figures of the study, drawn from its result files.

Command:  python -m benchmarks.study.figures    (half a minute)
Writes:   benchmarks/study/results/*.png
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import matplotlib as mpl
from matplotlib.figure import Figure

from autorank_jax.cli.figures import STYLE
from benchmarks.study import all_rules, claims, mixed_ranks, paper, policies_by_rules, privacy, questions
from benchmarks.study.cells import NOTHING
from benchmarks.study.columns import CONTRASTS
from benchmarks.study.forest import Forest, Mark, draw_forest
from benchmarks.study.options import RESULTS
from benchmarks.study.paired import corrected, difference
from benchmarks.study.panels import (
    CAPPED,
    FIRST,
    PRODUCTS,
    Found,
    draw_all_rules,
    draw_mixed_ranks,
    draw_over_rounds,
    name_of,
)
from benchmarks.study.questions import ALL, BEYOND, Answer, Point
from benchmarks.study.runs import values


def draw_paper(found: Found, seeds: int) -> Figure:
    """Draw final accuracies of the paper's columns and controls against each other."""
    forest = Forest.empty()
    titles = dict.fromkeys(column.title for columns in found.values() for column in columns)
    against = [(FIRST, title) for title in titles if title != FIRST]
    blocks = [(f"{FIRST} (the paper's) minus", against, against)]
    for first in (PRODUCTS, CAPPED):
        blocks.append((f"{first} minus", [pair for pair in CONTRASTS if pair[0] == first], list(CONTRASTS)))
    for heading, pairs, family in blocks:
        forest.heading(heading)
        marks = _marks(found, family)
        for pair in pairs:
            if 2 * sum(mark.difference is not None for mark in marks[pair]) >= len(found):
                forest.row(pair[1], *marks[pair])
    return draw_forest(
        forest,
        ["\n".join(map(name_of, key)) for key in found],
        title="The paper's pair, AutoRank with RBLA, and its remedies beside uniform ranks and controls",
        note=f"Final accuracy after 100 rounds; 10 clients; 95 % intervals, paired over {seeds} seeds",
        width=12.5,
    )


def _marks(found: Found, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], list[Mark]]:
    """Return one column minus another by pair, a mark for each split; Holm's correction is over a split's pairs."""
    marks: dict[tuple[str, str], list[Mark]] = {pair: [] for pair in pairs}
    for columns in found.values():
        there = {column.title: values(column.runs, "final") for column in columns}
        differences = [difference(there.get(one, {}), there.get(other, {})) for one, other in pairs]
        ps = corrected([{"final": row} for row in differences], "final")
        for pair, one, p in zip(pairs, differences, ps, strict=True):
            marks[pair].append(Mark(one, p is not None and p < BEYOND))
    return marks


def draw_rules(first: Sequence[Answer], fresh: Mapping[str, Sequence[Answer]], note: str) -> Figure:
    """Draw AutoRank minus a uniform rank of the same bytes by rule: in the end, early, and for the same training.

    Args:
        first: of the first seeds.
        fresh: of fresh seeds, by dataset: the recommended pair minus others.
        note: what was measured.
    """
    blocks = {name_of(rule): [row for row in first if row.one.rule == rule] for rule in _rules(first)}
    for dataset, rows in fresh.items():
        own = [row for row in rows if row.one.rule == row.other.rule]
        blocks |= {f"{name_of(rule)}, fresh seeds, {name_of(dataset)}": own for rule in _rules(own)}
    forest = Forest.empty()
    for heading, rows in blocks.items():
        forest.heading(heading)
        for row in rows:
            others = (Mark(row.differences[what], None) for what in ("early", "final_flops"))
            forest.row(name_of(row.one.split), Mark(row.differences["final"], row.shown), *others)
    return draw_forest(
        forest,
        [
            "final accuracy",
            "mean over the first\nfifth of the rounds",
            "at the end of the cheaper\none's training FLOPs",
        ],
        title="AutoRank minus a uniform rank of the same bytes, by aggregation rule",
        note=note,
        width=10.5,
    )


def _rules(rows: Sequence[Answer]) -> list[str]:
    return list(dict.fromkeys(row.one.rule for row in rows))


def figures() -> dict[str, Callable[[], Figure]]:
    """Read all results, and return how to draw each figure, by name."""
    plan = paper.make_plan(paper.options_of([]))
    found, seeds = paper.complete(paper.run_plan(paper.everything(plan), NOTHING)), len(plan.seeds)
    grid, table, rates = policies_by_rules.read_all(policies_by_rules.make_plan(policies_by_rules.options_of([])))
    asked = questions.questions(rules=grid.rules, settings=grid.settings, splits=grid.splits)
    answers = {question.title: questions.answers(table, question, grid.splits) for question in asked}
    best, fresh = [Point("autorank", "raflora", ALL, "all")], {}
    for one in policies_by_rules.fresh_plans(grid, best):
        seen, _ = policies_by_rules.run_plan(one, policies_by_rules.order(one), rates, NOTHING)
        (question,) = policies_by_rules.fresh_questions(one, best)
        fresh[one.dataset] = questions.answers(seen, question, grid.splits)
    about = f"{grid.options['rounds']} rounds; 10 clients; 95 % intervals, paired over {len(grid.seeds)} seeds"
    rules = f"Fashion-MNIST if nothing else is said; {about}; FLOPs are counted, the probe's among them"
    every = (
        f"Fashion-MNIST; {all_rules.ROUNDS} rounds; 10 clients; means of {all_rules.SEEDS} seeds; ranks of equal bytes;"
        " grey: from the least to the best of the four; panels have scales of their own"
    )
    return {
        "mixed_ranks": partial(draw_mixed_ranks, mixed_ranks.mixed_runs(found), seeds),
        "over_rounds": partial(draw_over_rounds, found, seeds),
        "paper": partial(draw_paper, found, seeds),
        "rules": partial(draw_rules, answers[questions.GAIN], fresh, rules),
        "claims": lambda: claims.draw(claims.claims(claims.read())),
        "all_rules": partial(draw_all_rules, all_rules.read(RESULTS), every),
        "privacy": privacy.draw_published,
    }


def main() -> None:
    """Draw all figures."""
    mpl.use("Agg")
    for name, draw in figures().items():
        with mpl.rc_context(STYLE):
            path = RESULTS / f"{name}.png"
            draw().savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
        print(path)


if __name__ == "__main__":
    main()
