"""All figures of the study, drawn from its result files.

Command:  python -m benchmarks.study.figures    (half a minute; `--results FOLDER` draws those of another folder)
Writes:   benchmarks/study/results/*.png
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from autorank_jax.cli.figures import PERCENT, STYLE
from autorank_jax.experiment.config import GLOBAL_RULES
from benchmarks.study import all_rules, mixed_ranks, paper, policies_by_rules, questions
from benchmarks.study.cell_file import CellFile
from benchmarks.study.cells import NOTHING
from benchmarks.study.columns import AUTHOR, CONTRASTS
from benchmarks.study.forest import HIGHER, LOWER, UNSURE, Forest, Mark, draw_forest, explain
from benchmarks.study.mixed_ranks import MixedRun
from benchmarks.study.options import RESULTS, make_parser
from benchmarks.study.paired import corrected, difference
from benchmarks.study.paper import Key
from benchmarks.study.paper_tables import Column
from benchmarks.study.questions import ALL, Answer, Point
from benchmarks.study.runs import values

Found = Mapping[Key, Sequence[Column]]
"""Columns by dataset and split."""
NAMES = {"fashion_mnist": "Fashion-MNIST", "mnist": "MNIST", "cifar10": "CIFAR-10", "cinic10": "CINIC-10",
         "staircase": "staircase split", "dirichlet-0.4-10": "random split", "dirichlet-0.3-10": "random split",
         "all": "mean of both"}  # fmt: skip
"""Of datasets and splits, where others have their own."""
RULES = {"rbla": "RBLA", "raflora": "raFLoRA", "flexlora": "FlexLoRA"}
FIRST, UNIFORM = AUTHOR[0], AUTHOR[2]
CAPPED, PRODUCTS = "AutoRank, top ranks capped + RBLA", "AutoRank + raFLoRA"
POINTS = "points of accuracy"
KINDS = {
    "AutoRank's ranks": ("o", "#0072B2", (FIRST, "AutoRank at the uniform rank's learning rate + RBLA")),
    "AutoRank's ranks, the highest capped": ("D", "#009E73", (CAPPED,)),
    "ranks by hand or by client size": ("s", "#E69F00", (AUTHOR[1], "ranks by size, AutoRank's bytes + RBLA")),
    "AutoRank's ranks, shuffled or reversed": ("X", "#CC79A7", ()),
}
"""Of mixed ranks: marker, colour and columns by name; the last has all others."""


def name_of(word: str) -> str:
    """Return the name of a dataset, split or rule in figures."""
    return NAMES.get(word, RULES.get(word, word))


def draw_mixed_ranks(runs: Sequence[MixedRun], seeds: int) -> Figure:
    """Draw what mixed ranks reach under RBLA over the share of examples that the clients of the highest rank hold."""
    figure = Figure(figsize=(9, 5.8), layout="constrained")
    axes = figure.subplots()
    left, top = min(0.003, *(run.share / 1.3 for run in runs)), 6.0
    axes.set(xscale="log", xlim=(left, 1.05), ylim=(min(100 * run.difference for run in runs) - 4, top))
    axes.axhline(0, color="#444444", linewidth=0.9)
    for number, band in enumerate(mixed_ranks.bands(runs)):
        low, all_lost = max(band.low, left), band.fallen == len(band.runs)
        if number % 2 == 0:
            axes.axvspan(low, band.high, color="#F2F2F2", linewidth=0, zorder=0)
        if band.runs:
            text = f"{band.fallen} of {len(band.runs)} runs"
            look = {"color": LOWER if all_lost else "#444444", "weight": "bold" if all_lost else "normal"}
            axes.text(np.sqrt(low * band.high), top + 0.8, text, ha="center", fontsize=9, **look)
    for run in runs:
        marker, colour, _ = kind_of(run.column)
        axes.scatter(
            run.share, 100 * run.difference, s=38, marker=marker, facecolors="none", edgecolors=colour, linewidth=1.4
        )
    axes.xaxis.set_major_locator(FixedLocator([0.003, 0.01, 0.02, *mixed_ranks.BANDS, 1]))
    axes.xaxis.set_major_formatter(PERCENT)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("share of all training examples that the clients of the highest rank hold")
    axes.set_ylabel("final accuracy minus that of a uniform rank\nof the same bytes, points")
    axes.set_title(
        "Ranks that differ by client lose accuracy under RBLA\nwhere few examples stand behind the highest rank", pad=30
    )
    axes.text(left, top + 3.6, f"more than {100 * mixed_ranks.BEHIND:g} points behind:", fontsize=9, color="#444444")
    hollow = {"linestyle": "", "markerfacecolor": "none", "markeredgewidth": 1.5}
    handles = [Line2D([], [], label=name, marker=look[0], color=look[1], **hollow) for name, look in KINDS.items()]
    places = dict.fromkeys(f"{name_of(run.dataset)}, {name_of(run.split)}" for run in runs)
    note = f"A mark per run: {'; '.join(places)}; 10 clients, 100 rounds, {seeds} seeds"
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, title=note, title_fontsize=8.5)
    return figure


def kind_of(column: str) -> tuple[str, str, Sequence[str]]:
    """Return marker, colour and columns of the kind of mixed ranks that a column has."""
    return next((look for look in KINDS.values() if column in look[2]), list(KINDS.values())[-1])


def draw_over_rounds(found: Found, seeds: int) -> Figure:
    """Draw differences from a uniform rank round by round: small panels, a row for each way to use AutoRank's ranks."""
    rows = {"AutoRank + RBLA\n(the paper's)": FIRST, "AutoRank, top ranks\ncapped + RBLA": CAPPED,
            "AutoRank + raFLoRA\n(the default)": PRODUCTS}  # fmt: skip
    figure = Figure(figsize=(2.7 * len(found) + 1, 6.4), layout="constrained")
    panels = figure.subplots(len(rows), len(found), sharex=True, sharey=True, squeeze=False)
    for across, (key, columns) in enumerate(found.items()):
        there = {column.title: column.runs for column in columns}
        panels[0, across].set_title("\n".join(map(name_of, key)), fontsize=10)
        panels[-1, across].set_xlabel("round")
        for axes, title in zip(panels[:, across], rows.values(), strict=True):
            one, other = (
                {
                    seed: dict(zip(run.rounds.tolist(), run.accuracy, strict=True))
                    for seed, run in there.get(t, {}).items()
                }
                for t in (title, UNIFORM)
            )
            _draw_band(axes, one, other)
    for axes, label in zip(panels[:, 0], rows, strict=True):
        axes.set(ylim=(-15, 12), ylabel=label)
    look = {"color": UNSURE, "linewidth": 1.6}
    handles = [
        Line2D([], [], label="ahead: the interval is above 0", **look | {"color": HIGHER, "linewidth": 2.6}),
        Line2D([], [], label="behind: it is below 0", **look | {"color": LOWER, "linewidth": 2.6}),
        Line2D([], [], label="0 lies within", **look),
    ]
    note = (
        f"Mean and 95 % t interval of differences paired over {seeds} seeds, round by round, not corrected; 10 clients"
        "; bands are cut at the frame"
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, title=note, title_fontsize=8.5)
    figure.suptitle(
        "Test accuracy minus that of a uniform rank of the same bytes under RBLA, in points",
        x=0.01, ha="left", fontsize=11, weight="bold",
    )  # fmt: skip
    return figure


Curves = Mapping[int, Mapping[int, float]]
"""Accuracy by seed and round."""


def _draw_band(axes: Axes, one: Curves, other: Curves) -> None:
    """Draw one minus other with its interval, in a colour where it excludes 0."""
    axes.axhline(0, color="#444444", linewidth=0.9)
    seeds = sorted(set(one) & set(other))
    if not seeds:
        axes.text(0.5, 0.75, "not measured", transform=axes.transAxes, ha="center", fontsize=8.5, color=UNSURE)
        return
    rounds = list(one[seeds[0]])
    by_round = [difference({s: one[s][n] for s in seeds}, {s: other[s][n] for s in seeds}) for n in rounds]
    mean, low, high = (
        100 * np.array([np.nan if d[place] is None else d[place] for d in by_round]) for place in range(3)
    )
    axes.plot(rounds, mean, color=UNSURE, linewidth=1.4)
    axes.fill_between(rounds, low, high, color=UNSURE, alpha=0.22, linewidth=0)
    for colour, certain in ((HIGHER, low > 0), (LOWER, high < 0)):
        axes.plot(rounds, np.where(certain, mean, np.nan), color=colour, linewidth=2.6, marker="o", markersize=2)
        axes.fill_between(rounds, low, high, where=certain, color=colour, alpha=0.22, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def draw_paper(found: Found, seeds: int) -> Figure:
    """Draw final accuracies of the paper's columns and controls against each other."""
    forest = Forest.empty()
    titles = dict.fromkeys(column.title for columns in found.values() for column in columns)
    against = [(title, FIRST, title) for title in titles if title != FIRST]
    forest.heading(f"{FIRST} (the paper's) minus")
    _add_pairs(forest, found, against)
    for first in dict.fromkeys(one for one, _ in CONTRASTS):
        chosen = [(other, one, other) for one, other in CONTRASTS if one == first and first in (PRODUCTS, CAPPED)]
        if chosen:
            forest.heading(f"{first} minus")
            _add_pairs(forest, found, chosen, family=[(one, other) for one, other in CONTRASTS])
    figure = Figure(figsize=(12.5, 0.29 * len(forest.labels) + 2), layout="constrained")
    names = ["\n".join(map(name_of, key)) for key in found]
    limits = [(-16.0, 10.0)] * len(names)
    draw_forest(figure, forest, names, POINTS, limits)
    explain(figure, f"Final accuracy after 100 rounds; 95 % intervals, paired over {seeds} seeds; 10 clients")
    return figure


def _add_pairs(
    forest: Forest, found: Found, rows: Sequence[tuple[str, str, str]], family: Sequence[tuple[str, str]] = ()
) -> None:
    """Add rows of one column minus another; Holm's correction is over the family, or the rows, on each split."""
    pairs = family or [(one, other) for _, one, other in rows]
    marks: dict[tuple[str, str], list[Mark]] = {pair: [] for pair in pairs}
    for columns in found.values():
        there = {column.title: values(column.runs, "final") for column in columns}
        differences = [difference(there.get(one, {}), there.get(other, {})) for one, other in pairs]
        ps = corrected([{"final": row} for row in differences], "final")
        for pair, one, p in zip(pairs, differences, ps, strict=True):
            marks[pair].append(Mark(one, p is not None and p < questions.BEYOND))
    for label, one, other in rows:
        if any(mark.difference for mark in marks[one, other]):
            forest.row(label, *marks[one, other])


def draw_rules(first: Sequence[Answer], fresh: Mapping[str, Sequence[Answer]], note: str) -> Figure:
    """Draw AutoRank minus a uniform rank of the same bytes by rule: in the end, early, and for the same training.

    Args:
        first: of the first seeds.
        fresh: of fresh seeds, by dataset: the recommended pair minus others.
        note: what was measured.
    """
    forest = Forest.empty()
    for rule in dict.fromkeys(row.one.rule for row in first):
        forest.heading(name_of(rule))
        for row in first:
            if row.one.rule == rule:
                forest.row(name_of(row.one.split), *_three_marks(row))
    for dataset, rows in fresh.items():
        own = [row for row in rows if row.one.rule == row.other.rule]
        if own:
            forest.heading(f"{name_of(own[0].one.rule)}, fresh seeds, {name_of(dataset)}")
            for row in own:
                forest.row(name_of(row.one.split), *_three_marks(row))
    figure = Figure(figsize=(11.5, 0.29 * len(forest.labels) + 2), layout="constrained")
    titles = (
        "final accuracy",
        "first fifth of the rounds",
        "end of the cheaper one's training,\nat equal FLOPs, probe counted",
    )
    draw_forest(figure, forest, titles, POINTS, [(-7.0, 7.0), (-7.0, 12.0), (-7.0, 7.0)])
    explain(figure, note)
    return figure


def _three_marks(row: Answer) -> list[Mark]:
    """Return the marks of three measures; only final accuracy is tested."""
    return [Mark(row.differences[what], row.shown and what == "final") for what in ("final", "early", "final_flops")]


def draw_settings(found: Sequence[Answer], splits: Sequence[str], note: str) -> Figure:
    """Draw AutoRank with other criteria and settings minus AutoRank with all criteria, by rule and split."""
    forest = Forest.empty()
    there = {(row.one.rule, row.one.setting, row.one.split): Mark(row.differences["final"], row.shown) for row in found}
    for rule in dict.fromkeys(rule for rule, *_ in there):
        forest.heading(name_of(rule))
        for setting in dict.fromkeys(setting for one, setting, _ in there if one == rule):
            forest.row(setting.replace("_", " "), *(there.get((rule, setting, split), Mark(None)) for split in splits))
    figure = Figure(figsize=(9.5, 0.29 * len(forest.labels) + 2), layout="constrained")
    draw_forest(figure, forest, [name_of(split) for split in splits], POINTS, [(-16.0, 16.0)] * len(splits))
    explain(figure, note)
    return figure


def draw_all_rules(found: all_rules.Found, note: str) -> Figure:
    """Draw final accuracies of every rule under four kinds of ranks."""
    looks = {"autorank": ("o", HIGHER, HIGHER), "uniform_bytes": ("D", "#000000", "white"),
             "shuffled": ("x", "#CC79A7", "none"), "reversed": ("+", LOWER, "none")}  # fmt: skip
    rules = all_rules.rules_of(found)
    figure = Figure(figsize=(10, 0.36 * len(rules) + 2.2), layout="constrained")
    panels = figure.subplots(1, len(all_rules.SPLITS), sharey=True)
    for axes, (split, title) in zip(panels, all_rules.SPLITS.items(), strict=True):
        for y, rule in enumerate(rules):
            means = {}
            for policy in looks:
                if seeds := list(all_rules.finals(found, split, rule, policy).values()):
                    means[policy] = 100 * float(np.mean(seeds))
            axes.plot([min(means.values()), max(means.values())], [y, y], color="#CCCCCC", linewidth=3, zorder=1)
            for policy, mean in means.items():
                marker, colour, face = looks[policy]
                axes.plot(
                    [mean],
                    [y],
                    marker=marker,
                    color=colour,
                    markerfacecolor=face,
                    markersize=7,
                    markeredgewidth=1.6,
                    zorder=2,
                )
        axes.set_title(name_of(title), fontsize=10)
        axes.set_xlabel("final accuracy, %")
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(range(len(rules)), rules)
    panels[0].set_ylim(len(rules) - 0.5, -0.5)
    names = {
        "autorank": "AutoRank's ranks",
        "uniform_bytes": "uniform rank",
        "shuffled": "AutoRank's, shuffled among clients",
        "reversed": "AutoRank's, reversed",
    }
    handles = [
        Line2D(
            [],
            [],
            label=names[policy],
            marker=marker,
            color=colour,
            markerfacecolor=face,
            linestyle="",
            markeredgewidth=1.6,
        )
        for policy, (marker, colour, face) in looks.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, title=note, title_fontsize=8.5)
    return figure


def figures(folder: Path) -> dict[str, Callable[[], Figure]]:
    """Return how to draw each figure whose results are in a folder, by name."""
    drawn: dict[str, Callable[[], Figure]] = {}
    columns = paper.make_plan(paper.options_of(["--out", str(folder), "--seeds", "5"] if folder != RESULTS else []))
    found = paper.complete(paper.run_plan(paper.everything(columns), NOTHING))
    if found:
        seeds = max(len(column.runs) for own in found.values() for column in own)
        drawn |= {"over_rounds": partial(draw_over_rounds, found, seeds), "paper": partial(draw_paper, found, seeds)}
        if mixed := mixed_ranks.mixed_runs(found):
            drawn["mixed_ranks"] = partial(draw_mixed_ranks, mixed, seeds)
    plan = policies_by_rules.make_plan(policies_by_rules.options_of(["--out", str(folder)]))
    plan, table, rates = policies_by_rules.read_all(plan)
    if table:
        drawn |= _study_figures(plan, table, rates)
    cells = all_rules.make_cells(GLOBAL_RULES, quick=False, rounds=20, seeds=3)
    if ruled := all_rules.run_rules(cells, CellFile(folder / "all_rules.jsonl"), NOTHING):
        note = "Fashion-MNIST, 10 clients, 20 rounds, mean of 3 seeds, ranks of equal bytes, one learning rate for all"
        drawn["all_rules"] = partial(draw_all_rules, ruled, note)
    return drawn


def _study_figures(
    plan: policies_by_rules.Plan, table: questions.Table, rates: policies_by_rules.Rates
) -> dict[str, Callable[[], Figure]]:
    axes = {"rules": plan.rules, "settings": plan.settings, "splits": plan.splits}
    asked = {q.title: questions.answers(table, q, plan.splits) for q in questions.questions(**axes)}
    best = [Point("autorank", "raflora", ALL, "all")]
    fresh = {}
    for one in policies_by_rules.fresh_plans(plan, best):
        seen, _ = policies_by_rules.run_plan(one, policies_by_rules.order(one), rates, NOTHING)
        (question,) = policies_by_rules.fresh_questions(one, best)
        fresh[one.dataset] = questions.answers(seen, question, plan.splits)
    about = f"{plan.options['rounds']} rounds; 95 % intervals, paired over {len(plan.seeds)} seeds; 10 clients"
    rules = (
        f"AutoRank minus a uniform rank of the same bytes; Fashion-MNIST, {about}; only final accuracy is tested; "
        "FLOPs are counted, not timed"
    )
    settings = f"AutoRank with the setting minus AutoRank with all criteria; final accuracy on Fashion-MNIST, {about}"
    return {
        "rules": partial(draw_rules, asked[questions.GAIN], fresh, rules),
        "settings": partial(draw_settings, asked[questions.CHANGED], plan.splits, settings),
    }


def main(arguments: list[str] | None = None) -> None:
    """Draw all figures whose results are there."""
    parser = make_parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results, and of the figures")
    options = parser.parse_args(arguments)
    mpl.use("Agg")
    for name, draw in figures(options.results).items():
        with mpl.rc_context(STYLE):
            path = options.results / f"{name}.png"
            draw().savefig(path, dpi=110, facecolor="white", metadata={"Software": None})
        print(path)


if __name__ == "__main__":
    main()
