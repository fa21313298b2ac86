"""Seconds and memory of one round from ten clients to a million, with the same examples in every round.

Synthetic few-shot clients share a fixed total of examples equally; an MLP 64-128-10 with adapters of rank 8 trains one
epoch in batches of 4. Each number of clients has a process of its own, so that peaks of memory are its own.

Command:  python -m benchmarks.speed.scale --json benchmarks/speed/results/scale.json
Hardware: two CPU cores, 4 GB of memory
Time and numbers to expect: see benchmarks/speed/README.md
Writes:   after each number of clients the rows as JSON, in the end a picture beside it
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
from matplotlib.figure import Figure

from autorank_jax.cli.figures import PALETTE
from autorank_jax.engine.round import make_round
from benchmarks import harness, script
from benchmarks.speed import workloads
from benchmarks.speed.competitors import arguments_of, timed

COLUMNS = {
    "clients": "clients",
    "examples each": "examples_per_client",
    "seconds per round": "seconds_per_round",
    "± seconds": "spread_seconds",
    "seconds per million examples": "seconds_per_million_examples",
    "µs per client": "microseconds_per_client",
    "seconds to compile": "compile_seconds",
    "MB of data": "data_mb",
    "MB a round holds beyond": "round_mb",
    "MB of XLA's temporaries": "compiled_mb",
}


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes: `VmRSS` now, `VmHWM` at its peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def measure(clients: int, total: int, repeats: int) -> harness.Row:
    """Time one number of clients, in this process."""
    workload = workloads.make_scale(clients, total)
    examples = workloads.examples_per_round(workload) // clients
    arguments = arguments_of(workload)
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
    }


def in_own_process(clients: int, options: argparse.Namespace) -> script.Content:
    """Measure in a fresh process; return the row and what it ran on."""
    command = [sys.executable, "-m", "benchmarks.speed.scale", "--one", str(clients)]
    command += ["--total", str(options.total), "--repeats", str(options.repeats)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def tables(content: script.Content) -> dict[str, str]:
    """Lay out seconds and memory."""
    rows = [
        row | {f"{kind}_mb": row[f"{kind}_bytes"] / 1e6 for kind in ("data", "round", "compiled")}
        for row in content["rows"]
    ]
    return {"scale": script.table(rows, COLUMNS)}


def draw(content: script.Content) -> Figure:
    """Draw seconds per million examples and memory against the number of clients."""
    rows = content["rows"]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    clients = [row["clients"] for row in rows]
    left.plot(clients, [row["seconds_per_million_examples"] for row in rows], marker="o", color=PALETTE[0])
    left.set(ylabel="seconds per million examples", title="Time")
    for field, label, colour in (
        ("data_bytes", "data and index arrays", PALETTE[2]),
        ("round_bytes", "beyond them,\nwhile a round runs", PALETTE[0]),
    ):
        right.plot(clients, [row[field] / 1e6 for row in rows], marker="o", color=colour)
        right.annotate(label, (clients[0], rows[0][field] / 1e6), (0, 8), textcoords="offset points", color=colour)
    right.set(ylabel="MB", title="Memory")
    total = rows[0]["clients"] * rows[0]["examples_per_client"]
    for axes in (left, right):
        axes.set(xscale="log", xlabel=f"clients that share {total:,} examples")
        axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
    script.entitle(
        figure,
        f"From {clients[0]:,} to {clients[-1]:,} clients",
        f"{script.hardware(content)}, one device; median of {rows[0]['repeats']} rounds, in a process of its own "
        "for each point.",
    )
    return figure


@harness.mistakes_in_words()
def main() -> None:
    """Measure one process after the other, print, write."""
    parser = script.make_parser(__doc__, quick="at most 10,000 examples, one round", repeats=3)
    parser.add_argument("--clients", default="10,100,1000,10000,100000,1000000", help="numbers of clients")
    parser.add_argument("--total", type=int, default=3_000_000, help="examples of all clients together")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps({"row": measure(options.one, options.total, options.repeats), **script.about()}))
        return
    if options.quick:
        options.total, options.repeats = min(options.total, 10_000), 1
    rows: list[harness.Row] = []
    for clients in map(int, options.clients.split(",")):
        print(f"{clients} clients …", flush=True)
        measured = in_own_process(clients, options)
        rows.append(measured.pop("row"))
        harness.write_json(options.json, {"rows": rows, **measured})
    script.publish({"rows": rows, **measured}, options.json, tables, draw)


if __name__ == "__main__":
    main()
