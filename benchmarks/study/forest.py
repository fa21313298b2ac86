"""Forest plots: differences with their intervals, row by row, against a line at zero."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.study.paired import Difference

HIGHER, LOWER, UNSURE = "#0072B2", "#D55E00", "#8A8A8A"
"""Colours: a difference that is shown, on either side, and one that is not."""


class Mark(NamedTuple):
    """One difference of a row."""

    difference: Difference | None  # None where it was not measured
    shown: bool = False  # beyond chance after correction


class Forest(NamedTuple):
    """Rows of marks: a mark for each panel."""

    labels: list[str]  # a row without marks is a heading
    marks: list[Sequence[Mark]]

    @classmethod
    def empty(cls) -> "Forest":
        """Return one without rows."""
        return cls([], [])

    def heading(self, text: str) -> None:
        """Add a heading."""
        self.labels.append(text)
        self.marks.append(())

    def row(self, label: str, *marks: Mark) -> None:
        """Add a row."""
        self.labels.append(label)
        self.marks.append(marks)


def draw_forest(
    figure: Figure, forest: Forest, titles: Sequence[str], label: str, limits: Sequence[tuple[float, float]]
) -> list[Axes]:
    """Draw a forest plot with a panel for every mark of a row.

    Args:
        figure: empty.
        forest: rows, from the top.
        titles: of the panels.
        label: of the axes of differences, in points.
        limits: of these axes; what lies beyond them is an arrow with its number.

    Returns:
        The panels.
    """
    panels = list(figure.subplots(1, len(titles), sharey=True, squeeze=False)[0])
    for place, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.axvline(0, color="#444444", linewidth=0.9, zorder=1)
        axes.set(xlim=limits[place], xlabel=label)
        axes.set_title(title, fontsize=10)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        for y, marks in enumerate(forest.marks):
            if marks:
                _draw_mark(axes, y, marks[place])
    panels[0].set_yticks(range(len(forest.labels)), forest.labels)
    panels[0].set_ylim(len(forest.labels) - 0.4, -0.7)
    for text, marks in zip(panels[0].get_yticklabels(), forest.marks, strict=True):
        if not marks:
            text.set_weight("bold")
    return panels


def _draw_mark(axes: Axes, y: int, mark: Mark) -> None:
    low, high = axes.get_xlim()
    if mark.difference is None:
        axes.text(0, y, " not measured", fontsize=7, color=UNSURE, va="center")
        return
    mean, *ends = (100 * value for value in mark.difference[:3] if value is not None)
    colour = (HIGHER if mean > 0 else LOWER) if mark.shown else UNSURE
    if ends:
        axes.plot(ends, [y, y], color=colour, linewidth=1.6, solid_capstyle="butt", zorder=2)
    if low <= mean <= high:
        look = _look(colour, filled=mark.shown)
        axes.plot([mean], [y], zorder=3, **look)
    else:
        edge, side = (high, "right") if mean > high else (low, "left")
        marker = ">" if mean > high else "<"
        axes.plot([edge], [y], clip_on=False, zorder=3, **_look(colour, filled=mark.shown) | {"marker": marker})
        gap = 0.03 * (high - low) * (-1 if mean > high else 1)
        axes.text(edge + gap, y - 0.16, f"{mean:+.1f}", ha=side, va="bottom", fontsize=7.5, color=colour)


def _look(colour: str, *, filled: bool) -> dict[str, Any]:
    return {
        "color": colour,
        "marker": "o",
        "markersize": 6.5,
        "markerfacecolor": colour if filled else "white",
        "markeredgewidth": 1.4,
        "linestyle": "",
    }


def explain(figure: Figure, note: str) -> None:
    """Say below a figure what its marks mean, and what was measured.

    Args:
        figure: a forest plot.
        note: dataset, rounds, seeds.
    """
    handles = [
        Line2D([], [], label="higher: p < 0.05 after Holm's correction", **_look(HIGHER, filled=True)),
        Line2D([], [], label="lower, likewise", **_look(LOWER, filled=True)),
        Line2D([], [], label="no difference shown", **_look(UNSURE, filled=False)),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, title=note, title_fontsize=8.5)
