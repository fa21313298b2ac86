"""Samples per second of the engine beside `centralised`, hand-written JAX engines and other simulators.

Competitors: `centralised` (one shared model, big batches, no clients: the yardstick), `same_batches` (that model over
the clients' own batches, one after the other, on one device), `lockstep` (`jit(vmap(scan))`), `loop` (a Python loop
over a jitted client), and the peers `drjax, fedjax, pfl, flower, torch, torch_vmap`, each in an
environment of its own (`benchmarks/speed/peers/setup.sh DIR`). All train the very same round: start values, examples,
order of batches, ranks. A competitor whose trained values differ from ours by more than 1e-4 gets no number, unless in
float64 they agree to 1e-6.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.speed.rounds --json benchmarks/speed/results/rounds.json
          (see `--help`; `--quick` needs no data; an existing file is added to, workload by workload)
Hardware: two CPU cores, or one GPU with `--device gpu`, which sweeps the lanes from 1 to 4096
Time and numbers to expect: see benchmarks/speed/README.md
Writes:   after each workload the rows and ratios as JSON, and beside it a picture
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from autorank_jax.engine.flops import training_flops
from autorank_jax.evaluation.costs import client_costs
from benchmarks import harness, script
from benchmarks.speed import rounds_report, workloads
from benchmarks.speed.competitors import ENGINES, YARDSTICKS, Entry, line_up
from benchmarks.speed.peer import ENVIRONMENTS, PeerError, peer_versions
from benchmarks.speed.workloads import WORKLOADS, Workload

SWEEP = (1, 4, 16, 64, 256, 1024, 4096)
COMPETITORS = (*ENGINES, *ENVIRONMENTS)


def take_turn(entry: Entry, rounds: int) -> float:
    """Run several rounds and return the mean seconds of one."""
    return sum(entry.run() for _ in range(rounds)) / rounds


def alternate(
    entries: dict[str, Entry], options: argparse.Namespace, skipped: dict[str, str]
) -> dict[str, list[float]]:
    """Let competitors take turns and return the seconds of a round in each.

    A turn lasts at least `options.turn` seconds. Who has used up its budget sits out after its first turn; who fails is
    noted in `skipped`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    rounds: dict[str, int] = {}
    for turn in range(options.repeats + 1):
        for name, entry in entries.items():
            spent = sum(seconds[name]) * rounds.get(name, 1)
            if name in skipped or (seconds[name] and spent * (1 + 1 / len(seconds[name])) > options.budget):
                continue
            try:
                if turn == 0:
                    rounds[name] = max(1, round(options.turn / entry.run()))
                else:
                    seconds[name].append(take_turn(entry, rounds[name]))
            except PeerError as error:
                skipped[name] = str(error)
    return {name: turns for name, turns in seconds.items() if turns and name not in skipped}


class Work(NamedTuple):
    """What a round must do at least, whoever does it."""

    examples: int
    flops: float  # forward and backward of every example at its client's ranks
    bytes: float  # of every client step: read values, write and read gradients, write values; read the examples


def useful_work(workload: Workload) -> Work:
    """Count the work of a round; frozen weights are shared and so left out of the bytes."""
    epochs, size = int(workload.state.hparams["local_epochs"]), np.asarray(workload.data.size, np.float64)
    model = training_flops(workload.task, workload.data)
    costs = client_costs(workload.state.server, workload.state.ranks, size, model, local_epochs=epochs)
    steps = epochs * np.ceil(size / workload.local.batch_size)
    example = sum(
        leaf.nbytes / leaf.shape[0] for leaf in jax.tree.leaves((workload.data.inputs, workload.data.targets))
    )
    touched = float(np.sum(steps * 4 * 4 * costs.parameters) + epochs * size.sum() * example)
    return Work(workloads.examples_per_round(workload), float(costs.flops.sum()), touched)


def make_row(name: str, competitor: str, entry: Entry, seconds: list[float], work: Work) -> harness.Row:
    """Summarise the turns of one competitor."""
    measured = harness.summary(seconds)
    return {
        "workload": name,
        "competitor": competitor,
        "samples_per_second": work.examples / measured["median"],
        "seconds_per_round": measured["median"],
        "spread_seconds": measured["spread"],
        "compile_seconds": entry.compile_seconds,
        "peak_bytes": entry.peak_bytes(),
        "repeats": len(seconds),
        "flops_per_second": work.flops / measured["median"],
        "bytes_per_second": None if competitor in YARDSTICKS else work.bytes / measured["median"],
        **entry.detail,
    }


def measure(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Time all competitors on one workload."""
    lanes = options.lanes or ((workload.lanes,) if options.device == "cpu" else SWEEP)
    with tempfile.TemporaryDirectory() as folder:
        entries, gaps, skipped = line_up(workload, lanes, options, Path(folder))
        try:
            print(f"  taking turns, {options.repeats} times: {', '.join(entries)}", flush=True)
            seconds = alternate(entries, options, skipped)
        finally:
            for entry in entries.values():
                entry.close()
    work = useful_work(workload)
    rows = [
        make_row(workload.name, c, entries[c], turns, work) | {"difference": gaps.get(c)}
        for c, turns in seconds.items()
    ]
    speed = {row["competitor"]: row["samples_per_second"] for row in rows}
    ratios = {c: speed["ours"] / s for c, s in speed.items() if c != "ours"}
    return {"rows": rows, "ratios": ratios, "skipped": skipped}


def merge(content: script.Content, name: str, measured: dict[str, Any], about: script.Content) -> script.Content:
    """Add one workload's results: what was measured anew replaces what stood there."""
    content = {"rows": [], "ratios": {}, "skipped": {}, "versions": {}} | content
    new, failed = {row["competitor"] for row in measured["rows"]}, measured["skipped"]
    kept = [row for row in content["rows"] if row["workload"] != name or row["competitor"] not in new]
    ratios = {c: r for c, r in content["ratios"].get(name, {}).items() if c not in failed}
    skipped = {c: why for c, why in content["skipped"].get(name, {}).items() if c not in new}
    return content | {
        "rows": kept + measured["rows"],
        "ratios": content["ratios"] | {name: ratios | measured["ratios"]},
        "skipped": content["skipped"] | {name: skipped | failed},
        "versions": content["versions"] | about["versions"],
        "device": about["device"],
    }


def is_done(content: script.Content, name: str, competitors: Sequence[str]) -> bool:
    """Return whether results have a row, or a reason for none, of every competitor on a workload."""
    rows = {row["competitor"] for row in content.get("rows", ()) if row["workload"] == name}
    return set(competitors) <= rows | set(content.get("skipped", {}).get(name, {}))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    small = "small workloads of embedded images, at most two turns"
    parser, names = script.make_parser(__doc__, quick=small, repeats=5), list(WORKLOADS)
    parser.add_argument("--workloads", type=listed, default=names, help=f"of {','.join(names)}")
    parser.add_argument("--competitors", type=listed, default=list(COMPETITORS), help=f"of {','.join(COMPETITORS)}")
    parser.add_argument("--budget", type=float, default=120, help="seconds of turns per competitor and workload")
    parser.add_argument("--turn", type=float, default=0.5, help="seconds that a turn lasts at least: several rounds")
    parser.add_argument("--patience", type=float, default=1800, help="seconds that a peer may take to answer")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--devices", type=int, help="to use at most; default: a virtual one per core, one GPU")
    parser.add_argument("--lanes", type=lambda text: tuple(map(int, text.split(","))), help="such as 1,4,16")
    parser.add_argument("--peers", type=Path, default=Path(os.environ.get("PEERS", "build/peers")))
    parser.add_argument("--resume", action="store_true", help="leave out workloads that the file has in full")
    options = parser.parse_args(arguments)
    for given, known in ((options.workloads, names), (options.competitors, COMPETITORS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"expected names among {', '.join(known)}, got {', '.join(unknown)}")
    if options.devices is None:
        options.devices = len(os.sched_getaffinity(0)) if options.device == "cpu" else 1
    if options.quick:
        options.repeats, options.turn = min(options.repeats, 2), 0.0
    return options


def listed(text: str) -> list[str]:
    """Split a list of names."""
    return [name for name in text.split(",") if name]


def use_devices(options: argparse.Namespace) -> None:
    """Choose platform and devices, before JAX is first used."""
    jax.config.update("jax_platforms", "cpu" if options.device == "cpu" else "cuda")
    if options.device == "cpu":
        jax.config.update("jax_num_cpu_devices", options.devices)


@harness.mistakes_in_words()
def main() -> None:
    """Measure, print, write, workload by workload."""
    options = parse()
    use_devices(options)
    about = script.about()
    about["versions"] |= peer_versions(options.peers, options.competitors)
    content = script.read(options.json)
    for name in options.workloads:
        if options.resume and is_done(content, name, options.competitors):
            print(f"{name}: in {options.json} already", flush=True)
            continue
        print(f"{name}: making the workload", flush=True)
        measured = measure(workloads.make_workload(name, quick=options.quick), options)
        content = merge(content, name, measured, about)
        print(f"\n### {name}\n\n{rounds_report.all_rows(content, name)}", flush=True)
        draw = rounds_report.draw if rounds_report.compared(content) else None  # nobody to draw us beside
        script.publish(content, options.json, rounds_report.tables, draw)


if __name__ == "__main__":
    main()
