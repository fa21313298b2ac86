"""The command line: what it prints and writes, and plain lines with exit code 2 for every mistake."""

import csv
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from autorank_jax.cli import main as cli
from autorank_jax.cli.entry import entry
from autorank_jax.cli.folders import FILES, default_folder
from autorank_jax.cli.signals import heard
from autorank_jax.experiment.results import Row
from tests.cli.cases import fails

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
        assert (*row, "epsilon") == Row._fields
        assert isinstance(row["accuracy"], float)
        assert row["excluded"] == 0
        assert row["participants"] == 4
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"policies", "critic_weights", "clients", "score", "device", "versions", "config"}
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
        "lost": {"excluded", "rounds"},
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
    monkeypatch.chdir(tmp_path)
    assert str(default_folder("fashion_mnist_mini-staircase", overwrite=False)) == "runs/fashion_mnist_mini-staircase"
    for name in ("fashion_mnist_mini-staircase", "fashion_mnist_mini-staircase-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    assert str(default_folder("fashion_mnist_mini-staircase", overwrite=False)) == "runs/fashion_mnist_mini-staircase-3"
    assert str(default_folder("fashion_mnist_mini-staircase", overwrite=True)) == "runs/fashion_mnist_mini-staircase"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset fashion_mnst", "probably 'fashion_mnist'"),
        ("--rank-policies autorank,biggest", "got 'biggest'"),
        ("--split stairs", "probably 'staircase'"),
        ("--aggregators fedavgg", "aggregators: expected one of"),
        ("--criteria entropy", "criteria: expected one of"),
        ("--rounds 0", "rounds: expected a whole number of at least 1, got 0"),
        ("--rounds ten", "rounds: expected a whole number, got 'ten'"),
        ("--round 3", "run: expected an option, got --round, probably --rounds (see autorank-jax run --help)"),
        ("--lr 0.1", "got --lr, probably --learning-rate (see autorank-jax run --help)"),
        ("--model a/b", "probably the folder of a language model: the command finetune trains it"),
        ("--policy full", "got --policy, probably --rank-policies (see"),
        ("--dataset fashion", "got 'fashion', probably 'fashion_mnist_mini' or 'fashion_mnist'"),
        ("--rounds 3 word", "run: expected an option, got 'word' (see autorank-jax run --help)"),
        ("--config a.json --config=b.json", "config: expected it once, got it 2 times"),
        ("--resume a --resume a", "resume: expected it once, got it 2 times"),
        ("--resume " + "x" * 300, "without checkpoints/run.json"),
        ("--hidden 8,x", "hidden: expected whole numbers with commas between them"),
        ("--participation 50", "probably a percentage"),
        ("--rank-policies manual --ratios 0.5,64,1,1", "probably a rank"),
        (
            "--max-ranks 64,99",
            "max-ranks: expected at most 10 for layer layers/1, the longer side of its",
        ),
        ("--drop-out 1", "drop-out: expected a number of at least 0 and below 1, got 1.0"),
        ("--drop-out 0.9999999999", "drop-out: expected a number that is below 1 in float32, got 0.9999999999"),
        ("--learning-rate 1e-300", "learning-rate: expected a number that float32 holds"),
        ("--clients 5000", "each of 5000 clients, got "),
        ("--split staircase --clients 7", "clients: expected 10 on the staircase split"),
        ("--dataset cinic10", "expected a file at"),
        ("--dataset ../etc", "dataset: expected one of"),
    ],
)
def test_mistakes_in_a_run(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORANK_JAX_DATA", str(tmp_path / "none"))
    problems = fails(capsys, *TINY, *arguments.split(), "--out", tmp_path / "out")
    assert message in problems
    assert problems.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_learning_rate_that_excludes_everybody(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main([*TINY, "--learning-rate", "1e30", "--rounds", "1", "--out", str(out)]) == 3
    assert "no client has sent a finite update for 1 round in round 1; probably the learning rate 1e+30 is too" in (
        capsys.readouterr().err
    )
    assert json.loads((out / "history.json").read_text())[0]["reported"] == 0


@pytest.mark.slow
def test_more_devices_than_cores(tmp_path):
    command = [sys.executable, "-m", "autorank_jax", *TINY, "--devices", "99", "--out", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("autorank-jax: devices: expected at most the ")
    assert not (tmp_path / "out").exists()


def test_a_refused_run_leaves_nothing_to_resume(capsys, tmp_path):
    problems = fails(capsys, *TINY, "--clients", "5000", "--checkpoint-every", "1", "--out", tmp_path / "out")
    assert "one example for each of" in problems
    assert list(tmp_path.iterdir()) == []


def test_all_mistakes_come_at_once(capsys):
    problems = fails(capsys, "run", "--rounds", "0", "--split", "stairs", "--seeds", "0")
    assert [line.split(": ")[1] for line in problems.splitlines()] == ["split", "rounds", "seeds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [],
            "cache, completion, got none (see autorank-jax --help)",
        ),
        (
            ["frobnicate"],
            "expected one of run, finetune, compare, ranks, data, cache, completion, got 'frobnicate' (see",
        ),
        (["ranks"], "criteria: expected --criteria PATH, got none (see autorank-jax ranks --help)"),
        (["ranks", "--criterria", "x.csv"], "got --criterria, probably --criteria (see autorank-jax ranks --help)"),
        (["completion"], "completion: expected one shell out of bash, zsh, fish, tcsh, got none"),
        (["data", "--all"], "data: expected no option, got --all (see autorank-jax data --help)"),
    ],
)
def test_mistakes_in_commands(arguments, message, capsys):
    problems = fails(capsys, *arguments)
    assert problems.count("\n") == 1
    assert message in problems


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
    dispatch = importlib.import_module("autorank_jax.cli.dispatch")

    def interrupted(command):  # noqa: ARG001
        raise KeyboardInterrupt

    monkeypatch.setattr(dispatch, "execute", interrupted)
    assert cli.main(["data"]) == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.setattr(cli.sys, "argv", ["autorank-jax", "data"])
    ended = []
    monkeypatch.setattr(cli.os, "_exit", ended.append)  # Python itself would wait for XLA, which may be compiling
    with pytest.raises(SystemExit):
        entry()
    assert ended == [130]


def test_a_signal_before_anything_is_loaded_ends_in_a_line(tmp_path):
    slow = tmp_path / "logging.py"  # which the command line loads early
    slow.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nraise ImportError\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}", "PATH": os.environ["PATH"]}
    command = [sys.executable, "-m", "autorank_jax", "data"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (143, "autorank-jax: interrupted\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_signals_end_as_an_interrupt_does(number, code, monkeypatch, capsys):
    dispatch = importlib.import_module("autorank_jax.cli.dispatch")
    before = signal.signal(
        number, signal.default_int_handler
    )  # so that it does not end the tests where it is not heard
    monkeypatch.setattr(dispatch, "execute", lambda command: signal.raise_signal(number))  # noqa: ARG005
    try:
        assert cli.main(["data"]) == code
        signal.signal(number, signal.SIG_IGN)
        with heard():
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err == "autorank-jax: interrupted; nothing was written\n"


def test_an_interrupt_is_not_lost_where_python_ignores_exceptions():
    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    with heard(), pytest.raises(KeyboardInterrupt):
        time.sleep(20 * bool(Finalized()))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_waits_for_what_is_being_loaded(tmp_path, monkeypatch):
    (tmp_path / "loaded_slowly.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with heard(), pytest.raises(KeyboardInterrupt):
        time.sleep(20 * importlib.import_module("loaded_slowly").whole)
    assert sys.modules["loaded_slowly"].whole


def test_an_interrupt_before_anything_began(monkeypatch, capsys):
    def interrupted(name):  # noqa: ARG001
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["data"]) == 130
    assert capsys.readouterr().err == "autorank-jax: interrupted; nothing was written\n"


def test_the_exit_code_is_that_of_the_command(monkeypatch):
    for code in (0, 2):
        monkeypatch.setattr(cli, "main", lambda code=code: code)
        with pytest.raises(SystemExit) as left:
            entry()
        assert left.value.code == code
