"""Files as JSON and CSV: each written whole or not at all, and read with mistakes in plain lines."""

import contextlib
import csv
import errno
import io
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from autorank_jax.cli.folders import CHECKPOINTS, RUN_FILE
from autorank_jax.experiment.config import ConfigurationError, Experiment, experiment_from

T = TypeVar("T")

MOST_BYTES = 2**28
"""Of a file that is read whole."""


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


def write_file(path: Path, content: bytes) -> None:
    """Write one file under a temporary name and rename it; where it is a link, what it points to."""
    path = Path(os.path.realpath(path))
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
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


def read_run(folder: Path, what: str, make: Callable[[Any], T]) -> tuple[T, int, int]:
    """Read what was run in a folder: its options, the rounds between checkpoints, and how many stay.

    Args:
        folder: of the run.
        what: the name of the options in there, which tells the commands apart.
        make: makes the options of what was written.

    Raises:
        ConfigurationError: if it holds no run of this command with checkpoints.
    """
    path = folder.expanduser() / CHECKPOINTS / RUN_FILE
    if not os.path.exists(path):  # where `path.exists()` raises for a name of 300 letters
        if what != "experiment" or not os.path.exists(folder.expanduser() / "config.json"):
            problem = f"got {folder} without {CHECKPOINTS}/{RUN_FILE}"
        else:
            problem = (
                f"got {folder}, a run that kept none, so that its models are gone; run it anew: autorank-jax run "
                f"--config {shlex.quote(os.fspath(folder / 'config.json'))} --checkpoint-every 5, with more --rounds"
            )
        raise ConfigurationError([f"resume: expected the folder of a run with checkpoints, {problem}"])
    content = read_json("resume", path)
    try:
        every, keep = content["every"], content["keep"]
        if type(every) is not int or type(keep) is not int:
            raise TypeError
        return make(content[what]), every, keep
    except (TypeError, KeyError) as error:
        another = isinstance(content, dict) and what not in content and {"every", "keep"} <= content.keys()
        cause = "; probably of another command" if another else ""
        raise ConfigurationError(
            [f"resume: expected {path} as this command leaves it, got another content{cause}"]
        ) from error


def read_config(path: Path) -> Experiment:
    """Read the `config.json` of a run, or that in its folder.

    Raises:
        ConfigurationError: for a file that cannot be read, or holds anything else; all mistakes at once.
    """
    path = path.expanduser()
    return experiment_from(read_json("config", path / "config.json" if os.path.isdir(path) else path))


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
        problem = f"the file {path}, got: {error.strerror or error}"
    except json.JSONDecodeError as error:
        problem = f"JSON in {path}, got {f'none from line {error.lineno} on' if error.doc.strip() else 'an empty file'}"
    except UnicodeDecodeError:
        problem = f"JSON in {path}, got bytes that are no text"
    except (ValueError, RecursionError) as error:
        problem = f"JSON in {path}, got: {error}"
    raise ConfigurationError([f"{option}: expected {problem}"])
