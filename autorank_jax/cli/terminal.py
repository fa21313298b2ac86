"""Standard output and error as they are: of any encoding, a pipe that nobody reads any more, a full disk.

What cannot be printed is lost, and not the work that it speaks of.
"""

import codecs
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import TextIO

PLAIN = {
    "–": "-", "−": "-", "±": "+-", "…": "...", "×": "x", "·": "|", "→": "->", "≥": ">=", "≤": "<=", "─": "-", "━": "-",
    "│": "|", "┃": "|", "╸": "-", "╺": "-", "•": "*", "█": "#",
    "ε": "epsilon", "δ": "delta", "σ": "sigma", "τ": "tau", "²": "^2", "√": "sqrt ",
}  # fmt: skip
"""Characters that some terminals lack, and what stands for them there; corners of boxes are `+`, all others `?`."""
CORNERS = range(0x250C, 0x2574)


def plain(text: str, encoding: str) -> str:
    """Return a text in the characters that an encoding has."""
    return text.encode(encoding, "autorank_jax_plain").decode(encoding)


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(c, "+" if ord(c) in CORNERS else "?") for c in lacking), error.end


codecs.register_error("autorank_jax_plain", _replace)


class Forgiving(io.TextIOBase):
    """A stream around one that may fail: from then on everything is dropped, and `failure` says why."""

    def __init__(self, stream: TextIO | None) -> None:
        """Wrap a stream; None is one that is closed."""
        self.stream = stream
        self.failure: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Return the encoding of the stream."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write a text, in other characters where the stream has not these, and in files no blanks that end lines."""
        text = text if self.isatty() else re.sub(" +(?=\n)", "", text)
        with self._noted():
            try:
                if self.stream:
                    self.stream.write(text)
            except UnicodeEncodeError:
                assert self.stream
                self.stream.write(plain(text, self.encoding))
        return len(text)

    def flush(self) -> None:
        """Pass on what is held back."""
        with self._noted():
            if self.stream:
                self.stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self.stream is not None and not self.stream.closed and self.stream.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the stream."""
        if self.stream is None:
            raise io.UnsupportedOperation("fileno")
        return self.stream.fileno()

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            if self.stream in (sys.__stdout__, sys.__stderr__):  # Python itself flushes once more as it ends
                with contextlib.suppress(OSError, ValueError):
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self.fileno())
                    os.close(nowhere)
            self.stream = None


@contextlib.contextmanager
def forgiving_streams() -> Iterator[Forgiving]:
    """Print to streams that are forgiving, and return the one of standard output."""
    before = sys.stdout, sys.stderr
    out, err = map(Forgiving, before)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def counted(number: int, noun: str) -> str:
    """Write a number and what it counts."""
    return f"{number} {noun}{'s' * (number != 1)}"


def tell(line: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(f"autorank-jax: {' '.join(line.splitlines())}\n")


def warn(line: str) -> None:
    """Write a line to standard error that ends nothing."""
    tell(f"warning: {line}")
