"""A process that has imported the command line and forks to run it: `[out, argument, ...]` in, process numbers out.

Starting Python and importing JAX takes seconds; a fork takes none. JAX starts its threads in the fork only.
"""

import json
import os
import sys

from autorank_jax.cli import main as cli
from autorank_jax.cli import running  # noqa: F401  # imported once, for all forks


def main():
    for line in sys.stdin:
        out, *arguments = json.loads(line)
        number = os.fork()
        if number == 0:
            file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(file, stream)
            code = cli.main(arguments)
            sys.stdout.flush()
            os._exit(code)
        print(number, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]), flush=True)


main()
