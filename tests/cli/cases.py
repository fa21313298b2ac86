"""What the tests of the command line share."""

import re

from autorank_jax.cli import main as cli


def fails(capsys, *arguments):
    """Run a command that must fail with exit code 2, and return what it says, one line per mistake."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert all(re.fullmatch(r"[a-z ]+\S*: \d+\.\d s", line) for line in captured.out.splitlines())  # stages before it
    lines = captured.err.splitlines()
    assert lines
    assert all(line.startswith("autorank-jax: ") for line in lines)
    assert "Traceback" not in captured.err
    return captured.err
