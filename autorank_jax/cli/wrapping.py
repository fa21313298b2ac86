"""Lines that end between words, and never between a number and its unit."""

import re
import textwrap

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from autorank_jax.cli.options import PROGRAM

_GLUED = re.compile(r"(?<=\d) (?=[%±]|(?:s|min|h|MB|[kMGTPE])\b)|(?<=±) ")


def wrapped(text: str, width: int) -> list[str]:
    """Return a text in lines of at most some characters; what is longer than a line is cut."""
    lines: list[str] = []
    for line in text.splitlines():
        glued, indent = _GLUED.sub("\0", line), line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(glued, max(width, 1), subsequent_indent=indent, break_on_hyphens=False) or [""]
    return [line.replace("\0", " ") for line in lines]


class Words:
    """The text of a table's cell."""

    def __init__(self, text: str) -> None:
        """Keep the text."""
        self.text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Return the columns that its longest word needs, and its longest line."""
        least = max(map(len, _GLUED.sub("_", self.text).split()), default=0)
        return Measurement(least, max(map(len, self.text.splitlines()), default=0))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield its lines."""
        yield Text("\n".join(wrapped(self.text, options.max_width)))


def print_line(console: Console, line: str) -> None:
    """Print a line: in several on a terminal of known width; whole elsewhere, and where it is a command."""
    whole = not console.is_terminal or console.is_dumb_terminal or line.startswith(PROGRAM)
    for part in [line] if whole else wrapped(line, console.width):
        console.print(part, markup=False, highlight=False, soft_wrap=True)
