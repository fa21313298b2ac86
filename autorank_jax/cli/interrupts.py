"""A run that can be stopped and taken up again: its folder, its signals, its checkpoints."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from autorank_jax.cli.files import CHECKPOINTS, to_json, write_file
from autorank_jax.experiment.checkpoints import Checkpoints
from autorank_jax.experiment.config import ConfigurationError, Experiment, experiment_from
from autorank_jax.experiment.events import Event, OnEvent, Started
from autorank_jax.experiment.position import RoundEnd

_CONFIG = "run.json"


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop and has saved where it stood. The message is one line."""

    def __init__(self, message: str, code: int) -> None:
        """Keep the exit code."""
        self.code = code
        super().__init__(message)


class Interruption:
    """A context manager: while a run trains, Ctrl-C and SIGTERM wait for the end of the round.

    A second signal, and one before the first round, stop at once.
    """

    def __init__(self) -> None:
        """Begin without any signal."""
        self.training = False
        self.signal: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        """Take the signals over; in threads other than the first that is impossible and they are left alone."""
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.signal is not None or not self.training:
            raise KeyboardInterrupt
        self.signal = number
        sys.stderr.write("autorank-jax: stopping when the round is over and saved; once more stops at once\n")

    def watch(self, on_event: OnEvent) -> OnEvent:
        """Return a listener that notices when training begins."""

        def listen(event: Event) -> None:
            self.training = self.training or isinstance(event, Started)
            on_event(event)

        return listen

    def on_round(self, end: RoundEnd) -> None:
        """Stop after a round in which a signal came."""
        if self.signal is not None:
            row = end.row
            where = f"round {row.round} of {row.policy} with {row.aggregator}, seed {row.seed}"
            raise Interrupted(f"interrupted after {where}", 128 + self.signal)


def checkpoints_of(folder: Path, *, every: int, keep: int) -> Checkpoints:
    """Return where the checkpoints of a run go."""
    return Checkpoints(folder / CHECKPOINTS, every, keep)


def begin_folder(folder: Path, experiment: Experiment, checkpoints: Checkpoints) -> None:
    """Forget what an older run left in a folder, and note there what is run, so that it can be taken up again."""
    shutil.rmtree(checkpoints.folder, ignore_errors=True)
    if checkpoints.every:
        write_run(folder, experiment, checkpoints)


def write_run(folder: Path, experiment: Experiment, checkpoints: Checkpoints) -> None:
    """Note what is run."""
    checkpoints.folder.mkdir(parents=True, exist_ok=True)
    content = {"experiment": dataclasses.asdict(experiment), "every": checkpoints.every, "keep": checkpoints.keep}
    write_file(folder / CHECKPOINTS / _CONFIG, to_json(content))


def how_to_resume(folder: Path) -> str:
    """Return the command that takes a run up again."""
    return f"autorank-jax run --resume {shlex.quote(os.fspath(folder))}"


def read_run(folder: Path) -> tuple[Experiment, int, int]:
    """Read what was run in a folder: the experiment, the rounds between checkpoints, and how many stay.

    Raises:
        ConfigurationError: if it holds no run with checkpoints.
    """
    path = folder.expanduser() / CHECKPOINTS / _CONFIG
    if not path.exists():
        raise ConfigurationError(
            [f"resume: expected the folder of a run with checkpoints, got {folder} without {CHECKPOINTS}/{_CONFIG}; "
             "probably another folder, or a run without --checkpoint-every"]
        )  # fmt: skip
    content = _read_json("resume", path)
    try:
        return experiment_from(content["experiment"]), int(content["every"]), int(content["keep"])
    except (TypeError, KeyError) as error:
        raise ConfigurationError([f"resume: expected {path} as a run leaves it, got another content"]) from error


def read_config(path: Path) -> Experiment:
    """Read the `config.json` of a run.

    Raises:
        ConfigurationError: for a file that cannot be read, or holds anything else; all mistakes at once.
    """
    return experiment_from(_read_json("config", path.expanduser()))


def _read_json(option: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"{path}, got: {error.strerror or error}"
    except ValueError as error:
        problem = f"JSON in {path}, got: {error}"
    raise ConfigurationError([f"{option}: expected {problem}"])


def word_after(arguments: Sequence[str], option: str) -> str | None:
    """Return the value of an option before the command line is parsed, as it changes the others' defaults.

    Raises:
        ConfigurationError: if it is there more than once.
    """
    found = []
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, sign, value = word.partition("=")
        if name == option:
            found.append(value if sign else following)
    if len(found) > 1:
        raise ConfigurationError([f"{option[2:]}: expected it once, got it {len(found)} times"])
    return found[0] if found else None
