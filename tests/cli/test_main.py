"""The command line: what it prints and writes, and plain lines with exit code 2 for every mistake."""

import csv
import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from autorank_jax.cli import main as cli
from autorank_jax.cli.files import FILES
from autorank_jax.experiment import config as configuration
from autorank_jax.experiment.results import Row
from autorank_jax.ranks import policies

OPTIONS = {
    "dataset": "synthetic", "clients": "4", "split": "dirichlet_lognormal", "hidden": "8", "rounds": "2",
    "local-epochs": "1", "probe-epochs": "2", "rank-levels": "1", "rank-policies": "autorank,full",
    "criteria": "size,loss_entropy", "targets": "0.5",
}  # fmt: skip
TINY = ["run", *(word for name, value in OPTIONS.items() for word in (f"--{name}", value))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the whole command in a process of its own."""
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "autorank_jax", *TINY, "--out", str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False), folder / "out"


def fails(capsys, *arguments):
    """Run a command that must fail with exit code 2, and return its complaint, one line per mistake."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines
    assert all(line.startswith("autorank-jax: ") for line in lines)
    assert "Traceback" not in captured.err
    return captured.err


def test_run_shows_tables_and_writes_files(finished):
    process, out = finished
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    for words in ("Clients under seed 0", "weight", "closeness", "Comparison", "final accuracy", "autorank", "full"):
        assert words in process.stdout
    assert "staircase" not in process.stdout  # that remark belongs to the staircase
    assert f"Written to {out}" in process.stdout
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)


def test_schemas(finished):
    out = finished[1]
    history = json.loads((out / "history.json").read_text())
    assert [(row["policy"], row["round"]) for row in history] == [
        ("autorank", 1), ("autorank", 2), ("full", 1), ("full", 2),
    ]  # fmt: skip
    for row in history:
        assert tuple(row) == Row._fields
        assert isinstance(row["accuracy"], float)
        assert row["excluded"] == 0
        assert row["participants"] == 4
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"policies", "critic_weights", "clients", "device", "versions", "config"}
    assert set(summary["critic_weights"]) == {"size", "loss_entropy"}
    assert sum(summary["critic_weights"].values()) == pytest.approx(1, abs=1e-5)
    assert set(summary["policies"]) == {"autorank", "full"}
    schema = {
        "final_accuracy": {"mean", "sd", "values"},
        "best_accuracy": {"mean", "sd", "values"},
        "area_under_curve": {"mean", "sd", "values"},
        "rounds_to": {"0.5"},
        "mean_ratio": {"clients", "examples"},
        "bytes_per_round": {"up", "down"},
        "train_flops": {"per_round", "total", "probe", "slowest_client"},
        "seconds": {"compile", "train"},
    }
    for policy, numbers in summary["policies"].items():
        assert set(numbers) == {*schema, "examples_behind_highest_ratio", "trained_parameters"}
        assert {name: set(numbers[name]) for name in schema} == schema
        last = [row for row in history if row["policy"] == policy][-1]
        assert numbers["final_accuracy"]["values"] == [last["accuracy"]]
        assert numbers["train_flops"]["total"] == last["train_flops"]
    assert set(summary["versions"]) == {"python", "autorank-jax", "jax", "jaxlib", "flax", "optax", "numpy"}
    assert summary["config"] == json.loads((out / "config.json").read_text())
    with (out / "criteria.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in summary["clients"]] == [list(row) for row in rows]
    assert sum(int(row["examples"]) for row in rows) == 1000


def test_a_run_is_refused_before_it_begins_if_its_folder_is_taken(finished, capsys):
    out = finished[1]
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert "give --overwrite or another --out" in fails(capsys, *TINY, "--out", out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.slow
def test_quiet_overwriting_run_repeats_its_history(finished, capsys):
    out = finished[1]
    before = json.loads((out / "history.json").read_text())
    assert cli.main([*TINY, "--out", str(out), "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    after = json.loads((out / "history.json").read_text())
    for row in (*before, *after):
        row.pop("seconds")
    assert before == after


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    commands = importlib.import_module("autorank_jax.cli.commands")
    monkeypatch.chdir(tmp_path)
    experiment = commands.Experiment()
    assert str(commands.default_folder(experiment, False)) == "runs/fashion_mnist_mini-staircase"
    for name in ("fashion_mnist_mini-staircase", "fashion_mnist_mini-staircase-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    assert str(commands.default_folder(experiment, False)) == "runs/fashion_mnist_mini-staircase-3"
    assert str(commands.default_folder(experiment, True)) == "runs/fashion_mnist_mini-staircase"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset fashion_mnst", "probably 'fashion_mnist'"),
        ("--rank-policies autorank,biggest", "got 'biggest'"),
        ("--split stairs", "probably 'staircase'"),
        ("--aggregators fedavgg", "aggregators: expected one of"),
        ("--criteria entropy", "criteria: expected one of"),
        ("--rounds 0", "rounds: expected a whole number of at least 1, got 0"),
        ("--rounds ten", "Error parsing --rounds"),
        ("--round 3", "expected options that exist, got --round, probably --rounds (see autorank-jax run --help)"),
        ("--sedes 3 --round=3", "got --sedes, --round, probably --seeds, --rounds (see autorank-jax run --help)"),
        ("--learning-rat 0.1 --nothing-like-it", "got --learning-rat, --nothing-like-it, probably --learning-rate ("),
        ("--rounds 3 word", "expected options that exist, got word (see"),
        ("--config a.json --config=b.json", "config: expected it once, got it 2 times"),
        ("--resume a --resume a", "resume: expected it once, got it 2 times"),
        ("--hidden 8,x", "--hidden"),
        ("--participation 50", "probably a percentage"),
        ("--rank-policies manual --ratios 0.5,64,1,1", "probably a rank"),
        ("--clients 5000", "probably too many clients for this dataset"),
        ("--split staircase --clients 7", "expected 10 clients for 10 classes"),
        ("--dataset cinic10", "expected a file at"),
        ("--dataset ../etc", "dataset: expected one of"),
    ],
)
def test_mistakes_in_a_run(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORANK_JAX_DATA", str(tmp_path / "none"))
    complaint = fails(capsys, *TINY, *arguments.split(), "--out", tmp_path / "out")
    assert message in complaint
    assert complaint.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_all_mistakes_come_at_once(capsys):
    complaint = fails(capsys, "run", "--rounds", "0", "--split", "stairs", "--seeds", "0")
    assert [line.split(": ")[1] for line in complaint.splitlines()] == ["split", "rounds", "seeds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of {run, ranks, data, cache}"),
        (["frobnicate"], "expected one of run, ranks, data, cache, got frobnicate (see autorank-jax --help)"),
        (["ranks"], "expected --criteria, got none (see autorank-jax ranks --help)"),
        (["ranks", "--criterria", "x.csv"], "expected --criteria, got --criterria (see autorank-jax ranks --help)"),
        (["data", "--all"], "expected one of list, fetch, got --all (see autorank-jax data --help)"),
    ],
)
def test_mistakes_in_commands(arguments, message, capsys):
    complaint = fails(capsys, *arguments)
    assert complaint.count("\n") == 1
    assert message in complaint


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["ranks", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "autorank-jax" in capsys.readouterr().out


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    commands = importlib.import_module("autorank_jax.cli.commands")
    for name in commands.Experiment.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in text
    assert "default:autorank,by_size,uniform,full)" in "".join(text.split())
    for words in (configuration.POLICIES, configuration.AGGREGATORS):
        for name in words:
            assert re.search(rf"^  {name} +\w", text, re.MULTILINE), f"{name} is explained"


def test_the_list_of_commands_is_short(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) < 25


def test_data(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORANK_JAX_DATA", str(tmp_path))
    np.savez(tmp_path / "mine.npz", x_train=np.zeros(100))
    (tmp_path / "cifar10.npz").write_bytes((tmp_path / "mine.npz").read_bytes()[:-50])
    assert cli.main(["data"]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1] for line in text.splitlines() if len(line.split()) > 2}
    assert lines["fashion_mnist_mini"] == "yes"
    assert lines["mnist"] == "no"
    assert lines["mine"] == "yes"
    assert lines["cifar10"] == "damaged"
    assert str(tmp_path) in text


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


@pytest.mark.parametrize("text", ["a;b\n1;2\n3;4\n", "a\tb\n1\t2\n3\t4\n", "\ufeffa, b\r\n1, 2\r\n\r\n3, 4\r\n"])
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
        ("a,b\n1,nan\n", [], "line 2, column 'b', got 'nan'"),
        ("a,b\n1,inf\n", [], "line 2, column 'b', got 'inf'"),
        ("a,b\n1,\n", [], "line 2, column 'b', got nothing"),
        ("a,b\n1,2\n3,many\n", [], "line 3, column 'b', got 'many'"),
        ("a,b\n1,2\nmany,3\n", [], "line 3, column 'a', got 'many'"),
        ("a\nmany\n", [], "got 'many'"),
        ("1,2\n3,4\n", [], "got only numbers in the first line"),
        ("a,a\n1,2\n", [], "got 'a' twice"),
        ("a,,c\n1,2,3\n", [], "a name for every column"),
        ("a,b\n1,2\n", ["--cost", "bb"], "cost: expected a column out of a, b, got 'bb', probably 'b'"),
        ("a,b\n1,1e200\n", [], "expected a finite number"),
        (b"PK\x03\x04\x00\x00\xff", [], "probably a spreadsheet"),
        ("a,b\n1,2\n", ["--max-rank", "0"], "max-rank: expected a whole number of at least 1, got 0"),
        ("a,b\n1,2\n", ["--min-ratio", "10"], "probably a percentage"),
        ("a,b\n1,2\n", ["--normalization", "max"], "normalization: expected one of"),
    ],
)
def test_mistakes_in_a_criteria_file(text, options, message, tmp_path, capsys):
    complaint = fails(capsys, "ranks", "--criteria", write(tmp_path, text), *options)
    assert message in complaint
    assert complaint.count("\n") == 1


def test_a_criteria_file_that_is_not_there(tmp_path, capsys):
    assert "No such file" in fails(capsys, "ranks", "--criteria", tmp_path / "none.csv")
    assert "directory" in fails(capsys, "ranks", "--criteria", tmp_path)


@pytest.mark.parametrize("missing", cli.EXTRA)
def test_without_the_extra_packages(missing, monkeypatch, capsys):
    def absent(name):  # noqa: ARG001
        raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    assert cli.main(["data"]) == 1
    assert (
        capsys.readouterr().err == f'autorank-jax: the command line needs {missing}: pip install "autorank-jax[cli]"\n'
    )


def test_interrupt(monkeypatch, capsys):
    commands = importlib.import_module("autorank_jax.cli.commands")

    def interrupted(command):  # noqa: ARG001
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "execute", interrupted)
    assert cli.main(["data"]) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.setattr(cli.sys, "argv", ["autorank-jax", "data"])
    ended = []
    monkeypatch.setattr(cli.os, "_exit", ended.append)  # Python itself would wait for XLA, which may be compiling
    with pytest.raises(SystemExit):
        cli.entry()
    assert ended == [130]


def test_the_exit_code_is_that_of_the_command(monkeypatch):
    for code in (0, 2):
        monkeypatch.setattr(cli, "main", lambda code=code: code)
        with pytest.raises(SystemExit) as left:
            cli.entry()
        assert left.value.code == code
