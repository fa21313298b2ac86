"""What XLA makes of a round on an NVIDIA H100, counted on a machine that has none.

JAX compiles ahead of time for a device that is only described. Of the compiled program this prints how many kernels one
training step of all lanes launches, how many a turn (whenever a lane finishes), and how many lie outside of both loops;
which library calls there are; and how much temporary memory the program takes. Times are not to be had this way.

Command:  python -m benchmarks.speed.gpu_program --json benchmarks/speed/results/gpu_program.json
          (`--quick`: few clients, without data; `--rules` and `--workloads` choose)
Needs:    the CUDA plugin of the installed JAX, without a GPU or a driver:
          pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION nvidia-cuda-nvcc-cu12
Limits:   without a device to tune on, matrix products go to cuBLAS; a real compilation may fuse some of them
Writes:   JSON; the table is printed
"""

import argparse
import collections
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from autorank_jax import aggregators
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.types import Array, Batch, FederatedData, PyTree, Trainable
from benchmarks import harness, script
from benchmarks.speed import competitors, workloads

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""The device in XLA's words, after NVIDIA's data sheet of the H100 SXM5."""

NO_LAUNCH = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
    "replica-id", "domain", "copy-done", "async-done", "all-reduce-done",
}  # fmt: skip
"""Instructions of a compiled program that start nothing on the device."""

LIBRARIES = ("__cu", "cublas", "cudnn", "cufft", "cusolver", "cusparse")
"""How the names of library calls begin: cuBLAS, cuDNN, cuSOLVER and the like."""

COLUMNS = {
    "workload": "workload",
    "rule": "rule",
    "lanes": "lanes",
    "launches a step": "step",
    "by hand": "by_hand",
    "a turn": "turn",
    "outside the loops": "outside",
    "MB of temporaries": "temporary_mb",
    "library calls": "calls",
}


class Counts(NamedTuple):
    """Launches of a round: a step of all lanes, a turn besides its steps, and what happens once or twice a round."""

    step: int
    turn: int
    outside: int
    calls: dict[str, int]  # library calls by name, wherever they stand


def prepare_for_h100() -> None:
    """Let JAX compile for a GPU on a machine without one; call it before anything is computed."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}  # no driver is asked for
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false".strip()
    jax.config.update("jax_platforms", "cpu")


def compile_for_h100(function: Callable[..., Any], *arguments: Any) -> Any:
    """Compile a function for one H100: the program is to be read, not run; arguments as `lower_for_h100` takes them."""
    return lower_for_h100(function, *arguments).compile()


def lower_for_h100(function: Callable[..., Any], *arguments: Any) -> Any:
    """Trace a function for one H100.

    Args:
        function: what `jax.jit` takes.
        arguments: arrays, or `jax.ShapeDtypeStruct`s.

    Returns:
        What `compile()` makes a program of.

    Raises:
        SystemExit: without the CUDA plugin.
    """
    try:
        device = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", target_config=H100, topology="1x1x1"
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise SystemExit(f"expected JAX's CUDA plugin (see --help), got: {str(error).splitlines()[0]}") from None
    mesh = topologies.make_mesh(device, (1,), ("device",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    return jax.jit(function).lower(*shapes)


def instructions_of(text: str) -> tuple[str, dict[str, list[str]]]:
    """Split a compiled program: the name of its entry, and the instructions of every computation."""
    entry, found, current = "", dict[str, list[str]](), None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            current.append(line.strip())
    return entry, found


def kinds_of(instructions: list[str]) -> collections.Counter[str]:
    """Count what the instructions of one computation launch, by kind; library calls by their name."""
    count: collections.Counter[str] = collections.Counter()
    for line in instructions:
        kind = re.search(r"[\s)\]}]([a-z][\w\-]*)\(", line.partition(" = ")[2])
        if kind is None or kind[1] in NO_LAUNCH:
            continue
        target = re.search(r'custom_call_target="([^"]+)"', line) if kind[1] == "custom-call" else None
        count[target[1] if target else kind[1]] += 1
    return count


def loops_of(found: Mapping[str, list[str]], name: str) -> Iterator[tuple[str, int | None]]:
    """Yield body and number of turns, None where data decide it, of every loop that a computation starts."""
    for line in found.get(name, ()):
        if loop := re.search(r" while\(.*body=%?([\w.\-]+)", line):
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            yield loop[1], int(trips[1]) if trips else None
        else:
            for other in called(line):
                yield from loops_of(found, other)


def called(line: str) -> Iterator[str]:
    """Yield the computations that an instruction runs as part of its own: branches and calls."""
    if " conditional(" in line or " call(" in line:
        yield from re.findall(r"(?:to_apply|true_computation|false_computation)=%?([\w.\-]+)", line)
        if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
            yield from (name.strip().lstrip("%") for name in branches[1].split(","))


def launches(found: Mapping[str, list[str]], name: str) -> int:
    """Count what one run of a computation launches; a loop whose turns data decide is one launch here."""
    total = kinds_of(found.get(name, [])).total()
    total += sum(launches(found, other) for line in found.get(name, ()) for other in called(line))
    return total + sum(trips * launches(found, body) for body, trips in loops_of(found, name) if trips)


def paths(found: Mapping[str, list[str]], name: str) -> Iterator[tuple[str, ...]]:
    """Yield the ways from a computation into its innermost loops, through loops whose turns data decide."""
    inner = [body for body, trips in loops_of(found, name) if trips is None]
    for body in inner:
        yield from ((name, *path) for path in paths(found, body))
    if not inner:
        yield (name,)


def count(text: str) -> Counts:
    """Count the launches of a round: its innermost loop is the step, the loop around it the turn.

    With several rank levels the numbers are those of the level that launches most.
    """
    entry, found = instructions_of(text)
    nested = [path for path in paths(found, entry) if len(path) > 2]
    if not nested:
        raise ValueError("expected a loop within a loop, got a program without: probably it is no round")
    *around, turn, step = max(nested, key=lambda path: launches(found, path[-1]))
    everywhere = sum((kinds_of(lines) for lines in found.values()), collections.Counter())
    calls = {name: times for name, times in sorted(everywhere.items()) if name.startswith(LIBRARIES)}
    outside = sum(launches(found, name) for name in around)
    return Counts(launches(found, step), launches(found, turn), outside, calls)


def step_by_hand(workload: workloads.Workload, lanes: int) -> int:
    """Count what a step launches that somebody would write by hand: `scan` over `vmap`, no queue, no masks, no rule."""
    task, data, size = workload.task, workload.data, workload.local.batch_size
    stacked = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (lanes, *leaf.shape)), task.server.trainable)

    def train(stacked: Trainable, frozen: PyTree, data: FederatedData, index: Array, key: Array) -> Trainable:
        def loss(params: Trainable, rows: Array) -> Array:
            inputs, targets = jax.tree.map(lambda leaf: leaf[rows], (data.inputs, data.targets))
            return jnp.mean(task.loss(frozen, params, Batch(inputs, targets, jnp.ones(size)), key))

        def step(stacked: Trainable, rows: Array) -> tuple[Trainable, None]:
            return jax.tree.map(lambda p, g: p - 0.01 * g, stacked, jax.vmap(jax.grad(loss))(stacked, rows)), None

        return jax.lax.scan(step, stacked, index)[0]

    index = jnp.zeros((100, lanes, size), jnp.int32)
    program = compile_for_h100(train, stacked, task.server.frozen, data, index, jax.random.key(0))
    entry, found = instructions_of(program.as_text())
    return max(launches(found, body) for body, _ in loops_of(found, entry))


def measure(name: str, rule_name: str | None, options: argparse.Namespace) -> harness.Row:
    """Compile a round of a workload, under a rule of its own where one is named, and count."""
    workload = workloads.make_workload(name, quick=options.quick)
    if rule_name is not None:
        rule = aggregators.make_rule(rule_name)
        state = init_state(workload.task.server, rule, workload.state.ranks, learning_rate=workloads.LEARNING_RATE)
        workload = workload._replace(rule=rule, state=state)
    round_fn = make_round(
        workload.local, workload.rule, lanes=options.lanes, rank_levels=options.levels, pack=not options.apart
    )
    begin = time.perf_counter()
    program = compile_for_h100(round_fn, *competitors.arguments_of(workload))
    seconds, counts = time.perf_counter() - begin, count(program.as_text())
    return {
        "workload": name,
        "rule": rule_name or "rbla",
        "lanes": options.lanes,
        "rank_levels": options.levels,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
        "by_hand": step_by_hand(workload, options.lanes),
        **counts._asdict(),
    }


def tables(content: script.Content) -> Mapping[str, str]:
    """Lay the counts out."""
    rows = [
        row
        | {"temporary_mb": row["temporary_bytes"] / 1e6}
        | {"calls": ", ".join(f"{times} {name.removeprefix('__')}" for name, times in row["calls"].items()) or "none"}
        for row in content["rows"]
    ]
    return {"gpu_program": script.table(rows, COLUMNS)}


@harness.mistakes_in_words()
def main() -> None:
    """Compile, count, print, write."""
    parser = script.make_parser(__doc__, quick="few clients of the embedded images")
    parser.add_argument("--workloads", default="equal,cnn,transformer", help="of benchmarks.speed.workloads")
    parser.add_argument("--rules", default="rbla,raflora", help="aggregation rules")
    parser.add_argument("--lanes", type=int, default=64, help="clients side by side, 64")
    parser.add_argument("--levels", type=int, default=1, help="rank levels, 1")
    parser.add_argument("--apart", action="store_true", help="turns leaf by leaf, as on a CPU")
    options = parser.parse_args()
    prepare_for_h100()
    rows = []
    for name in options.workloads.split(","):
        for rule in options.rules.split(","):
            print(f"{name}, {rule} …", flush=True)
            rows.append(measure(name, rule, options))
    found = {"rows": rows, "versions": script.about()["versions"], "target": "NVIDIA H100 80GB HBM3"}
    script.publish(script.read(options.json) | found, options.json, tables, None)


if __name__ == "__main__":
    main()
