"""The command `finetune`: a language model trained by many clients, from its folder to adapters that `peft` loads."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from autorank_jax.adapters.peft import export_peft
from autorank_jax.checkpoint import CheckpointError, saved_steps
from autorank_jax.cli.figures import PALETTE, STYLE
from autorank_jax.cli.files import (
    checkpoints_of,
    how_to_resume,
    resuming_problems,
    to_csv,
    to_json,
    to_png,
    write_file,
    write_run,
)
from autorank_jax.cli.folders import CHECKPOINTS, FILES, ReportError, check_folder, default_folder, occupied
from autorank_jax.cli.interrupts import Interrupted, Interruption
from autorank_jax.cli.options import Finetune
from autorank_jax.cli.stages import Stages
from autorank_jax.cli.tables import make_console, make_table
from autorank_jax.cli.terminal import tell
from autorank_jax.experiment.events import Resumed
from autorank_jax.experiment.language import run_language
from autorank_jax.experiment.language_options import as_json
from autorank_jax.experiment.language_results import Begun, Ended, LanguageEvent, LanguageResults, LanguageRow
from autorank_jax.experiment.mistakes import ConfigurationError
from autorank_jax.experiment.results import si
from autorank_jax.models.causal_checkpoint import causal_name

PICTURE, ADAPTER = "perplexity.png", "adapter"
SHOWN_CLIENTS = 30


def finetune(command: Finetune) -> None:
    """Train, or what is left of it, show, and write the files.

    Raises:
        ConfigurationError: for mistakes in options and files.
        DatasetError: for instructions that cannot be read.
        ReportError: for a folder that results cannot be written to, and checkpoints that cannot be gone on with.
        LanguageDivergedError: for a loss that is no number.
    """
    options = command.training
    options.validate()
    if problems := list(resuming_problems(command)):
        raise ConfigurationError(problems)
    if command.resume:
        folder = check_folder(command.resume, overwrite=True)
    else:
        names = [path.stem if path else "tiny" for path in (options.model, options.data)]
        folder = command.out or default_folder("-".join(dict.fromkeys(names)), overwrite=command.overwrite)
        folder = check_folder(folder, overwrite=command.overwrite)
    with occupied(folder):
        if not command.resume:  # an older run's would be gone on with
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        console = make_console(quiet=command.quiet)
        try:
            results = train_in(folder, command, console)
        except CheckpointError as error:
            raise ReportError(str(error)) from error
        _show(console, results)
        written = write_language_results(folder, results)
        console.print(f"Written to {folder}: {', '.join(written)}", soft_wrap=True)


def train_in(folder: Path, command: Finetune, console: Console) -> LanguageResults:
    """Train in a folder, and say how to go on where it is stopped."""
    checkpoints = checkpoints_of(folder, every=command.checkpoint_every, keep=command.keep_checkpoints)
    options = command.training

    def note() -> None:
        model, data = (path and path.expanduser().absolute() for path in (options.model, options.data))
        write_run(folder, {"training": as_json(dataclasses.replace(options, model=model, data=data))}, checkpoints)

    interruption = Interruption()
    try:
        with interruption, Stages(console) as stages:

            def on_event(event: LanguageEvent) -> None:
                interruption.training |= isinstance(event, Begun) and event.name.startswith("round")
                if isinstance(event, Resumed) and checkpoints.every:
                    note()
                show_stage(stages, event)

            def on_round(row: LanguageRow) -> None:
                if row.round == 0 and checkpoints.every:  # by now options and files are found to fit
                    note()
                stages.say(f"round {row.round}: perplexity {row.perplexity:.4g}, {row.seconds:.1f} s")
                interruption.stop_after(f"round {row.round}")

            return run_language(options, on_event=on_event, on_round=on_round, checkpoints=checkpoints)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Interrupted):
            note()
        if not saved_steps(checkpoints.folder):
            raise Interrupted("interrupted; nothing was written", interruption.code) from None
        raise Interrupted(
            f"{str(stop) or 'interrupted'}; go on with: {how_to_resume(folder, 'finetune')}", interruption.code
        ) from None


def show_stage(stages: Stages, event: LanguageEvent) -> None:
    """Show one event: a line for every stage that is over, with what it found."""
    match event:
        case Begun(name, expected):
            stages.begin(name, expected)
        case Ended(name, seconds, detail):
            stages.leave()
            stages.say(f"{name}: {seconds:.1f} s" + (f", {detail}" if detail else ""))
        case Resumed(rounds, differences):
            stages.say(f"Going on after {rounds} rounds of an earlier process.")
            for difference in differences:
                stages.say(f"Since then: {difference}; results are equal up to rounding only.")


def write_language_results(folder: Path, results: LanguageResults) -> list[str]:
    """Write all files, each whole or not at all, `summary.json` last; those of an older run are deleted before.

    Returns:
        The names. Without `adapter` where the rule has changed the base weights, which is told.

    Raises:
        ReportError: if the folder cannot be written.
    """
    rows = [row._asdict() for row in results.rows]
    contents = {
        "config.json": to_json(results.options),
        "history.json": to_json(rows),
        "history.csv": to_csv(rows),
        PICTURE: to_png(perplexity_figure(results)),
    }
    try:
        for name in ("summary.json", *FILES, PICTURE):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        for name, content in contents.items():
            write_file(folder / name, content)
        exported = _export(folder, results)
        write_file(folder / "summary.json", to_json(summarize_language(results)))
    except OSError as error:
        raise ReportError(f"out: expected to write {folder}, got: {error.strerror or error}") from error
    return [*contents, *([f"{ADAPTER}/"] if exported else []), "summary.json"]


def _export(folder: Path, results: LanguageResults) -> bool:
    """Write the adapters under a temporary name and rename their folder; say so where there can be none."""
    temporary = folder / f".{ADAPTER}.{os.getpid()}.tmp"
    base = results.options["model"]
    try:
        export_peft(temporary, results.task, results.state.server, names=causal_name, base_model=base)
        temporary.replace(folder / ADAPTER)
    except (ValueError, ImportError) as error:
        tell(f"{ADAPTER}: not written: {error}")
        return False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def summarize_language(results: LanguageResults) -> dict[str, Any]:
    """Return what `summary.json` says; costs are those of all rounds and clients."""
    first, last = results.rows[0], results.rows[-1]
    clients = [client for client in results.clients if client.before is not None and client.after is not None]
    befores, afters = ([getattr(client, name) for client in clients] for name in ("before", "after"))

    def total(name: str) -> float:
        return float(sum(getattr(row, name) for row in results.rows))

    def told(values: list[float]) -> dict[str, float | None]:
        return {"mean": sum(values) / len(values) if values else None, "worst": max(values, default=None)}

    ranks = [client.rank for client in results.clients]
    return {
        "perplexity": {"before": first.perplexity, "after": last.perplexity},
        "clients_perplexity": {"before": told(befores), "after": told(afters)},
        "ranks": {"least": min(ranks), "mean": sum(ranks) / len(ranks), "most": max(ranks)},
        "bytes_up": total("bytes_up"),
        "bytes_down": total("bytes_down"),
        "flops": total("flops"),
        "probe_flops": results.probe_flops,
        "seconds": total("seconds"),
        "texts": results.texts,
        "criteria_weights": results.weights,
        "clients": [client._asdict() for client in results.clients],
        "sample": results.sample._asdict(),
    }


def perplexity_figure(results: LanguageResults) -> Figure:
    """Draw the server's perplexity by round, and every client's before and after against its rank."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        by_round, by_rank = figure.subplots(1, 2, sharey=True)
        by_round.plot(
            [row.round for row in results.rows],
            [row.perplexity for row in results.rows],
            color=PALETTE[0],
            linewidth=2,
            marker="o",
            markersize=3,
        )
        by_round.set(xlabel="round", ylabel="held-out perplexity", title="Server by round", yscale="log")
        by_round.xaxis.set_major_locator(MaxNLocator(integer=True))
        for name, colour in (("before", PALETTE[7]), ("after", PALETTE[1])):
            known = [c for c in results.clients if getattr(c, name) is not None]
            ranks, values = [c.rank for c in known], [getattr(c, name) for c in known]
            by_rank.scatter(ranks, values, color=colour, s=25, label=name)
        by_rank.set(xlabel="rank", title="Clients, before and after")
        by_rank.xaxis.set_major_locator(MaxNLocator(integer=True))
        by_rank.legend()
    return figure


def _show(console: Console, results: LanguageResults) -> None:
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
    table.caption += f" {more} more clients in summary.json." if more > 0 else ""
    return table


def _totals_table(results: LanguageResults) -> Table:
    table = make_table(f"{results.options['aggregator']}, {results.options['rounds']} rounds")
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    for row in _totals(summarize_language(results)):
        table.add_row(*row)
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
    yield "bytes to the server", "", si(summary["bytes_up"])
    yield "bytes to the clients", "", si(summary["bytes_down"])
    yield "FLOPs of rounds", "", si(summary["flops"])
    yield "FLOPs of the probe", "", si(summary["probe_flops"])
    yield "seconds of rounds", "", f"{summary['seconds']:.1f}"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
