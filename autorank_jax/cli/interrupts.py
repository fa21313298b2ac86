"""Ctrl-C, SIGTERM and a hung-up terminal while a run trains: the round is finished and saved first."""

import contextlib
import signal
import sys
from types import FrameType, TracebackType

from autorank_jax.cli.signals import SIGNALLED, Signalled, heard, interrupt
from autorank_jax.experiment.events import Event, OnEvent, Started
from autorank_jax.experiment.position import RoundEnd


class Interrupted(Signalled):
    """A run that was asked to stop and has saved where it stood."""


class Interruption:
    """A context manager: while a run trains, `SIGNALS` wait for the end of the round.

    A second signal, and one before the first round, stop at once.
    """

    def __init__(self) -> None:
        """Begin without any signal."""
        self.training = False
        self.signal: int | None = None
        self.hearing = contextlib.ExitStack()

    def __enter__(self) -> "Interruption":
        """Take the signals over."""
        self.hearing.enter_context(heard(self._note))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        self.hearing.close()

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
        return SIGNALLED + (self.signal or signal.SIGINT)

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
