"""The line that says what is done just now, and for how long: moving on a terminal, now and then elsewhere."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from autorank_jax.cli.terminal import counted
from autorank_jax.cli.wrapping import print_line

SILENCE = 10.0
"""Seconds after which there is another line, where nothing moves."""


class Stages:
    """A context manager that shows one stage after the other."""

    def __init__(self, console: Console) -> None:
        """Prepare to show stages on a console."""
        self.console = console
        self.moving = console.is_terminal and not console.is_dumb_terminal
        self.stage, self.expected = "", ""
        self.since = self.said = time.monotonic()
        self.over = threading.Event()
        self.spinner = Spinner("line" if console.options.ascii_only else "dots")
        self.live = Live(console=console, get_renderable=self._view, refresh_per_second=5)

    def __enter__(self) -> Self:
        """Begin to show."""
        if self.moving:
            self.live.start()
        elif not self.console.quiet:
            threading.Thread(target=self._break_silence, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        self.over.set()
        self.leave()
        if self.moving:
            self.live.stop()

    def begin(self, stage: str, expected: float | None = None) -> None:
        """Begin a stage, of which the seconds it will take may be known."""
        self.stage, self.expected = stage, "" if expected is None else f" of about {spoken(expected)}"
        self.since = time.monotonic()

    def leave(self) -> None:
        """End the stage."""
        self.stage = ""

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.said = time.monotonic()
        print_line(self.console, line)

    def say_resumed(self, rounds: int, differences: Sequence[str]) -> None:
        """Tell what is taken over from an earlier process, and what has changed since."""
        self.say(f"Going on after {counted(rounds, 'round')} of an earlier process.")
        for difference in differences:
            self.say(f"Since then: {difference}; results are equal up to rounding only.")

    def progress(self) -> str:
        """Return what is said where nothing was for a while."""
        return f"{self.stage or 'working'}: {self.elapsed()} so far"

    def _break_silence(self) -> None:
        while not self.over.wait(max(self.said + SILENCE - time.monotonic(), 0.01)):
            if time.monotonic() - self.said >= SILENCE:
                self.say(self.progress())

    def elapsed(self) -> str:
        """Return how long the stage has taken, and how long it will."""
        return f"{time.monotonic() - self.since:.0f} s{self.expected}"

    def _view(self) -> RenderableType:
        return self._line(f"{self.stage} {self.elapsed()}") if self.stage else ""

    def _line(self, text: str) -> RenderableType:
        line = Table.grid(padding=(0, 1))
        line.add_row(self.spinner, Text(text, no_wrap=True, overflow="ellipsis"))
        return line


def spoken(seconds: float) -> str:
    """Return a duration in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
