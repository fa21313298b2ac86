"""Results survive the terminal that they are shown on, and folders are found wanting before there are results."""

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from autorank_jax.cli import folders
from autorank_jax.cli import main as cli
from autorank_jax.cli.folders import FILES, occupied
from autorank_jax.cli.terminal import Forgiving, counted, plain
from autorank_jax.experiment.events import Stopped
from tests.cli.cases import fails, make_results

RUN = ["run", "--dataset", "synthetic", "--split", "iid", "--clients", "4", "--devices", "1"]


@pytest.fixture
def training(monkeypatch):
    """Training that is over at once, so that what comes before and after it can be tested; how often it was asked."""
    running, asked = importlib.import_module("autorank_jax.cli.running"), []

    def over(experiment, **options):  # noqa: ARG001
        asked.append(experiment)
        return make_results()

    monkeypatch.setattr(running, "run_experiment", over)
    return asked


def test_a_run_says_whether_it_can_be_extended(tmp_path, training, monkeypatch, capsys):  # noqa: ARG001
    out, running = tmp_path / "out", importlib.import_module("autorank_jax.cli.running")
    monkeypatch.setattr(running, "save_results", lambda folder, _: ([folder / "config.json"], None))  # it draws
    begun = []
    monkeypatch.setattr(running.Stages, "begin", lambda _, stage: begun.append(stage))
    assert cli.main([*RUN, "--out", str(out)]) == 0
    without = "It cannot be extended by more rounds, as no checkpoints were kept: --checkpoint-every N keeps some.\n"
    assert capsys.readouterr().out.endswith(without)
    assert begun == ["drawing and writing"]  # which takes seconds
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert fails(capsys, "run", "--resume", out, "--rounds", "9") == (
        f"autorank-jax: resume: expected the folder of a run with checkpoints, got {out}, a run that kept none, so "
        f"that its models are gone; run it anew: autorank-jax run --config {out}/config.json --checkpoint-every 5, "
        "with more --rounds\n"
    )
    monkeypatch.setattr(running, "saved_steps", lambda _: [3])
    assert cli.main([*RUN, "--out", str(out), "--overwrite"]) == 0
    assert capsys.readouterr().out.endswith(
        "It cannot be extended by more rounds, as the state of autorank with rbla, seed 0 is not kept: only one policy"
        ", rule and seed can go on.\n"
    )
    monkeypatch.setattr(running, "run_experiment", lambda *given, **named: only_first(make_results()))  # noqa: ARG005
    assert cli.main([*RUN, "--out", str(out), "--overwrite"]) == 0
    assert capsys.readouterr().out.endswith(
        f"It can be extended by more rounds:\nautorank-jax run --resume {out} --rounds N\n"
    )


def only_first(results):
    return results._replace(runs=results.runs[:1])


def ascii_only(tmp_path):
    return (tmp_path / "printed").open("w", encoding="ascii")


def pipe_without_reader(tmp_path):  # noqa: ARG001
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w", encoding="utf-8")


def full_disk(tmp_path):  # noqa: ARG001
    return open("/dev/full", "w", encoding="utf-8")


@pytest.mark.parametrize(("stream", "code"), [(ascii_only, 0), (pipe_without_reader, 0), (full_disk, 1)])
def test_a_failing_terminal_loses_no_results(stream, code, tmp_path, training, capsys):
    out, shown = tmp_path / "out", stream(tmp_path)
    with contextlib.redirect_stdout(shown):
        assert cli.main([*RUN, "--out", str(out)]) == code
    with contextlib.suppress(OSError):  # what is held back
        shown.close()
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    assert len(training) == 1
    error = "autorank-jax: standard output: expected to print, got: No space left on device\n"
    assert capsys.readouterr().err == (error if code else "")
    if stream is ascii_only:
        text = (tmp_path / "printed").read_text()
        assert "60.0 +- 14.1 %" in text
        assert "?" not in text


def test_characters_that_a_terminal_lacks_are_written_in_others():
    assert plain("a – b ± c … ┌─┐│ 漢", "ascii") == "a - b +- c ... +-+| ?"
    assert plain("5 ± 1 …", "latin-1") == "5 ± 1 ..."
    assert plain("– 漢", "utf-8") == "– 漢"


def test_lines_in_a_file_end_in_no_blanks(tmp_path):
    with (tmp_path / "kept").open("w") as file:
        print("a  b   \n\n   c \n", file=Forgiving(file), end="")
    assert (tmp_path / "kept").read_text() == "a  b\n\n   c\n"


def test_help_into_a_pipe_that_nobody_reads(tmp_path, monkeypatch, capsys):
    pipe = pipe_without_reader(tmp_path)
    monkeypatch.setattr(sys, "stdout", pipe)
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--help"])
    with contextlib.suppress(BrokenPipeError):  # what is held back
        pipe.close()
    assert stop.value.code == 0
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_help_into_head():
    command = f"set -o pipefail; {sys.executable} -m autorank_jax run --help | head -n 1"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert process.returncode == 0
    assert process.stderr == ""


def file_in_the_way(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoints").write_text("")
    return tmp_path / "out"


def folder_in_the_way(tmp_path):
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda _: "/sys/x/y", "out: expected a folder that can be written, got /sys/x/y: "),
        (lambda path: path / ("x" * 300), "File name too long"),
        (file_in_the_way, "where checkpoints is a file"),
        (folder_in_the_way, "where config.json is a folder"),
    ],
)
def test_a_folder_that_cannot_be_written_is_found_before_training(out, message, tmp_path, training, capsys):
    folder = out(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert message in fails(capsys, *RUN, "--out", folder, "--overwrite")
    assert training == []
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_found_before_training(tmp_path, training, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (folders.ROOM // 2, limits[1]))
    try:
        assert "expected a folder that can be written" in fails(capsys, *RUN, "--out", tmp_path / "a" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert training == []
    assert list(tmp_path.iterdir()) == []


def test_two_runs_in_one_folder(tmp_path, training, monkeypatch, capsys):
    out = tmp_path / "out"
    with occupied(out):
        assert f"got {out}, where another run is going on" in fails(capsys, *RUN, "--out", out, "--overwrite")
    assert training == []
    assert not out.exists()
    assert cli.main([*RUN, "--out", str(out)]) == 0
    monkeypatch.chdir(tmp_path)
    with occupied(tmp_path / "runs" / "synthetic-iid"):  # without --out each finds a folder of its own
        assert cli.main(RUN) == 0
    assert (tmp_path / "runs" / "synthetic-iid-2" / "summary.json").exists()


def test_results_go_elsewhere_if_their_folder_fails(tmp_path, monkeypatch, training, capsys):
    files = importlib.import_module("autorank_jax.cli.files")
    real, out = files.write_file, tmp_path / "out"
    monkeypatch.setattr(files.tempfile, "mkdtemp", lambda prefix: str(tmp_path / f"{prefix}rescued"))

    def full(path, content):
        if path.parent == out and path.name == "ranks.png":
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(files, "write_file", full)
    assert cli.main([*RUN, "--out", str(out)]) == 2
    said, rescued = capsys.readouterr(), tmp_path / "autorank-jax-rescued"
    assert said.err.endswith(f"No space left on device; the results are in {rescued}\n")
    assert "final accuracy" in said.out
    assert sorted(path.name for path in rescued.iterdir()) == sorted(FILES)
    assert json.loads((rescued / "summary.json").read_text())["policies"]
    assert len(training) == 1


def test_what_ended_early_survives_a_full_disk(tmp_path, monkeypatch, capsys):
    running, files = (importlib.import_module(f"autorank_jax.cli.{name}") for name in ("running", "files"))

    def stopped(experiment, *, on_event, **options):  # noqa: ARG001
        on_event(Stopped(make_results()))
        raise KeyboardInterrupt

    real = files.write_file
    monkeypatch.setattr(running, "run_experiment", stopped)
    monkeypatch.setattr(files, "_contents", lambda _: [b""] * len(FILES))  # what it would draw
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def write(path, content):
        if path.parent == tmp_path / "out":
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(files, "write_file", write)
    assert cli.main([*RUN, "--quiet", "--out", str(tmp_path / "out")]) == 130
    (other,) = tmp_path.glob("autorank-jax-*")
    assert f"interrupted; the rounds so far are in {other}\n" in capsys.readouterr().err
    assert {path.name for path in other.iterdir()} == set(FILES)


def test_options_without_effect_are_told(tmp_path, training, monkeypatch, capsys):  # noqa: ARG001
    running = importlib.import_module("autorank_jax.cli.running")
    monkeypatch.setattr(running, "save_results", lambda folder, _: ([folder / "config.json"], None))  # it draws
    words = ["--rank-policies", "full", "--probe-epochs", "3", "--min-ratio", "0.2", "--rerank-every", "99"]
    words += ["--keep-checkpoints", "2"]
    assert cli.main([*RUN, *words, "--out", str(tmp_path / "out")]) == 0
    assert [line.split(" without ")[0] for line in capsys.readouterr().err.splitlines()] == [
        f"autorank-jax: warning: {option}: has no effect"
        for option in ("probe-epochs", "min-ratio", "rerank-every", "keep-checkpoints")
    ]
    words = ["--rank-policies", "by_size", "--min-ratio", "0.2", "--rerank-every", "2", "--quiet"]
    assert cli.main([*RUN, *words, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == ""


def test_numbers_of_things():
    assert [counted(number, "round") for number in (0, 1, 2)] == ["0 rounds", "1 round", "2 rounds"]
