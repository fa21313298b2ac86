"""Help: what each command does, its options in groups with their defaults, and examples."""

import dataclasses
import importlib
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from autorank_jax.cli.fields import Option, options_of
from autorank_jax.cli.options import COMMANDS, PROGRAM, Run
from autorank_jax.experiment.names import POLICIES

WIDTH = 80


class Group(NamedTuple):
    """Options that belong together."""

    title: str
    first: tuple[str, ...]  # shown always
    more: tuple[str, ...] = ()  # shown where all are asked for


RUN_GROUPS = (
    Group("data", ("dataset", "split", "clients", "alpha", "sigma"), ("classes_per_client", "validation")),
    Group("model", ("model", "hidden")),
    Group(
        "federation",
        ("aggregators", "rounds", "participation", "seeds"),
        ("first_seed", "sampling", "drop_out", "stragglers", "straggler_steps", "clip_norm", "server_learning_rate",
         "server_momentum"),
    ),
    Group("privacy", (), ("dp_epsilon", "dp_delta", "dp_clip", "dp_adaptive", "dp_noise", "dp_ranks", "dp_count_clip")),
    Group(
        "ranks",
        ("rank_policies", "max_ranks", "min_ratio", "criteria"),
        ("ratios", "probe_epochs", "probe_ratio", "probe_share", "rerank_every", "rank_levels"),
    ),
    Group(
        "training",
        ("local_epochs", "batch_size", "optimizer", "learning_rate"),
        ("rate_schedule", "momentum", "lanes"),
    ),
    Group(
        "output",
        ("out", "overwrite", "quiet", "config", "resume", "checkpoint_every", "log"),
        ("keep_checkpoints", "eval_every", "targets", "personal", "no_cache"),
    ),
    Group("devices", ("devices",), ("distributed", "coordinator", "num_processes", "process_id")),
)  # fmt: skip

FINETUNE_GROUPS = (
    Group("model and texts", ("model", "dtype", "quantize", "data", "template", "skip_odd_lines", "max_length")),
    Group("clients", ("clients_by", "groups_by", "clients", "alpha", "size", "hold_out")),
    Group("ranks", ("policy", "max_rank", "min_ratio", "probe_epochs", "probe_share")),
    Group("training", ("aggregator", "rounds", "local_epochs", "batch_size", "learning_rate", "lanes", "seed")),
    Group(
        "output",
        ("out", "overwrite", "quiet", "resume", "checkpoint_every", "tokens"),
        ("keep_checkpoints", "no_cache"),
    ),
)
GROUPS: Mapping[str, tuple[Group, ...]] = {"run": RUN_GROUPS, "finetune": FINETUNE_GROUPS}
"""Of the commands with many options."""
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "run": ("--split dirichlet_lognormal --clients 20 --seeds 3",),
    "finetune": ("--rounds 2", "--model FOLDER --data FILE.jsonl --clients-by category"),
    "compare": ("runs/one runs/two --output both.png",),
    "ranks": (
        "--criteria clients.csv --max-rank 64 --cost latency",
        "--criteria - --columns size,classes --json < FILE",
    ),
    "data": ("", "fetch mnist", "fetch --help"),
    "data fetch": ("cifar100", "mine --source pictures/", "houses --source houses.csv --target price"),
    "cache": ("--clear",),
}

_NEARBY = {
    "lr": "learning-rate", "policy": "rank-policies", "policies": "rank-policies policy",
    "method": "rank-policies policy", "rule": "aggregators aggregator", "rules": "aggregators aggregator",
    "algorithm": "aggregators aggregator", "strategy": "aggregators aggregator", "epochs": "local-epochs",
    "epoch": "local-epochs", "bs": "batch-size", "batch": "batch-size", "data": "dataset", "seed": "first-seed",
    "rank": "max-ranks max-rank", "max-rank": "max-ranks", "output": "out", "o": "out output", "output-dir": "out",
    "folder": "out source model", "gpus": "devices", "workers": "devices", "num-clients": "clients",
    "n-clients": "clients", "num-rounds": "rounds", "fraction": "participation", "dropout": "drop-out",
    "partition": "split", "network": "model", "optim": "optimizer", "force": "overwrite", "silent": "quiet",
    "q": "quiet", "layers": "hidden", "widths": "hidden", "checkpoints": "checkpoint-every", "noniid": "split",
    "dirichlet": "alpha", "input": "criteria source data", "file": "criteria source data", "csv": "criteria source",
    "i": "criteria source", "label": "target", "delete": "clear", "empty": "clear", "out": "output", "png": "output",
    "picture": "output", "name": "model",
}  # fmt: skip
NEARBY: Mapping[str, tuple[str, ...]] = {word: tuple(here.split()) for word, here in _NEARBY.items()}
"""What other programs call an option, and its names here."""


def help_on_program() -> str:
    """Return the list of commands."""
    lines = [
        f"usage: {PROGRAM} COMMAND [OPTIONS]",
        "",
        "Federated LoRA with a rank for every client, chosen by AutoRank.",
        "",
    ]
    for name, kind in COMMANDS.items():
        lines += _entry(f"  {name}", _summary(kind), 15)
    lines += _entry("  completion", "Print a script that completes words in a shell: bash, zsh, fish or tcsh.", 15)
    lines += ["", f"{PROGRAM} COMMAND --help explains a command; {PROGRAM} --version.", "", "begin with:"]
    return "\n".join([*lines, f"  {PROGRAM} run --dataset synthetic --split dirichlet_lognormal --rounds 3"])


def help_on(command: str, *, everything: bool = False) -> str:
    """Return the help on a command; of `run` without rarer options where not everything is asked for."""
    kind = COMMANDS[command]
    options = options_of(kind)
    needed = [option for option in options.values() if option.default is dataclasses.MISSING or option.bare]
    words = [option.bare or f"{option.flag}{_metavar(option)}" for option in needed]
    words = [f"{word} {word} ..." if option.several else word for word, option in zip(words, needed, strict=True)]
    usage = " ".join([PROGRAM, command, *words, *(["[OPTIONS]"] if len(options) > len(needed) else [])])
    lines = [f"usage: {usage}", "", *textwrap.wrap(_summary(kind), WIDTH)]
    short = kind is Run and not everything
    for group in GROUPS.get(command, (Group("", tuple(options)),)):
        shown = (*group.first, *(() if short else group.more))
        lines += ["", *([group.title] if group.title else [])] if shown else []
        for name in shown:
            lines += _lines(options[name], short)
    if kind is Run and everything:
        lines += list(_names())
    elif short:
        lines += ["", f"{PROGRAM} run --help-all explains all {len(options)} options, policies and rules."]
    examples = EXAMPLES[command]
    if len(examples) == 1:
        return "\n".join([*lines, *([] if short else [""]), f"example: {PROGRAM} {command} {examples[0]}"])
    lines += ["", "examples:", *(f"  {PROGRAM} {command} {words}".rstrip() for words in examples)]
    return "\n".join(lines)


def _summary(kind: type) -> str:
    return (kind.__doc__ or "").partition("\n")[0]


def _lines(option: Option, short: bool) -> list[str]:
    """Return the lines of one option: no more than two where help is short."""
    text, default = option.about, _shown(option.default)
    if short:
        text = re.split(r"[;(]| default ", text)[0].strip(" ,")
        default = textwrap.shorten(default.replace(",", ", "), 60, placeholder=" …").replace(", ", ",")
    text = f"{text} [{default}]" if default else text
    return _entry(f"  {option.flag}{'' if option.bare else _metavar(option)}", text, 25, 2 if short else None)


def _entry(head: str, text: str, width: int, most: int | None = None) -> list[str]:
    """Return a name and what it means beside it."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{head:<{width}} ",
        subsequent_indent=" " * (width + 1),
        max_lines=most,
        break_on_hyphens=False,
    )


def _metavar(option: Option) -> str:
    if option.kind is bool:
        return ""
    word = {Path: "PATH", str: "NAME", int: "N", float: "X"}[option.kind]
    return f" {word},…" if option.several else f" {word}"


def _shown(default: Any) -> str:
    """Return a default as one would type it; nothing where there is none."""
    if isinstance(default, tuple):
        return ",".join(map(_shown, default))
    if default is None or isinstance(default, bool) or default is dataclasses.MISSING or default == "":
        return ""
    return f"{default:g}" if isinstance(default, float) else str(default)


def _names() -> Iterator[str]:
    """Yield a line for every rank policy and every aggregation rule."""
    registry = importlib.import_module("autorank_jax.aggregators").RULES  # all other help needs no JAX
    rules = {name: (rule.__doc__ or "").partition("\n")[0] for name, rule in registry.items()}
    for option, words in (("--rank-policies", POLICIES), ("--aggregators", rules)):
        yield from ("", f"{option}:")
        for name, what in words.items():
            yield textwrap.fill(what, WIDTH, initial_indent=f"  {name:<14} ", subsequent_indent=" " * 17)
