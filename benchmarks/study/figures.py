"""Pictures of the studies: accuracy curves with bands, ranks against data complexity, coverage, heat maps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from curves import Reached
from grid import Cell
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from mixed_ranks import MixedRun

from autorank_jax.cli.figures import DASHES, PALETTE, PERCENT, STYLE
from autorank_jax.experiment.results import si

PANELS = {
    "rounds": "round",
    "flops": "training FLOPs of all clients,\nprobe included",
    "bytes": "bytes sent, up and down",
}
MOST_LINES = len(PALETTE)
MARKERS = "osD^v"


def accuracy_curves(series: Mapping[str, Mapping[int, Reached]], path: Path, title: str) -> None:
    """Draw test accuracy over rounds, FLOPs and bytes: mean over seeds, in a band from the worst to the best.

    Args:
        series: runs by seed, by name; the first eight are drawn. Who has no runs keeps the colour of the place.
        path: of the PNG.
        title: above all.
    """
    most = max(len(runs) for runs in series.values())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 5.2), layout="constrained")
        handles = []
        panels = figure.subplots(1, 3, sharey=True)
        for number, (name, runs) in enumerate(list(series.items())[:MOST_LINES]):
            if not runs:
                continue
            look: dict[str, Any] = {
                "color": PALETTE[number],
                "linestyle": DASHES[0 if number == 0 else 1 + (number - 1) % 3],
                "linewidth": 2.6 if number == 0 else 1.7,
            }
            _draw_curves(panels, list(runs.values()), look)
            note = "" if len(runs) == most else f" ({len(runs)} of {most} seeds)"
            handles.append(Line2D([], [], label=name + note, **look))
        for axes, label in zip(panels, PANELS.values(), strict=True):
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axes in panels[1:]:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value) if value else "0"))
        panels[0].set_ylabel("test accuracy")
        panels[0].yaxis.set_major_formatter(PERCENT)
        band = f"mean and range of {most} seeds" if most > 1 else "one seed"
        figure.suptitle(f"{title} · {band}", x=0.01, ha="left", fontsize=11, weight="bold")
        figure.legend(handles=handles, loc="outside lower center", ncols=2 if len(handles) > 3 else len(handles))
        _save(figure, path)


def _draw_curves(panels: Sequence[Any], runs: Sequence[Reached], look: Mapping[str, Any]) -> None:
    accuracy = np.array([run.accuracy for run in runs])
    for axes, what in zip(panels, PANELS, strict=True):
        x = np.nanmean([getattr(run, what) for run in runs], axis=0)
        axes.plot(x, accuracy.mean(axis=0), **look)
        if len(runs) > 1:
            axes.fill_between(
                x, accuracy.min(axis=0), accuracy.max(axis=0), color=look["color"], alpha=0.13, linewidth=0
            )


def ranks_against_complexity(cells: Mapping[str, Cell], path: Path) -> None:
    """Draw AutoRank's ratio of every client against each of its criteria, a colour for each cell's first seed.

    Args:
        cells: by name, with AutoRank among their policies.
        path: of the PNG.
    """
    shown = {name: next(iter(cell["scores"].values())) for name, cell in list(cells.items())[: len(PALETTE)]}
    criteria = next(iter(shown.values()))["criteria"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(criteria), 3.9), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(criteria), sharey=True))
        for number, scores in enumerate(shown.values()):
            matrix, ratios = np.array(scores["matrix"]), scores["ratios"]["autorank"]
            size = 34 if len(ratios) <= 30 else 14
            for place, axes in enumerate(panels):
                axes.scatter(matrix[:, place], ratios, s=size, color=PALETTE[number], alpha=0.65, linewidth=0)
        for axes, name in zip(panels, criteria, strict=True):
            axes.set_xlabel(name.replace("_", " "))
            if name == "size":
                axes.set_xscale("log")
            else:
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=name == "classes"))
        panels[0].set_ylabel("AutoRank's rank ratio")
        panels[0].set_ylim(0, 1.04)
        handles = [
            Line2D([], [], color=PALETTE[n], marker="o", linestyle="", label=name) for n, name in enumerate(shown)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)))
        figure.suptitle(
            "Rank against data complexity, a point per client of the first seed",
            x=0.01,
            ha="left",
            fontsize=11,
            weight="bold",
        )
        _save(figure, path)


def accuracy_over_coverage(runs: Sequence[MixedRun], path: Path) -> None:
    """Draw what mixed ranks reach over the examples behind the highest rank: colours for columns, markers for splits.

    Args:
        runs: at least one.
        path: of the PNG.
    """
    datasets, splits, columns = (list(dict.fromkeys(run[place] for run in runs)) for place in range(3))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.5 * len(datasets), 5.2), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(datasets), sharey=True))
        for run in runs:
            look = {
                "edgecolors": PALETTE[columns.index(run.column) % len(PALETTE)],
                "marker": MARKERS[splits.index(run.split)],
            }
            panels[datasets.index(run.dataset)].scatter(
                run.share, 100 * run.difference, s=48, facecolors="none", linewidth=1.5, **look
            )
        for axes, name in zip(panels, datasets, strict=True):
            axes.axhline(0, color="#666666", linewidth=0.8)
            axes.set_xscale("log")
            axes.set_xlim(min(run.share for run in runs) / 1.3, 1.1)
            axes.xaxis.set_major_locator(FixedLocator([0.003, 0.01, 0.03, 0.1, 0.3, 1]))
            axes.xaxis.set_major_formatter(PERCENT)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("share of all examples that the clients of the highest rank hold")
            axes.set_title(name, loc="left")
        panels[0].set_ylabel("final accuracy minus that of one rank\nof AutoRank's bytes, points")
        hollow = {"linestyle": "", "markerfacecolor": "none", "markeredgewidth": 1.5}
        handles = [Line2D([], [], color=PALETTE[n % len(PALETTE)], marker="o", label=name, **hollow)
                   for n, name in enumerate(columns)]  # fmt: skip
        handles += [Line2D([], [], color="#666666", marker=MARKERS[n], label=name, **hollow)
                    for n, name in enumerate(splits)]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        figure.suptitle("Mixed ranks under RBLA, a point per run", x=0.01, ha="left", fontsize=11, weight="bold")
        _save(figure, path)


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    path: Path,
    *,
    title: str,
    label: str,
    breaks: Sequence[int] = (),
    differences: bool = False,
    shown: np.ndarray | None = None,
) -> None:
    """Draw numbers as a heat map, NaN left empty.

    Args:
        values: `(rows, columns)`.
        rows: their names.
        columns: likewise; line breaks are kept.
        path: of the PNG.
        title: above it.
        label: of the colours.
        breaks: columns before which a gap is drawn.
        differences: colours centred at 0 and numbers with a sign.
        shown: `(rows, columns)`, whether a number gets a star.
    """
    known = values[np.isfinite(values)]
    top = float(np.abs(known).max() if differences else known.max()) or 1.0
    low = -top if differences else max(10.0, top - 40)
    with mpl.rc_context({key: value for key, value in STYLE.items() if not key.startswith("axes.grid")}):
        figure = Figure(figsize=(max(5.2, 0.85 * len(columns) + 2.4), 0.42 * len(rows) + 2.0), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(values, cmap="RdBu" if differences else "viridis", aspect="auto", vmin=low, vmax=top)
        for (y, x), value in np.ndenumerate(values):
            if np.isfinite(value):
                star = shown is not None and shown[y, x]
                number = (f"{value:+.1f}" if differences else f"{value:.1f}") + "*" * bool(star)
                axes.text(x, y, number, ha="center", va="center", fontsize=8, weight="bold" if star else "normal",
                          color=_ink(image.cmap(image.norm(value))))  # fmt: skip
        axes.set_xticks(range(len(columns)), columns, fontsize=7.5)
        axes.set_yticks(range(len(rows)), rows)
        for place in breaks:
            axes.axvline(place - 0.5, color="white", linewidth=3)
        axes.tick_params(length=0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[:].set_visible(False)
        clipped = "min" if known.min() < low else "neither"
        figure.colorbar(image, ax=axes, label=label, shrink=0.85, extend=clipped)
        _save(figure, path)


def _ink(colour: Sequence[float]) -> str:
    """Return black on light colours, white on dark ones."""
    return "black" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.5 else "white"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")
