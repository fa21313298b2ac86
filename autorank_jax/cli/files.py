"""The folder of a run: its results, and what it takes to go on with it."""

import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from autorank_jax.cli.figures import accuracy_figure, ranks_figure, to_png
from autorank_jax.cli.folders import CHECKPOINTS, FILES, RUN_FILE, ReportError, check_folder
from autorank_jax.cli.formats import to_csv, to_json, write_file
from autorank_jax.cli.options import Finetune, Run
from autorank_jax.cli.report import html_report
from autorank_jax.experiment.checkpoints import Checkpoints
from autorank_jax.experiment.mistakes import outside
from autorank_jax.experiment.results import Results, client_rows, summarize

T = TypeVar("T")


def write_results(folder: str | Path, results: Results, *, overwrite: bool = False) -> list[Path]:
    """Write all files of a run.

    Every file is made in memory, then written under a temporary name and renamed, `summary.json` last: it is there
    only if all others are. Pictures come after all other numbers.

    Args:
        folder: is made if needed.
        results: of `run_experiment`.
        overwrite: replace the files of an older run.

    Returns:
        The paths.

    Raises:
        ReportError: if the folder holds a run and may not be overwritten, or cannot be written.
    """
    folder = check_folder(folder, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)
        for name, content in zip(FILES, _contents(results), strict=True):
            write_file(folder / name, content)
    except OSError as error:
        raise ReportError(f"out: expected to write {folder}, got: {error.strerror or error}") from error
    return [folder / name for name in FILES]


def saved(write: Callable[[Path], T], folder: Path) -> tuple[T, Path, ReportError | None]:
    """Write what took long: to a folder for temporary files if its own fails.

    Returns:
        What `write` returns, where it is, and what is to be said of that.

    Raises:
        ReportError: if the other folder fails too.
    """
    try:
        return write(folder), folder, None
    except ReportError as error:
        try:
            other = Path(tempfile.mkdtemp(prefix="autorank-jax-"))
        except OSError:
            raise error from None
        return write(other), other, ReportError(f"{error}; the results are in {other}")


def save_results(folder: Path, results: Results) -> tuple[list[Path], ReportError | None]:
    """Write all files of a run that took long, wherever that can be done."""
    paths, _, problem = saved(lambda place: write_results(place, results, overwrite=True), folder)
    return paths, problem


def _contents(results: Results) -> Iterator[bytes]:
    """Yield the files in the order of `FILES`."""
    yield to_json(results.config)
    yield to_csv([row for scores in results.scores for row in client_rows(scores)])
    history = [row._asdict() for run in results.runs for row in run.rows]
    if not results.config.get("dp_epsilon"):
        history = [{name: value for name, value in row.items() if name != "epsilon"} for row in history]
    yield to_json(history)
    yield to_csv(history)
    accuracy = to_png(accuracy_figure(results))
    yield accuracy
    ranks = to_png(ranks_figure(results.scores[0], seeds=len(results.scores)))
    yield ranks
    yield html_report(results, {"Accuracy": accuracy, "Clients and their ranks": ranks})
    yield to_json(summarize(results))


def resuming_problems(command: Run | Finetune) -> Iterator[str]:
    """Yield a line for each mistake in the options of checkpoints."""
    yield from outside("checkpoint_every", command.checkpoint_every, 0, whole=True)
    yield from outside("keep_checkpoints", command.keep_checkpoints, 1, whole=True)
    if command.resume and command.out:
        yield "out: expected none beside --resume, got one: a run goes on in its own folder"


def idle_checkpoints(command: Run | Finetune) -> Iterator[str]:
    """Yield a line for an option of checkpoints that does nothing beside the others."""
    if not command.checkpoint_every and command.keep_checkpoints != type(command).keep_checkpoints:
        yield "keep-checkpoints: has no effect without --checkpoint-every"


def checkpoints_of(folder: Path, *, every: int, keep: int) -> Checkpoints:
    """Return where the checkpoints of a run go."""
    return Checkpoints(folder / CHECKPOINTS, every, keep)


def write_run(folder: Path, options: Mapping[str, Any], checkpoints: Checkpoints) -> None:
    """Note in a folder what is run there, by the name of the options, so that it can be taken up again.

    Raises:
        ReportError: if the folder cannot be written.
    """
    content = to_json({**options, "every": checkpoints.every, "keep": checkpoints.keep})
    try:
        checkpoints.folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / CHECKPOINTS / RUN_FILE, content)
    except OSError as error:
        raise ReportError(f"out: expected to write {folder}, got: {error.strerror or error}") from error


def how_to_resume(folder: Path, command: str) -> str:
    """Return the command line that takes a run up again."""
    return f"autorank-jax {command} --resume {shlex.quote(os.fspath(folder))}"
