"""Ctrl-C that is not lost, and breaks nothing.

Python ignores what is raised where it collects garbage, where JAX does much; libraries that are being loaded may crash.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

DEAF = ("_xla_gc_callback", "__del__")
"""Functions out of which no exception comes."""
LOADING = "<frozen importlib._bootstrap>"
LATER = 0.05
"""Seconds after which a signal that came there is tried again."""


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt` on a signal, a little later where it would be ignored or do harm."""
    while frame is not None:
        if frame.f_code.co_name in DEAF or frame.f_code.co_filename == LOADING:
            again = threading.Timer(LATER, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Take Ctrl-C over; in threads other than the first that is impossible and it is left alone."""
    first = threading.current_thread() is threading.main_thread()
    ours = first and signal.getsignal(signal.SIGINT) is signal.default_int_handler  # nohup and others ignore it
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
