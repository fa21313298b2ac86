"""Ranks of a table: those of the library, whatever program wrote the table, and a line for every mistake in it."""

import csv
import io
import json
import time

import numpy as np
import pytest

from autorank_jax.cli import main as cli
from autorank_jax.cli.formats import to_csv
from autorank_jax.cli.tables import SHOWN_RANKS, criteria_table
from autorank_jax.experiment.results import client_rows
from autorank_jax.ranks import policies, table_file
from tests.cli.cases import fails, make_scores

TABLE = "client,size,classes,label_entropy,gini_simpson\na,10,1,0,0\nb,10,2,0.6931472,0.5\nc,40,2,0.6931472,0.5\n"


def write(tmp_path, text, name="criteria.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.slow
def test_ranks_equal_those_of_the_library(tmp_path, capsys):
    path = write(tmp_path, TABLE)
    assert cli.main(["ranks", "--criteria", str(path), "--max-rank", "10", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ranks, info = policies.autorank_ranks([[10, 0], [5, 5], [20, 20]], max_rank=10)
    assert [row["client"] for row in found["clients"]] == ["a", "b", "c"]
    assert [row["rank"] for row in found["clients"]] == ranks.tolist() == [1, 3, 10]
    np.testing.assert_allclose([row["closeness"] for row in found["clients"]], info.closeness, atol=1e-6)
    np.testing.assert_allclose(list(found["weights"].values()), info.weights, atol=1e-6)
    assert found["weights"]["size"] == pytest.approx(0.5, abs=1e-6)  # worked by hand in autorank_ranks
    assert found["clients"][1]["ratio"] == pytest.approx(0.399, abs=1e-3)


def test_ranks_as_a_table(tmp_path, capsys):
    assert cli.main(["ranks", "--criteria", str(write(tmp_path, TABLE)), "--max-rank", "10"]) == 0
    text = capsys.readouterr().out
    assert "CRITIC weights" in text
    assert [line.split()[-1] for line in text.splitlines() if line.split()[:1] in (["a"], ["b"], ["c"])] == [
        "1", "3", "10",
    ]  # fmt: skip


def test_cost_columns_turn_the_order_round(tmp_path, capsys):
    path = write(tmp_path, "battery\n1\n2\n3\n")
    ranks = {}
    for options in ([], ["--cost", "battery"]):
        assert cli.main(["ranks", "--criteria", str(path), "--max-rank", "10", "--json", *options]) == 0
        ranks[len(options)] = [row["rank"] for row in json.loads(capsys.readouterr().out)["clients"]]
    assert ranks[0] == ranks[2][::-1]
    assert ranks[0] == sorted(ranks[0])
    assert ranks[0] != ranks[2]


@pytest.mark.parametrize(
    "text",
    [
        "a;b\n1;2\n3;4\n",
        "a\tb\n1\t2\n3\t4\n",
        "a|b\n1|2\n3|4\n",
        "\ufeffa, b\r\n1, 2\r\n\r\n3, 4\r\n",
        " ,\n\na,b\n1,2\n3,4\n,\n , \n",
    ],
)
def test_tables_of_other_programs(text, tmp_path, capsys):
    assert cli.main(["ranks", "--criteria", str(write(tmp_path, text)), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["weights"]) == ["a", "b"]
    assert [(row["client"], row["rank"]) for row in found["clients"]] == [("0", 6), ("1", 64)]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", [], "got an empty file"),
        ("a,b\n", [], "got none"),
        ("a,b\n1,2\n3\n", [], "expected 2 values in line 3, got 1"),
        ("a,b\n1,2\n,\n3,4\n", [], "expected the values of a client in line 3, got an empty row: remove it"),
        ("client,b\nann,2\n,\nbob,4\n", [], "expected the values of a client in line 3, got an empty row"),
        ("a,b\n,\n,\n", [], "got none"),
        ("a,b\n1,nan\n", [], "line 2, column 'b', got 'nan'"),
        ("a,b\n1,inf\n", [], "line 2, column 'b', got 'inf'"),
        ("a,b\n1,\n", [], "line 2, column 'b', got nothing"),
        ("a,b\n1,2\n3,many\n", [], "line 3, column 'b', got 'many'"),
        ("a,b\n1,2\nmany,3\n", [], "line 3, column 'a', got 'many'"),
        ("a\nmany\n", [], "got 'many'"),
        ("1,2\n3,4\n", [], "got only numbers in the first line"),
        ("ann,10,2\nbob,20,3\n", [], "got the number 10 in the first line, probably a client: put a line such as"),
        ("client,size\nann,10\nbob,20\n", ["--columns", "sise"], "columns: expected a column out of client, size"),
        ("client,size\nann,10\nbob,20\n", ["--columns", "size,size"], "columns: expected every column once"),
        ("client,rank\nann,10\nbob,20\n", [], "got only client, rank; choose them by --columns"),
        ("a,b\n1,2\n", ["--output", "ranks.txt"], "output: expected a file that ends in .csv or .json, got ranks.txt"),
        ("a,b\n1,2\n3,4\n", ["--output", "x" * 300 + ".csv"], "File name too long"),
        ("a,b\n1,2\n3,4\n", ["--output", "/none/ranks.csv"], "expected to write /none/ranks.csv, got: No such file"),
        ("a,b\n2,1_000\n3,4\n", [], "expected a finite number in line 2, column 'b', got '1_000'"),
        ("a,b\n2,２０\n3,4\n", [], "expected a finite number in line 2, column 'b', got '２０'"),
        ("a,b\n1,2\n", ["--max-rank", "9" * 30], "and at most 1048576, got 9"),
        ("a,a\n1,2\n", [], "got 'a' twice"),
        ("a,,c\n1,2,3\n", [], "a name for every column"),
        ("a,b\n1,2\n", ["--cost", "bb"], "cost: expected a column out of a, b, got 'bb', probably 'b'"),
        ("a,b\n1,1e200\n", [], "expected a finite number"),
        (b"PK\x03\x04\x00\x00\xff", [], "probably a spreadsheet"),
        ("a,b\n1,2\n", ["--max-rank", "0"], "max-rank: expected a whole number of at least 1 and at most 1048576, got"),
        ("a,b\n1,2\n", ["--min-ratio", "10"], "probably a percentage"),
        ("a,b\n1,2\n", ["--normalization", "max"], "normalization: expected one of"),
    ],
)
def test_mistakes_in_a_criteria_file(text, options, message, tmp_path, capsys):
    problems = fails(capsys, "ranks", "--criteria", write(tmp_path, text), *options)
    assert message in problems
    assert problems.count("\n") == 1


def test_what_a_run_found_is_left_out_of_its_own_table(tmp_path, capsys):
    path = write(tmp_path, to_csv(client_rows(make_scores(0))))
    assert cli.main(["ranks", "--criteria", str(path), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert list(found["weights"]) == ["size", "label_entropy"]
    assert [row["client"] for row in found["clients"]] == ["0", "1"]
    assert said.err == (
        f"autorank-jax: warning: {path}: left out seed, examples, closeness, ratio.autorank, rank.autorank.layers/0, "
        "ratio.full, rank.full.layers/0: no criteria; --columns takes those that it names\n"
    )
    assert cli.main(["ranks", "--criteria", str(path), "--json", "--columns", "examples"]) == 0
    said = capsys.readouterr()
    assert list(json.loads(said.out)["weights"]) == ["examples"]
    assert said.err == ""
    several = write(tmp_path, to_csv([*client_rows(make_scores(0)), *client_rows(make_scores(1))]))
    assert "expected the clients of one seed, got those of seeds 0, 1" in fails(capsys, "ranks", "--criteria", several)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nr,size\n1,5\n2,6\n3,9\n", True),
        ("nr,size\n1,5\n2,6\n2,9\n", False),
        ("nr,size\n1,5\n2,6\n1.5,9\n", False),
        ("size,nr\n5,1\n2,2\n9,3\n", False),
        ("Serial no,size\n1007,5\n1001,6\n1003,9\n", True),
        ("patientID,size\n1007,5\n1001,6\n1003,9\n", True),
        ("Client ID,size\n1007,5\n1001,6\n1003,9\n", False),
        ("id,size\n1,5\n2,6\n3,9\n", False),
        ("nr\n1\n2\n3\n", False),
    ],
)
def test_a_column_of_row_numbers_is_told(text, told, tmp_path, capsys):
    assert cli.main(["ranks", "--criteria", str(write(tmp_path, text)), "--json"]) == 0
    assert ("all different, and is scored as a criterion" in capsys.readouterr().err) == told


def test_ranks_through_a_link_are_written_where_it_points(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "ranks.csv", tmp_path / "link.csv"
    link.symlink_to(target)
    for _ in range(2):  # the target is made, and replaced
        assert cli.main(["ranks", "--criteria", str(write(tmp_path, TABLE)), "--output", str(link)]) == 0
        assert link.is_symlink()
        assert target.read_text().startswith("client,")
        assert list(target.parent.iterdir()) == [target]
        target.write_text("")


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_ranks_from_a_pipe_into_a_file(ending, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TABLE.encode())))
    path = tmp_path / f"ranks.{ending}"
    assert cli.main(["ranks", "--criteria", "-", "--max-rank", "10", "--output", str(path)]) == 0
    assert capsys.readouterr().out == ""
    with path.open() as file:
        rows = list(csv.DictReader(file)) if ending == "csv" else json.load(file)["clients"]
    assert [(row["client"], int(row["rank"])) for row in rows] == [("a", 1), ("b", 3), ("c", 10)]
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_table_is_not_read_whole(tmp_path, capsys, monkeypatch):
    endless = tmp_path / "endless.csv"
    with endless.open("wb") as file:
        file.write(b"a,b\n" * 2**11)
        file.truncate(5 * 2**30)  # five GB that take no room
    for path, message in (("/dev/zero", "got zero bytes"), (endless, "got zero bytes"), (tmp_path, "directory")):
        assert message in fails(capsys, "ranks", "--criteria", path)
    long = write(tmp_path, b"1," * 2**20, "long.csv")
    assert "expected a header of column names, got a line of over a MB" in fails(capsys, "ranks", "--criteria", long)
    monkeypatch.setattr(table_file, "MOST_BYTES", 2**20)
    large = write(tmp_path, b"a,b\n" + b"1,2\n" * 2**18, "large.csv")
    assert "expected at most 1 MB, got more" in fails(capsys, "ranks", "--criteria", large)


@pytest.mark.parametrize("name", ["config.json", "criteria.csv", "summary.json", "checkpoints/run.json"])
def test_ranks_take_the_place_of_nothing_that_a_run_left(name, tmp_path, capsys):
    path, run = write(tmp_path, TABLE, "table.csv"), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for left in ("history.json", name):
        (run / left).write_text("[]")
    assert "which belongs to a run" in fails(capsys, "ranks", "--criteria", path, "--output", run / name)
    assert (run / name).read_text() == "[]"


def test_wide_and_long_tables(tmp_path, capsys):
    names = ",".join(f"c{n}" for n in range(100_000))
    row = ",".join(["1"] * 100_000)
    wide = write(tmp_path, f"{names}\n{row}\n{row}\n", "wide.csv")
    begin = time.perf_counter()
    said = fails(capsys, "ranks", "--criteria", wide)
    assert "expected few enough criteria to compare each with each, got 100000 of 2 clients" in said
    said = fails(capsys, "ranks", "--criteria", wide, "--columns", "d1")
    assert "c28, c29 and 99970 more, got" in said
    assert time.perf_counter() - begin < 10
    numbers = np.linspace(0, 1, 50_000)
    _, ranks = criteria_table(list(map(str, range(50_000))), {"size": 1.0}, numbers, numbers, numbers.astype(int))
    assert ranks.row_count == SHOWN_RANKS
    assert ranks.caption == "49800 more clients: --output FILE.csv writes all."


def test_a_criteria_file_that_is_not_there(tmp_path, capsys):
    assert "No such file" in fails(capsys, "ranks", "--criteria", tmp_path / "none.csv")
    assert "directory" in fails(capsys, "ranks", "--criteria", tmp_path)
