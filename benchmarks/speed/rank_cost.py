"""Seconds and FLOPs of a round against the clients' rank ratio, with and without rank levels.

The workload is `staircase`; all clients have one ratio of the maximum ranks, or AutoRank's. FLOPs are those of forward
and backward at the clients' own ranks. A level trains at one width, so that four levels follow the FLOPs in steps of a
quarter; one level pays for full rank whatever the ratio. Ranks are data: each number of levels is compiled once.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.speed.rank_cost --json benchmarks/speed/results/rank_cost.json
Hardware: two CPU cores
Time and numbers to expect: see benchmarks/speed/README.md
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from autorank_jax.adapters.lora import max_ranks
from autorank_jax.cli.figures import PALETTE
from autorank_jax.engine import sharding
from autorank_jax.engine.flops import training_flops
from autorank_jax.engine.round import make_round
from autorank_jax.evaluation.costs import client_costs
from autorank_jax.types import State
from benchmarks import harness, script
from benchmarks.speed import workloads
from benchmarks.speed.competitors import arguments_of, meshes, timed
from benchmarks.speed.workloads import Workload

RATIOS = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0)
LEVELS = 4


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


def tables(content: script.Content) -> dict[str, str]:
    """Lay out the shares of a round at full rank, a row per rank ratio."""
    most = max(row["rank_levels"] for row in content["rows"])
    rows: dict[str, harness.Row] = {}
    for row in content["rows"]:
        own = {f"{field} {row['rank_levels']}": row[field] for field in ("seconds_share", "seconds_per_round")}
        rows[row["ranks"]] = rows.get(row["ranks"], {}) | row | own
    columns = {
        "ranks": "ranks",
        "mean ratio": "mean_ratio",
        "share of FLOPs": "flops_share",
        "share of seconds, one level": "seconds_share 1",
        f"share of seconds, {most} levels": f"seconds_share {most}",
        "seconds, one level": "seconds_per_round 1",
        f"seconds, {most} levels": f"seconds_per_round {most}",
    }
    return {"rank_cost": script.table(list(rows.values()), columns)}


def draw(content: script.Content) -> Figure:
    """Draw the shares of a round at full rank."""
    rows = content["rows"]
    figure = Figure(figsize=(6.6, 4.1), layout="constrained")
    axes = figure.subplots()
    most = max(row["rank_levels"] for row in rows)
    for levels, label, colour in (
        (1, "seconds, no rank levels", PALETTE[1]),
        (most, f"seconds, {most} rank levels", PALETTE[0]),
    ):
        line = [row for row in rows if row["rank_levels"] == levels]
        for marker, uniform in (("o", True), ("*", False)):
            own = [row for row in line if (row["ranks"] != "AutoRank") == uniform]
            x, y = ([row[field] for row in own] for field in ("mean_ratio", "seconds_share"))
            look = {"marker": marker, "markersize": 6 if uniform else 12, "linestyle": "-" if uniform else ""}
            axes.plot(x, y, color=colour, label=label if uniform else "", **look)
    line = [row for row in rows if row["rank_levels"] == most and row["ranks"] != "AutoRank"]
    ratios, flops = ([row[field] for row in line] for field in ("mean_ratio", "flops_share"))
    axes.plot(ratios, flops, color="black", linestyle=":", label="FLOPs (computed)")
    axes.plot([], [], "*", color="#555555", markersize=12, label="AutoRank's ranks, at their mean")
    axes.set(xlabel="clients' rank over the maximum", ylabel="share of a round at full rank", ylim=(0, 1.1))
    axes.legend(fontsize=9, loc="lower right")
    script.entitle(
        figure,
        "What a lower rank saves",
        f"{script.hardware(content)}, {content['device']['devices']} virtual devices; median of {content['repeats']} "
        "turns.\n10 clients of Fashion-MNIST, MLP 784-200-200-10.",
    )
    return figure


@harness.mistakes_in_words()
def main() -> None:
    """Measure, print, write."""
    parser = script.make_parser(__doc__, quick="embedded images, two ratios, two levels, one turn", repeats=5)
    parser.add_argument("--devices", type=int, default=len(os.sched_getaffinity(0)), help="virtual ones, one per core")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    ratios, repeats, levels = ((0.5,), 1, 2) if options.quick else (RATIOS, options.repeats, LEVELS)
    workload = workloads.make_workload("staircase", quick=options.quick)
    rows = measure(workload, ratios, repeats, levels, options.devices)
    script.publish({"rows": rows, "repeats": repeats, **script.about()}, options.json, tables, draw)


if __name__ == "__main__":
    main()
