"""A language model trained by the owners of 21 kinds of dialogues: rank policies under rules for mixed ranks.

SmolLM2-135M-Instruct and 2,393 questions and answers in English (the ChatterBot corpus), a client for each category: 8
to 1,050 pairs, so clients are double-imbalanced by nature. AutoRank (with its probe), one rank for all of the same
bytes, and full rank, under `rbla`, `raflora` and `flora`; a fifth of each client's pairs is held out to measure with.
`--share` leaves that part of each category, evenly spaced in the file, 8 pairs at least: clients stay as uneven.
A cell is one policy under one rule and seed; what is finished is not run again, and a cell that was stopped goes on
from its latest round.

Needs the extras `text` and `cli`, and a folder with `smollm2/`, as Hugging Face publishes it, and `dialogues.jsonl`
(category, instruction, output).

Command:  python -m benchmarks.study.dialogues --data FOLDER --out OUT [--cells 'autorank-*'] [--limit-minutes 60]
          python -m benchmarks.study.dialogues --data FOLDER --out OUT --plan    (runs nothing: cells and hours)
          python -m benchmarks.study.dialogues --out OUT --report [--publish]   (runs nothing: the finished cells)
          python -m benchmarks.study.dialogues --report     (runs nothing: the published cells)
          python -m benchmarks.study.dialogues --quick --out OUT    (a tiny model, embedded instructions, two cells)
Expect:   what the plan says, which is printed first: FLOPs over the speed of a matrix product on this machine.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from autorank_jax.cli.stages import spoken
from autorank_jax.datasets import load_instructions
from autorank_jax.engine.probe import part_sizes
from autorank_jax.experiment.checkpoints import Checkpoints
from autorank_jax.experiment.language import FORWARD, run_language
from autorank_jax.experiment.language_options import LANGUAGE_BEFORE, LanguageOptions, as_json
from autorank_jax.experiment.language_results import Begun, Clock, Ended, summarize_language
from autorank_jax.experiment.language_setup import make_parts
from benchmarks import harness, script
from benchmarks.study.cell_file import appending
from benchmarks.study.options import RESULTS, make_parser
from benchmarks.study.paired import Difference, difference, in_points

POLICIES, RULES = ("autorank", "uniform_bytes", "full"), ("raflora", "rbla", "flora")
FEWEST = 8
"""Pairs of a category that a share leaves, where there are as many."""
RECOMPUTED = 1.5
"""FLOPs of a step over those that are counted: the backward pass computes the activations of a block again."""
PUBLISHED = RESULTS / "texts.json"
COLUMNS = (
    "cell", "before", "after", "clients, mean", "clients, worst", "clients, % beyond one rank", "by round",
    "clients of each rank", "MB up",
    "MB down", "TFLOP", "TFLOP of the probe", "hours",
)  # fmt: skip


@harness.mistakes_in_words()
def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan, run the cells that are not finished, and print what there is."""
    given = parse(arguments)
    if not given.out:
        print(table(published()))
        return
    path, began = given.out / "dialogues.jsonl", time.monotonic()
    if not given.report:
        cells = {name: one for name, one in grid(given).items() if fnmatchcase(name, given.cells)}
        left = {name: one for name, one in cells.items() if not is_finished(read(path), name, one, given.share)}
        print(plan(left, len(cells)), flush=True)
        for name, options in {} if given.plan else left.items():
            if given.limit_minutes is not None and time.monotonic() - began > 60 * given.limit_minutes:
                print(f"{name}: not begun, {given.limit_minutes:g} minutes are over")
                break
            append(path, name, {"share": given.share} | run_cell(given.out / "running" / name, name, options))
    print(table(read(path)))
    if given.publish:
        cells = [{"cell": name, **cell} for name, cell in read(path).items()]
        harness.write_json(PUBLISHED, script.read(PUBLISHED) | {"dialogues": cells})


def published() -> dict[str, Any]:
    """Return the published cells by name."""
    return {cell["cell"]: cell for cell in script.read(PUBLISHED).get("dialogues", [])}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, help="folder with smollm2/ and dialogues.jsonl")
    parser.add_argument("--out", type=Path, help="folder of results")
    parser.add_argument("--seeds", type=int, default=3, help="3")
    parser.add_argument("--rounds", type=int, default=10, help="10")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a row, 64")
    parser.add_argument("--share", type=float, default=1.0, help="of each category's pairs, 1")
    parser.add_argument("--probe-epochs", type=int, default=2, help="2; 0 = rank without a probe")
    parser.add_argument("--max-rank", type=int, default=16, help="16")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a step, 4")
    parser.add_argument("--lanes", type=int, default=1, help="clients side by side, 1; more on a GPU")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto, float32, bfloat16")
    parser.add_argument("--cells", default="*", help="only cells whose name matches, such as 'autorank-*'")
    parser.add_argument("--limit-minutes", type=float, default=None, help="begin no cell after so many minutes")
    parser.add_argument("--plan", action="store_true", help="run nothing: say what there is to do")
    parser.add_argument("--report", action="store_true", help="run nothing: show what there is")
    parser.add_argument("--publish", action="store_true", help=f"put the finished cells into {PUBLISHED.name}")
    parser.add_argument("--quick", action="store_true", help="a tiny model and embedded instructions")
    given = parser.parse_args(arguments)
    if not 0 < given.share <= 1:
        cause = ", probably a percentage" * (given.share > 1)
        sys.exit(f"--share: expected a number above 0 and at most 1, got {given.share:g}{cause}")
    if given.quick and (given.share, given.probe_epochs) != (1, 2):
        sys.exit("--quick: expected neither --share nor --probe-epochs beside it: it has options of its own")
    names = [given.data / name for name in ("smollm2/model.safetensors", "dialogues.jsonl")] if given.data else []
    if not (given.quick or given.report) and not (names and all(path.is_file() for path in names)):
        sys.exit(f"expected --data FOLDER with smollm2/ and dialogues.jsonl, got {str(given.data)!r}; or --quick")
    if not given.out and (given.publish or not given.report):
        sys.exit("--out: expected a folder of results, got none; only --report shows what is published without")
    return given


def grid(given: argparse.Namespace) -> dict[str, LanguageOptions]:
    """Return the options of every cell, by name; all policies and rules of a seed before the next seed."""
    common: dict[str, Any] = {"rounds": 1, "tokens": 2, "max_rank": 4, "clients": 3, "alpha": 1.0}
    policies, rules, seeds = ("autorank", "uniform_bytes"), ("rbla",), 1
    if not given.quick:
        names = ("rounds", "max_length", "max_rank", "batch_size", "lanes", "dtype", "probe_epochs")
        common = {name: getattr(given, name) for name in names}
        common |= {"model": given.data / "smollm2", "data": part_of(given.data / "dialogues.jsonl", given)}
        common |= {"skip_odd_lines": True}  # a few lines of dialogues.jsonl lack a question or an answer
        policies, rules, seeds = POLICIES, RULES, given.seeds
    return {
        f"{policy}-{rule}-{seed}": LanguageOptions(policy=policy, aggregator=rule, seed=seed, **common)
        for seed in range(seeds)
        for rule in rules
        for policy in policies
    }


def part_of(path: Path, given: argparse.Namespace) -> Path:
    """Return the file with a share of the pairs of each category: the whole one, or one that is written to the output.

    Lines that are not read, or lack something, are left out.
    """
    if given.share == 1:
        return path
    pairs = load_instructions(path, skip=True)
    lines, kept = path.read_bytes().splitlines(), []
    for category in dict.fromkeys(pairs.fields["category"]):
        own = [line for line, other in zip(pairs.lines, pairs.fields["category"], strict=True) if other == category]
        count = min(len(own), max(FEWEST, round(given.share * len(own))))
        kept += [own[n * len(own) // count] for n in range(count)]
    part = given.out / f"dialogues-{given.share:g}.jsonl"
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b"".join(lines[number - 1] + b"\n" for number in kept))
    return part


def is_finished(found: Mapping[str, Any], name: str, options: LanguageOptions, share: float) -> bool:
    """Return whether a cell is there.

    Raises:
        SystemExit: if it is there with other options: it may have taken hours.
    """
    if name not in found:
        return False
    ours = described(options) | {"share": share}
    others = described(LanguageOptions()) | LANGUAGE_BEFORE | found[name]["options"]  # some options came later
    others["share"] = found[name].get("share", 1.0)
    differing = [key for key in ours if ours[key] != others.get(key)]
    if differing:
        key = differing[0]
        sys.exit(f"expected {name} of {key} {ours[key]}, got one of {others.get(key)}: choose another --out")
    return True


def described(options: LanguageOptions) -> dict[str, Any]:
    """Return the options that describe a cell, without paths."""
    content = as_json(dataclasses.replace(options, learning_rate=options.rate))
    return {name: value for name, value in content.items() if name not in ("model", "data")}


def plan(cells: Mapping[str, LanguageOptions], total: int) -> str:
    """Say what is to be run, and for how long."""
    if not cells:
        return f"{total} cells, all of them finished"
    options = next(iter(cells.values()))
    options.validate()
    parts = make_parts(options, Clock(lambda _: None))
    examples, held = (float(data.size.sum()) for data in (parts.data, parts.held_out))
    probed = float(part_sizes(parts.data.size, options.probe_share).sum())
    # policies differ little, and so does the probe: adapters are a small part of a step
    width = sum(parts.flops.per_rank.values()) * options.max_rank / 2 + parts.flops.base
    per_cell = {
        name: width * (examples * one.rounds * one.local_epochs + probed * one.probed * one.probe_epochs)
        + parts.flops.base * FORWARD * held * (one.rounds + 3)
        for name, one in cells.items()
    }
    speed = flops_per_second()
    hours = {name: spoken(RECOMPUTED * flops / speed) for name, flops in per_cell.items()}
    lines = [f"{name}: about {each}" for name, each in hours.items()]
    everything = spoken(RECOMPUTED * sum(per_cell.values()) / speed)
    return "\n".join(
        [
            f"{len(parts.names)} clients, {examples:.0f} rows of {options.max_length} tokens, {held:.0f} held out",
            f"{len(cells)} of {total} cells at {speed / 1e9:.0f} GFLOP/s of a matrix product: about {everything}",
            *lines,
        ]
    )


def flops_per_second() -> float:
    """Return the speed of a float32 matrix product of a decoder's shape."""
    x, w = jnp.ones((256, 576)), jnp.ones((576, 1536))
    multiply = jax.jit(lambda x, w: (x @ w) @ w.T)
    jax.block_until_ready(multiply(x, w))
    began, runs = time.perf_counter(), 0
    while time.perf_counter() - began < 0.5:
        jax.block_until_ready(multiply(x, w))
        runs += 1
    return 4 * x.shape[0] * w.size * runs / (time.perf_counter() - began)


def run_cell(folder: Path, name: str, options: LanguageOptions) -> dict[str, Any]:
    """Run a cell, or what is left of it."""

    def on_event(event: Any) -> None:
        if isinstance(event, Begun) and event.expected:
            print(f"{name}, {event.name}: about {spoken(event.expected)}", flush=True)
        if isinstance(event, Ended):
            print(f"{name}, {event.name}: {event.seconds:.1f} s {event.detail}", flush=True)

    results = run_language(
        options,
        on_event=on_event,
        on_round=lambda row: print(f"{name}, round {row.round}: {row.perplexity:.4g}, {row.seconds:.1f} s", flush=True),
        checkpoints=Checkpoints(folder, every=1, keep=1),
    )
    rows = [row._asdict() for row in results.rows]
    about = {"versions": harness.versions(), "device": harness.device()}
    return {"options": described(options), "rows": rows, "summary": summarize_language(results), **about}


def append(path: Path, name: str, cell: Mapping[str, Any]) -> None:
    """Add a cell as one line of its own, whatever an interrupted write has left."""
    with appending(path) as write:
        write([{"cell": name, **cell}])


def read(path: Path) -> dict[str, Any]:
    """Return the finished cells by name; a line that was cut short counts as not there."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        found[content.pop("cell")] = content
    return found


def logarithms(cell: Mapping[str, Any]) -> dict[str, float]:
    """Return the logarithm of each client's last perplexity by its name."""
    return {one["name"]: math.log(one["after"]) for one in cell["summary"]["clients"] if one["after"]}


def as_shares(found: Difference | None) -> Difference | None:
    """Turn a difference of logarithms `x` into shares `exp(x) - 1`."""
    if found is None:
        return None
    mean, low, high = (None if x is None else math.expm1(x) for x in found[:3])
    return found._replace(mean=mean, low=low, high=high)


def beyond(name: str, found: Mapping[str, Any]) -> Difference | None:
    """Return by how much clients' perplexities exceed those under one rank of the same rule and seed, as a share.

    The mean of `ln(one / other)` over clients with its 95 % t interval, made shares by `exp(x) - 1`.
    """
    other = "-".join(["uniform_bytes", *name.split("-")[1:]])
    if name == other or other not in found:
        return None
    return as_shares(difference(logarithms(found[name]), logarithms(found[other])))


def mean_client(cell: Mapping[str, Any]) -> float:
    """Return the mean over clients of the logarithm of their last perplexity."""
    return statistics.fmean(logarithms(cell).values())


def all_answers(cell: Mapping[str, Any]) -> float:
    """Return the logarithm of the last perplexity of all held-out answers."""
    return math.log(cell["summary"]["perplexity"]["after"])


def over_seeds(
    policy: str, rule: str, found: Mapping[str, Any], measure: Callable[[Mapping[str, Any]], float] = mean_client
) -> Difference | None:
    """Return the same over seeds, of their means over clients or of another logarithm."""
    values = [
        {
            name.rpartition("-")[2]: measure(cell)
            for name, cell in found.items()
            if name.rpartition("-")[0] == f"{one}-{rule}"
        }
        for one in (policy, "uniform_bytes")
    ]
    return as_shares(difference(*values))


def table(found: Mapping[str, Any]) -> str:
    """Return the finished cells as Markdown: perplexities of held-out answers, and what they cost."""
    rows = []
    for name, cell in found.items():
        summary = cell["summary"]
        clients, ranks = summary["clients_perplexity"]["after"], Counter(one["rank"] for one in summary["clients"])
        owners = ", ".join(f"{rank}: {ranks[rank]}" for rank in sorted(ranks))
        values = (
            name, summary["perplexity"]["before"], summary["perplexity"]["after"], clients["mean"], clients["worst"],
            in_points(beyond(name, found)), " ".join(f"{row['perplexity']:.3g}" for row in cell["rows"]), owners,
            summary["bytes_up"] / 1e6, summary["bytes_down"] / 1e6, summary["flops"] / 1e12,
            summary["probe_flops"] / 1e12, summary["seconds"] / 3600,
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    over = []
    for policy, rule in dict.fromkeys(tuple(name.split("-")[:2]) for name in found):
        between = over_seeds(policy, rule, found)
        if policy != "uniform_bytes" and between and between.seeds > 1:
            shown = {"ranks": policy, "rule": rule, "seeds": between.seeds, COLUMNS[5]: in_points(between)}
            shown["all answers, % beyond one rank"] = in_points(over_seeds(policy, rule, found, all_answers))
            over.append(shown)
    every = f"\n\nOver seeds:\n\n{harness.markdown_table(over, list(over[0]))}" if over else ""
    return harness.markdown_table(rows, COLUMNS) + every


if __name__ == "__main__":
    main()
