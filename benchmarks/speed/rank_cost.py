"""Seconds and FLOPs of a round against the clients' rank ratio, with and without rank levels.

The workload is `staircase`; all clients have one ratio of the maximum ranks, or AutoRank's. FLOPs are those of forward
and backward at the clients' own ranks. A level trains at one width, so that four levels follow the FLOPs in steps of a
quarter; one level pays for full rank whatever the ratio. Ranks are data: each number of levels is compiled once.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.speed.rank_cost --json benchmarks/speed/results/rank_cost.json
Hardware: two CPU cores
Time and numbers to expect: see benchmarks/README.md
"""

import argparse
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from autorank_jax.adapters.lora import max_ranks
from autorank_jax.engine import sharding
from autorank_jax.engine.flops import training_flops
from autorank_jax.engine.round import make_round
from autorank_jax.evaluation.costs import client_costs
from autorank_jax.types import State
from benchmarks import harness
from benchmarks.speed import workloads
from benchmarks.speed.competitors import arguments_of, meshes, timed
from benchmarks.speed.workloads import Workload

RATIOS = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
LEVELS = 4
COLUMNS = ("ranks", "mean_ratio", "rank_levels", "seconds_per_round", "spread_seconds", "seconds_share", "flops_share")


def states_of(workload: Workload, ratios: tuple[float, ...]) -> dict[str, State]:
    """Return the start at each ratio, at AutoRank's and at full rank."""
    model = workloads.Model(workload.task, workload.network)
    states = {f"{ratio:g}": workloads.uniform_ranks(model, workload.data, ratio) for ratio in sorted({*ratios, 1.0})}
    states["AutoRank"] = workload.state.ranks
    types = jax.tree.map(lambda leaf: leaf.dtype, workload.state.ranks)
    return {
        name: workload.state._replace(ranks=jax.tree.map(jnp.astype, ranks, types)) for name, ranks in states.items()
    }


def mean_ratio(workload: Workload, state: State) -> float:
    """Return the ratio of the ranks to their maximum: mean over layers, and over clients by their examples."""
    widest, size = max_ranks(state.server.trainable), np.asarray(workload.data.size, np.float64)
    return float(np.mean([np.asarray(rank) @ size / size.sum() / widest[path] for path, rank in state.ranks.items()]))


def flops_of(workload: Workload, states: dict[str, State]) -> dict[str, float]:
    """Return the FLOPs of a round at each state's ranks."""
    model = training_flops(workload.task, workload.data)
    server, size = workload.state.server, workload.data.size
    costs = {name: client_costs(server, state.ranks, size, model, local_epochs=1) for name, state in states.items()}
    return {name: float(cost.flops.sum()) for name, cost in costs.items()}


def measure(
    workload: Workload, ratios: tuple[float, ...], repeats: int, most_levels: int, devices: int
) -> list[harness.Row]:
    """Let all ranks and numbers of levels take turns, on all devices."""
    states, rows, mesh = states_of(workload, ratios), [], meshes(devices)[devices]
    flops = flops_of(workload, states)
    key, state, data = arguments_of(workload, mesh)
    if mesh is not None:
        states = sharding.replicate(states, mesh)
    programs = {}
    for levels in (1, most_levels):
        print(f"compiling {levels} rank levels …", flush=True)
        round_fn = make_round(workload.local, workload.rule, lanes=workload.lanes, rank_levels=levels, mesh=mesh)
        programs[levels], _ = harness.compiled(round_fn, key, state, data)
    seconds: dict[tuple[str, int], list[float]] = {(name, levels): [] for name in states for levels in programs}
    for turn in range(repeats + 1):
        print(f"turn {turn} of {repeats} …", flush=True)
        for (name, levels), times in seconds.items():
            times.append(timed(programs[levels], key, states[name], data))
    for (name, levels), times in seconds.items():
        full, own = (harness.summary(t[1:]) for t in (seconds["1", levels], times))
        rows.append(
            {
                "ranks": name,
                "mean_ratio": mean_ratio(workload, states[name]),
                "rank_levels": levels,
                "seconds_per_round": own["median"],
                "spread_seconds": own["spread"],
                "seconds_share": own["median"] / full["median"],
                "flops": flops[name],
                "flops_share": flops[name] / flops["1"],
            }
        )
    return rows


def draw(rows: list[harness.Row], path: Path) -> None:
    """Draw the shares of a round at full rank."""
    figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
    most = max(row["rank_levels"] for row in rows)
    for levels, label, colour in (
        (1, "seconds, no rank levels", "#D55E00"),
        (most, f"seconds, {most} rank levels", "#0072B2"),
    ):
        line = [row for row in rows if row["rank_levels"] == levels and row["ranks"] != "AutoRank"]
        ratios = [row["mean_ratio"] for row in line]
        axes.plot(ratios, [row["seconds_share"] for row in line], marker="o", color=colour, label=label)
    axes.plot(ratios, [row["flops_share"] for row in line], color="black", linestyle=":", label="FLOPs")
    axes.set_xlabel("rank ratio of all clients")
    axes.set_ylabel("share of a round at full rank")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


@harness.mistakes_in_words()
def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="embedded images, two ratios, two levels, one turn")
    parser.add_argument("--devices", type=int, default=len(os.sched_getaffinity(0)), help="virtual ones, one per core")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    mpl.use("Agg")
    ratios, repeats, levels = ((0.5,), 1, 2) if options.quick else (RATIOS, options.repeats, LEVELS)
    workload = workloads.make_workload("staircase", quick=options.quick)
    rows = measure(workload, ratios, repeats, levels, options.devices)
    print(harness.markdown_table(rows, COLUMNS))
    content = {"rows": rows, "versions": harness.versions(), "device": harness.device()}
    harness.write_json(options.json, content)
    if options.json is not None:
        draw(rows, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
