"""Criteria files: a table with a header, one row per client."""

import csv
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

NAME_COLUMNS = ("", "client", "clients", "client_id", "id", "name")
COUNTS = ("size", "classes")


class CriteriaError(ValueError):
    """A criteria file that cannot be scored. The message is one line."""


class Criteria(NamedTuple):
    """A decision matrix with names."""

    clients: tuple[str, ...]
    criteria: tuple[str, ...]
    matrix: np.ndarray  # (clients, criteria) float64
    benefit: tuple[bool, ...]  # (criteria,) False where the column is a cost


def read_criteria(path: str | Path, *, cost: Sequence[str] = ()) -> Criteria:
    """Read and check a criteria file.

    Args:
        path: CSV with commas (or semicolons or tabs throughout), a header, one row per client. The first column holds
            the clients' names if it is called so (`NAME_COLUMNS`) or holds no number at all; all others are criteria.
        cost: columns of which less means more complex.

    Raises:
        CriteriaError: a file that cannot be read, is empty, ragged, or holds something other than finite numbers, or
            negative counts; an unknown or doubled column; a doubled client.
    """
    path = Path(path).expanduser()
    header, rows = _read(path)
    named = len(header) > 1 and (
        header[0].lower() in NAME_COLUMNS or all(row[0] and _number(row[0]) is None for _, row in rows)
    )
    criteria = tuple(header[1:] if named else header)
    clients = tuple(row[0] if named else str(number) for number, (_, row) in enumerate(rows))
    doubled = [name for name in header if header.count(name) > 1]
    if doubled:
        raise CriteriaError(f"{path}: expected columns of different names, got {doubled[0]!r} twice")
    seen: set[str] = set()
    for name, (line, _) in zip(clients, rows, strict=True):
        if name in seen:
            raise CriteriaError(f"{path}: expected one row per client, got {name!r} again in line {line}")
        seen.add(name)
    for name in cost:
        if name not in criteria:
            close = difflib.get_close_matches(name, criteria, n=1)
            hint = f", probably {close[0]!r}" if close else ""
            raise CriteriaError(f"cost: expected a column out of {', '.join(criteria)}, got {name!r}{hint}")
    matrix = [
        [_checked(path, line, name, text) for name, text in zip(criteria, row[named:], strict=True)]
        for line, row in rows
    ]
    return Criteria(clients, criteria, np.array(matrix), tuple(name not in cost for name in criteria))


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header, and the rows with their line numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CriteriaError(f"{path}: expected a criteria file, got: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CriteriaError(
            f"{path}: expected UTF-8 text, got other bytes; probably a spreadsheet: save as CSV"
        ) from error
    if "\0" in text:
        raise CriteriaError(f"{path}: expected text, got zero bytes; probably a spreadsheet: save as CSV")
    lines = _split(path, text)
    if not lines:
        raise CriteriaError(f"{path}: expected a header and one row per client, got an empty file")
    (_, header), *rows = lines
    if all(_number(name) is not None for name in header):
        raise CriteriaError(f"{path}: expected a header of column names, got only numbers in the first line")
    if not all(header[1:]) or header == [""]:
        raise CriteriaError(f"{path}: expected a name for every column, got an empty one in the first line")
    if not rows:
        raise CriteriaError(f"{path}: expected one row per client below the header, got none")
    for line, row in rows:
        if len(row) != len(header):
            raise CriteriaError(f"{path}: expected {len(header)} values in line {line}, got {len(row)}")
    return header, rows


def _split(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Return the cells of all lines that are not blank, with their line numbers."""
    first = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    try:
        cells = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise CriteriaError(f"{path}: expected a table, got: {error} in line {reader.line_num}") from error
    return [(line, row) for line, row in cells if any(row)]


def _number(text: str) -> float | None:
    """Return a number, NaN and infinities included, or None where it is text."""
    try:
        return float(text)
    except ValueError:
        return None


def _checked(path: Path, line: int, column: str, text: str) -> float:
    """Return a finite number of ordinary size."""
    value = _number(text)
    if value is None or not math.isfinite(value) or abs(value) > 1e30:
        got = repr(text) if text else "nothing"
        raise CriteriaError(f"{path}: expected a finite number in line {line}, column {column!r}, got {got}")
    if value < 0 and column.lower() in COUNTS:
        raise CriteriaError(f"{path}: expected a count of at least 0 in line {line}, column {column!r}, got {text}")
    return value
