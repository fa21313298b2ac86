"""Forest plots: differences with their intervals, row by row, against a line at zero."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from benchmarks.study.paired import Difference

HIGHER, LOWER, UNSURE, UNTESTED = "#0072B2", "#D55E00", "#8A8A8A", "#222222"
"""Colours: a difference that is shown, on either side; one that is not; one that was not tested."""
LIMITS = (3, 6, 12, 16)
"""Points on either side of zero that a panel may have."""


class Mark(NamedTuple):
    """One difference of a row."""

    difference: Difference | None  # None where it was not measured
    shown: bool | None = False  # beyond chance after correction; None where that was not tested

    @property
    def colour(self) -> str:
        """What was found, as a colour."""
        if self.shown is None:
            return UNTESTED
        return UNSURE if not self.shown else HIGHER if self.difference.mean > 0 else LOWER


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
        self.row(text)

    def row(self, label: str, *marks: Mark) -> None:
        """Add a row."""
        self.labels.append(label)
        self.marks.append(marks)


def draw_forest(forest: Forest, panels: Sequence[str], *, title: str, note: str, width: float) -> Figure:
    """Draw a forest plot, with a panel for every mark of a row.

    Args:
        forest: rows, from the top.
        panels: their titles.
        title: above all.
        note: below: dataset, rounds, seeds.
        width: of the figure, in inches.
    """
    figure = Figure(figsize=(width, 0.28 * len(forest.labels) + 2.1), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, weight="bold")
    drawn = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    for place, (axes, name) in enumerate(zip(drawn, panels, strict=True)):
        marks = [(y, row[place]) for y, row in enumerate(forest.marks) if row]
        limit = _limit([mark for _, mark in marks])
        axes.axvline(0, color="#444444", linewidth=0.9, zorder=1)
        axes.set(xlim=(-limit, limit), xlabel="points of accuracy")
        axes.set_title(name, fontsize=10)
        axes.xaxis.set_major_locator(MultipleLocator(limit // 3))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        for y, mark in marks:
            _draw_mark(axes, y, mark)
    drawn[0].set_yticks(range(len(forest.labels)), forest.labels)
    drawn[0].set_ylim(len(forest.labels) - 0.4, -0.7)
    for text, row in zip(drawn[0].get_yticklabels(), forest.marks, strict=True):
        text.set_weight("normal" if row else "bold")
    beyond = any(_is_cut(axes, row[place]) for place, axes in enumerate(drawn) for row in forest.marks if row)
    further = ["intervals are cut at the frame"] * beyond + ["panels have scales of their own"] * (len(panels) > 1)
    below = note + (";\n" + ", ".join(further) if further else "")
    _explain(figure, [mark for row in forest.marks for mark in row if mark.difference], below)
    return figure


def _is_cut(axes: Axes, mark: Mark) -> bool:
    """Return whether a mark's interval goes beyond the frame."""
    ends = mark.difference[:3] if mark.difference else ()
    return any(abs(100 * end) > axes.get_xlim()[1] for end in ends if end is not None)


def _limit(marks: Sequence[Mark]) -> int:
    """Return how far a panel has to go for its means; the farthest limit leaves some out, which are arrows."""
    means = [100 * abs(mark.difference.mean) for mark in marks if mark.difference]
    most = max((mean for mean in means if mean < LIMITS[-1]), default=0.0)
    return next((limit for limit in LIMITS if limit > 1.05 * most), LIMITS[-1])


def _draw_mark(axes: Axes, y: int, mark: Mark) -> None:
    """Draw a difference and its interval; a mean beyond the frame is an arrow with its number."""
    _, limit = axes.get_xlim()
    if mark.difference is None:
        axes.text(0, y, "  not measured", fontsize=7, color=UNSURE, va="center")
        return
    mean, *ends = (100 * value for value in mark.difference[:3] if value is not None)
    if ends:
        axes.plot(ends, [y, y], color=mark.colour, linewidth=1.6, solid_capstyle="butt", zorder=2)
    if abs(mean) <= limit:
        axes.plot([mean], [y], zorder=3, **_look(mark.colour, filled=mark.shown))
        return
    edge, marker, side = (limit, ">", "right") if mean > 0 else (-limit, "<", "left")
    look = _look(mark.colour, filled=mark.shown) | {"marker": marker, "markersize": 7}
    axes.plot([edge], [y], clip_on=False, zorder=3, **look)
    axes.text(0.93 * edge, y - 0.16, f"{mean:+.1f}", ha=side, va="bottom", fontsize=7.5, color=mark.colour)


def _look(colour: str, *, filled: bool | None) -> dict[str, Any]:
    """Return how a mark looks: filled where shown, open where not, a bar where it was not tested."""
    return {
        "color": colour,
        "marker": "|" if filled is None else "o",
        "markersize": 11 if filled is None else 6.5,
        "markerfacecolor": colour if filled else "white",
        "markeredgewidth": 1.5,
        "linestyle": "",
    }


def _explain(figure: Figure, marks: Sequence[Mark], note: str) -> None:
    """Say below a figure what the marks that it has mean, and what was measured."""
    meanings = {
        HIGHER: ("higher: p < 0.05 after Holm's correction", True),
        LOWER: ("lower: p < 0.05 after Holm's correction", True),
        UNSURE: ("no difference shown", False),
        UNTESTED: ("not tested: interval only", None),
    }
    used = {mark.colour for mark in marks}
    handles = [
        Line2D([], [], label=text, **_look(colour, filled=filled))
        for colour, (text, filled) in meanings.items()
        if colour in used
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, title=note, title_fontsize=8.5
    )
