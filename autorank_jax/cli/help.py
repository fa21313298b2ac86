"""Help on `run`: two screens of what is mostly used, or every option, in the groups of an experiment."""

import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from autorank_jax.cli.options import PROGRAM, Run
from autorank_jax.experiment.config import POLICIES, Experiment
from autorank_jax.experiment.launch_options import Launch

WIDTH = 80


class Group(NamedTuple):
    """Options that belong together."""

    title: str
    first: tuple[str, ...]  # shown always
    more: tuple[str, ...] = ()  # shown where all are asked for


GROUPS = (
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
        ("ratios", "probe_epochs", "rerank_every", "rank_levels"),
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

NEARBY: Mapping[str, str] = {
    "lr": "learning-rate", "policy": "rank-policies", "policies": "rank-policies", "method": "rank-policies",
    "rule": "aggregators", "rules": "aggregators", "algorithm": "aggregators", "strategy": "aggregators",
    "epochs": "local-epochs", "epoch": "local-epochs", "bs": "batch-size", "batch": "batch-size", "data": "dataset",
    "seed": "first-seed", "rank": "max-ranks", "max-rank": "max-ranks", "output": "out", "output-dir": "out",
    "folder": "out", "gpus": "devices", "workers": "devices", "num-clients": "clients", "n-clients": "clients",
    "num-rounds": "rounds", "fraction": "participation", "dropout": "drop-out", "partition": "split",
    "network": "model", "optim": "optimizer", "force": "overwrite", "silent": "quiet", "layers": "hidden",
    "widths": "hidden", "checkpoints": "checkpoint-every", "noniid": "split", "dirichlet": "alpha",
}  # fmt: skip
"""What other programs call an option, and its name here."""


def help_on_run(*, everything: bool) -> str:
    """Return the help on `run`."""
    summary = (Run.__doc__ or "").partition("\n")[0]
    lines = [f"usage: {PROGRAM} run [OPTIONS]", "", *textwrap.wrap(summary, WIDTH)]
    explained, fields = explanations(), _fields()
    for group in GROUPS:
        shown = (*group.first, *(group.more if everything else ()))
        lines += ["", group.title] if shown else []
        for name in shown:
            lines += _option(name, explained[name], fields[name], everything)
    if everything:
        lines += list(_names())
    else:
        lines += ["", f"{PROGRAM} run --help-all explains all {len(fields)} options, policies and rules."]
    return "\n".join(lines)


def explanations() -> dict[str, str]:
    """Return what the docstrings say about every option."""
    found: dict[str, str] = {}
    for kind in (Experiment, Launch, Run):
        about = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", about, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def _fields() -> dict[str, dataclasses.Field[Any]]:
    """Return the options of all parts of a run."""
    parts = [field for kind in (Experiment, Launch, Run) for field in dataclasses.fields(kind)]
    return {field.name: field for field in parts if field.name not in ("experiment", "launch")}


def _option(name: str, text: str, field: dataclasses.Field[Any], everything: bool) -> list[str]:
    """Return the lines of one option: no more than two where not everything is asked for."""
    head = f"  --{name.replace('_', '-')}{_metavar(field)}"
    default = _shown(field.default)
    if not everything:
        text = re.split(r"[;(]| default ", text)[0].strip(" ,")
        default = textwrap.shorten(default.replace(",", ", "), 36, placeholder=" …").replace(", ", ",")
    return textwrap.wrap(
        f"{text} [{default}]" if default else text,
        WIDTH,
        initial_indent=f"{head:<25} ",
        subsequent_indent=" " * 26,
        max_lines=None if everything else 2,
        break_on_hyphens=False,
    )


def _metavar(field: dataclasses.Field[Any]) -> str:
    kind = str(field.type)
    if field.type is bool or kind == "bool":
        return ""
    word = "PATH" if "Path" in kind else "NAME" if "str" in kind else "N" if "int" in kind else "X"
    return f" {word},…" if "tuple" in kind else f" {word}"


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
