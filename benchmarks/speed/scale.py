"""Seconds and memory of one round from ten clients to a million, with the same examples in every round.

Synthetic few-shot clients share a fixed total of examples equally; an MLP 64-128-10 with adapters of rank 8 trains one
epoch in batches of 4. Each number of clients has a process of its own, so that peaks of memory are its own.

Command:  python -m benchmarks.speed.scale --json benchmarks/speed/results/scale.json
Hardware: two CPU cores, 4 GB of memory
Time and numbers to expect: see benchmarks/README.md
Writes:   after each number of clients the rows as JSON, and beside it a picture
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import matplotlib as mpl
from matplotlib import pyplot as plt

from autorank_jax.engine.round import make_round
from benchmarks import harness
from benchmarks.speed import workloads
from benchmarks.speed.competitors import timed

COLUMNS = (
    "clients",
    "examples_per_client",
    "lanes",
    "seconds_per_round",
    "seconds_per_million_examples",
    "microseconds_per_client",
    "compile_seconds",
    "data_bytes",
    "round_bytes",
    "compiled_bytes",
)


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes: `VmRSS` now, `VmHWM` at its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def measure(clients: int, total: int, repeats: int) -> harness.Row:
    """Time one number of clients, in this process."""
    examples = max(1, total // clients)
    model = workloads.mlp((64, 128, 10), (8, 8))
    data = workloads.few_shot_clients(clients, examples)
    ranks = workloads.alternating_ranks(model, clients)
    workload = workloads.assemble("scale", model, data, ranks, batch_size=4)
    arguments = (jax.random.key(0), workload.state, data)
    round_fn = make_round(workload.local, workload.rule, lanes=workload.lanes)
    program, compile_seconds = harness.compiled(round_fn, *arguments)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory("VmRSS")
    seconds = harness.summary([timed(program, *arguments) for _ in range(repeats + 1)][1:])
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if leaf.shape[:1] in ((clients,), (clients * examples,))]
    return {
        "clients": clients,
        "examples_per_client": examples,
        "lanes": workload.lanes,
        "seconds_per_round": seconds["median"],
        "spread_seconds": seconds["spread"],
        "seconds_per_million_examples": 1e6 * seconds["median"] / (clients * examples),
        "microseconds_per_client": 1e6 * seconds["median"] / clients,
        "compile_seconds": compile_seconds,
        "data_bytes": sum(leaf.nbytes for leaf in leaves),  # data, index arrays and what is known of each client
        "round_bytes": memory("VmHWM") - before,  # the peak during rounds, beyond what was there before
        "compiled_bytes": program.memory_analysis().temp_size_in_bytes,
        "repeats": repeats,
        "versions": harness.versions(),
        "device": harness.device(),
    }


def in_own_process(clients: int, options: argparse.Namespace) -> harness.Row:
    """Measure in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.speed.scale", "--one", str(clients), "--total", str(options.total)]
    command += ["--repeats", str(options.repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def draw(rows: list[harness.Row], path: Path) -> None:
    """Draw seconds per million examples and memory against the number of clients."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    clients = [row["clients"] for row in rows]
    left.plot(clients, [row["seconds_per_million_examples"] for row in rows], marker="o", color="#0072B2")
    left.set_ylabel("seconds per million examples")
    for field, label, colour in (
        ("data_bytes", "data and index arrays", "#009E73"),
        ("round_bytes", "beyond them, while a round runs", "#0072B2"),
    ):
        right.plot(clients, [row[field] / 2**20 for row in rows], marker="o", color=colour, label=label)
    right.set_ylabel("MiB")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("clients, the same examples in every round")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    """Measure one process after the other, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="10,100,1000,10000,100000,1000000", help="numbers of clients")
    parser.add_argument("--total", type=int, default=3_000_000, help="examples of all clients together")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="at most 10,000 examples, one repeat")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    mpl.use("Agg")
    if options.one is not None:
        print(json.dumps(measure(options.one, options.total, options.repeats)))
        return
    if options.quick:
        options.total, options.repeats = min(options.total, 10_000), 1
    rows: list[harness.Row] = []
    for clients in map(int, options.clients.split(",")):
        print(f"{clients} clients …", flush=True)
        rows.append(in_own_process(clients, options))
        about = {name: rows[-1].pop(name) for name in ("versions", "device")}
        harness.write_json(options.json, {"rows": rows} | about)
    print(harness.markdown_table(rows, COLUMNS))
    if options.json is not None:
        draw(rows, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
