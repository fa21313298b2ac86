"""What `finetune` leaves in its folder and prints: numbers, a picture, and adapters that `peft` loads."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from autorank_jax.adapters.peft import export_peft
from autorank_jax.cli.figures import PALETTE, STYLE, to_png
from autorank_jax.cli.folders import ADAPTER, FILES, PICTURE, ReportError
from autorank_jax.cli.formats import to_csv, to_json, write_file
from autorank_jax.cli.tables import make_table
from autorank_jax.cli.terminal import counted, warn
from autorank_jax.experiment.language_results import LanguageClient, LanguageResults, LanguageRow, summarize_language
from autorank_jax.experiment.results import si
from autorank_jax.models.causal_checkpoint import causal_name

SHOWN_CLIENTS = 30


def write_rounds(
    folder: Path, options: Mapping[str, Any], rows: Sequence[LanguageRow], clients: Sequence[LanguageClient] = ()
) -> list[str]:
    """Write options, rounds and their picture, each file whole or not at all; those of an older run are deleted before.

    Returns:
        The names.

    Raises:
        ReportError: if the folder cannot be written.
    """
    told = [row._asdict() for row in rows]
    contents = {
        "config.json": to_json(options),
        "history.json": to_json(told),
        "history.csv": to_csv(told),
        PICTURE: to_png(perplexity_figure(rows, clients)),
    }
    try:
        for name in ("summary.json", *FILES, PICTURE):
            (folder / name).unlink(missing_ok=True)
        for name, content in contents.items():
            write_file(folder / name, content)
    except OSError as error:
        raise ReportError(f"out: expected to write {folder}, got: {error.strerror or error}") from error
    return list(contents)


def write_language_results(folder: Path, results: LanguageResults) -> list[str]:
    """Write all files, `summary.json` last.

    Returns:
        The names. Without `adapter` where the rule has changed the base weights, which is told.

    Raises:
        ReportError: if the folder cannot be written.
    """
    names = write_rounds(folder, results.options, results.rows, results.clients)
    try:
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        exported = _export(folder, results)
        write_file(folder / "summary.json", to_json(summarize_language(results)))
    except OSError as error:
        raise ReportError(f"out: expected to write {folder}, got: {error.strerror or error}") from error
    return [*names, *([f"{ADAPTER}/"] if exported else []), "summary.json"]


def _export(folder: Path, results: LanguageResults) -> bool:
    """Write the adapters under a temporary name and rename their folder; say so where there can be none."""
    temporary = folder / f".{ADAPTER}.{os.getpid()}.tmp"
    base = results.options["model"]
    try:
        export_peft(temporary, results.task, results.state.server, names=causal_name, base_model=base)
        temporary.replace(folder / ADAPTER)
    except (ValueError, ImportError) as error:
        warn(f"{ADAPTER}: not written: {error}")
        return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def perplexity_figure(rows: Sequence[LanguageRow], clients: Sequence[LanguageClient]) -> Figure:
    """Draw the server's perplexity by round, and every client's before and after against its rank."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        by_round, by_rank = figure.subplots(1, 2, sharey=True)
        by_round.plot(
            [row.round for row in rows],
            [row.perplexity for row in rows],
            color=PALETTE[0],
            linewidth=2,
            marker="o",
            markersize=3,
        )
        by_round.set(xlabel="round", ylabel="held-out perplexity", title="Server by round", yscale="log")
        by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
        for name, colour in (("before", PALETTE[7]), ("after", PALETTE[1])):
            known = [c for c in clients if getattr(c, name) is not None]
            ranks, values = [c.rank for c in known], [getattr(c, name) for c in known]
            by_rank.scatter(ranks, values, color=colour, s=25, label=name)
        by_rank.set(xlabel="rank", title="Clients, before and after")
        by_rank.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_rank.legend()
    return figure


def show_language_results(console: Console, results: LanguageResults) -> None:
    """Print the clients, what was reached and what it cost, and the sample."""
    console.print(_clients_table(results))
    console.print(_totals_table(results))
    for name, text in results.sample._asdict().items():
        console.print(f"{name:>6}: {text!r}", soft_wrap=True)


def _clients_table(results: LanguageResults) -> Table:
    table = make_table(f"Clients, ranks by {results.options['policy']}")
    table.add_column("client")
    for name in ("rows", "rank", "perplexity\nbefore", "perplexity\nafter"):
        table.add_column(name, justify="right")
    for client in results.clients[:SHOWN_CLIENTS]:
        table.add_row(client.name, str(client.rows), str(client.rank), _shown(client.before), _shown(client.after))
    more = len(results.clients) - SHOWN_CLIENTS
    table.caption = "Of the server cut to the client's rank, on the client's held-out texts."
    table.caption += f" {counted(more, 'more client')} in summary.json." if more > 0 else ""
    return table


def _totals_table(results: LanguageResults) -> Table:
    table = make_table(f"{results.options['aggregator']}, {counted(results.options['rounds'], 'round')}")
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    for row in _totals(summarize_language(results)):
        table.add_row(*row)
    table.caption = "Seconds depend on the machine and its load."
    return table


def _totals(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    def both(name: str, told: dict[str, Any], key: str = "") -> tuple[str, str, str]:
        before, after = (told[when][key] if key else told[when] for when in ("before", "after"))
        return name, _shown(before), _shown(after)

    yield both("perplexity", summary["perplexity"])
    yield both("mean client", summary["clients_perplexity"], "mean")
    yield both("worst client", summary["clients_perplexity"], "worst")
    ranks = summary["ranks"]
    yield "ranks: least, mean, most", "", f"{ranks['least']}, {ranks['mean']:.3g}, {ranks['most']}"
    if summary["excluded"]:
        yield "clients left out, not finite", "", str(summary["excluded"])
    yield "bytes to the server", "", si(summary["bytes_up"])
    yield "bytes to the clients", "", si(summary["bytes_down"])
    yield "FLOPs of rounds", "", si(summary["flops"])
    yield "FLOPs of the probe", "", si(summary["probe_flops"])
    yield "seconds of rounds", "", f"{summary['seconds']:.1f}"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
