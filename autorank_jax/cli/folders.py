"""The folder of a run: whether results can be written to it, found out before there are any."""

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows two runs into one folder are not noticed
    fcntl = None  # type: ignore[assignment]

FILES = (
    "config.json", "criteria.csv", "history.json", "history.csv", "accuracy.png", "ranks.png", "report.html",
    "summary.json",
)  # fmt: skip
PICTURE, ADAPTER = "perplexity.png", "adapter"
"""What `finetune` leaves besides."""
CHECKPOINTS = "checkpoints"
"""The folder within a run's folder that holds its checkpoints."""
RUN_FILE = "run.json"
"""The file in there that says what is run."""
LOG_FILE = "log.jsonl"
OWN = (*FILES, PICTURE, ADAPTER, CHECKPOINTS, LOG_FILE)
"""All that runs leave in their folders."""
ROOM = 2**20
"""Bytes that must be free: more than the files of a run take, without checkpoints."""


class ReportError(ValueError):
    """A folder that results cannot be written to, or gone on with. The message is one line."""


def check_folder(folder: str | Path, *, overwrite: bool = False) -> Path:
    """Make sure, before any work and without making anything, that a folder may hold a run.

    Raises:
        ReportError: if it holds a run and may not be overwritten, or a file stands in its place.
    """
    folder = Path(folder).expanduser()
    try:
        held = held_of_a_run(folder)
        above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        folders = [name for name in FILES if (folder / name).is_dir()]
    except (OSError, ValueError) as error:  # a name of 300 letters, or with a zero byte
        reason = getattr(error, "strerror", None) or error
        raise ReportError(f"out: expected a folder that can be made, got {_short(folder)}: {reason}") from error
    if held and not overwrite:
        resume = f", --resume {folder}" if CHECKPOINTS in held else ""
        raise ReportError(
            f"out: expected a folder without a run, got {folder} with {held[0]}; "
            f"give --overwrite{resume} or another --out"
        )
    if not above.is_dir():
        raise ReportError(f"out: expected a folder, got {folder}, but {above} is a file")
    if folders:
        raise ReportError(f"out: expected a folder for files, got {folder}, where {folders[0]} is a folder")
    if (folder / CHECKPOINTS).exists() and not (folder / CHECKPOINTS).is_dir():
        raise ReportError(f"out: expected a folder for a run, got {folder}, where {CHECKPOINTS} is a file")
    return folder


def held_of_a_run(folder: Path) -> list[str]:
    """Return what a folder holds of a run."""
    return [name for name in OWN if (folder / name).exists()]


def is_of_a_run(path: Path) -> bool:
    """Return whether a file would take the place of one that a run has left in its folder."""
    path = Path(os.path.realpath(path))
    marks = (Path("history.json"), Path(CHECKPOINTS, RUN_FILE))
    folders = [folder for folder in path.parents if any(os.path.exists(folder / mark) for mark in marks)]
    return any(path.relative_to(folder).parts[0] in OWN for folder in folders)


def default_folder(name: str, *, overwrite: bool) -> Path:
    """Return `runs/NAME`, with the first free number where it holds a run that is to be kept, or that goes on."""
    base = Path("runs") / name
    numbered = (base.with_name(f"{name}-{number}") for number in itertools.count(2))
    if overwrite:
        return base
    return next(path for path in itertools.chain([base], numbered) if not held_of_a_run(path) and not _taken(path))


@contextlib.contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Make a folder and keep other runs out of it; folders in which nothing was left vanish again.

    Raises:
        ReportError: if it cannot be made or written, the disk is full, or another run holds it.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    descriptor = None
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(folder)
            _try_to_write(folder)
        except OSError as error:
            raise ReportError(
                f"out: expected a folder that can be written, got {_short(folder)}: {error.strerror or error}"
            ) from error
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # there are files in it
                path.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds a folder until it is closed, or the process ends; None where there are no locks.

    Raises:
        ReportError: if another process holds it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ReportError(f"out: expected a folder of its own, got {folder}, where another run is going on") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):  # some file systems have no locks
            os.close(descriptor)
            raise
    return descriptor


def _taken(folder: Path) -> bool:
    """Return whether another run is going on in a folder."""
    if not os.path.isdir(folder):
        return False
    try:
        descriptor = _lock(folder)
    except ReportError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return False


def _try_to_write(folder: Path) -> None:
    """Write and delete as many bytes as a run needs."""
    trial = folder / f".trial.{os.getpid()}.tmp"
    try:
        with trial.open("wb") as file:
            file.write(bytes(ROOM))
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} letters)"
