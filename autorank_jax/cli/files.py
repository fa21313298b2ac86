"""The folder of a run: its results, each file whole or not at all, and what it takes to go on with it."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from autorank_jax.cli.figures import accuracy_figure, ranks_figure
from autorank_jax.cli.folders import CHECKPOINTS, FILES, ReportError, check_folder
from autorank_jax.cli.report import html_report
from autorank_jax.experiment.checkpoints import Checkpoints
from autorank_jax.experiment.config import ConfigurationError, Experiment, experiment_from
from autorank_jax.experiment.results import Results, client_rows, summarize

MOST_BYTES = 2**28
"""Of a file that is read whole."""
RUN_FILE = "run.json"
"""The file in there that says what is run."""


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
        raise ReportError(
            f"out: expected to write {folder}, got: {error.strerror or error}; probably a full disk"
        ) from error
    return [folder / name for name in FILES]


def save_results(folder: Path, results: Results) -> tuple[list[Path], ReportError | None]:
    """Write all files of a run that took long: to a folder for temporary files if its own fails, and say so."""
    try:
        return write_results(folder, results, overwrite=True), None
    except ReportError as error:
        paths = write_results(tempfile.mkdtemp(prefix="autorank-jax-"), results)
        return paths, ReportError(f"{error}; the results are in {paths[0].parent}")


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


def to_json(content: Any) -> bytes:
    """Return content as indented JSON, strictly: NaN is refused."""
    if isinstance(content, list):  # one row per line, so that histories can be read and compared
        rows = ",\n".join(json.dumps(row, allow_nan=False) for row in content)
        return f"[\n{rows}\n]\n".encode()
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def to_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows of equal keys as CSV, missing values empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def to_png(figure: Figure) -> bytes:
    """Return a picture as PNG."""
    image = io.BytesIO()
    figure.savefig(image, dpi=150, format="png", facecolor="white")
    return image.getvalue()


def write_file(path: Path, content: bytes) -> None:
    """Write one file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def checkpoints_of(folder: Path, *, every: int, keep: int) -> Checkpoints:
    """Return where the checkpoints of a run go."""
    return Checkpoints(folder / CHECKPOINTS, every, keep)


def write_run(folder: Path, experiment: Experiment, checkpoints: Checkpoints) -> None:
    """Note in a folder what is run there, so that it can be taken up again."""
    checkpoints.folder.mkdir(parents=True, exist_ok=True)
    content = {"experiment": dataclasses.asdict(experiment), "every": checkpoints.every, "keep": checkpoints.keep}
    write_file(folder / CHECKPOINTS / RUN_FILE, to_json(content))


def how_to_resume(folder: Path) -> str:
    """Return the command that takes a run up again."""
    return f"autorank-jax run --resume {shlex.quote(os.fspath(folder))}"


def read_run(folder: Path) -> tuple[Experiment, int, int]:
    """Read what was run in a folder: the experiment, the rounds between checkpoints, and how many stay.

    Raises:
        ConfigurationError: if it holds no run with checkpoints.
    """
    path = folder.expanduser() / CHECKPOINTS / RUN_FILE
    if not os.path.exists(path):  # where `path.exists()` raises for a name of 300 letters
        raise ConfigurationError(
            [f"resume: expected the folder of a run with checkpoints, got {folder} without {CHECKPOINTS}/{RUN_FILE}; "
             "probably another folder, or a run without --checkpoint-every"]
        )  # fmt: skip
    content = read_json("resume", path)
    try:
        return experiment_from(content["experiment"]), int(content["every"]), int(content["keep"])
    except (TypeError, KeyError) as error:
        raise ConfigurationError([f"resume: expected {path} as a run leaves it, got another content"]) from error


def read_config(path: Path) -> Experiment:
    """Read the `config.json` of a run.

    Raises:
        ConfigurationError: for a file that cannot be read, or holds anything else; all mistakes at once.
    """
    return experiment_from(read_json("config", path.expanduser()))


def read_json(option: str, path: Path) -> Any:
    """Read a file that an option names.

    Raises:
        ConfigurationError: if that cannot be done.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES >> 20} MB")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"{path}, got: {error.strerror or error}"
    except (ValueError, RecursionError) as error:
        problem = f"JSON in {path}, got: {error}"
    raise ConfigurationError([f"{option}: expected {problem}"])
