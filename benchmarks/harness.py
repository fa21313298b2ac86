"""What every benchmark shares: alternating timing, JSON rows with versions and device, tables.

A benchmark warms every competitor up, then lets them alternate within one run, and reports medians and ratios: single
absolute times on a shared machine mean little.
"""

import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from autorank_jax.cli.formats import write_file
from autorank_jax.datasets import DatasetError
from autorank_jax.experiment.config import ConfigurationError

Row = dict[str, Any]


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, of this package's dependencies and of further packages."""
    names = ("autorank-jax", "jax", "jaxlib", "flax", "optax", "numpy", *packages)
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(package: str) -> str:
    """Return the version of a package; one that runs from a checkout has none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def device() -> dict[str, Any]:
    """Describe what the measurement ran on."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)),
        "date": date.today().isoformat(),
    }


def alternate(competitors: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time competitors in turn, `repeats` times each, after one warm-up of each.

    Args:
        competitors: functions that return arrays, which are waited for.
        repeats: rounds of turns.

    Returns:
        Seconds by competitor.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for run in competitors.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in competitors.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], float]:
    """Compile a function for these arguments and return it with the seconds that took."""
    begin = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    return program, time.perf_counter() - begin


def program_bytes(program: Any) -> int | None:
    """Return the bytes of a compiled program's arguments, results and temporaries together, as its compiler has it."""
    memory = program.memory_analysis()
    if memory is None:
        return None
    parts = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
    return sum(getattr(memory, part) for part in parts) - getattr(memory, "alias_size_in_bytes", 0)


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Compile equal programs once within the block: the cells of a grid are many, their programs few."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for name, value in zip(names, (folder, 0.3), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # or JAX keeps to the folder it has seen first
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


@contextlib.contextmanager
def mistakes_in_words() -> Iterator[None]:
    """Leave the script with one line where options make no experiment, a dataset is missing, or it is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("interrupted; what is finished is kept") from None
    except (ConfigurationError, DatasetError) as error:
        raise SystemExit(str(error)) from error


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the half-width of the middle half."""
    low, high = np.percentile(seconds, [25, 75])
    return {"median": statistics.median(seconds), "spread": float(high - low) / 2}


def write_json(path: str | Path | None, content: Any) -> None:
    """Write JSON as `write_text` does; do nothing where there is no path."""
    if path is not None:
        write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Make the folder and write a file whole or not at all: what the path held before stays where that fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode())


def markdown_table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Lay rows out as a Markdown table, the form in which the READMEs hold them."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
