"""The line that says what is done just now, and for how long: moving on a terminal, now and then elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

EVERY = 30.0
"""Seconds between lines about a stage that goes on, where nothing moves."""


class Stages:
    """A context manager that shows one stage after the other."""

    def __init__(self, console: Console) -> None:
        """Prepare to show stages on a console."""
        self.console = console
        self.moving = console.is_terminal and not console.is_dumb_terminal
        self.stage, self.expected = "", ""
        self.since = self.told = time.monotonic()
        self.spinner = Spinner("line" if console.options.ascii_only else "dots")
        self.live = Live(console=console, get_renderable=self._view, refresh_per_second=5)

    def __enter__(self) -> Self:
        """Begin to show."""
        if self.moving:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""
        self.leave()
        if self.moving:
            self.live.stop()

    def begin(self, stage: str, expected: float | None = None) -> None:
        """Begin a stage, of which the seconds it will take may be known."""
        self.stage, self.expected = stage, "" if expected is None else f" of about {spoken(expected)}"
        self.since = self.told = time.monotonic()

    def leave(self) -> None:
        """End the stage."""
        self.stage = ""

    def goes_on(self) -> None:
        """Say now and then that the stage goes on, where nothing moves."""
        now = time.monotonic()
        if self.stage and not self.moving and now - self.told >= EVERY:
            self.told = now
            self.say(f"{self.stage}: {self.elapsed()}")

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

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
