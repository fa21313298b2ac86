"""Tables and picture of what `rounds` measured: for each workload, how many times as fast as each competitor we are."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autorank_jax.cli.figures import PALETTE
from benchmarks import script
from benchmarks.speed.competitors import YARDSTICKS
from benchmarks.speed.workloads import TITLES, WORKLOADS

NAMES = {
    "centralised": "centralised: no clients",
    "same_batches": "the same batches, one model",
    "lockstep": "hand-written jit(vmap(scan))",
    "loop": "loop over jitted clients",
    "drjax": "DrJAX",
    "fedjax": "FedJAX",
    "pfl": "pfl",
    "flower": "Flower",
    "torch": "PyTorch, client by client",
    "torch_vmap": "PyTorch, torch.func.vmap",
}
"""The competitors, as the picture has them."""
FASTER, SLOWER, YARDSTICK = PALETTE[0], PALETTE[1], PALETTE[7]
ROWS = {
    "competitor": "competitor",
    "examples/s": "samples_per_second",
    "seconds per round": "seconds_per_round",
    "± seconds": "spread_seconds",
    "seconds to compile": "compile_seconds",
    "peak bytes": "peak_bytes",
    "devices": "devices",
    "turns": "repeats",
    "ours / theirs": "ratio",
}
OURS = {
    "workload": "workload",
    "examples/s": "samples_per_second",
    "seconds per round": "seconds_per_round",
    "± seconds": "spread_seconds",
    "seconds to compile": "compile_seconds",
    "MB": "mb",
    "MB of `lockstep`": "lockstep_mb",
    "devices": "devices",
    "devices of `lockstep`": "lockstep_devices",
    "devices of `centralised`": "centralised_devices",
    "ours / ours on one device": "one",
    "ours on one device / `same_batches`": "same_batches",
}


def all_rows(content: script.Content, workload: str) -> str:
    """Lay out everything that was measured on one workload, and why somebody has no number."""
    ratios = content["ratios"][workload]
    rows = [r | {"ratio": ratios.get(r["competitor"])} for r in content["rows"] if r["workload"] == workload]
    skipped = [f"no number for {name}: {why}" for name, why in content["skipped"].get(workload, {}).items()]
    return "\n".join([script.table(rows, ROWS), *skipped])


def tables(content: script.Content) -> dict[str, str]:
    """Lay out `ours / theirs` of everybody, and what our rounds take."""
    measured = [name for name in WORKLOADS if name in content["ratios"]]
    names = [name for name in NAMES if any(name in content["ratios"][workload] for workload in measured)]
    ratios = [{"workload": f"`{name}`"} | content["ratios"][name] for name in measured]
    found = {
        "rounds": script.table(ratios, {name: name for name in ("workload", *names)}),
        "rounds, ours": script.table([our_round(content, name) for name in measured], OURS),
    }
    return found


def our_round(content: script.Content, workload: str) -> dict[str, Any]:
    """Return what our round takes on one workload, beside what some others used."""
    by_name = {row["competitor"]: row for row in content["rows"] if row["workload"] == workload}
    lockstep, central = by_name.get("lockstep", {}), by_name.get("centralised", {})
    ratios = content["ratios"][workload]
    one, same = ratios.get("ours, 1 device"), ratios.get("same_batches")
    return by_name["ours"] | {
        "workload": f"`{workload}`",
        "mb": megabytes(by_name["ours"]["peak_bytes"]),
        "lockstep_mb": megabytes(lockstep.get("peak_bytes")),
        "lockstep_devices": lockstep.get("devices"),
        "centralised_devices": central.get("devices"),
        "one": one,
        "same_batches": None if same is None else same / (one or 1.0),
    }


def megabytes(count: int | None) -> float | None:
    """Return a count of bytes in MB."""
    return None if count is None else count / 1e6


def compared(content: script.Content) -> dict[str, dict[str, float]]:
    """Return `ours / theirs` of the competitors, of every workload where somebody else has a number."""
    ratios = {name: {c: r for c, r in of.items() if c in NAMES} for name, of in content["ratios"].items()}
    return {name: ratios[name] for name in WORKLOADS if ratios.get(name)}


def draw(content: script.Content) -> Figure:
    """Draw one panel per workload with a bar per competitor, on a logarithmic scale around 1."""
    ratios = compared(content)
    columns = min(2, len(ratios))
    lines = -(-len(ratios) // columns)
    most = max(len(of) for of in ratios.values())
    every = [ratio for of in ratios.values() for ratio in of.values()]
    figure = Figure(figsize=(max(9.2, 5.4 * columns), (0.22 * most + 0.6) * lines + 1), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (name, of) in zip(grid.flat, ratios.items(), strict=False):
        panel(axes, TITLES[name], of)
        axes.set_xlim(0.8 * min(1.0, *every), 2 * max(2.0, *every))  # one scale for all
    for axes in list(grid.flat)[len(ratios) :]:
        axes.set_visible(False)
    script.entitle(
        figure,
        "How many times as fast as others one of our rounds is (logarithmic)",
        "Examples per second over theirs, the very same work with equal results. Blue: we are faster, orange: they "
        "are. Grey: yardsticks, one shared model without clients,\nin big batches or in the clients' own. "
        f"{script.hardware(content)}; median of up to {max(row['repeats'] for row in content['rows'])} turns each.",
    )
    return figure


def panel(axes: Axes, title: str, ratios: dict[str, float]) -> None:
    """Draw one workload; bars to the right of 1 are ours."""
    order = sorted(ratios, key=ratios.__getitem__)
    for place, competitor in enumerate(order):
        ratio = ratios[competitor]
        colour = YARDSTICK if competitor in YARDSTICKS else FASTER if ratio >= 1 else SLOWER
        axes.barh(place, ratio - 1, left=1, color=colour)
        text = f" {ratio:.2g}" if ratio < 10 else f" {ratio:.0f}"
        axes.annotate(text, (max(ratio, 1), place), ha="left", va="center", fontsize=8)  # right of whatever is drawn
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(order)), [NAMES.get(name, name) for name in order], fontsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.minorticks_off()
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(visible=False, axis="y")
    axes.set_title(title, fontsize=9, loc="left")
