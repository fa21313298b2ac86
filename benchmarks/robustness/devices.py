"""Rounds on one and on two devices, how evenly clients are dealt, and on paper how a round scales to 8 and 256.

Four tables:

1. Measured: seconds per round on one device and on `--devices` virtual CPU devices (or GPUs, where JAX finds them) of
   one process, alternating in one run, with the same model, data, ranks and rule.
2. Drift: the same rounds on one device and on many, the largest relative difference of any trained factor. In 64-bit
   one round is equal to 1e-9 (tested); in float32 another order of sums is another rounding, which training amplifies.
3. Counted: steps of the busiest device over the mean of all, on 2, 8 and 256 devices. Nothing is trained.
4. On paper: a round of log-normal clients (σ = 1, 60 examples each on average, batch 32) from the counted steps, the
   bytes of the one sum, and an interconnect that is stated in `PAPER`. `efficiency` is the share of the devices' time
   that is client steps; `stops_at` names what takes most of the rest: the longest client, which devices cannot share,
   or the sum.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.robustness.devices \
              --json benchmarks/robustness/results/devices.json \
              --png benchmarks/robustness/results/devices.png
          (--quick: few clients of the embedded images)
Hardware: two CPU cores
Time and numbers to expect: see benchmarks/README.md
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from autorank_jax.adapters.lora import level_widths, max_ranks
from autorank_jax.cli.figures import PALETTE, STYLE
from autorank_jax.engine import sharding
from autorank_jax.engine.lanes import Program, steps_and_levels
from autorank_jax.engine.round import make_round
from autorank_jax.federated.participation import everyone
from benchmarks import harness
from benchmarks.speed import workloads
from benchmarks.speed.competitors import difference, trained_values
from benchmarks.speed.workloads import Workload

COUNTED = (2, 8, 256)
PAPER = {
    "lanes": 64,  # of one accelerator
    "milliseconds_per_step": 1.0,  # of all its lanes together
    "links": {1: 1.0, 8: 300e9, 256: 40e9},  # bytes/s of each device: NVLink within a host of 8, 400 Gb/s between hosts
    "latency": {1: 0.0, 8: 2e-5, 256: 2e-4},  # seconds of one all-reduce, however small
}
"""Round numbers for an accelerator, to be replaced by measured ones."""


class Ready(NamedTuple):
    """A round compiled for some devices."""

    program: Any
    arguments: tuple[Any, ...]
    compile_seconds: float
    lanes: int


def make_ready(workload: Workload, devices: int) -> dict[int, Ready]:
    """Compile the round for one device and for many."""
    mesh, key = sharding.client_mesh(jax.devices()[:devices]), jax.random.key(0)
    useful = float(np.sum(client_steps(workload)) / np.max(client_steps(workload)))
    lanes = {1: workload.lanes, devices: max(1, min(workload.lanes, int(useful / devices)))}
    placed = {1: (key, workload.state, workload.data)}
    placed[devices] = sharding.replicate(placed[1], mesh)
    ready = {}
    for count, arguments in placed.items():
        options = {"lanes": lanes[count], "rank_levels": workload.rank_levels, "mesh": mesh if count > 1 else None}
        program, seconds = harness.compiled(make_round(workload.local, workload.rule, **options), *arguments)
        ready[count] = Ready(program, arguments, seconds, lanes[count])
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
    """Deal the clients as a round would, and count the steps of each device."""
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


def on_paper(workload: Workload, clients: int, devices: int) -> harness.Row:
    """Predict a round from counted steps, bytes and the numbers in `PAPER`."""
    size = np.ceil(60 * np.exp(np.random.default_rng(0).normal(-0.5, 1.0, clients)))
    steps = -(-size // 32)
    device = np.asarray(sharding.assign(jnp.asarray(steps, jnp.float32), devices))
    load = np.bincount(device, weights=steps, minlength=devices)
    lanes, step = PAPER["lanes"], PAPER["milliseconds_per_step"] / 1e3
    train = max(steps.max(), load.max() / lanes) * step
    size_of_sum = sum_bytes(workload, clients)
    together = 2 * (devices - 1) / devices * size_of_sum / PAPER["links"][devices] + PAPER["latency"][devices]
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


def draw(rows: Sequence[harness.Row], path: Path) -> None:
    """Draw the rounds on paper: milliseconds over the number of devices, a line for each number of clients."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        for number, clients in enumerate(sorted({row["clients"] for row in rows})):
            own = [row for row in rows if row["clients"] == clients]
            devices, times = ([row[name] for row in own] for name in ("devices", "round_milliseconds"))
            look = {"color": PALETTE[number], "marker": "o", "linewidth": 2}
            axes.plot(devices, times, label=f"{clients:,} clients", **look)
            axes.plot(devices, [times[0] / d for d in devices], ":", color=PALETTE[number], linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel="accelerators", ylabel="milliseconds a round, on paper")
        axes.set_xticks(list(PAPER["links"]), [str(devices) for devices in PAPER["links"]])
        axes.minorticks_off()
        figure.suptitle("Rounds over devices; dotted: evenly shared", x=0.01, ha="left", fontsize=11, weight="bold")
        figure.legend(loc="outside lower center", ncols=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def report(title: str, rows: list[harness.Row]) -> None:
    print(f"\n{title}\n\n{harness.markdown_table(rows, list(rows[0]))}")


def main() -> None:
    """Measure, count, compute, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default="lognormal,staircase")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="few clients of the embedded images, two repeats")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=86400"
    )
    jax.config.update("jax_num_cpu_devices", options.devices)
    chosen = [workloads.make_workload(name, quick=options.quick) for name in options.workloads.split(",")]
    content: dict[str, Any] = {"versions": harness.versions(), "device": harness.device(), "paper": PAPER}
    ready = [make_ready(workload, options.devices) for workload in chosen]
    pairs = list(zip(chosen, ready, strict=True))
    content["measured"] = [measure(w, r, 2 if options.quick else options.repeats) for w, r in pairs]
    content["drift"] = [row for w, r in pairs for row in drift(w, r, (1, 2) if options.quick else (1, 5, 20))]
    content["counted"] = [count(w, devices) for w in chosen for devices in COUNTED]
    sizes = (1_000,) if options.quick else (1_000, 10_000, 100_000, 1_000_000)
    content["on_paper"] = [on_paper(chosen[0], clients, devices) for clients in sizes for devices in PAPER["links"]]
    report(f"Measured on 1 and {options.devices} devices", content["measured"])
    report("Drift in float32", content["drift"])
    report("Counted", content["counted"])
    report("On paper", content["on_paper"])
    harness.write_json(options.json, content)
    if options.png:
        draw(content["on_paper"], options.png)


if __name__ == "__main__":
    main()
