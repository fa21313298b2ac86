"""What a whole federated round of a language model takes, beside the same steps written by hand, off compiled programs.

The round is `make_round`'s: 16 clients of mixed ranks in 16 lanes, SGD with momentum, masks, queue, sums, the rule. By
hand it is `language_by_hand`: `scan` over `vmap`, all of one rank, no federation. Nothing is run, and no weight exists.
Printed are the bytes of arguments and temporaries, and launches (those of loops of known length times that length): a
step of all lanes, a turn (whenever a client ends) besides its steps, and what lies outside. Then what compiling a round
takes by the depth of the model.

Command:  python -m benchmarks.speed.language_rounds --h100 --json benchmarks/speed/results/gpu_program.json
          (without `--h100` a small model for this machine's CPU; `--models` and `--programs` choose; with `--json`
          rows that are there are kept, so that one program can be compiled at a time)
Needs:    for `--h100` what gpu_program needs, and about 4 GB of memory
Writes:   JSON; the tables are printed
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autorank_jax import aggregators, federated
from autorank_jax.adapters.lora import max_ranks
from autorank_jax.engine.ahead import without_copies
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from benchmarks import harness, script
from benchmarks.speed import gpu_program, language_by_hand
from benchmarks.speed.language_memory import MODELS, Training, task_of

PLAIN, BY_HAND, RULES = "by hand, no rotation", "by hand", ("rbla", "raflora")
PROGRAMS = (PLAIN, BY_HAND, *RULES)
DEPTHS = (4, 32)
TURNS = 3

COLUMNS = {
    "model": "model",
    "program": "program",
    "lanes × texts × tokens": "batch",
    "rank": "rank",
    "GB of arguments": "arguments_gb",
    "GB of temporaries": "temporaries_gb",
    "GB of results": "results_gb",
    "both": "both_gb",
    "both / plain by hand": "memory_ratio",
    "with results / plain by hand": "whole_ratio",
    "launches a step": "step",
    "launches / plain by hand": "step_ratio",
    "a turn": "turn",
    "outside": "outside",
    "compiled for": "target",
}
DEPTH_COLUMNS = {
    "blocks": "depth",
    "operations of the program": "operations",
    "CPU seconds to trace": "trace_seconds",
    "CPU seconds to compile": "compile_seconds",
    "both / least deep": "ratio",
    "compiled for ": "target",
}


def round_of(training: Training, rule_name: str, *, pack: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Make a round and the shapes of its arguments: a client for each lane, 1 to 4 batches of texts, mixed ranks.

    What the round hands on as it came, the base above all, is no result of it, as `compile_ahead` has it.
    """
    task, server = task_of(training, "none")
    task, lanes, rank = task._replace(server=server), training.lanes, training.rank
    sizes = [training.texts * (1 + client % 4) for client in range(lanes)]
    ids = np.zeros((sum(sizes), training.length), np.int32)
    data = federated.from_client_ids(ids, ids, np.repeat(np.arange(lanes), sizes))
    rule = aggregators.make_rule(rule_name)
    local = make_local_training(task, lambda h: optax.sgd(h["learning_rate"], momentum=0.9), batch_size=training.texts)
    mixed = jnp.array([max(1, rank >> client % 4) for client in range(lanes)], jnp.int32)
    ranks = dict.fromkeys(max_ranks(server), mixed)
    state = jax.eval_shape(lambda server: init_state(server, rule, ranks, learning_rate=0.01), server)
    round_fn = make_round(local, rule, lanes=lanes, rank_levels=1, pack=pack)
    return without_copies(round_fn)[0], (jax.random.key(0), state, data)


def by_hand_of(training: Training, *, rotary: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Make the steps by hand, and the shapes of their arguments."""
    sizes = {name: getattr(training, name) for name in ("lanes", "texts", "length", "rank")}
    arguments = language_by_hand.arguments(training.config, training.dtype, **sizes)
    return language_by_hand.make_training(training.config, rotary=rotary), arguments


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...], *, h100: bool) -> Any:
    """Compile for an H100, or for this machine's CPU."""
    if h100:
        return gpu_program.compile_for_h100(function, *arguments)
    return jax.jit(function).lower(*arguments).compile()


def counts_of(text: str, name: str) -> harness.Row:
    """Count launches: of a round a step, a turn and the rest; by hand a step."""
    if name in RULES:
        return gpu_program.count(text)._asdict()
    entry, found = gpu_program.instructions_of(text)
    return {"step": max(gpu_program.launches(found, body) for body, _ in gpu_program.loops_of(found, entry))}


def measure(model: str, name: str, *, h100: bool) -> harness.Row:
    """Compile one program, read what it takes and count what it launches."""
    training, begin = MODELS[model], time.process_time()
    made = round_of(training, name, pack=h100) if name in RULES else by_hand_of(training, rotary=name == BY_HAND)
    program = compiled(*made, h100=h100)
    seconds, memory = time.process_time() - begin, program.memory_analysis()
    text = program.as_text()
    return {
        "model": model,
        "program": name,
        "target": "H100" if h100 else "CPU",
        **{field: getattr(training, field) for field in ("lanes", "texts", "length", "rank")},
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "compile_cpu_seconds": seconds,
        **counts_of(text, name),
    }


def depth_rows(training: Training, *, h100: bool) -> list[harness.Row]:
    """Compile a round of several depths in turns; keep the least CPU seconds of each."""
    rows: dict[int, harness.Row] = {}
    for _, depth in itertools.product(range(TURNS), DEPTHS):
        jax.clear_caches()
        deep = training._replace(config=training.config._replace(depth=depth))
        begin = time.process_time()
        function, arguments = round_of(deep, "rbla", pack=h100)
        lowered = gpu_program.lower_for_h100(function, *arguments) if h100 else jax.jit(function).lower(*arguments)
        middle = time.process_time()
        lowered.compile()
        seconds = {"trace_seconds": middle - begin, "compile_seconds": time.process_time() - middle}
        operations = sum(" = " in line for line in lowered.as_text().splitlines())
        best = rows.setdefault(depth, {"depth": depth, "operations": operations} | seconds)
        best |= {field: min(best[field], value) for field, value in seconds.items()}
    return [rows[depth] | {"turns": TURNS, "target": "H100" if h100 else "CPU"} for depth in DEPTHS]


def tables(content: script.Content) -> Mapping[str, str]:
    """Lay out bytes, launches and what depth costs."""
    rows = content["language_rounds"]["rows"]
    floors = {row["model"]: row for row in rows if row["program"] == PLAIN}

    def told(row: harness.Row) -> harness.Row:
        parts = {"arguments_gb": "argument", "temporaries_gb": "temporary", "results_gb": "output"}
        gigabytes = {column: row[f"{name}_bytes"] / 1e9 for column, name in parts.items()}
        found = row | gigabytes | {"both_gb": both(row) / 1e9, "batch": batch_of(row)}
        floor = floors.get(row["model"])
        return found if floor is None else found | ratios(row, floor)

    found = {"language_rounds": script.table([told(row) for row in rows], COLUMNS)}
    if depths := content.get("language_depths"):
        least = depths["rows"][0]
        deep = [row | {"ratio": seconds_of(row) / seconds_of(least)} for row in depths["rows"]]
        found["language_depths"] = script.table(deep, DEPTH_COLUMNS)
    return found


def both(row: harness.Row) -> int:
    """Return the bytes of arguments and temporaries."""
    return row["argument_bytes"] + row["temporary_bytes"]


def batch_of(row: harness.Row) -> str:
    """Say what a step trains on."""
    return f"{row['lanes']} × {row['texts']} × {row['length']}"


def ratios(row: harness.Row, floor: harness.Row) -> harness.Row:
    """Return memory and launches of a step beside those of another program."""
    whole, whole_floor = (both(one) + one["output_bytes"] for one in (row, floor))
    return {
        "memory_ratio": both(row) / both(floor),
        "whole_ratio": whole / whole_floor,
        "step_ratio": row["step"] / floor["step"],
    }


def seconds_of(row: harness.Row) -> float:
    """Return the seconds that tracing and compiling took."""
    return row["trace_seconds"] + row["compile_seconds"]


def rows_of(
    known: list[harness.Row], models: list[str], programs: list[str], *, h100: bool
) -> Iterator[list[harness.Row]]:
    """Yield all rows, those that are known among them, after each that is new."""
    order = [(model, name) for model in MODELS for name in PROGRAMS]
    rows = {(row["model"], row["program"]): row for row in known}
    for model in models:
        for name in programs:
            if (model, name) not in rows:
                print(f"{model}, {name} …", flush=True)
                rows[model, name] = measure(model, name, h100=h100)
            yield [rows[which] for which in order if which in rows]


@harness.mistakes_in_words()
def main() -> None:
    """Compile, read, count, print, write."""
    parser = script.make_parser(__doc__, quick="the small model alone")
    parser.add_argument("--models", default="", help="small, 1B, 8B")
    parser.add_argument("--programs", default=",".join(RULES), help=f"besides those by hand: {', '.join(RULES)}")
    parser.add_argument("--shallow", action="store_true", help="leave out what depth costs")
    parser.add_argument("--h100", action="store_true", help="compile the large models for one H100")
    options = parser.parse_args()
    if options.h100:
        gpu_program.prepare_for_h100()
    models = options.models.split(",") if options.models else ["1B", "8B"] if options.h100 else ["small"]
    programs = [PLAIN, BY_HAND, *filter(None, options.programs.split(","))]
    content = script.read(options.json)
    rounds = content.setdefault("language_rounds", {"versions": script.about()["versions"], "rows": []})
    for rows in rows_of(rounds["rows"], models, programs, h100=options.h100):
        rounds["rows"] = rows
        if options.json:
            harness.write_json(options.json, content)
    if "language_depths" not in content and not options.shallow:
        training = MODELS["1B" if options.h100 else "small"]
        content["language_depths"] = script.about() | {"rows": depth_rows(training, h100=options.h100)}
    script.publish(content, options.json, tables, None)


if __name__ == "__main__":
    main()
