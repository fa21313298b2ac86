"""Build the manual: `python -m autorank_jax.manual FOLDER [--no-execute]`."""

import argparse
import sys
from pathlib import Path

from autorank_jax.manual.site import ManualError, build


def main(arguments: list[str] | None = None) -> int:
    """Build the manual and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m autorank_jax.manual", description="Build the manual.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the site goes; made if it does not exist")
    parser.add_argument("--no-execute", action="store_true", help="show the blocks of the guides without running them")
    options = parser.parse_args(arguments)
    try:
        print(f"open {build(options.folder, execute=not options.no_execute)}")
    except ManualError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
