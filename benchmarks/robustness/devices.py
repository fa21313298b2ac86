"""Rounds on one device and on many: measured on two, counted up to 256, modelled for accelerators.

Four tables:

1. Measured: seconds of the very same round on one device and on `--devices` virtual CPU devices (or GPUs), in turns.
2. Drift: the same rounds on one device and on many, the largest relative difference of any trained factor. In 64-bit
   one round is equal to 1e-9 (tested); in float32 another order of sums is another rounding, which training amplifies.
3. Counted: steps of the busiest device over the mean of all, on 2, 8 and 256 devices. Nothing is trained.
4. Modelled, not measured: a round of log-normal clients (σ = 1, 60 examples each on average, batch 32) from counted
   steps, the bytes of the sum, and the interconnect in `MODEL`. `efficiency` is the share of the devices' time that is
   client steps; `stops_at` is what takes most of the rest: the longest client, which no device can share, or the sum.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.robustness.devices \
              --json benchmarks/robustness/results/devices.json
Hardware: two CPU cores; numbers to expect are in benchmarks/robustness/README.md
"""

import os
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from autorank_jax.adapters.lora import level_widths, max_ranks
from autorank_jax.cli.figures import PALETTE
from autorank_jax.engine import sharding
from autorank_jax.engine.lanes import Program, steps_and_levels
from autorank_jax.engine.round import make_round
from autorank_jax.federated.participation import everyone
from benchmarks import harness, script
from benchmarks.speed import workloads
from benchmarks.speed.competitors import arguments_of, difference, meshes, trained_values
from benchmarks.speed.workloads import Workload

COUNTED = (2, 8, 256)
MODEL = {
    "lanes": 64,  # of one accelerator
    "milliseconds_per_step": 1.0,  # of all its lanes together
    "links": {1: 1.0, 8: 300e9, 256: 40e9},  # bytes/s of each device: NVLink within a host of 8, 400 Gb/s between hosts
    "latency": {1: 0.0, 8: 2e-5, 256: 2e-4},  # seconds of one all-reduce, however small
}
"""Round numbers for an accelerator, to be replaced by measured ones."""
TABLES = {
    "measured": {
        "workload": "workload",
        "devices": "devices",
        "lanes each": "lanes_per_device",
        "seconds, one device": "one_seconds",
        "± one": "one_spread",
        "seconds, all": "many_seconds",
        "± all": "many_spread",
        "times as fast": "speedup",
        "seconds to compile, one": "one_compile_seconds",
        "seconds to compile, all": "many_compile_seconds",
    },
    "drift": {
        "workload": "workload",
        "devices": "devices",
        "rounds": "rounds",
        "relative difference": "difference",
        "loss, one device": "loss",
        "loss, all": "many_loss",
    },
    "counted": {
        "workload": "workload",
        "clients": "clients",
        "devices": "devices",
        "steps, busiest / mean": "busiest_over_mean_steps",
        "cost, busiest / mean": "busiest_over_mean_cost",
        "cost, longest client / mean device": "longest_client_over_mean_cost",
    },
    "modelled": {
        "clients": "clients",
        "accelerators": "devices",
        "steps, busiest / mean": "busiest_over_mean_steps",
        "MB of the sum": "sum_megabytes",
        "ms of the sum": "sum_milliseconds",
        "ms per round": "round_milliseconds",
        "efficiency": "efficiency",
        "stops at": "stops_at",
    },
}
"""The tables, and the fields of their columns."""


class Ready(NamedTuple):
    """A round compiled for some devices."""

    program: Any
    arguments: tuple[Any, ...]
    compile_seconds: float
    lanes: int


def make_ready(workload: Workload, devices: int) -> dict[int, Ready]:
    """Compile the round for one device and for many."""
    steps, ready = client_steps(workload), {}
    busy = max(1, min(workload.lanes, int(np.sum(steps) / np.max(steps) / devices)))
    for used, mesh in meshes(devices).items():
        arguments, lanes = arguments_of(workload, mesh), workload.lanes if used == 1 else busy
        options = {"lanes": lanes, "rank_levels": workload.rank_levels, "mesh": mesh}
        program, seconds = harness.compiled(make_round(workload.local, workload.rule, **options), *arguments)
        ready[used] = Ready(program, arguments, seconds, lanes)
    return ready


def measure(workload: Workload, ready: dict[int, Ready], repeats: int) -> harness.Row:
    """Time a round on one device and on many."""
    devices = max(ready)
    run = {str(count): lambda one=one: one.program(*one.arguments) for count, one in ready.items()}
    seconds = {int(count): harness.summary(s) for count, s in harness.alternate(run, repeats).items()}
    return {
        "workload": workload.name,
        "devices": devices,
        "lanes_per_device": ready[devices].lanes,
        "one_seconds": seconds[1]["median"],
        "one_spread": seconds[1]["spread"],
        "many_seconds": seconds[devices]["median"],
        "many_spread": seconds[devices]["spread"],
        "one_compile_seconds": ready[1].compile_seconds,
        "many_compile_seconds": ready[devices].compile_seconds,
        "speedup": seconds[1]["median"] / seconds[devices]["median"],
    }


def drift(workload: Workload, ready: dict[int, Ready], rounds: Sequence[int]) -> list[harness.Row]:
    """Run the same rounds on one device and on many, and tell how far float32 lets them part."""
    states, losses, rows = {count: one.arguments[1] for count, one in ready.items()}, {}, []
    for number in range(1, max(rounds) + 1):
        for count, (program, (key, _, data), _, _) in ready.items():
            states[count], info = program(key, states[count], data)
            losses[count] = float(info.loss)
        if number in rounds:
            one, many = (trained_values(states[count]) for count in (1, max(ready)))
            row = {"workload": workload.name, "devices": max(ready), "rounds": number}
            rows.append(row | {"difference": difference(one, many), "loss": losses[1], "many_loss": losses[max(ready)]})
    return rows


def client_steps(workload: Workload) -> np.ndarray:
    """Return the steps of each client in a round."""
    return -(-np.asarray(workload.data.size, np.int64) // workload.local.batch_size)


def count(workload: Workload, devices: int) -> harness.Row:
    """Assign the clients to devices as a round would, and count the steps of each device."""
    widths = level_widths(max_ranks(workload.state.server.trainable), workload.rank_levels)
    program = Program(workload.local, workload.rule, 1, widths)
    cohort = everyone(jax.random.key(0), workload.data)
    steps, level = steps_and_levels(workload.state, workload.data, cohort, program=program)
    costs = jnp.array([sharding.step_cost(workload.state.server.trainable, w) for w in widths])
    cost = steps * costs[level]
    device = np.asarray(sharding.assign(cost, devices))
    load = np.bincount(device, weights=np.asarray(cost, float), minlength=devices)
    taken = np.bincount(device, weights=np.asarray(steps, float), minlength=devices)
    return {
        "workload": workload.name,
        "devices": devices,
        "clients": len(device),
        "busiest_over_mean_steps": float(taken.max() / taken.mean()),
        "busiest_over_mean_cost": float(load.max() / load.mean()),
        "longest_client_over_mean_cost": float(cost.max() / load.mean()),
    }


def sum_bytes(workload: Workload, cohort: int) -> int:
    """Return the bytes of the sum that ends a round: what is trained, and a few numbers per client."""
    model = sum(4 * leaf.size for leaf in jax.tree.leaves(workload.state.server.trainable))
    return model + 4 * cohort * (workload.state.epoch_losses.shape[1] + 2)


def modelled(workload: Workload, clients: int, devices: int) -> harness.Row:
    """Predict a round from counted steps, bytes and the numbers in `MODEL`."""
    size = np.ceil(60 * np.exp(np.random.default_rng(0).normal(-0.5, 1.0, clients)))
    steps = -(-size // 32)
    device = np.asarray(sharding.assign(jnp.asarray(steps, jnp.float32), devices))
    load = np.bincount(device, weights=steps, minlength=devices)
    lanes, step = MODEL["lanes"], MODEL["milliseconds_per_step"] / 1e3
    train = max(steps.max(), load.max() / lanes) * step
    size_of_sum = sum_bytes(workload, clients)
    together = 2 * (devices - 1) / devices * size_of_sum / MODEL["links"][devices] + MODEL["latency"][devices]
    useful = steps.sum() / lanes / devices * step
    return {
        "clients": clients,
        "devices": devices,
        "busiest_over_mean_steps": float(load.max() / load.mean()),
        "sum_megabytes": size_of_sum / 1e6,
        "sum_milliseconds": 1e3 * together,
        "round_milliseconds": 1e3 * (train + together),
        "efficiency": float(useful / (train + together)),
        "stops_at": stops_at(useful, train, together, longest=steps.max() >= load.max() / lanes),
    }


def stops_at(useful: float, train: float, together: float, *, longest: bool) -> str:
    """Name what takes most of a round beyond useful work.

    Args:
        useful: seconds of client steps, were they shared evenly.
        train: seconds of training.
        together: seconds of the sum.
        longest: whether training lasts as long as its longest client.
    """
    if round(useful / (train + together), 3) == 1:
        return ""
    if together > train - useful:
        return "sum"
    return "longest client" if longest else ""


def tables(content: script.Content) -> dict[str, str]:
    """Lay out the four tables."""
    return {name: script.table(content[name], columns) for name, columns in TABLES.items()}


def draw(content: script.Content) -> Figure:
    """Draw measured seconds on one device and on many, and beside them the modelled rounds."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    draw_measured(left, content["measured"])
    draw_modelled(right, content["modelled"])
    script.entitle(
        figure,
        "More than one device",
        f"Measured: {script.hardware(content)}; median of {content['repeats']} turns, bars: half-width of the "
        "middle half. Modelled: counted steps,\n64 lanes and 1 ms a step on each accelerator, one sum over NVLink "
        "within 8, 400 Gb/s beyond; no accelerator was used.",
    )
    return figure


def draw_measured(axes: Axes, rows: Sequence[harness.Row]) -> None:
    """Draw seconds per round on one device and on many."""
    for place, row in enumerate(rows):
        for shift, which, colour in ((-0.2, "one", PALETTE[7]), (0.2, "many", PALETTE[0])):
            label = (
                f"{row['devices']} devices, a core each" if which == "many" else "1 device, which uses both cores too"
            )
            seconds, spread = row[f"{which}_seconds"], row[f"{which}_spread"]
            axes.bar(place + shift, seconds, 0.38, yerr=spread, color=colour, label=label if place == 0 else "")
        text = f"{row['speedup']:.2f} times\nas fast"
        axes.annotate(text, (place + 0.2, row["many_seconds"] / 2), ha="center", fontsize=8, color="white")
    axes.set_xticks(range(len(rows)), [textwrap.fill(workloads.TITLES[row["workload"]], 24) for row in rows])
    axes.tick_params(axis="x", labelsize=8)
    axes.set(ylabel="seconds per round", title="Measured", ylim=(0, 1.3 * max(row["one_seconds"] for row in rows)))
    axes.grid(visible=False, axis="x")
    axes.legend(loc="upper right", fontsize=8)


def draw_modelled(axes: Axes, rows: Sequence[harness.Row]) -> None:
    """Draw modelled milliseconds a round over the number of accelerators, a line for each number of clients."""
    for number, clients in enumerate(sorted({row["clients"] for row in rows})):
        own = [row for row in rows if row["clients"] == clients]
        devices, times = ([row[name] for row in own] for name in ("devices", "round_milliseconds"))
        axes.plot(devices, times, "--o", color=PALETTE[number], label=f"{clients:,} clients")
        axes.plot(devices, [times[0] / d for d in devices], ":", color=PALETTE[number], linewidth=1)
    axes.plot([], [], ":", color="#555555", linewidth=1, label="shared evenly at no cost")
    axes.set(xscale="log", yscale="log", xlabel="accelerators", ylabel="milliseconds per round, modelled")
    axes.set_title("Modelled, not measured: clients of log-normal sizes")
    counts = sorted({row["devices"] for row in rows})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="lower left")


@harness.mistakes_in_words()
def main() -> None:
    """Measure, count, compute, print, write."""
    parser = script.make_parser(__doc__, quick="few clients of the embedded images, two turns", repeats=7)
    parser.add_argument("--workloads", default="lognormal,staircase")
    parser.add_argument("--devices", type=int, default=2)
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=86400"
    )
    jax.config.update("jax_num_cpu_devices", options.devices)
    repeats, rounds, sizes = options.repeats, (1, 5, 20), (1_000, 10_000, 100_000, 1_000_000)
    if options.quick:
        repeats, rounds, sizes = 2, (1, 2), sizes[:1]
    chosen = [workloads.make_workload(name, quick=options.quick) for name in options.workloads.split(",")]
    ready = [make_ready(workload, options.devices) for workload in chosen]
    pairs = list(zip(chosen, ready, strict=True))
    content = script.about() | {
        "model": MODEL,
        "repeats": repeats,
        "measured": [measure(workload, one, repeats) for workload, one in pairs],
        "drift": [row for workload, one in pairs for row in drift(workload, one, rounds)],
        "counted": [count(workload, devices) for workload in chosen for devices in COUNTED],
        "modelled": [modelled(chosen[0], clients, devices) for clients in sizes for devices in MODEL["links"]],
    }
    script.publish(content, options.json, tables, draw)


if __name__ == "__main__":
    main()
