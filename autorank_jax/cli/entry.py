"""The entry of the program, where signals are heard before anything large is loaded."""

import importlib
import os
import sys
from types import FrameType
from typing import NoReturn

from autorank_jax.cli.signals import SIGNALLED, heard


def entry() -> NoReturn:
    """Run the command line and leave with its exit code.

    After an interrupt Python ends without tidying up: XLA may still be compiling, and would crash.
    """
    with heard(_leave):
        program = importlib.import_module("autorank_jax.cli.main")
    code = program.main()
    if code >= SIGNALLED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _leave(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    """End at once, with a line: nothing has begun."""
    os.write(2, b"autorank-jax: interrupted\n")
    os._exit(SIGNALLED + number)
