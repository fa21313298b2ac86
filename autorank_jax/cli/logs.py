"""Every round as it happens, for other programs: lines of JSON, or TensorBoard's event files."""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from autorank_jax.cli.folders import LOG_FILE
from autorank_jax.cli.formats import write_file
from autorank_jax.cli.terminal import warn
from autorank_jax.experiment.events import Event, RoundDone, Started
from autorank_jax.experiment.mistakes import unknown
from autorank_jax.experiment.results import Row

SCALARS = tuple(name for name in Row._fields if name not in ("policy", "aggregator", "seed", "round"))


class Log(Protocol):
    """Where rounds are written."""

    def start(self, event: Started) -> None:
        """Begin a run, or go on with it: later rounds of an earlier process are void."""

    def write(self, row: Row) -> None:
        """Write a round."""

    def close(self) -> None:
        """Finish what is open."""


class JsonLines:
    """`log.jsonl`: a line per round, with the fields of `history.json`."""

    def __init__(self, folder: Path) -> None:
        """Keep the file's place."""
        self.path = folder / LOG_FILE
        self.started = False

    def start(self, event: Started) -> None:
        """Leave out what an earlier process wrote of this run after its last checkpoint."""
        lines: list[str] = []
        if event.done and self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        if event.done or not self.started:
            kept = [line for line in lines if not _later(line, event)]
            write_file(self.path, "".join(f"{line}\n" for line in kept).encode())
        self.started = True

    def write(self, row: Row) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row._asdict(), allow_nan=False) + "\n")

    def close(self) -> None:
        """Do nothing: no file is open."""


class TensorBoard:
    """`tensorboard/POLICY-RULE-SEED`: a curve per number."""

    def __init__(self, folder: Path) -> None:
        """Keep the folder."""
        self.folder = folder / "tensorboard"
        self.writer: Any = None

    def start(self, event: Started) -> None:
        """Begin a file, which makes later rounds of older files void."""
        from tensorboardX import SummaryWriter  # noqa: PLC0415

        self.close()
        place = self.folder / f"{event.policy}-{event.aggregator}-{event.seed}"
        self.writer = SummaryWriter(str(place), purge_step=event.done + 1)

    def write(self, row: Row) -> None:
        """Write the numbers of a round."""
        for name in SCALARS:
            value = getattr(row, name)
            if value is not None:
                self.writer.add_scalar(name, value, row.round)
        self.writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self.writer is not None:
            self.writer.close()


LOGS: Mapping[str, Callable[[Path], Log]] = {"jsonl": JsonLines, "tensorboard": TensorBoard}


def log_problems(names: Sequence[str]) -> Iterable[str]:
    """Yield a line for every log that there is not."""
    yield from unknown("log", names, LOGS)
    if "tensorboard" in names and importlib.util.find_spec("tensorboardX") is None:
        yield 'log: expected tensorboardX for tensorboard, got none; pip install "autorank-jax[log]"'


class Logs:
    """A context manager to be called with the events of an experiment; the run goes on without a log that fails."""

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """Open nothing yet."""
        self.logs = {name: LOGS[name](folder) for name in dict.fromkeys(names)}

    def __enter__(self) -> "Logs":
        """Do nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all logs."""
        for log in self.logs.values():
            with contextlib.suppress(OSError):
                log.close()

    def __call__(self, event: Event) -> None:
        """Write one event."""
        for name, log in list(self.logs.items()):
            try:
                if isinstance(event, Started):
                    log.start(event)
                elif isinstance(event, RoundDone):
                    log.write(event.row)
            except OSError as error:
                del self.logs[name]
                warn(f"log: expected to write {name}, got: {error.strerror or error}; nothing more is logged there")


def _later(line: str, event: Started) -> bool:
    """Return whether a line is of a run after the rounds that are done, or no whole line."""
    try:
        row = json.loads(line)
        same = (row["policy"], row["aggregator"], row["seed"]) == (event.policy, event.aggregator, event.seed)
        return bool(same and row["round"] > event.done)
    except (ValueError, KeyError, TypeError):
        return True
