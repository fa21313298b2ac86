"""The picture of `rounds.py`: for each workload, how many times as fast as each competitor we are."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.speed.workloads import WORKLOADS

OURS, THEIRS = "#0072B2", "#D55E00"


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw one panel per workload with a bar per competitor, on a logarithmic scale around 1."""
    ratios = {
        name: {c: r for c, r in content["ratios"][name].items() if not c.startswith("ours")}
        for name in WORKLOADS
        if content["ratios"].get(name)
    }
    if not ratios:
        return
    columns = min(3, len(ratios))
    lines = -(-len(ratios) // columns)
    most = max(len(of) for of in ratios.values())
    size = (3.0 * columns, (0.28 * most + 0.8) * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, (name, of) in zip(grid.flat, ratios.items(), strict=False):
        panel(axes, name, of)
    for axes in list(grid.flat)[len(ratios) :]:
        axes.set_visible(False)
    figure.supxlabel("samples per second: ours / theirs", fontsize=9)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def panel(axes: Any, name: str, ratios: dict[str, float]) -> None:
    """Draw one workload; bars to the right of 1 are ours."""
    order = sorted(ratios, key=ratios.__getitem__)
    for place, competitor in enumerate(order):
        ratio = ratios[competitor]
        axes.barh(place, ratio - 1, left=1, color=OURS if ratio >= 1 else THEIRS)
        text = f" {ratio:.2g}" if ratio < 10 else f" {ratio:.0f}"
        axes.annotate(text, (max(ratio, 1), place), ha="left", va="center", fontsize=7)  # right of whatever is drawn
    axes.set_xscale("log")
    axes.set_xlim(0.8 * min(1.0, *ratios.values()), 4 * max(2.0, *ratios.values()))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(name, fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
