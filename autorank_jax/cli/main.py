"""The command line: exit codes, and mistakes in plain lines."""

import contextlib
import importlib
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence

from autorank_jax.cli.signals import SIGNALLED, SIGNALS, heard
from autorank_jax.cli.terminal import forgiving_streams, tell

EXTRA = ("rich", "matplotlib")

_LOST = "another process ended or cannot be reached"
_WATCH = "import sys; sys.stdin.read() or sys.stderr.write(sys.argv[1])"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    One of several processes that fails ends at once, without waiting for the others, so that they notice and end too.

    Args:
        arguments: without the program's name; those of the process where None.

    Returns:
        Exit code: 0, 1 without the extra packages or where standard output fails, 2 for a mistake of the user, 3 for a
        run that diverged, 130 after an interrupt (129 after SIGHUP, 143 after SIGTERM), 4 when another process was
        lost. XLA aborts a process that loses the first one: it ends by SIGABRT.
    """
    words = sys.argv[1:] if arguments is None else arguments
    several = "--distributed" in words  # processes that wait for each other are deaf, and have to end by SIGTERM
    with heard(signals=SIGNALS[: 1 if several else None]), forgiving_streams() as out:
        code = _watched(words)
        out.flush()
        if out.failure and not isinstance(out.failure, BrokenPipeError):  # nobody reads on: no mistake
            code = _say(code or 1, [f"standard output: expected to print, got: {out.failure.strerror or out.failure}"])
    return code


def _watched(words: Sequence[str]) -> int:
    watcher = _watch() if "--distributed" in words else None
    try:
        code = _run(words)
    except Exception as error:
        if not _among_others():
            raise
        if isinstance(error, sys.modules["jax"].errors.JaxRuntimeError):
            code = _say(4, [f"{_LOST}; go on with --resume: {error}".splitlines()[0]])
        else:
            traceback.print_exc()
            code = _say(1, [str(error).partition("\n")[0]])
    finally:
        if watcher is not None and watcher.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                watcher.stdin.write("over")
                watcher.stdin.close()
    if code and _among_others():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if watcher is not None:
        watcher.wait()
    return code


def _among_others() -> bool:
    """Tell whether this is one of several processes, which JAX knows if any command has loaded it."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _watch() -> subprocess.Popen[str]:
    """Start a process that says why this one was aborted, as XLA does where the first process is lost: no Python runs.

    It speaks when its input ends without a word.
    """
    message = f"autorank-jax: aborted, probably because {_LOST}; go on with --resume\n"
    command = [sys.executable, "-I", "-S", "-c", _WATCH, message]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)


def _run(arguments: Sequence[str]) -> int:
    try:
        return _execute(arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        return _say(1, [f'the command line needs {error.name}: pip install "autorank-jax[cli]"'])
    except KeyboardInterrupt as stop:
        return _say(getattr(stop, "code", SIGNALLED + signal.SIGINT), [str(stop) or "interrupted; nothing was written"])


def _execute(arguments: Sequence[str]) -> int:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of folders that it cannot write
    dispatch = importlib.import_module("autorank_jax.cli.dispatch")
    parsing = importlib.import_module("autorank_jax.cli.parsing")
    mistakes = importlib.import_module("autorank_jax.cli.mistakes")
    try:
        dispatch.execute(parsing.parse(arguments))
    except mistakes.SEVERAL as error:
        return _say(2, error.problems)
    except mistakes.SINGLE as error:
        return _say(2, [str(error)])
    except mistakes.DIVERGED as error:
        return _say(3, [str(error)])
    return 0


def _say(code: int, lines: Sequence[str]) -> int:
    for line in lines:
        tell(line)
    return code
