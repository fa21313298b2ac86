"""Criteria files: a table with a header, one row per client."""

import csv
import difflib
import math
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from autorank_jax.interface.paths import user_path

NAME_COLUMNS = (
    "", "client", "clients", "clientid", "id", "name", "index", "user", "userid", "device", "deviceid", "node",
    "nodeid", "unnamed0",
)  # fmt: skip
"""Headings of a first column that names the clients, in letters and digits alone."""
NUMBERING = ("id", "uid", "uuid", "serial", "number", "no", "nr", "num", "code", "key")
"""Words in the heading of a column that, if its whole numbers are all different, probably numbers the clients."""
RESULTS = ("closeness", "ratio", "rank")
"""Columns that a run leaves behind in its `criteria.csv` beside the criteria, alone or before a dot."""
COUNTS = ("size", "classes")
MOST_BYTES = 2**26
_SPREADSHEETS = (b"PK", b"\xd0\xcf\x11\xe0")  # how .xlsx, .ods and .xls begin
MOST_BYTES_OF_HEADER = 2**20
MOST_NAMED = 30
"""Columns in a message."""
MOST_PAIRS = 2**27
"""Of values of two criteria, over all clients: CRITIC compares them, a GB at a time."""
STANDARD_INPUT = Path("-")


class CriteriaError(ValueError):
    """A criteria file that cannot be scored. The message is one line."""


class Criteria(NamedTuple):
    """A decision matrix with names."""

    clients: tuple[str, ...]
    criteria: tuple[str, ...]
    matrix: np.ndarray  # (clients, criteria) float64
    benefit: tuple[bool, ...]  # (criteria,) False where the column is a cost
    remarks: tuple[str, ...] = ()  # what was decided without being asked, a line each


def read_criteria(path: str | Path, *, cost: Sequence[str] = (), columns: Sequence[str] = ()) -> Criteria:
    """Read and check a criteria file.

    Args:
        path: CSV with commas (or semicolons, tabs or bars throughout), a header, one row per client, at most 64 MB; `-`
            for standard input. The first column holds the clients' names if it is called so (`NAME_COLUMNS`) or holds
            no number at all; all others are criteria, but for seeds and results (`RESULTS`) in a run's `criteria.csv`.
        cost: columns of which less means more complex.
        columns: the criteria among the columns, in this order; all that are some where none are given.

    Raises:
        CriteriaError: a file that cannot be read, is empty, ragged, or holds something other than finite numbers, or
            negative counts; an unknown or doubled column; a doubled client; the clients of several seeds.
    """
    path = user_path(path)
    header, rows = _read(path)
    doubled = next((name for name, count in Counter(header).items() if count > 1), None)
    if doubled is not None:
        raise CriteriaError(f"{path}: expected columns of different names, got {doubled!r} twice")
    _check_names("columns", columns, header)
    asked = {*columns, *cost}
    results = dict.fromkeys(name for name in _results(header) if name not in asked)
    _check_seeds(path, header, rows, results)
    criteria = [name for name in header if name not in results]
    clients, remarks = tuple(map(str, range(len(rows)))), []
    first = [row[header.index(criteria[0])] for _, row in rows] if criteria else []
    if criteria and header[1:] and criteria[0] not in columns and _are_names(criteria[0], first):
        clients, criteria = tuple(first), criteria[1:]
    elif criteria[1:] and not columns and _number_clients(criteria[0], first):
        remarks.append(
            f"{path}: column {criteria[0]!r} holds {first[0]}, {first[1]} and so on, all different, and is scored as a"
            " criterion; if it only numbers the clients, rename it to client, or name the criteria by --columns"
        )
    if columns:
        criteria = list(columns)
    elif results:
        remarks.append(f"{path}: left out {_listed(list(results))}: no criteria; --columns takes those that it names")
    if not criteria:
        raise CriteriaError(f"{path}: expected criteria, got only {_listed(header)}; choose them by --columns")
    _check_clients(path, clients, rows)
    _check_names("cost", cost, criteria)
    _check_pairs(path, len(rows), len(criteria))
    number = {name: place for place, name in enumerate(header)}
    places = [(number[name], name) for name in criteria]
    matrix = [[_checked(path, line, name, row[place]) for place, name in places] for line, row in rows]
    benefit = tuple(name not in cost for name in criteria)
    return Criteria(clients, tuple(criteria), np.array(matrix), benefit, tuple(remarks))


def _results(header: Sequence[str]) -> Iterable[str]:
    """Yield the columns that a run writes beside its criteria."""
    for name in header:
        known = name.partition(".")[0] in RESULTS or (name == "seed" and "client" in header)
        if known or (name == "examples" and "size" in header):
            yield name


def _are_names(heading: str, cells: Sequence[str]) -> bool:
    """Return whether a column names the clients."""
    return "".join(filter(str.isalnum, heading.lower())) in NAME_COLUMNS or all(
        cell and _number(cell) is None for cell in cells
    )


def _number_clients(heading: str, cells: Sequence[str]) -> bool:
    """Return whether a column seems to number its rows: it counts from any number, or is called so."""
    if len(cells) < 2 or not all(cell.isascii() and cell.isdigit() and len(cell) < 20 for cell in cells):
        return False
    numbers = list(map(int, cells))
    counts = numbers == list(range(numbers[0], numbers[0] + len(cells)))
    words = re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", heading).lower())
    return counts or (len(set(numbers)) == len(numbers) and not set(words).isdisjoint(NUMBERING))


def _check_names(option: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f", probably {close[0]!r}" if close else ""
            raise CriteriaError(f"{option}: expected a column out of {_listed(known)}, got {name!r}{hint}")
        if list(names).count(name) > 1:
            raise CriteriaError(f"{option}: expected every column once, got {name!r} twice")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _check_seeds(
    path: Path, header: list[str], rows: Sequence[tuple[int, list[str]]], results: Collection[str]
) -> None:
    seeds = sorted({row[header.index("seed")] for _, row in rows}) if "seed" in results else []
    if len(seeds) > 1:
        raise CriteriaError(
            f"{path}: expected the clients of one seed, got those of seeds {', '.join(seeds[:5])}; keep the rows of one"
        )


def _check_pairs(path: Path, clients: int, criteria: int) -> None:
    if clients * criteria**2 > MOST_PAIRS:
        raise CriteriaError(
            f"{path}: expected few enough criteria to compare each with each, got {criteria} of {clients} clients; "
            "choose them by --columns"
        )


def _check_clients(path: Path, clients: Sequence[str], rows: Sequence[tuple[int, list[str]]]) -> None:
    seen: set[str] = set()
    for name, (line, _) in zip(clients, rows, strict=True):
        if name in seen:
            raise CriteriaError(f"{path}: expected one row per client, got {name!r} again in line {line}")
        seen.add(name)


def _read(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header, and the rows with their line numbers."""
    text = _text(path)
    lines = _split(path, text)
    if not lines:
        raise CriteriaError(f"{path}: expected a header and one row per client, got an empty file")
    (_, header), *rows = lines
    number = next((name for name in header if _number(name) is not None), None)
    if number is not None:
        numeric = [_number(name) is not None for name in header]
        got = "only numbers" if all(numeric) else f"the number {number}"
        cause = ", probably a client" * all(numeric[1:])
        raise CriteriaError(
            f"{path}: expected a header of column names, got {got} in the first line{cause}: put a line such as "
            "client,size,classes above the clients"
        )
    if not all(header[1:]) or header == [""]:
        raise CriteriaError(f"{path}: expected a name for every column, got an empty one in the first line")
    if not rows:
        raise CriteriaError(f"{path}: expected one row per client below the header, got none")
    for line, row in rows:
        if not any(row):
            raise CriteriaError(f"{path}: expected the values of a client in line {line}, got an empty row: remove it")
        if len(row) != len(header):
            raise CriteriaError(f"{path}: expected {len(header)} values in line {line}, got {len(row)}")
    return header, rows


def _text(path: Path) -> str:
    """Return the text of a file that is none of the kinds that are no table, without reading those whole."""
    try:
        if path == STANDARD_INPUT:
            content = sys.stdin.buffer.read(MOST_BYTES + 1) if sys.stdin else b""
        else:
            with path.open("rb") as file:
                content = file.read(2**12)
                content += b"" if b"\0" in content else file.read(MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CriteriaError(f"{path}: expected a criteria file, got: {reason}") from error
    if b"\0" in content:
        cause = "; probably a spreadsheet" if content.startswith(_SPREADSHEETS) else ""
        raise CriteriaError(f"{path}: expected UTF-8 text, got zero bytes{cause}: save as CSV in UTF-8")
    if len(content) > MOST_BYTES:
        raise CriteriaError(f"{path}: expected at most {MOST_BYTES >> 20} MB, got more")
    if len(content.lstrip().partition(b"\n")[0].partition(b"\r")[0]) > MOST_BYTES_OF_HEADER:
        raise CriteriaError(f"{path}: expected a header of column names, got a line of over a MB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CriteriaError(f"{path}: expected UTF-8 text, got other bytes: save as CSV in UTF-8") from error


def _split(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Return the cells of all lines that are not blank, with their line numbers, from the first row to the last."""
    first = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t|", key=first.count)
    reader = csv.reader(text.splitlines(), delimiter=delimiter, skipinitialspace=True)
    try:
        cells = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise CriteriaError(f"{path}: expected a table, got: {error} in line {reader.line_num}") from error
    written = [(line, row) for line, row in cells if len(row) > 1 or any(row)]
    full = [place for place, (_, row) in enumerate(written) if any(row)]
    return written[full[0] : full[-1] + 1] if full else []


def _number(text: str) -> float | None:
    """Return a number in plain digits, NaN and infinities included, or None where it is text."""
    try:
        return float(text) if text.isascii() and "_" not in text else None
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
