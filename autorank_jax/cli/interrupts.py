"""Ctrl-C and SIGTERM while a run trains: the round is finished and saved first."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from autorank_jax.cli.signals import interrupt
from autorank_jax.experiment.events import Event, OnEvent, Started
from autorank_jax.experiment.position import RoundEnd


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

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        if again or not self.training:
            interrupt(number, frame)
            return
        sys.stderr.write("autorank-jax: stopping when the round is over and saved; once more stops at once\n")

    def watch(self, on_event: OnEvent) -> OnEvent:
        """Return a listener that notices when training begins."""

        def listen(event: Event) -> None:
            self.training = self.training or isinstance(event, Started)
            on_event(event)

        return listen

    @property
    def code(self) -> int:
        """Return the exit code that tells of the signal."""
        return 128 + (self.signal or signal.SIGINT)

    def on_round(self, end: RoundEnd) -> None:
        """Stop after a round in which a signal came."""
        row = end.row
        self.stop_after(f"round {row.round} of {row.policy} with {row.aggregator}, seed {row.seed}")

    def stop_after(self, what: str) -> None:
        """Stop after what it was in which a signal came.

        Raises:
            Interrupted: if one did.
        """
        if self.signal is not None:
            raise Interrupted(f"interrupted after {what}", self.code)
