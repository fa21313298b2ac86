"""One file for all cells of a study: JSON lines that are only ever appended, so that nobody's cell is lost.

A line that holds `shared` has the options of all cells after it; every other line is a cell, by its name, with the
options in which it differs. A cell is one write of one line under a lock. What an interrupted write leaves does not
read, and counts as not there; of two cells of a name the later one counts.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autorank_jax.experiment import Experiment, experiment_from

Cell = dict[str, Any]
"""What `cells.contents` holds, `options`, and `ran`: when, and with which versions."""


@contextlib.contextmanager
def appending(path: Path) -> Iterator[Callable[[Sequence[Mapping[str, Any]]], None]]:
    """Lock a file, which need not be there yet, and give what adds lines of JSON to it in one write.

    What an interrupted write has left becomes a line of its own, which does not read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def write(lines: Sequence[Mapping[str, Any]]) -> None:
            broken = path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
            text = "".join(json.dumps(line, separators=(",", ":"), ensure_ascii=False) + "\n" for line in lines)
            file.write(b"\n" * broken + text.encode())
            file.flush()
            os.fsync(file.fileno())

        yield write


class CellFile:
    """The cells of a file, with those that other processes append meanwhile."""

    def __init__(self, path: Path) -> None:
        """Take a file that need not be there yet."""
        self.path = path
        self._cells: dict[str, Cell] = {}
        self._shared: Mapping[str, Any] | None = None
        self._read = 0  # bytes that have been read

    def cells(self) -> Mapping[str, Cell]:
        """Return all cells by name, in the order of their lines."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                added = file.read()
        except FileNotFoundError:
            added = b""
        whole = added.rfind(b"\n") + 1  # the rest is being written
        for line in added[:whole].splitlines():
            self._take(line)
        self._read += whole
        return self._cells

    def cell(self, name: str) -> Cell | None:
        """Return a cell, None where it is not there."""
        return self.cells().get(name)

    def append(self, name: str, cell: Cell) -> None:
        """Add a cell: the whole of it, or nothing that reads.

        Args:
            name: of the cell.
            cell: with all its options.
        """
        with appending(self.path) as write:
            self.cells()
            options = cell["options"]
            lines = [] if self._shared is not None else [{"shared": options}]
            shared = self._shared or options
            differing = {key: value for key, value in options.items() if key not in shared or shared[key] != value}
            lines.append({"cell": name, **cell, "options": differing})
            write(lines)

    def _take(self, line: bytes) -> None:
        """Take up a line, unless it does not read."""
        try:
            content = json.loads(line)
            if isinstance(shared := content.get("shared"), dict):
                experiment_from(shared)
                self._shared = shared
            elif self._shared is not None:
                content["options"] = {**self._shared, **content["options"]}
                experiment_from(content["options"])
                self._cells[content.pop("cell")] = content
        except (ValueError, KeyError, TypeError, AttributeError):
            return


def options_of(experiment: Experiment) -> dict[str, Any]:
    """Return the options of an experiment as JSON has them."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))
