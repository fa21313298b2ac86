"""Figures of single runs, of curves, and of accuracies side by side; their words."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from autorank_jax.cli.figures import PERCENT
from benchmarks.study import all_rules, mixed_ranks
from benchmarks.study.columns import AUTHOR
from benchmarks.study.forest import HIGHER, LOWER, UNSURE
from benchmarks.study.mixed_ranks import MixedRun
from benchmarks.study.paired import difference
from benchmarks.study.paper import Key
from benchmarks.study.paper_tables import Column

Found = Mapping[Key, Sequence[Column]]
"""Columns by dataset and split."""
NAMES = {"fashion_mnist": "Fashion-MNIST", "mnist": "MNIST", "cifar10": "CIFAR-10", "cinic10": "CINIC-10",
         "staircase": "staircase split", "dirichlet-0.4-10": "random split", "dirichlet-0.3-10": "random split",
         "all": "mean of both", "rbla": "RBLA", "raflora": "raFLoRA", "flexlora": "FlexLoRA", "flora": "FLoRA",
         "fedex_lora": "FedEx-LoRA", "ffa_lora": "FFA-LoRA", "hetlora": "HetLoRA", "rolora": "RoLoRA",
         "florist": "FLoRIST", "lora_fair": "LoRA-FAIR", "zero_pad": "zero-padding",
         "owner_merge": "owner merge"}  # fmt: skip
"""Of datasets, splits and rules, where others have their own."""
FIRST, UNIFORM = AUTHOR[0], AUTHOR[2]
CAPPED, PRODUCTS = "AutoRank, top ranks capped + RBLA", "AutoRank + raFLoRA"
KINDS = {
    "AutoRank's ranks": ("o", "#0072B2", (FIRST, "AutoRank at the uniform rank's learning rate + RBLA")),
    "AutoRank's ranks, the highest capped": ("D", "#009E73", (CAPPED,)),
    "ranks by hand or by client size": ("s", "#E69F00", (AUTHOR[1], "ranks by size, AutoRank's bytes + RBLA")),
    "AutoRank's ranks, shuffled or reversed": ("X", "#CC79A7", ()),
}
"""Of mixed ranks: marker, colour and columns by name; the last has all others."""


def name_of(word: str) -> str:
    """Return the name that figures give to a dataset, split or rule."""
    return NAMES.get(word, word.replace("_", " "))


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
        "Ranks that differ between clients lose accuracy under RBLA\n"
        "where the clients of the highest rank hold few examples",
        pad=30,
    )
    axes.text(left, top + 3.6, f"more than {100 * mixed_ranks.BEHIND:g} points behind:", fontsize=9, color="#444444")
    hollow = {"linestyle": "", "markerfacecolor": "none", "markeredgewidth": 1.5}
    handles = [Line2D([], [], label=name, marker=look[0], color=look[1], **hollow) for name, look in KINDS.items()]
    where = [" and ".join(dict.fromkeys(name_of(run[place]) for run in runs)) for place in (0, 1)]
    note = f"{len(runs)} runs: {', '.join(where)}; 10 clients, 100 rounds, {seeds} seeds"
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
        f"Mean and 95 % t interval of differences paired over {seeds} seeds, round by round, not corrected; "
        "10 clients; bands are cut at the frame"
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


LOOKS = {"autorank": ("o", HIGHER, HIGHER, "AutoRank's ranks"),
         "uniform_bytes": ("D", "#000000", "none", "uniform rank"),
         "shuffled": ("x", "#CC79A7", "none", "AutoRank's ranks, shuffled among clients"),
         "reversed": ("+", LOWER, "none", "AutoRank's ranks, reversed")}  # fmt: skip
"""Of kinds of ranks: marker, colours of edge and face, name."""


def draw_all_rules(found: all_rules.Found, note: str) -> Figure:
    """Draw final accuracies of every rule under four kinds of ranks."""
    rules = all_rules.rules_of(found)
    figure = Figure(figsize=(10, 0.34 * len(rules) + 2.4), layout="constrained")
    panels = figure.subplots(1, len(all_rules.SPLITS), sharey=True)
    for axes, (split, title) in zip(panels, all_rules.SPLITS.items(), strict=True):
        for y, rule in enumerate(rules):
            seeds = {policy: list(all_rules.finals(found, split, rule, policy).values()) for policy in LOOKS}
            means = {policy: 100 * float(np.mean(own)) for policy, own in seeds.items() if own}
            axes.plot([min(means.values()), max(means.values())], [y, y], color="#CCCCCC", linewidth=3, zorder=1)
            for policy, mean in means.items():
                axes.plot([mean], [y], markersize=7, zorder=2, **_marker(policy))
        axes.set(title=name_of(title), xlabel="final accuracy, %")
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(range(len(rules)), [name_of(rule) for rule in rules])
    panels[0].set_ylim(len(rules) - 0.5, -0.5)
    handles = [Line2D([], [], label=look[3], **_marker(policy)) for policy, look in LOOKS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, title=note, title_fontsize=8.5)
    figure.suptitle(
        "How much a rule depends on which client has which rank", x=0.01, ha="left", fontsize=11.5, weight="bold"
    )
    return figure


def _marker(policy: str) -> dict[str, Any]:
    marker, edge, face, _ = LOOKS[policy]
    return {"marker": marker, "color": edge, "markerfacecolor": face, "linestyle": "", "markeredgewidth": 1.6}
