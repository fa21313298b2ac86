"""Ctrl-C, SIGTERM and a terminal that hangs up: none is lost, and none breaks anything.

Python ignores what is raised where it collects garbage, where JAX does much; libraries that are being loaded may crash.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

DEAF = ("_xla_gc_callback", "__del__")
"""Functions out of which no exception comes."""
LOADING = "<frozen importlib._bootstrap>"
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""That ask a command to stop; Windows has no SIGHUP."""
SIGNALLED = 128
"""What is added to a signal's number for the exit code."""
LATER = 0.05
"""Seconds after which a signal that came there is tried again."""


class Signalled(KeyboardInterrupt):
    """A command that was asked to stop. The message is one line, or empty."""

    def __init__(self, message: str, code: int) -> None:
        """Keep the exit code."""
        self.code = code
        super().__init__(message)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise `Signalled` on a signal, a little later where it would be ignored or do harm."""
    while frame is not None:
        if frame.f_code.co_name in DEAF or frame.f_code.co_filename == LOADING:
            again = threading.Timer(LATER, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise Signalled("", SIGNALLED + number)


@contextlib.contextmanager
def heard(
    handler: Callable[[int, FrameType | None], None] = interrupt, *, signals: Sequence[int] = SIGNALS
) -> Iterator[None]:
    """Take signals over; not those that the caller ignores, as `nohup` does, and none outside the first thread."""
    ours = signals if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in ours}
    taken = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in taken.items():
            signal.signal(number, old)
