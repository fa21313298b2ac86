"""The tables of `benchmarks/paper.py`, and those of `benchmarks/README.md`."""

import sys
from pathlib import Path

import numpy as np
import pytest
from fake_cells import TINY, fake_cell

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import curves
import paper_tables
import plan
import readme

TARGET = plan.DATASETS["mnist"].targets[-1]
BASE = curves.runs_of(fake_cell(TINY))["full"][0]


def column(title, finals, own=None, before=None):
    """Return a column with these final accuracies; the target is seen at the second of two evaluations, if at all."""
    runs = {
        seed: BASE._replace(
            rounds=np.array([2, 2 + 2 * (seed + 1)]),
            accuracy=np.array([0.3, final]),
            flops=np.array([1e9, 5e9]),
            bytes=np.array([1e6, 4e6]) * (1 if before is None else before),
            clients={} if own is None else {"before": own[seed], "after": own[seed]},
        )
        for seed, final in enumerate(finals)
    }
    return paper_tables.Column(title, None, runs)


def test_further_columns_are_compared_with_each_other():
    one, other = plan.CONTRASTS[0]
    columns = [column(other, (0.6, 0.7, 0.8)), column(one, (0.7, 0.8, 0.91)), column("by size", (0.8, 0.8, 0.8))]
    text = paper_tables.write("mnist", "staircase", columns, seeds=3)
    assert f"| {one} minus {other} | 3 | +10.3 [" in text
    assert "minus by size" not in text


def row_of(text, title):
    """Return the cells of the last row that begins with a title."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {title} |")]
    return rows[-1][2:]


def test_differences_in_what_clients_have_and_in_what_it_takes():
    own = [{"mean": 0.5 + shift, "worst": 0.2} for shift in (0.1, 0.2, 0.3)]
    less = [{"mean": 0.5, "worst": 0.2 + shift} for shift in (0.1, 0.2, 0.3)]
    first = column(paper_tables.FIRST, [TARGET] * 3, own)
    other = column("other", [TARGET] * 3, less, before=3)
    never = column("never", [TARGET, TARGET, TARGET - 0.01])
    text = paper_tables.write("mnist", "staircase", [first, other, never], seeds=3)
    cells = row_of(text, f"{paper_tables.FIRST} minus other")
    assert cells[0].startswith("+20.0 [")
    assert cells[1].startswith("-20.0 [")
    assert cells[4:] == ["0 [0, 0]", "0 [0, 0]", "-8 M [-8 M, -8 M]"]
    assert row_of(text, f"{paper_tables.FIRST} minus never") == ["–"] * 7


def test_columns_that_nobody_ran_are_named():
    columns = [column(paper_tables.FIRST, [0.5]), column("one", []), column("two", [])]
    text = paper_tables.write("mnist", "staircase", columns, seeds=5)
    assert "Not run yet: one; two." in text
    assert "| one |" not in text


def test_benchmarks_readme_holds_the_tables_of_the_results():
    readme.main(["--check"])


def test_a_block_is_replaced_between_its_markers():
    text = "before\n<!-- a -->\nold\n<!-- end of a -->\nafter"
    assert readme.filled(text, {"a": "new"}) == "before\n<!-- a -->\n\nnew\n\n<!-- end of a -->\nafter"
    for broken in ("no markers", "<!-- end of a --> <!-- a -->"):
        with pytest.raises(ValueError, match="expected the markers <!-- a --> and <!-- end of a -->"):
            readme.filled(broken, {"a": "new"})
