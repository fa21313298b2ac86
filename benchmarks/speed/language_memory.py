"""What training a language model takes with its base in floats, 8 and 4 bits a number, read off compiled programs.

Of a few steps of clients side by side (`scan` over `vmap` of the gradient, SGD with momentum) it prints the bytes of
the arguments (base, adapters, momentum, texts) and of the temporaries; nothing is run. Activations are computed again
block by block, adapters and momentum are float32.

Command:  python -m benchmarks.speed.language_memory --h100 --json benchmarks/speed/results/gpu_program.json
          (without `--h100` a small model for this machine's CPU; `--models` and `--formats` choose; with `--json`
          rows that are there are kept, so that one program can be compiled at a time)
Needs:    for `--h100` what gpu_program needs, and about 4 GB of memory
Writes:   JSON; the table is printed
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from autorank_jax.adapters.causal_lm import task_from_causal_lm
from autorank_jax.models.causal_config import CausalConfig, Rope
from autorank_jax.models.causal_lm import CausalLM, param_shapes
from autorank_jax.models.quantized import BLOCK, Quantized, is_quantizable
from autorank_jax.types import Array, Batch, PyTree, Server, Task, Trainable
from benchmarks import harness, script
from benchmarks.speed.gpu_program import compile_for_h100, prepare_for_h100

STEPS = 4
FORMATS = ("none", "int8", "nf4")
_LLAMA_3 = {"vocabulary": 128256, "norm_eps": 1e-5, "rope": Rope(theta=5e5)}
LLAMA_1B = CausalConfig(width=2048, depth=16, heads=32, kv_heads=8, head_dim=64, hidden=8192, tied=True, **_LLAMA_3)
LLAMA_8B = CausalConfig(width=4096, depth=32, heads=32, kv_heads=8, head_dim=128, hidden=14336, tied=False, **_LLAMA_3)
SMALL = CausalConfig(vocabulary=512, width=256, depth=8, heads=4, kv_heads=2, head_dim=64, hidden=768)

COLUMNS = {
    "model": "model",
    "base": "quantize",
    "lanes × texts × tokens": "batch",
    "rank": "rank",
    "GB of the base": "base_gb",
    "GB of arguments": "arguments_gb",
    "GB of temporaries": "temporaries_gb",
    "both": "both_gb",
    "compiled for": "target",
}


class Training(NamedTuple):
    """What is trained: the decoder and the steps of all clients."""

    config: CausalConfig
    dtype: Any
    lanes: int
    texts: int
    length: int
    rank: int


MODELS: Mapping[str, Training] = {
    "small": Training(SMALL, jnp.float32, 2, 2, 64, 4),
    "1B": Training(LLAMA_1B, jnp.bfloat16, 16, 2, 512, 32),
    "8B": Training(LLAMA_8B, jnp.bfloat16, 16, 2, 512, 16),
}


def shapes_of(training: Training, quantize: str) -> dict[str, Any]:
    """Return the decoder's parameters without their numbers."""

    def one(name: str, shape: tuple[int, ...]) -> Any:
        if quantize == "none" or not is_quantizable(name):
            return jax.ShapeDtypeStruct(shape, training.dtype)
        depth, d_in, d_out = shape
        blocks = -(-d_in * d_out // BLOCK)
        eight = quantize == "int8"
        codes = jax.ShapeDtypeStruct(*((shape, jnp.int8) if eight else ((depth, blocks, BLOCK // 2), jnp.uint8)))
        scale = jax.ShapeDtypeStruct((depth, d_out if eight else blocks), jnp.float32)
        return Quantized(codes, scale, (quantize, (d_in, d_out), jnp.dtype(training.dtype)))

    return {name: one(name, shape) for name, shape in param_shapes(training.config).items()}


def task_of(training: Training, quantize: str) -> tuple[Task, Server]:
    """Return the task and the shapes of its server: there is no memory for its numbers."""
    made: list[Task] = []

    def make(params: dict[str, Any]) -> Server:
        made.append(task_from_causal_lm(CausalLM(training.config, params), max_rank=training.rank))
        return made[0].server

    server = jax.eval_shape(make, shapes_of(training, quantize))
    return made[0], server


def program_of(training: Training, quantize: str, *, h100: bool) -> tuple[Any, PyTree]:
    """Compile the steps; return the program and the shapes of the frozen base."""
    task, server = task_of(training, quantize)
    stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((training.lanes, *a.shape), a.dtype), server.trainable)
    ids = jax.ShapeDtypeStruct((STEPS, training.lanes, training.texts, training.length), jnp.int32)

    def train(start: Trainable, momentum: Trainable, frozen: PyTree, ids: Array) -> tuple[Trainable, Trainable]:
        def loss(trainable: Trainable, ids: Array) -> Array:
            batch = Batch(ids, jnp.roll(ids, -1, axis=1), jnp.ones(training.texts))
            return jnp.mean(task.loss(frozen, trainable, batch, jax.random.key(0)))

        def step(carry: tuple[Trainable, Trainable], ids: Array) -> tuple[tuple[Trainable, Trainable], None]:
            gradient = jax.vmap(jax.grad(loss))(carry[0], ids)
            momentum = jax.tree.map(lambda m, g: 0.9 * m + g, carry[1], gradient)
            return (jax.tree.map(lambda p, m: p - 1e-3 * m, carry[0], momentum), momentum), None

        return jax.lax.scan(step, (start, momentum), ids)[0]

    arguments = (stacked, stacked, server.frozen, ids)
    program = compile_for_h100(train, *arguments) if h100 else jax.jit(train).lower(*arguments).compile()
    return program, server.frozen


def measure(name: str, quantize: str, *, h100: bool) -> harness.Row:
    """Compile one program and read what it takes."""
    training, begin = MODELS[name], time.perf_counter()
    program, frozen = program_of(training, quantize, h100=h100)
    memory = program.memory_analysis()
    return {
        "model": name,
        "quantize": quantize,
        "target": "H100" if h100 else "CPU",
        "lanes": training.lanes,
        "texts": training.texts,
        "length": training.length,
        "rank": training.rank,
        "base_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(frozen)),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_seconds": time.perf_counter() - begin,
    }


def tables(content: script.Content) -> Mapping[str, str]:
    """Lay the bytes out."""

    def told(row: harness.Row) -> harness.Row:
        base, arguments, temporaries = (row[f"{what}_bytes"] / 1e9 for what in ("base", "argument", "temporary"))
        return row | {
            "batch": f"{row['lanes']} × {row['texts']} × {row['length']}",
            "base_gb": base,
            "arguments_gb": arguments,
            "temporaries_gb": temporaries,
            "both_gb": arguments + temporaries,
        }

    return {"language_memory": script.table([told(row) for row in content["memory"]["rows"]], COLUMNS)}


def rows_of(
    known: list[harness.Row], models: list[str], formats: list[str], *, h100: bool
) -> Iterator[list[harness.Row]]:
    """Yield all rows, those that are known among them, after each that is new."""
    order = [(name, quantize) for name in MODELS for quantize in FORMATS]
    rows = {(row["model"], row["quantize"]): row for row in known}
    for name in models:
        for quantize in formats:
            if (name, quantize) not in rows:
                print(f"{name}, {quantize} …", flush=True)
                rows[name, quantize] = measure(name, quantize, h100=h100)
            yield [rows[which] for which in order if which in rows]


@harness.mistakes_in_words()
def main() -> None:
    """Compile, read, print, write."""
    parser = script.make_parser(__doc__, quick="the small model alone")
    parser.add_argument("--models", default="", help="small, 1B, 8B")
    parser.add_argument("--formats", default=",".join(FORMATS), help="of the base: none, int8, nf4")
    parser.add_argument("--h100", action="store_true", help="compile the large models for one H100")
    options = parser.parse_args()
    if options.h100:
        prepare_for_h100()
    models = options.models.split(",") if options.models else ["1B", "8B"] if options.h100 else ["small"]
    content = script.read(options.json)
    memory = content.setdefault("memory", {"versions": script.about()["versions"], "rows": []})
    for rows in rows_of(memory["rows"], models, options.formats.split(","), h100=options.h100):
        memory["rows"] = rows
        if options.json:
            harness.write_json(options.json, content)
    script.publish(content, options.json, tables, None)


if __name__ == "__main__":
    main()
