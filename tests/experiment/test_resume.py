"""A run that is killed, stopped or lost at any moment goes on bit for bit; one that diverges says so."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from autorank_jax.checkpoint import CheckpointError, saved_steps
from autorank_jax.engine import LevelChoice
from autorank_jax.experiment import checkpoints
from autorank_jax.experiment import run as run_module
from autorank_jax.experiment.checkpoints import Checkpoints, full_configuration
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.events import Resumed, Stopped
from autorank_jax.experiment.run import run_experiment
from tests.cli.cases import fails

OPTIONS = {
    "dataset": "synthetic", "clients": "5", "split": "dirichlet_lognormal", "hidden": "8", "rounds": "6",
    "local-epochs": "1", "probe-epochs": "2", "rank-levels": "1", "rank-policies": "autorank,full", "seeds": "2",
    "participation": "0.8", "drop-out": "0.2", "stragglers": "0.3", "straggler-steps": "2", "rerank-every": "2",
    "learning-rate": "0.05", "clip-norm": "5", "targets": "0.5",
}  # fmt: skip
TINY = ["run", *(word for name, value in OPTIONS.items() for word in (f"--{name}", value))]
ROUNDS = 24  # two policies, two seeds, six rounds
KILLS = 20


class Commands:
    """Starts the command line, each time as a process of its own."""

    def __init__(self, folder):
        self.folder = folder
        environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(folder / "cache"))
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        script = str(Path(__file__).with_name("commands_by_fork.py"))
        self.parent = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *arguments):
        self.parent.stdin.write(json.dumps([str(self.folder / "said"), *map(str, arguments)]) + "\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline())

    def end(self):
        """Wait for the end of the process: its exit code and what it said."""
        return int(self.parent.stdout.readline()), (self.folder / "said").read_text()

    def run(self, *arguments):
        self.start(*arguments)
        return self.end()


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    made = Commands(tmp_path_factory.mktemp("resume"))
    yield made
    made.parent.stdin.close()
    made.parent.wait()
    made.parent.stdout.close()


@pytest.fixture(scope="module")
def whole(commands):
    """The folder of a run that nobody interrupts."""
    out = commands.folder / "whole"
    code, said = commands.run(*TINY, "--out", out, "--checkpoint-every", 1)
    assert code == 0, said
    assert "dropped out" in said
    return out


def history(out):
    return [row | {"seconds": 0} for row in json.loads((out / "history.json").read_text())]


def arrays(out):
    folder = out / "checkpoints"
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(folder / f"step_{saved_steps(folder)[-1]:08d}" / "arrays")


def assert_same_run(one, other):
    """Compare every bit of the last state, every row of the history, every score."""
    assert history(one) == history(other)
    assert (one / "criteria.csv").read_bytes() == (other / "criteria.csv").read_bytes()
    assert saved_steps(one / "checkpoints")[-1] == saved_steps(other / "checkpoints")[-1] == ROUNDS
    held, expected = arrays(one), arrays(other)
    assert held.keys() == expected.keys()
    assert len(held) > 10
    for name, value in held.items():
        assert np.asarray(value).tobytes() == np.asarray(expected[name]).tobytes(), name


def wait_for(condition, limit=60):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "the process makes no progress"
        time.sleep(0.0005)


def saving(folder):
    return any(folder.glob(".saving-*/*"))


@pytest.mark.slow
def test_killed_twenty_times(commands, whole):
    """SIGKILL at 20 moments: before anything is there, between rounds, while a checkpoint is written."""
    out, chance, left = commands.folder / "killed", random.Random(0), 0
    folder = out / "checkpoints"
    for number in range(KILLS):
        resume = (folder / "run.json").exists()
        process = commands.start(
            *(["run", "--resume", out] if resume else [*TINY, "--out", out, "--checkpoint-every", 1])
        )
        done = (saved_steps(folder) or [0])[-1] if resume else 0
        if number == 0:
            time.sleep(0.3)
        elif number == 1:
            wait_for((folder / "run.json").exists)
        else:
            wait_for(lambda done=done: (saved_steps(folder) or [0])[-1] > done)
            if number % 2:
                wait_for(lambda: saving(folder))
                time.sleep(chance.uniform(0, 0.01))
            else:
                time.sleep(chance.uniform(0, 0.05))
        os.kill(process, signal.SIGKILL)
        code, said = commands.end()
        assert code == -signal.SIGKILL, said
        left += saving(folder)
        if (saved_steps(folder) or [0])[-1] >= ROUNDS - 2 and number < KILLS - 1:  # too fast: begin again
            shutil.rmtree(out)
    code, said = commands.run("run", "--resume", out)
    assert code == 0, said
    assert left >= 3, "no kill met a checkpoint being written"
    assert not saving(folder)
    assert_same_run(out, whole)


@pytest.mark.slow
def test_ctrl_c_finishes_the_round_and_says_how_to_go_on(commands, whole):
    out = commands.folder / "stopped"
    process = commands.start(*TINY, "--out", out, "--checkpoint-every", 2)
    wait_for(lambda: saved_steps(out / "checkpoints"))
    os.kill(process, signal.SIGINT)
    code, said = commands.end()
    assert code == 130, said
    assert "Traceback" not in said
    assert f"go on with: autorank-jax run --resume {out}" in said
    assert "interrupted after round" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["stopped"].startswith("interrupted after round")
    assert json.loads((out / "config.json").read_text()) == summary["config"]
    assert history(out) == history(whole)[: saved_steps(out / "checkpoints")[-1]]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("accuracy.png", "ranks.png"))
    step = saved_steps(out / "checkpoints")[-1]
    code, said = commands.run("run", "--resume", out)
    assert code == 0
    assert f"Going on after {step} rounds" in said
    assert_same_run(out, whole)
    code, said = commands.run("run", "--resume", out)  # nothing is left to do: the files are written again
    assert code == 0
    assert_same_run(out, whole)


@pytest.mark.slow
def test_config_json_runs_again_to_the_same_history(commands, whole):
    out = commands.folder / "again"
    code, said = commands.run("run", "--config", whole / "config.json", "--out", out)
    assert code == 0, said
    assert history(out) == history(whole)
    assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert not (out / "checkpoints").exists()


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_names_where(commands):
    out = commands.folder / "diverged"
    code, said = commands.run(
        *TINY, "--learning-rate", "1e38", "--clip-norm", "0", "--out", out, "--checkpoint-every", 1
    )
    assert code == 3, said
    last = said.splitlines()[-1]
    assert last.startswith("autorank-jax: autorank with raflora, seed 0: ")
    assert "in round " in last
    assert "probably the learning rate 1e+38 is too large" in last
    steps = saved_steps(out / "checkpoints")
    good = f"checkpoint is {out}/checkpoints/step_{steps[-1]:08d}" if steps else "no checkpoint of it was saved"
    assert good in last
    rows = history(out)
    assert f"in round {len(rows)};" in last
    assert all(row["train_loss"] is None or np.isfinite(row["train_loss"]) for row in rows)


@pytest.mark.slow
def test_callbacks_log_stop_early_and_lose_nothing(tmp_path, monkeypatch):
    one = Experiment(
        dataset="synthetic", split="iid", clients=3, hidden=(4,), rank_policies=("full", "by_size"), rounds=5,
        local_epochs=1, criteria=("size",),
    )  # fmt: skip
    two = LevelChoice(({"layers/0": 2, "layers/1": 1}, {"layers/0": 3, "layers/1": 2}), 1.0, 1.0)
    monkeypatch.setattr(run_module, "levels_for", lambda *_: two)
    kept, seen, events = Checkpoints(tmp_path / "kept"), [], []

    def failing(end):
        seen.append((end.row.policy, end.row.round, int(end.state.round), int(end.info.participants)))
        if end.row.round == 3:
            raise OSError("the logger's disk is full")

    with pytest.raises(OSError, match="the logger's disk is full"):
        run_experiment(one, on_round=failing, on_event=events.append, checkpoints=kept)
    assert seen == [("full", number, number, 3) for number in (1, 2, 3)]
    assert saved_steps(kept.folder) == [3]
    assert [event.results.stopped for event in events if isinstance(event, Stopped)] == ["the logger's disk is full"]
    assert [row.round for run in events[-1].results.runs for row in run.rows] == [1, 2, 3]
    events = []
    monkeypatch.setattr(run_module, "levels_for", lambda *_: pytest.fail("levels are chosen once"))
    early = lambda end: end.row.policy == "full" and end.row.round == 4  # noqa: E731
    results = run_experiment(one, on_round=early, on_event=events.append, checkpoints=kept)
    assert [event for event in events if isinstance(event, Resumed)] == [Resumed(3, ())]
    assert [len(run.rows) for run in results.runs] == [4, 5]
    monkeypatch.setattr(run_module, "levels_for", lambda *_: two)
    plain = run_experiment(one, on_round=early)
    without = lambda found: [row._replace(seconds=0) for run in found.runs for row in run.rows]  # noqa: E731
    assert without(results) == without(plain)


@pytest.mark.slow
def test_more_rounds_later_are_more_rounds_at_once(commands, capsys):
    """Ranks set anew, drop-out, sampling and rare evaluation included."""
    one, part = [*TINY, "--rank-policies", "autorank", "--seeds", 1, "--eval-every", 2], commands.folder / "part"
    code, said = commands.run(*one, "--rounds", 7, "--out", commands.folder / "at_once", "--checkpoint-every", 1)
    assert code == 0, said
    code, said = commands.run(*one, "--rounds", 4, "--out", part, "--checkpoint-every", 3)
    assert code == 0, said
    assert "more than the 4 that are done, got 3" in fails(capsys, "run", "--resume", part, "--rounds", 3)
    code, said = commands.run("run", "--resume", part, "--rounds", 7)
    assert code == 0, said
    whole = commands.folder / "at_once"
    assert history(part) == history(whole)
    assert len(history(part)) == 7
    held, expected = arrays(part), arrays(whole)
    assert {name: np.asarray(value).tobytes() for name, value in held.items()} == {
        name: np.asarray(value).tobytes() for name, value in expected.items()
    }
    assert json.loads((part / "checkpoints" / "run.json").read_text())["experiment"]["rounds"] == 7
    assert "rounds: expected 7 as before, as the last of them is tested" in fails(
        capsys, "run", "--resume", part, "--rounds", 9
    )


@pytest.mark.slow
def test_resuming_something_else_is_refused(commands, whole, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(whole, out)
    problems = fails(capsys, "run", "--resume", out, "--rounds", 7, "--split", "iid")
    assert "split: expected dirichlet_lognormal beside --resume, as that run has it, got iid" in problems
    problems = fails(capsys, "run", "--resume", out, "--rounds", 7)
    assert "rounds: expected 6 as before, as the state of autorank with raflora, seed 0 is not kept" in problems
    assert "--resume" in fails(capsys, *TINY, "--out", out)
    assert "expected no --config" in fails(capsys, "run", "--resume", out, "--config", out / "config.json")
    assert "out: expected none beside --resume" in fails(capsys, "run", "--resume", out, "--out", tmp_path / "x")
    assert "without checkpoints/run.json" in fails(capsys, "run", "--resume", tmp_path)
    newest = out / "checkpoints" / f"step_{ROUNDS:08d}"
    file = max(
        (path for path in (newest / "arrays").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    file.write_bytes(file.read_bytes()[:-1])
    assert f"delete {newest} to go on from the checkpoint before it" in fails(capsys, "run", "--resume", out)
    shutil.rmtree(newest)
    code, _ = commands.run("run", "--resume", out)
    assert code == 0
    assert_same_run(out, whole)


@pytest.mark.slow
def test_a_checkpoint_of_before_an_option_came_is_gone_on_with(tmp_path, monkeypatch):
    one = Experiment(
        dataset="synthetic", split="iid", clients=3, hidden=(4,), rank_policies=("full",), rounds=3, local_epochs=1,
        rank_levels=1, probe_ratio=1.0, probe_share=1.0,
    )  # fmt: skip
    kept = Checkpoints(tmp_path)

    def stop(end):
        if end.row.round == 2:
            raise KeyboardInterrupt

    def before(*arguments):
        config = full_configuration(*arguments)
        assert (config.pop("probe_ratio"), config.pop("probe_share")) == (1.0, 1.0)
        return config

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "full_configuration", before)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(one, on_round=stop, checkpoints=kept)
    events = []
    results = run_experiment(one, on_event=events.append, checkpoints=kept)
    assert Resumed(2, ()) in events
    assert [row.round for row in results.runs[0].rows] == [1, 2, 3]
    with pytest.raises(CheckpointError, match="probe_ratio"):
        run_experiment(dataclasses.replace(one, rank_policies=("autorank",), probe_ratio=0.5), checkpoints=kept)
