"""The competitors of `rounds`, made ready to be timed: compiled, warmed up, and held against our result."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from autorank_jax.engine import sharding
from autorank_jax.engine.round import make_round
from autorank_jax.types import State
from benchmarks import harness
from benchmarks.speed import workloads
from benchmarks.speed.baselines import make_centralised, make_lockstep, make_loop, make_same_batches, mean_widths
from benchmarks.speed.peer import Peer, PeerError
from benchmarks.speed.workloads import Workload

ENGINES = ("centralised", "same_batches", "lockstep", "loop")
YARDSTICKS = ("centralised", "same_batches")
"""Engines that train one shared model, and so pass no gate."""
BIG_BATCHES = (256, 512, 1024, 2048)
TOLERANCE = 1e-4
KEY = 0


class Entry(NamedTuple):
    """A competitor that is ready to be timed."""

    run: Callable[[], float]  # one round from the start values; returns its seconds
    values: Callable[[], dict[str, np.ndarray]]  # what such a round trains, under the names that peers use
    compile_seconds: float | None
    peak_bytes: Callable[[], int | None]
    detail: dict[str, Any]
    close: Callable[[], None] = lambda: None


class Field(NamedTuple):
    """Everybody who takes part in one workload, and why the others do not."""

    entries: dict[str, Entry]
    gaps: dict[str, float]  # how far their results are from ours
    skipped: dict[str, str]


def timed(program: Callable[..., Any], *arguments: Any) -> float:
    """Run a program once and return the seconds it took."""
    begin = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - begin


def arguments_of(workload: Workload, mesh: Mesh | None = None) -> tuple[Any, ...]:
    """Return the arguments of every round, on all devices of a mesh where there is one."""
    arguments = (jax.random.key(KEY), workload.state, workload.data)
    return arguments if mesh is None else sharding.replicate(arguments, mesh)


def compiled_entry(function: Callable[..., State], arguments: tuple[Any, ...], **detail: Any) -> Entry:
    """Compile a round and warm it up."""
    program, seconds = harness.compiled(function, *arguments)
    timed(program, *arguments)
    peak = harness.program_bytes(program)
    return Entry(
        lambda: timed(program, *arguments), lambda: trained_values(program(*arguments)), seconds, lambda: peak, detail
    )


def make_ours(workload: Workload, lanes: int, devices: int = 1) -> Entry:
    """Compile this package's round, for several devices where asked for."""
    mesh = meshes(devices)[devices]
    lanes = min(lanes, max(1, workload.data.size.shape[0] // devices))
    round_fn = make_round(workload.local, workload.rule, lanes=lanes, rank_levels=workload.rank_levels, mesh=mesh)
    return compiled_entry(lambda *a: round_fn(*a)[0], arguments_of(workload, mesh), lanes=lanes, devices=devices)


def sweep(workload: Workload, lanes: tuple[int, ...], devices: int) -> dict[str, Entry]:
    """Compile our round for several numbers of lanes and devices; the fastest is `ours`, the others say what they are.

    On one device XLA may use all cores within an operation; several virtual devices have a core each.
    """
    entries = {}
    for count in sorted({min(count, workload.data.size.shape[0]) for count in lanes}):
        for used in meshes(devices):
            print(f"  ours, {count} lanes, {used} devices …", flush=True)
            entries[count, used] = make_ours(workload, count, used)
    best = min(entries, key=lambda which: min(entries[which].run() for _ in range(2)))
    one = len(entries) == len(meshes(devices))  # one number of lanes: tell devices apart, else lanes

    def name(count: int, used: int) -> str:
        if (count, used) == best:
            return "ours"
        return f"ours, {used} device{'s' * (used > 1)}" if one else f"ours, {count} lanes, {used} devices"

    return {name(*which): entry for which, entry in entries.items()}


def fastest(entries: list[Entry]) -> Entry:
    """Return the entry whose better round of two is the fastest."""
    return min(entries, key=lambda entry: min(entry.run() for _ in range(2)))


def meshes(devices: int) -> dict[int, Mesh | None]:
    """Return the device counts to try: one (which on a CPU still uses all cores within an operation), and all."""
    return {1: None} | ({devices: sharding.client_mesh(jax.devices()[:devices])} if devices > 1 else {})


def make_best_centralised(workload: Workload, devices: int) -> Entry:
    """Compile the yardstick at several batch sizes, on one device and on all, and keep the fastest."""
    widths, entries = mean_widths(workload.state, workload.data), []
    for count, mesh in meshes(devices).items():
        for batch_size in BIG_BATCHES:
            if batch_size <= max(BIG_BATCHES[0], workloads.examples_per_round(workload)):
                function = make_centralised(workload.local, widths=widths, batch_size=batch_size, mesh=mesh)
                detail = {"batch_size": batch_size, "devices": count}
                entries.append(compiled_entry(function, arguments_of(workload, mesh), **detail))
    return fastest(entries)


def make_best_lockstep(workload: Workload, devices: int) -> Entry:
    """Compile the hand-written round on one device, and on all where they divide the clients; keep the faster."""
    entries, steps = [], workloads.longest(workload)
    for count, mesh in meshes(devices).items():
        if workload.data.size.shape[0] % count == 0:
            function = make_lockstep(workload.local, workload.rule, steps=steps, mesh=mesh)
            entries.append(compiled_entry(function, arguments_of(workload, mesh), devices=count))
    return fastest(entries)


def make_same(workload: Workload) -> Entry:
    """Compile the loop over the very same batches, on one device."""
    epochs, size = int(workload.state.hparams["local_epochs"]), np.asarray(workload.data.size)
    function = make_same_batches(
        workload.local,
        workload.rule,
        widths=mean_widths(workload.state, workload.data),
        steps=epochs * int(np.sum(-(-size // workload.local.batch_size))),
    )
    return compiled_entry(function, arguments_of(workload), devices=1)


def make_engine(name: str, workload: Workload, devices: int = 1) -> Entry:
    """Make an engine that runs in this process."""
    if name == "centralised":
        return make_best_centralised(workload, devices)
    if name == "same_batches":
        return make_same(workload)
    if name == "lockstep":
        return make_best_lockstep(workload, devices)
    program, arguments = make_loop(workload.local, workload.rule), arguments_of(workload)
    first = timed(program, *arguments)
    return Entry(
        lambda: timed(program, *arguments),
        lambda: trained_values(program(*arguments)),
        max(0.0, first - timed(program, *arguments)),
        lambda: None,
        {},
    )


def make_peer(name: str, workload: Workload, options: argparse.Namespace, folder: Path) -> Entry:
    """Start a peer's worker on the exported workload, in its precision, and let it warm up."""
    dtype = workload.state.hparams["learning_rate"].dtype
    exported = folder / f"{dtype}.npz"
    if not exported.exists():
        workloads.export_workload(workload, jax.random.key(KEY), exported)
    double = dtype == jnp.float64
    peer = Peer(name, options.peers, exported, folder, patience=options.patience, double=double)
    peak: list[int] = [0]

    def run() -> float:
        answer = peer.ask("run")
        peak[0] = answer["peak_bytes"]
        return answer["seconds"]

    try:
        first = run()
        return Entry(run, peer.values, max(0.0, first - run()), lambda: peak[0], {}, peer.close)
    except PeerError:
        peer.close()
        raise


def trained_values(state: State) -> dict[str, np.ndarray]:
    """Return the trained values under the names that peers use."""
    trainable = state.server.trainable
    values = {f"dense:{name}": value for name, value in trainable.dense.items()}
    for path, (a, b) in trainable.adapters.items():
        values |= {f"lora_a:{path}": a, f"lora_b:{path}": b}
    return {name: np.asarray(value) for name, value in values.items()}


def difference(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """Return the largest relative difference of any factor (Frobenius norm), and of all dense values together.

    `lora_b` starts at zero, so that who trains nothing differs by 1. Some biases (of attention keys) have no gradient
    but rounding, hence the dense values together.
    """

    def relative(names: list[str]) -> float:
        gap = sum(float(np.sum(np.square(ours[name] - theirs[name], dtype=np.float64))) for name in names)
        size = sum(float(np.sum(np.square(ours[name], dtype=np.float64))) for name in names)
        return (gap / max(size, 1e-300)) ** 0.5

    factors = [relative([name]) for name in ours if not name.startswith("dense:")]
    worst = max(*factors, relative([name for name in ours if name.startswith("dense:")]))
    return worst if np.isfinite(worst) else float("inf")


def gate(name: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> float:
    """Return how far a competitor's result is from ours; raise `PeerError` where it is another result."""
    gap = difference(ours, theirs)
    print(f"  {name}: differs from ours by {gap:.1e}", flush=True)
    if gap > tolerance:
        raise PeerError(f"trained something else: values differ by {gap:.1e}, more than {tolerance:.0e}")
    return gap


def gate_twice(
    name: str,
    ours: dict[str, np.ndarray],
    entry: Entry,
    *,
    workload: Workload,
    options: argparse.Namespace,
    folder: Path,
) -> float:
    """Hold a competitor against ours; if float32 is too coarse for that, in float64, a hundred times as strictly."""
    try:
        return gate(name, ours, entry.values())
    except PeerError:
        print(f"  {name}: once more in float64", flush=True)
    with jax.enable_x64(True):
        doubled = workloads.in_float64(workload)
        precise = make_ours(doubled, doubled.lanes).values()
        if name in ENGINES:
            return gate(name, precise, make_engine(name, doubled).values(), TOLERANCE / 100)
        theirs = make_peer(name, doubled, options, folder)
    try:
        return gate(name, precise, theirs.values(), TOLERANCE / 100)
    finally:
        theirs.close()


def line_up(workload: Workload, lanes: tuple[int, ...], options: argparse.Namespace, folder: Path) -> Field:
    """Make our round and everybody whom the options name ready to take turns; the caller closes their entries.

    The yardsticks train another model and so pass no gate.
    """
    entries, gaps, skipped = sweep(workload, lanes, options.devices), {}, {}
    ours = entries["ours"].values()
    for name in options.competitors:
        print(f"  {name} …", flush=True)
        entry = None
        try:
            local = name in ENGINES
            entry = (
                make_engine(name, workload, options.devices) if local else make_peer(name, workload, options, folder)
            )
            if name not in YARDSTICKS:
                gaps[name] = gate_twice(name, ours, entry, workload=workload, options=options, folder=folder)
            entries[name] = entry
        except PeerError as error:
            skipped[name] = str(error)
            print(f"  {name}: no number: {error}", flush=True)
            if entry is not None:
                entry.close()
    return Field(entries, gaps, skipped)
