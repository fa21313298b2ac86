"""Pages that are written from the package: a room's docstring, then every name of its `__all__`; and the gallery."""

import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from flax import nnx

import autorank_jax
from autorank_jax.manual.pages import shown_in

ROOMS = ("datasets", "models", "federated", "adapters", "ranks", "engine", "aggregators", "evaluation", "experiment")
ALONE = ("types", "checkpoint")
"""Modules that lie in no room."""

FRONT, COMMAND = "readme.png", "python -m benchmarks.readme_picture"
"""The picture of the front page, and what draws it."""

MANY = 4
"""Guides that a name links to; some names are in nearly all."""

TITLES = {
    "datasets": "raw data",
    "models": "models",
    "federated": "clients",
    "adapters": "LoRA on any model",
    "ranks": "from data to ranks",
    "engine": "training",
    "aggregators": "rules",
    "evaluation": "what was learnt, what it cost",
    "experiment": "one whole experiment",
    "types": "the nouns",
    "checkpoint": "any pytree to a folder and back",
}


def reference() -> dict[str, str]:
    """Return the Markdown pages of the reference by name, `index` first."""
    names = [*ROOMS, *ALONE]
    entries = "\n".join(names)
    index = f"# Reference\n\nOne page for each room, in the order of the pipeline.\n\n```{{toctree}}\n{entries}\n```\n"
    shown = shown_in(known())
    return {"index": index} | {name: _page(name, shown) for name in names}


def _page(name: str, shown: Mapping[str, list[str]]) -> str:
    """Return the page of a room."""
    module = importlib.import_module(f"autorank_jax.{name}")
    parts = [f"# `{name}`: {TITLES[name]}\n", inspect.getdoc(module) or ""]
    for home, names in _names(module):
        heading = home.removeprefix("autorank_jax.")
        parts.append(f"## `{heading}`\n" if heading != name else "## Names\n")
        if home != module.__name__:
            parts.append(inspect.getdoc(importlib.import_module(home)) or "")
        parts.append("```{eval-rst}\n" + "\n".join(_entry(home, one, shown) for one in names) + "\n```\n")
    return "\n\n".join(parts) + "\n"


def _names(module: ModuleType) -> Iterator[tuple[str, list[str]]]:
    """Yield modules and the names to be documented from each: the room's own, then those of modules that are exported.

    A module is exported by its room, or by the package at the top: `autorank_jax.policies`.
    """
    exported = public(module)
    own = [name for name in exported if not inspect.ismodule(getattr(module, name))]
    if own:
        yield module.__name__, own
    candidates = [getattr(module, name) for name in exported] + [getattr(autorank_jax, n) for n in autorank_jax.__all__]
    inner = {m.__name__: m for m in candidates if inspect.ismodule(m) and m.__name__.startswith(f"{module.__name__}.")}
    for name in sorted(inner):
        rest = [one for one in public(inner[name]) if one not in own]
        if rest:
            yield name, rest


def public(module: ModuleType) -> list[str]:
    """Return the public names of a module: its `__all__`, or the functions and classes that it defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    found = []
    for name, value in vars(module).items():
        here = getattr(value, "__module__", None) == module.__name__
        if not name.startswith("_") and here and (inspect.isfunction(value) or inspect.isclass(value)):
            found.append(name)
    return found


def known() -> dict[int, str]:
    """Return the full names of the reference by the `id` of what they are names of."""
    rooms = (importlib.import_module(f"autorank_jax.{name}") for name in (*ROOMS, *ALONE))
    entries = (f"{home}.{name}" for room in rooms for home, names in _names(room) for name in names)
    return {id(value_of(entry)): entry for entry in entries}


def value_of(entry: str) -> Any:
    """Return what a full name is the name of."""
    home, _, name = entry.rpartition(".")
    return getattr(importlib.import_module(home), name)


def _entry(home: str, name: str, shown: Mapping[str, list[str]]) -> str:
    """Return the directive of a name, with links to the guides that show it."""
    value = value_of(f"{home}.{name}")
    if inspect.isclass(value):
        shown_as, members = f"{home}.{name}", ""
        if issubclass(value, nnx.Module):  # its metaclass hides what makes it
            own = inspect.signature(value.__init__, eval_str=False)
            arguments = [one for one in own.parameters.values() if one.name != "self"]
            text = str(own.replace(parameters=arguments, return_annotation=own.empty))
            shown_as += re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", text)
            members = "   :special-members: __init__, __call__\n"
        text = f".. autoclass:: {shown_as}\n   :members:\n{members}"
    elif inspect.isfunction(value):
        text = f".. autofunction:: {home}.{name}\n"
    else:
        text = f".. autodata:: {home}.{name}\n   :no-value:\n"
    pages = [f":doc:`/guides/{guide}`" for guide in shown.get(f"{home}.{name}", ())]
    return text + (f"\n   Shown in {', '.join(pages[:MANY])}.\n" if pages else "")


def gallery(benchmarks: Path) -> tuple[str, dict[str, Path]]:
    """Return the page of all pictures in the benchmarks' READMEs, and the pictures by name.

    Args:
        benchmarks: the repository's folder of that name; where it is not there, as in an installed package, the page
            has no pictures.
    """
    pictures: dict[str, Path] = {}
    parts = [
        "# Gallery\n\nEvery picture that the benchmarks draw, with the command that draws it. `autorank-jax run` draws"
    ]
    parts[0] += (
        " `accuracy.png` and `ranks.png` besides, `autorank-jax compare` one picture of several runs: see [reading"
    )
    parts[0] += " the results](guides/reading_the_results.md). `autorank-jax finetune` draws `perplexity.png`."
    if (benchmarks / FRONT).is_file():
        pictures[FRONT] = benchmarks / FRONT
        parts.append(f"```{{figure}} pictures/{FRONT}\n:alt: {COMMAND}\nThe front page: `{COMMAND}`\n```")
    for readme in sorted(benchmarks.glob("*/README.md")):
        parts.append(f"## {readme.parent.name}")
        for caption, link in re.findall(r"!\[([^\]]+)\]\((\S+\.png)\)", readme.read_text(encoding="utf-8")):
            name = f"{readme.parent.name}-{Path(link).name}"
            pictures[name] = readme.parent / link
            command = "study.figures" if readme.parent.name == "study" else "report"
            parts.append(
                f"```{{figure}} pictures/{name}\n:alt: {caption}\n{caption}: `python -m benchmarks.{command}`\n```"
            )
    return "\n\n".join(parts) + "\n", pictures
