"""Progress of a long conversion: what is reported, and a bar on standard error."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, TextIO

WIDTH = 30


class Progress(NamedTuple):
    """How far a stage has come."""

    stage: str  # such as "reading train"
    done: int
    total: int  # 0 where it is not known


OnProgress = Callable[[Progress], None]


class Bar:
    """A bar that is drawn over itself on a terminal; elsewhere one line for every stage.

    It is called with `Progress`; leaving the context ends the last line.
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        """Make a bar.

        Args:
            label: what is being done, in front of every line.
            stream: where to write; standard error where None.
        """
        self.label = label
        self.stream = stream or sys.stderr
        self.drawn = ""
        self.stage = ""

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end_line()

    def __call__(self, progress: Progress) -> None:
        """Draw a bar, unless it looks as before."""
        new = progress.stage != self.stage
        if not self.stream.isatty():
            if new:
                self.stream.write(f"{self.label}: {progress.stage}\n")
        else:
            line = f"{self.label}: {progress.stage}{drawing(progress)}"
            if new:
                self._end_line()
            if line != self.drawn:
                self.stream.write(f"\r{line.ljust(len(self.drawn))}")
                self.drawn = line
        self.stage = progress.stage
        self.stream.flush()

    def _end_line(self) -> None:
        if self.drawn:
            self.stream.write("\n")
            self.stream.flush()
            self.drawn = ""


def drawing(progress: Progress) -> str:
    """Return the bar itself.

    Example:
        >>> drawing(Progress("reading", 15_000, 60_000))
        ' |███████▌······················|  25 % of 60,000'
    """
    if progress.total <= 0:
        return f" {progress.done:,}" if progress.done else ""
    share = min(1.0, max(0.0, progress.done / progress.total))
    halves = int(2 * WIDTH * share)
    full = "█" * (halves // 2) + "▌" * (halves % 2)
    return f" |{full.ljust(WIDTH, '·')}| {int(100 * share):3d} % of {progress.total:,}"
