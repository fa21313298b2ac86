"""Criteria files, fuzzed: a table of finite numbers or one line that says what is wrong, whatever the bytes."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autorank_jax.ranks.table_file import CriteriaError, read_criteria

cells = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=4),
    st.sampled_from(["1", "-2.5", "1e30", "1e31", "nan", "inf", "-inf", "", " ", "0x1", '"', '"1"', "1_0", "٣"]),
    st.floats().map(str),
)
tables = st.lists(st.lists(cells, max_size=4), max_size=5)


def read(content, **options):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "criteria.csv"
        path.write_bytes(content)
        return read_criteria(path, **options)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(st.binary(max_size=60), st.tuples(tables, st.sampled_from([",", ";", "\t"]), st.sampled_from("\n\r"))))
def test_any_bytes_give_a_table_or_a_complaint(content):
    if not isinstance(content, bytes):
        rows, delimiter, end = content
        content = end.join(delimiter.join(row) for row in rows).encode("utf-8", "surrogatepass")
    try:
        table = read(content)
    except CriteriaError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
        return
    assert table.matrix.shape == (len(table.clients), len(table.criteria))
    assert np.isfinite(table.matrix).all()
    assert np.abs(table.matrix).max() <= 1e30
    assert len(set(table.criteria)) == len(table.criteria)


numbers = st.floats(-1e30, 1e30)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 4).flatmap(lambda k: st.lists(st.lists(numbers, min_size=k, max_size=k), min_size=1, max_size=5)))
def test_written_numbers_are_read_back(rows):
    header = [f"c{number}" for number in range(len(rows[0]))]
    text = "\n".join(",".join(map(repr, row)) for row in rows)
    table = read(f"{','.join(header)}\n{text}\n".encode(), cost=header[:1])
    np.testing.assert_array_equal(table.matrix, rows)
    assert table.benefit == (False, *[True] * (len(header) - 1))


def test_a_complaint_names_the_place():
    with pytest.raises(CriteriaError, match="line 3, column 'b', got 'x'"):
        read(b"a,b\n1,2\n3,x\n")


def test_a_client_has_one_row():
    with pytest.raises(CriteriaError, match="one row per client, got 'x' again in line 4"):
        read(b"client,a\nx,1\ny,2\nx,3\n")


@pytest.mark.parametrize("column", ["size", "classes"])
def test_counts_are_not_negative(column):
    with pytest.raises(CriteriaError, match=f"count of at least 0 in line 3, column '{column}', got -2"):
        read(f"client,{column}\nx,0\ny,-2\n".encode())
