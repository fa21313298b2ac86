"""The command `compare`: several runs in one table and one picture."""

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from autorank_jax.cli.figures import DASHES, PALETTE, Curve, curves_figure, to_png
from autorank_jax.cli.folders import ReportError, is_of_a_run
from autorank_jax.cli.formats import read_json, write_file
from autorank_jax.cli.options import Compare
from autorank_jax.cli.tables import make_console, make_table, percent
from autorank_jax.cli.wrapping import print_line
from autorank_jax.experiment.config import ConfigurationError
from autorank_jax.experiment.results import (
    SCORES,
    Costs,
    Row,
    Run,
    accuracies,
    rounds_to,
    run_name,
    share_of,
    si,
    spread,
)

UNKNOWN_COSTS = Costs(*[float("nan")] * len(Costs._fields))


class Found(NamedTuple):
    """What one folder holds."""

    name: str
    config: Mapping[str, Any]
    runs: Mapping[str, Sequence[Run]]  # by policy and rule, a seed each
    stopped: str
    score: str  # what its accuracies are: accuracy, or R²


def compare(command: Compare) -> None:
    """Show what runs reached and what they cost, where they differ, and draw their curves."""
    output = command.output.expanduser()
    problems = []
    if len(command.runs) < 2:
        problems.append(f"runs: expected two folders of runs or more, got {len(command.runs)}")
    if len({os.path.realpath(path.expanduser()) for path in command.runs}) < len(command.runs):
        problems.append("runs: expected every folder once, got one again")
    if output.suffix.lower() != ".png" or os.path.isdir(output):
        problems.append(f"output: expected a file that ends in .png, got {output}")
    elif is_of_a_run(output):
        problems.append(f"output: expected a file of its own, got {output}, which belongs to a run")
    if problems:
        raise ConfigurationError(problems)
    short = len({path.name for path in command.runs}) == len(command.runs)
    found = [read_found(path, path.name if short and path.name else str(path)) for path in command.runs]
    scores = {run.score: run.name for run in found}
    if len(scores) > 1:
        kinds = " and ".join(f"{score} (as in {name})" for score, name in scores.items())
        raise ConfigurationError([f"runs: expected one measure in all of them, got {kinds}; compare those of a kind"])
    try:
        write_file(output, to_png(comparison_figure(found)))
    except OSError as error:
        raise ReportError(f"output: expected to write {output}, got: {error.strerror or error}") from error
    show(make_console(), found)
    print_line(make_console(), f"Written to {output}")


def show(console: Console, found: Sequence[Found]) -> None:
    """Print the tables, in as many columns as there is room for."""
    named = with_short_names(found, max(8, console.width // 5))
    for long, short in zip(found, named, strict=True):
        if long.name != short.name:
            print_line(console, f"{short.name} is {long.name}")
    across = max(2, (console.width - 20) // 16)
    for begin in range(0, len(named), across):
        differences = differences_table(named, named[begin : begin + across])
        if differences.row_count:
            console.print(differences)
    for results in results_tables(named, console):
        console.print(results)
    for run in named:
        if run.stopped:
            print_line(console, f"{run.name} ended before its time: {run.stopped}")


def with_short_names(found: Sequence[Found], most: int) -> list[Found]:
    """Return the runs with names of some length: their ends, or numbers where those are the same."""
    ends = [run.name if len(run.name) <= most else f"…{run.name[1 - most :]}" for run in found]
    if len(set(ends)) < len(ends):
        ends = [str(number) for number in range(1, len(found) + 1)]
    return [run._replace(name=end) for run, end in zip(found, ends, strict=True)]


def comparison_figure(found: Sequence[Found]) -> Figure:
    """Draw the curves of all runs."""
    named = with_short_names(found, 40)
    return curves_figure(list(_curves(named)), _caption(found), score=found[0].score)


def read_found(folder: Path, name: str) -> Found:
    """Read what a run has left in its folder.

    Raises:
        ConfigurationError: if it is no such folder, or one of its files is damaged.
    """
    path = folder.expanduser()
    if not os.path.exists(path / "history.json"):
        raise ConfigurationError([f"runs: expected the folder of a run, got {folder} without history.json"])
    config, history = read_json("runs", path / "config.json"), read_json("runs", path / "history.json")
    summary = read_json("runs", path / "summary.json") if os.path.exists(path / "summary.json") else {}
    try:
        if isinstance(history, list) and history and "perplexity" in history[0]:
            raise ConfigurationError([f"runs: expected a run, got {folder} of finetune, whose perplexities say it all"])
        rows = [_row(values) for values in history]
        if not rows or not isinstance(config, dict) or not isinstance(summary, dict):
            raise TypeError
    except (TypeError, OverflowError) as error:
        raise ConfigurationError([f"runs: expected {path} as a run leaves it, got another content"]) from error
    groups: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in rows:
        groups.setdefault((row.policy, row.aggregator), {}).setdefault(row.seed, []).append(row)
    several = len({aggregator for _, aggregator in groups}) > 1
    runs = {
        run_name(policy, aggregator, several=several): [
            Run(policy, aggregator, seed, tuple(seeds[seed]), UNKNOWN_COSTS, 0.0, 0.0, 0.0) for seed in seeds
        ]
        for (policy, aggregator), seeds in groups.items()
    }
    numbers = [[row.round for row in run.rows] for some in runs.values() for run in some]
    if any(rounds != list(range(1, len(rounds) + 1)) for rounds in numbers):
        raise ConfigurationError([f"runs: expected {path} as a run leaves it, got a history that lacks rounds"])
    return Found(name, config, runs, str(summary.get("stopped", "")), SCORES.get(str(summary.get("score")), "accuracy"))


def _row(values: Mapping[str, Any]) -> Row:
    """Return one round of a history, whose numbers are numbers."""
    row = Row(**values)
    whole = (row.seed, row.round, row.participants, row.excluded, row.reported)
    numbers = (row.train_flops, row.bytes, row.seconds)
    measured = [value for value in (row.accuracy, row.loss, row.train_loss) if value is not None]
    right = all(type(value) is int and abs(value) < 2**53 for value in whole)
    right &= all(type(value) in (int, float) and math.isfinite(value) for value in (*numbers, *measured))
    if not right or not isinstance(row.policy, str) or not isinstance(row.aggregator, str) or row.round < 1:
        raise TypeError
    return row


def _curves(found: Sequence[Found]) -> Iterator[Curve]:
    for number, run in enumerate(found):
        for place, (name, seeds) in enumerate(run.runs.items()):
            label = f"{run.name}: {name}"
            yield Curve(label, seeds, PALETTE[number % len(PALETTE)], DASHES[place % len(DASHES)])


def _caption(found: Sequence[Found]) -> str:
    words = ("dataset", "split", "model", "clients", "aggregators", "learning_rate")
    config = found[0].config
    shared = [f"{w.replace('_', ' ')} {_word(config[w])}" for w in words if w in config and len(_values(found, w)) == 1]
    return " · ".join(shared)


def _values(found: Sequence[Found], option: str) -> set[str]:
    return {json.dumps(run.config.get(option)) for run in found}


def differences_table(found: Sequence[Found], shown: Sequence[Found]) -> Table:
    """Show the options in which runs differ, a column for each that is shown."""
    table = make_table("Options that differ")
    table.add_column("")
    for run in shown:
        table.add_column(run.name, overflow="fold")
    names = dict.fromkeys(name for run in found for name in run.config)
    for name in names:
        if len(_values(found, name)) > 1:
            table.add_row(name.replace("_", "-"), *(_word(run.config.get(name)) for run in shown))
    return table


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)


def results_tables(found: Sequence[Found], console: Console) -> Iterator[Table]:
    """Show what every run reached under each policy and rule, and what it cost: a row each.

    Where there is no room beside each other, further columns are in further tables.
    """
    listed = [run.config.get("targets") for run in found]
    targets = sorted({t for some in listed if isinstance(some, list) for t in some if isinstance(t, float)})
    score = found[0].score
    names = [
        "rounds",
        f"final\n{score}",
        f"best\n{score}",
        *(f"rounds to\n{100 * t:g} %" for t in targets),
        "bytes",
        "FLOPs",
        *(["clients\nexcluded", "rounds with-\nout update"] if any(map(_losses, found)) else []),
    ]
    rows = [
        (f"{run.name}: {name}", tuple(_numbers(seeds, targets))[: len(names)], number == len(run.runs) - 1)
        for run in found
        for number, (name, seeds) in enumerate(run.runs.items())
    ]
    first, unlimited = 0, console.options.update(max_width=10_000)
    for last in range(1, len(names) + 1):
        wider = _table(names, rows, first, last + 1) if last < len(names) else None
        if wider is None or Measurement.get(console, unlimited, wider).maximum > console.width:
            yield _table(names, rows, first, last)
            first = last


def _table(names: Sequence[str], rows: Sequence[tuple[str, Sequence[str], bool]], first: int, last: int) -> Table:
    """Return some of the columns."""
    table = make_table("Comparison, mean ± sd over seeds" if first == 0 else "")
    table.add_column("run", overflow="fold")
    for name in names[first:last]:
        table.add_column(name, justify="right", no_wrap=True)
    for label, cells, ends in rows:
        table.add_row(label, *cells[first:last], end_section=ends)
    return table


def _numbers(seeds: Sequence[Run], targets: Iterable[float]) -> Iterator[str]:
    curves = [[accuracy for _, accuracy in accuracies(run)] for run in seeds]
    yield "/".join(dict.fromkeys(str(len(run.rows)) for run in seeds))
    yield percent(spread([curve[-1] if curve else None for curve in curves]))
    yield percent(spread([max(curve, default=None) for curve in curves]))
    for target in targets:
        reached = spread([rounds_to(run, target) for run in seeds])["mean"]
        yield "–" if reached is None else f"{reached:.3g}"
    yield si(spread([run.rows[-1].bytes for run in seeds])["mean"])
    yield si(spread([run.rows[-1].train_flops for run in seeds])["mean"])
    yield f"{100 * statistics.fmean(share_of(run.rows, 'excluded') for run in seeds):.3g} %"
    yield f"{statistics.fmean(sum(row.reported == 0 for row in run.rows) for run in seeds):.3g}"


def _losses(found: Found) -> bool:
    """Return whether some clients were excluded, or some rounds gave no update."""
    return any(row.excluded or not row.reported for seeds in found.runs.values() for run in seeds for row in run.rows)
