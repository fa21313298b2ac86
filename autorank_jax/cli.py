"""The entry of the command line: exit codes, and mistakes in plain lines."""

import importlib
import sys
from collections.abc import Sequence

from autorank_jax.configuration import ConfigurationError
from autorank_jax.criteria_file import CriteriaError
from autorank_jax.datasets import DatasetError

EXTRA = ("tyro", "rich", "matplotlib")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process where None.

    Returns:
        Exit code: 0, 1 without the extra packages, 2 for a mistake of the user, 3 for a run that diverged, 130 after
        an interrupt (143 after SIGTERM).
    """
    try:
        commands = importlib.import_module("autorank_jax.commands")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        return _say(1, [f'the command line needs {error.name}: pip install "autorank-jax[cli]"'])
    try:
        commands.execute(commands.parse(sys.argv[1:] if arguments is None else arguments))
    except ConfigurationError as error:
        return _say(2, error.problems)
    except (CriteriaError, DatasetError, commands.ReportError, commands.CheckpointError) as error:
        return _say(2, [str(error)])
    except commands.DivergedError as error:
        return _say(3, [str(error)])
    except KeyboardInterrupt as stop:
        return _say(getattr(stop, "code", 130), [str(stop) or "interrupted; nothing was written"])
    return 0


def _say(code: int, lines: Sequence[str]) -> int:
    for line in lines:
        sys.stderr.write(f"autorank-jax: {line}\n")
    return code
