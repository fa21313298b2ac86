"""The parts of `gpu`: each is a generator of rows, runs in a process of its own, and prints a row as soon as it has it.

`python -m benchmarks.speed.gpu_parts PART [--rehearse]` runs one part. Its first line of JSON says what it runs
on, each further one is a row of the results. A part that crashes XLA,
as some of the options tried here may, ends itself alone.
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache

from autorank_jax import aggregators
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.types import Server, State
from benchmarks import harness, script
from benchmarks.speed import competitors, gpu_language, workloads

Rows = Iterator[harness.Row]
T = TypeVar("T")

LANES = (1, 8, 64, 256, 1024)
CLIENTS = (1_000, 10_000, 100_000, 1_000_000)
EXAMPLES = 3_000_000
"""Examples that the clients of `scale` share."""
REPEATS = 5
TOLERANCE = 1e-3
"""Of `agreement`: two rounds in float32 differ by some 1e-6 where sums are taken in another order."""
DEFAULT_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,CONDITIONAL"
GRAPHS: dict[str, dict[str, str]] = {
    "default": {},
    "no graphs": {"xla_gpu_enable_command_buffer": ""},
    "graphs of loops": {"xla_gpu_enable_command_buffer": f"{DEFAULT_GRAPHS},WHILE,CONVOLUTION"},
    "graphs of loops, concurrent": {
        "xla_gpu_enable_command_buffer": f"{DEFAULT_GRAPHS},WHILE,CONVOLUTION",
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT_REGIONS",
    },
}
"""Compiler options of `graphs`, the riskiest last. A list of kinds replaces XLA's default."""


def agreement(*, rehearse: bool) -> Rows:
    """Run two rounds of every rule here and on the CPU, with products in full float32, and tell how far they differ."""
    jax.config.update("jax_default_matmul_precision", "float32")
    model, clients = workloads.mlp((64, 48, 10), (8, 8)), 12
    data, ranks = workloads.few_shot_clients(clients, 20), workloads.alternating_ranks(model, clients)
    local = make_local_training(model.task, optax.sgd(0.1), batch_size=8)

    def follow(name: str, device: jax.Device) -> tuple[Server, float]:
        rule = aggregators.make_rule(name)
        round_fn = make_round(local, rule, lanes=4, rank_levels=2, pack=device.platform != "cpu")
        arguments = (jax.random.key(0), init_state(model.task.server, rule, ranks), data)
        key, state, here = jax.device_put(arguments, device)
        program, seconds = harness.compiled(round_fn, key, state, here)
        for _ in range(2):
            state, _ = program(key, state, here)
        return jax.tree.map(np.asarray, state.server), seconds

    def compare(name: str) -> harness.Row:
        ours, seconds = follow(name, jax.devices()[0])
        theirs, _ = follow(name, jax.devices("cpu")[0])
        gap = difference(ours, theirs)
        return {"rule": name, "difference": gap, "agrees": gap <= TOLERANCE, "compile_seconds": seconds}

    names = list(aggregators.RULES)[:2] if rehearse else list(aggregators.RULES)
    with ThreadPoolExecutor(1 if rehearse else 8) as pool:
        yield from pool.map(compare, names)


def difference(one: Server, other: Server) -> float:
    """Return the largest relative difference (Frobenius norm) of a layer's whole matrix or of a dense parameter.

    Factors alone are unique only up to signs and rotations where a rule splits a product.
    """

    def whole(server: Server) -> dict[str, np.ndarray]:
        adapters = server.trainable.adapters.items()
        layers = {p: server.frozen.kernels[p].reshape(a.shape[0], -1) + a @ b for p, (a, b) in adapters}
        return layers | dict(server.trainable.dense)

    ours, theirs = whole(one), whole(other)
    return max(float(np.linalg.norm(ours[n] - theirs[n]) / max(np.linalg.norm(theirs[n]), 1e-30)) for n in theirs)


def speed(name: str, *, rehearse: bool) -> Rows:
    """Time a workload at several numbers of lanes beside hand-written engines, in turns."""
    workload = workloads.make_workload(name, quick=rehearse)
    clients = workload.data.size.shape[0]
    lanes = sorted({min(count, clients) for count in (*((1,) if rehearse else LANES), workload.lanes)})
    makers: dict[str, Callable[[], competitors.Entry]] = {
        f"ours, {count} lanes": functools.partial(competitors.make_ours, workload, count) for count in lanes
    }
    for engine in competitors.ENGINES:
        if engine != "loop":
            makers[engine] = functools.partial(competitors.make_engine, engine, workload)
    entries: dict[str, competitors.Entry] = {}
    seconds: dict[str, list[float]] = {}
    with ThreadPoolExecutor(1 if rehearse else 8) as pool:
        for competitor, made in zip(makers, pool.map(attempt, makers.values()), strict=True):
            if isinstance(made, str):
                yield {"workload": name, "competitor": competitor, "failed": made}
            else:
                entries[competitor], seconds[competitor] = made, []
    chosen, turns = f"ours, {min(workload.lanes, clients)} lanes", 1 if rehearse else REPEATS
    for turn in range(turns):
        for competitor, entry in list(entries.items()):
            took = attempt(entry.run)
            if isinstance(took, str):
                del entries[competitor]
                yield {"workload": name, "competitor": competitor, "failed": took}
            else:
                seconds[competitor].append(took)
        if turn in (0, turns - 1):  # rows of several turns take the place of those of one
            yield from speed_rows(workload, entries, seconds, chosen)


def attempt(make: Callable[[], T]) -> T | str:
    """Call, or return in a line what XLA has against it."""
    try:
        return make()
    except jax.errors.JaxRuntimeError as error:
        return str(error).partition("\n")[0]


def speed_rows(
    workload: workloads.Workload,
    entries: Mapping[str, competitors.Entry],
    seconds: Mapping[str, list[float]],
    chosen: str,
) -> Rows:
    """Sum up the turns so far."""
    examples = workloads.examples_per_round(workload)
    ours = entries[chosen].values() if chosen in entries else {}
    for competitor, entry in entries.items():
        measured = harness.summary(seconds[competitor])
        another = not ours or competitor in competitors.YARDSTICKS
        yield {
            "workload": workload.name,
            "competitor": competitor,
            "chosen": competitor == chosen,
            "turns": len(seconds[competitor]),
            "seconds_per_round": measured["median"],
            "spread_seconds": measured["spread"],
            "samples_per_second": examples / measured["median"],
            "compile_seconds": entry.compile_seconds,
            "peak_bytes": entry.peak_bytes(),
            "difference": None if another else competitors.difference(ours, entry.values()),
        } | {field: value for field, value in entry.detail.items() if field in ("lanes", "batch_size")}


def scale(*, rehearse: bool) -> Rows:
    """Time one program from a thousand clients to a million that share the same number of examples."""
    total = 2_000 if rehearse else EXAMPLES
    for clients in (100, 1_000) if rehearse else CLIENTS:
        workload = workloads.make_scale(clients, total)
        arguments = competitors.arguments_of(workload)
        round_fn = make_round(workload.local, workload.rule, lanes=workload.lanes)
        program, compile_seconds = harness.compiled(round_fn, *arguments)
        seconds = [competitors.timed(program, *arguments) for _ in range(2 if rehearse else 4)][1:]
        yield {
            "clients": clients,
            "lanes": workload.lanes,
            "seconds_per_round": float(np.median(seconds)),
            "microseconds_per_example": 1e6 * float(np.median(seconds)) / workloads.examples_per_round(workload),
            "compile_seconds": compile_seconds,
            "peak_bytes": harness.program_bytes(program),
        }


def graphs(name: str, *, rehearse: bool) -> Rows:
    """Time a round with and without CUDA graphs, each twice at least, and tell whether the bits are the same."""
    workload = workloads.make_workload(name, quick=rehearse)
    round_fn = make_round(workload.local, workload.rule, lanes=workload.lanes, rank_levels=workload.rank_levels)
    arguments, expected = competitors.arguments_of(workload), None
    lowered = jax.jit(round_fn).lower(*arguments)
    for how, options in GRAPHS.items():
        row: harness.Row = {"workload": name, "graphs": how}
        try:
            program = lowered.compile(compiler_options=options or None)
            first = competitors.timed(program, *arguments)
            seconds = [competitors.timed(program, *arguments) for _ in range(1 if rehearse else REPEATS)]
            state, _ = program(*arguments)
        except jax.errors.JaxRuntimeError as error:
            yield row | {"failed": str(error).partition("\n")[0]}
            continue
        bits = bits_of(state)
        expected = expected or bits
        yield row | {
            "first_seconds": first,
            "seconds_per_round": float(np.median(seconds)),
            "equal_bits": bits == expected,
        }


def bits_of(state: State) -> bytes:
    """Return all that a round trains as bytes."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.server.trainable))


def precision(name: str, *, rehearse: bool) -> Rows:
    """Time a round whose products are computed as the device likes (TF32 on recent GPUs) and in full float32."""
    workload = workloads.make_workload(name, quick=rehearse)
    arguments, programs = competitors.arguments_of(workload), {}
    for how in ("default", "float32"):
        with jax.default_matmul_precision(how):
            round_fn = make_round(workload.local, workload.rule, lanes=workload.lanes)
            programs[how], _ = harness.compiled(round_fn, *arguments)
    turns = {how: functools.partial(program, *arguments) for how, program in programs.items()}
    seconds = harness.alternate(turns, 1 if rehearse else REPEATS)
    trained = {how: competitors.trained_values(program(*arguments)[0]) for how, program in programs.items()}
    for how, turn in seconds.items():
        gap = competitors.difference(trained["float32"], trained[how])
        yield {"workload": name, "precision": how, "seconds_per_round": float(np.median(turn)), "difference": gap}


def svd(*, rehearse: bool) -> Rows:
    """Time the ways to decompose a dense matrix, and how far their product is from it."""
    ways = {"default": jax.lax.linalg.SvdAlgorithm.DEFAULT, "QR": jax.lax.linalg.SvdAlgorithm.QR}
    if jax.default_backend() == "gpu":
        ways |= {"polar": jax.lax.linalg.SvdAlgorithm.POLAR, "Jacobi": jax.lax.linalg.SvdAlgorithm.JACOBI}
    jax.config.update("jax_default_matmul_precision", "float32")
    for size in (32,) if rehearse else (256, 1024, 2048):
        matrix = jax.random.normal(jax.random.key(size), (size, size))
        for how, algorithm in ways.items():
            row = {"size": size, "algorithm": how}
            try:
                run = jax.jit(functools.partial(jax.lax.linalg.svd, full_matrices=False, algorithm=algorithm))
                left, values, right = run(matrix)
                seconds = [competitors.timed(run, matrix) for _ in range(3)]
                gap = jnp.linalg.norm((left * values[None, :]) @ right - matrix) / jnp.linalg.norm(matrix)
            except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
                yield row | {"failed": str(error).partition("\n")[0]}
                continue
            yield row | {"seconds": float(np.median(seconds)), "difference": float(gap)}


def compilation(*, rehearse: bool) -> Rows:
    """Time the compilation of rounds without and with a persistent cache."""
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        for name in ("tiny",) if rehearse else ("staircase", "cnn", "transformer"):
            workload = workloads.make_workload(name, quick=rehearse)
            for levels in (1, 4):
                row: harness.Row = {"workload": name, "rank_levels": levels}
                for when in ("cold", "warm"):
                    round_fn = make_round(workload.local, workload.rule, lanes=workload.lanes, rank_levels=levels)
                    _, row[f"{when}_seconds"] = harness.compiled(round_fn, *competitors.arguments_of(workload))
                    jax.clear_caches()
                yield row
        compilation_cache.reset_cache()


PARTS: Mapping[str, Callable[..., Rows]] = (
    {"agreement": agreement}
    | {f"speed {n}": functools.partial(speed, n) for n in ("staircase", "cnn", "transformer", "lognormal", "equal")}
    | {"scale": scale}
    | {f"language {n}": functools.partial(gpu_language.language, n) for n in ("pfl", "ranks", "openfedllm")}
    | {f"graphs {n}": functools.partial(graphs, n) for n in ("staircase", "lognormal", "cnn")}
    | {f"precision {n}": functools.partial(precision, n) for n in ("transformer", "cnn")}
    | {"svd": svd, "compilation": compilation}
)
"""What is measured, most important first."""


def nothing(*, rehearse: bool) -> Rows:  # noqa: ARG001
    """Measure nothing: what it runs on is said all the same."""
    yield from ()


def main() -> None:
    """Run one part and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "nothing"])
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    about: dict[str, Any] = script.about()
    print(json.dumps({"about": about}), flush=True)
    with harness.mistakes_in_words():
        for row in PARTS.get(options.part, nothing)(rehearse=options.rehearse):
            print(json.dumps({"row": row}), flush=True)


if __name__ == "__main__":
    main()
