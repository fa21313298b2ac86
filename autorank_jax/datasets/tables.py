"""Tables as datasets: a CSV file with a header, a row per example, numbers as features and one column to predict."""

import csv
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from autorank_jax.datasets.base import Dataset, DatasetError
from autorank_jax.interface import checked
from autorank_jax.interface.paths import user_path

TEST_SHARE = 0.2
LONGEST = 1_000_000  # characters of a line
LARGEST = 1e30  # number, whose squares float64 still sums
FEW = 20  # different whole numbers or fewer are classes


def is_table(path: Path) -> bool:
    """Return whether a file is called as a table is."""
    return path.suffix.lower() in (".csv", ".tsv")


@checked
def read_table(path: str | Path, *, name: str, target: str | None = None) -> Dataset:
    """Read a dataset of a CSV file.

    The target's column is text or few whole numbers (classes, in sorted order), or other numbers (regression: they are
    standardised). All other columns are features: numbers, standardised to mean 0 and deviation 1 over the training
    part. A fifth of the rows, drawn always in the same way, is the test part.

    Args:
      path: commas, semicolons or tabs throughout; the first line has the columns' names.
      name: what the dataset is called, also in messages.
      target: name of the column to predict; the last where None.

    Returns:
      The dataset, float32 features `(n, columns - 1)`.

    Raises:
      DatasetError: for a file that cannot be read, an unknown column, a ragged row, text or nothing where a number
        should be, too few rows, or a target that is the same everywhere.
    """
    path, where = user_path(path), f"dataset '{name}'"
    header, rows = _read(path, where)
    column = _column(header, target, where)
    features = [
        [_number(cell, where, line, header[k]) for k, cell in enumerate(row) if k != column] for line, row in rows
    ]
    for line, row in rows:
        if not row[column]:
            raise DatasetError(f"{where}: expected something in line {line}, column {header[column]!r}, got nothing")
    test = np.zeros(len(rows), bool)
    test[np.random.default_rng(0).permutation(len(rows))[: max(1, round(TEST_SHARE * len(rows)))]] = True
    x = _standardised(np.array(features), ~test)
    y, classes = _targets([row[column] for _, row in rows], ~test, f"{where}: column {header[column]!r}")
    return Dataset(x[~test], y[~test], x[test], y[test], classes, name)


def _read(path: Path, where: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header, and the rows that are not blank with their line numbers."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline(LONGEST)
            delimiter = max(",;\t", key=first.count)
            header = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter), [])]
            lines = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
            rows = [(number, [cell.strip() for cell in row]) for number, row in enumerate(lines, 2)]
            rows = [(number, row) for number, row in rows if len(row) > 1 or any(row)]
    except OSError as error:
        raise DatasetError(f"{where}: expected a table at {path}, got: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{where}: expected a CSV file in UTF-8 at {path}, got: {error}") from error
    while rows and not any(rows[-1][1]):  # spreadsheets add empty ones at the end
        rows.pop()
    if len(header) < 2 or len(set(header)) < len(header) or any(_is_number(cell) for cell in header):
        got = ", ".join(repr(cell) for cell in header[:5]) or "nothing"
        raise DatasetError(f"{where}: expected at least two columns of different names in the first line, got {got}")
    for line, row in rows:
        if len(row) != len(header):
            raise DatasetError(f"{where}: expected {len(header)} values in line {line}, got {len(row)}")
    if len(rows) < 2:
        raise DatasetError(f"{where}: expected at least two rows below the header, got {len(rows)}")
    return header, rows


def _column(header: Sequence[str], target: str | None, where: str) -> int:
    if target is not None and target not in header:
        raise DatasetError(f"{where}: expected a target among the columns {', '.join(header)}, got {target!r}")
    return len(header) - 1 if target is None else header.index(target)


def _is_number(text: str) -> bool:
    try:
        return text.isascii() and "_" not in text and abs(float(text)) <= LARGEST
    except ValueError:
        return False


def _number(text: str, where: str, line: int, column: str) -> float:
    if not _is_number(text):
        got = repr(text) if text else "nothing"
        raise DatasetError(
            f"{where}: expected a finite number in line {line}, column {column!r}, got {got}: encode or remove it, or "
            "predict it with --target"
        )
    return float(text)


def _standardised(values: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return float32 of mean 0 and deviation 1 over the training rows; columns that do not vary become 0."""
    deviation = values[train].std(axis=0)
    return ((values - values[train].mean(axis=0)) / np.where(deviation > 0, deviation, 1)).astype(np.float32)


def _targets(cells: Sequence[str], train: np.ndarray, where: str) -> tuple[np.ndarray, int]:
    """Return labels and their number, or standardised numbers and 0."""
    words = [cell for cell in cells if not _is_number(cell)]
    numbers = not words
    if words and 2 * len(words) <= len(cells):
        raise DatasetError(
            f"{where}: expected only finite numbers, or only words, got {len(words)} of {len(cells)} that are no "
            f"numbers, such as {words[0]!r}: remove their rows, or give all classes names"
        )
    values = np.array([float(cell) for cell in cells]) if numbers else np.array(cells)
    different, labels = np.unique(values, return_inverse=True)
    if len(different) < 2:
        raise DatasetError(f"{where}: expected different values to predict, got {cells[0]!r} everywhere")
    if numbers and (len(different) > FEW or (values != np.round(values)).any()):
        return _standardised(values, train), 0
    if len(different) > max(2, len(cells) // 2):
        got = (
            f"{len(different)} different ones in {len(cells)} rows, such as {', '.join(islice(map(str, different), 3))}"
        )
        raise DatasetError(f"{where}: expected labels that examples share, got {got}")
    return labels.astype(np.int32), len(different)
