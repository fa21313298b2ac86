"""Complaints of the parser of the command line, condensed to one line each."""

import itertools
from collections.abc import Sequence


def one_line(complaint: str, helpful: str) -> str:
    """Condense a boxed complaint: what was expected, what came, and what was probably meant.

    Args:
        complaint: what tyro writes.
        helpful: the command that prints help.
    """
    lines = [line.strip("╭╮╰╯│─| \t") for line in complaint.splitlines()[1:]]
    lines = [line for line in lines if line.strip("-+| ") and not line.startswith("For full help")]
    if lines and lines[0].startswith("Unrecognized"):
        what = _unknown(lines)
    elif lines and lines[0].startswith("Missing from"):
        what = _missing(lines)
    else:
        what = " ".join(itertools.takewhile(lambda line: not line.startswith("Argument helptext"), lines))
    return f"{what or complaint.strip() or 'unknown mistake'} (see {helpful})"


def _unknown(lines: Sequence[str]) -> str:
    """Say which words are no options, with the nearest option of each where there is one, in the same order."""
    head = list(itertools.takewhile(lambda line: not line.endswith(":") and not line.startswith("Available"), lines))
    words = " ".join(head).partition(": ")[2].split(", ")
    words = [word.partition("=")[0] for word in words if word.startswith("-")] or words
    known, about = "options that exist", ""
    nearest: dict[str, str] = {}
    for line in lines[len(head) :]:
        if line.startswith("Available subcommands: "):
            known = f"one of {line.partition(': ')[2]}"
        elif line.endswith(":"):
            about = line.removeprefix("Arguments similar to ").rstrip(":").partition("=")[0]
        elif line.startswith("--"):
            nearest.setdefault(about, line.split()[0])
    meant = [nearest[word] for word in sorted(nearest, key=lambda word: words.index(word) if word in words else 0)]
    return f"expected {known}, got {', '.join(words)}" + (f", probably {', '.join(meant)}" if meant else "")


def _missing(lines: Sequence[str]) -> str:
    """Say which options a command needs, and which words it got that are none."""

    def options(part: Sequence[str]) -> str:
        return ", ".join(line.split()[0] for line in part if line.startswith("--") or line.isupper())

    cut = next((i for i, line in enumerate(lines) if line.startswith("Unrecognized")), len(lines))
    return f"expected {options(lines[:cut])}, got {options(lines[cut:]) or 'none'}"
