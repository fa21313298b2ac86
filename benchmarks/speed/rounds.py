"""Samples per second of the engine beside `centralised`, hand-written JAX engines and other simulators.

Competitors: `centralised` (one shared model, big batches, no clients: the yardstick), `lockstep` (`jit(vmap(scan))`),
`loop` (a Python loop over a jitted client), and the peers `drjax, fedjax, pfl, flower, torch, torch_vmap`, each in an
environment of its own (`benchmarks/speed/peers/setup.sh DIR`). All train the very same round: start values, examples,
order of batches, ranks. A competitor whose trained values differ from ours by more than 1e-4 gets no number, unless in
float64 they agree to 1e-6.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.speed.rounds --json benchmarks/speed/results/rounds.json
          (see `--help`; `--quick` needs no data; an existing file is added to, workload by workload)
Hardware: two CPU cores, or one GPU with `--device gpu`, which sweeps the lanes from 1 to 4096
Time and numbers to expect: see benchmarks/README.md
Writes:   after each workload the rows and ratios as JSON, and beside it a picture
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import numpy as np

from autorank_jax.engine.flops import training_flops
from autorank_jax.evaluation.costs import client_costs
from benchmarks import harness
from benchmarks.speed import workloads
from benchmarks.speed.competitors import ENGINES, Entry, add_engines, add_peers, sweep
from benchmarks.speed.peer import ENVIRONMENTS, PeerError, peer_versions
from benchmarks.speed.pictures import draw
from benchmarks.speed.workloads import WORKLOADS, Workload

SWEEP = (1, 4, 16, 64, 256, 1024, 4096)
COMPETITORS = (*ENGINES, *ENVIRONMENTS)
COLUMNS = ("competitor", "samples_per_second", "seconds_per_round", "spread_seconds", "compile_seconds", "peak_bytes")


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
        "bytes_per_second": None if competitor == "centralised" else work.bytes / measured["median"],
        **entry.detail,
    }


def measure(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Time all competitors on one workload."""
    lanes = options.lanes or ((workload.lanes,) if options.device == "cpu" else SWEEP)
    entries, skipped, gaps = sweep(workload, lanes, options.devices), {}, {}
    add_engines(workload, options, entries, skipped, gaps)
    with tempfile.TemporaryDirectory() as folder:
        peers, peer_gaps = add_peers(workload, options, Path(folder), entries, skipped)
        try:
            print(f"  taking turns, {options.repeats} times: {', '.join(entries)}", flush=True)
            seconds = alternate(entries, options, skipped)
        finally:
            for peer in peers:
                peer.close()
    gaps |= peer_gaps
    work = useful_work(workload)
    rows = [
        make_row(workload.name, c, entries[c], turns, work) | {"difference": gaps.get(c)}
        for c, turns in seconds.items()
    ]
    speed = {row["competitor"]: row["samples_per_second"] for row in rows}
    ratios = {c: speed["ours"] / s for c, s in speed.items() if c != "ours"}
    return {"rows": rows, "ratios": ratios, "skipped": skipped}


def merge(path: Path | None, name: str, measured: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Write one workload's results into the file: what was measured anew replaces what stood there."""
    content: dict[str, Any] = {"rows": [], "ratios": {}, "skipped": {}}
    if path is not None and path.exists():
        content |= json.loads(path.read_text())
    new = {row["competitor"] for row in measured["rows"]}
    kept = [row for row in content["rows"] if row["workload"] != name or row["competitor"] not in new]
    skipped = {c: why for c, why in content["skipped"].get(name, {}).items() if c not in new} | measured["skipped"]
    content["rows"] = kept + measured["rows"]
    content["ratios"][name] = {
        c: r for c, r in content["ratios"].get(name, {}).items() if c not in measured["skipped"]
    } | measured["ratios"]
    content["skipped"][name] = skipped
    content["versions"] = content.get("versions", {}) | about["versions"]
    content["device"] = about["device"]
    harness.write_json(path, content)
    return content


def is_done(path: Path | None, name: str, competitors: Sequence[str]) -> bool:
    """Return whether the file has a row, or a reason for none, of every competitor on a workload."""
    if path is None or not path.exists():
        return False
    content = json.loads(path.read_text())
    rows = {row["competitor"] for row in content["rows"] if row["workload"] == name}
    return set(competitors) <= rows | set(content["skipped"].get(name, {}))


def report(name: str, measured: dict[str, Any]) -> None:
    """Print the table of one workload."""
    rows = [row | {"ours/theirs": measured["ratios"].get(row["competitor"])} for row in measured["rows"]]
    print(f"\n### {name}\n\n{harness.markdown_table(rows, [*COLUMNS, 'ours/theirs'])}\n")
    for competitor, why in measured["skipped"].items():
        print(f"no number for {competitor}: {why}")
    print(flush=True)


def overview(content: dict[str, Any]) -> str:
    """Lay out `ours / theirs` of everything in a file: a row per workload, a column per competitor."""
    names = [c for c in COMPETITORS if any(c in ratios for ratios in content["ratios"].values())]
    rows = [{"workload": f"`{name}`"} | content["ratios"][name] for name in WORKLOADS if name in content["ratios"]]
    return harness.markdown_table(rows, ["workload", *names])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(WORKLOADS)
    parser.add_argument("--workloads", type=listed, default=names, help=f"of {','.join(names)}")
    parser.add_argument("--competitors", type=listed, default=list(COMPETITORS), help=f"of {','.join(COMPETITORS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=120, help="seconds of turns per competitor and workload")
    parser.add_argument("--turn", type=float, default=0.5, help="seconds that a turn lasts at least: several rounds")
    parser.add_argument("--patience", type=float, default=1800, help="seconds that a peer may take to answer")
    parser.add_argument("--quick", action="store_true", help="small workloads of embedded images, at most two turns")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--devices", type=int, help="to use at most; default: a virtual one per core, one GPU")
    parser.add_argument("--lanes", type=lambda text: tuple(map(int, text.split(","))), help="such as 1,4,16")
    parser.add_argument("--peers", type=Path, default=Path(os.environ.get("PEERS", "build/peers")))
    parser.add_argument("--json", type=Path, help="file that results are merged into, after each workload")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing, print the tables of the file and draw its picture"
    )
    parser.add_argument("--resume", action="store_true", help="leave out workloads that the file has in full")
    options = parser.parse_args(arguments)
    for given, known in ((options.workloads, names), (options.competitors, COMPETITORS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"expected names among {', '.join(known)}, got {', '.join(unknown)}")
    if options.report and (options.json is None or not options.json.exists()):
        parser.error(f"expected --json with the file to report, got {options.json}")
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


def show_file(path: Path) -> None:
    """Print all tables of a file and draw its picture."""
    content = json.loads(path.read_text())
    for name in (name for name in WORKLOADS if name in content["ratios"]):
        rows = [row for row in content["rows"] if row["workload"] == name]
        report(name, {"rows": rows, "ratios": content["ratios"][name], "skipped": content["skipped"].get(name, {})})
    print(overview(content))
    draw(content, path.with_suffix(".png"))


@harness.mistakes_in_words()
def main() -> None:
    """Measure, print, write, workload by workload."""
    options = parse()
    mpl.use("Agg")
    if options.report:
        show_file(options.json)
        return
    use_devices(options)
    about = {"versions": harness.versions() | peer_versions(options.peers, options.competitors)}
    about["device"] = harness.device()
    for name in options.workloads:
        if options.resume and is_done(options.json, name, options.competitors):
            print(f"{name}: in {options.json} already", flush=True)
            continue
        print(f"{name}: making the workload", flush=True)
        measured = measure(workloads.make_workload(name, quick=options.quick), options)
        report(name, measured)
        content = merge(options.json, name, measured, about)
        if options.json is not None:
            draw(content, options.json.with_suffix(".png"))
            print(overview(content), flush=True)


if __name__ == "__main__":
    main()
