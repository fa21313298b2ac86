"""The command for an accelerator: parts in processes of their own, written row by row, gone on with."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from autorank_jax.types import Adapter, Base, Server, Trainable
from benchmarks import script
from benchmarks.speed import gpu, gpu_parts

ROOT = Path(__file__).parents[2]
ABOUT = {"versions": {"jax": "1"}, "device": {"platform": "gpu", "kind": "a card", "cores": 1, "date": "2026-01-01"}}
KINDS = (
    "agreement",
    "speed cnn",
    "scale",
    "language ranks",
    "language pfl",
    "graphs cnn",
    "precision cnn",
    "svd",
    "compilation",
)


def options(tmp_path, *words):
    return gpu.parse(["--json", str(tmp_path / "gpu.json"), *words])


def nothing():
    return {"rows": [], "finished": [], "ended": {}}


def test_rows_are_written_at_once_and_finished_parts_are_not_measured_again(tmp_path, monkeypatch):
    asked, chosen = [], options(tmp_path, "--parts", "svd,scale")

    def fake(part, **_):
        if part == "nothing":
            yield {"about": ABOUT}
            return
        asked.append(part)
        yield {"about": ABOUT}
        yield {"row": {"size": len(asked), "seconds": 1.0}}
        assert json.loads(chosen.json.read_text())["rows"][-1]["size"] == len(asked)
        yield {"end": None if part == "svd" or len(asked) > 2 else "out of time"}

    monkeypatch.setattr(gpu, "run_part", fake)
    content = gpu.measure(nothing(), chosen)
    assert (content["finished"], content["ended"]) == (["svd"], {"scale": "out of time"})
    assert "- scale: out of time" in gpu.tables(content)["not finished"]
    content = gpu.measure(script.read(chosen.json), chosen)
    assert asked == ["svd", "scale", "scale"]
    assert (content["finished"], content["ended"]) == (["svd", "scale"], {})
    assert [(row["part"], row["size"]) for row in content["rows"]] == [("svd", 1), ("scale", 3)]


@pytest.mark.parametrize("change", ["--rehearse", "device", "versions"])
def test_results_of_another_device_or_version_are_not_gone_on_with(change, tmp_path, monkeypatch):
    def fake(_, **__):
        yield {"about": ABOUT if change == "--rehearse" else ABOUT | {change: {"jax": "2"}}}
        yield {"end": None}

    monkeypatch.setattr(gpu, "run_part", fake)
    words = ["--rehearse"] if change == "--rehearse" else []
    old = nothing() | ABOUT | {"rows": [{"part": "svd", "size": 1}], "finished": ["svd"], "rehearse": False}
    content = gpu.measure(old, options(tmp_path, "--parts", "scale", *words))
    assert (content["rows"], content["finished"]) == ([], ["scale"])


def test_rows_are_not_lost_to_a_shorter_attempt_and_later_turns_take_their_place(tmp_path, monkeypatch):
    turns = [1, 1, 5]

    def fake(part, **_):
        yield {"about": ABOUT}
        if part != "nothing":
            for name, turn in zip("aba", turns, strict=False):
                yield {"row": {"competitor": name, "turns": turn}}
            yield {"end": "out of time" if len(turns) == 1 else None}

    monkeypatch.setattr(gpu, "run_part", fake)
    chosen = options(tmp_path, "--parts", "speed cnn")
    content = gpu.measure(nothing(), chosen)
    assert [(row["competitor"], row["turns"]) for row in content["rows"]] == [("b", 1), ("a", 5)]
    turns[:] = [1]
    content["finished"].clear()
    assert len(gpu.measure(content, chosen)["rows"]) == 2


def test_a_competitor_that_finds_no_memory_is_told_and_the_others_go_on():
    def fail():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: much\nmore")

    assert gpu_parts.attempt(fail) == "RESOURCE_EXHAUSTED: much"
    assert gpu_parts.attempt(lambda: 3.0) == 3.0


def test_no_part_begins_without_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run_part", lambda *_, **__: pytest.fail("began"))
    assert gpu.measure(nothing(), options(tmp_path, "--seconds", "0"))["rows"] == []


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            "import os; print('{\"row\": {}}', flush=True); os.abort()",
            [{"row": {}}, {"end": "ended with exit code -6"}],
        ),
        ("import time; print('{\"row\": {}}', flush=True); time.sleep(60)", [{"row": {}}, {"end": "out of time"}]),
        ("print('other words'); print('{\"row\": {}}')", [{"row": {}}, {"end": None}]),
    ],
    ids=["crash", "hang", "finish"],
)
def test_a_part_that_crashes_or_hangs_ends_alone(program, said, monkeypatch):
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda _, **how: start([sys.executable, "-c", program], stdout=how["stdout"])
    )
    assert list(gpu.run_part("svd", rehearse=True, seconds=3)) == said


def test_speed_is_relative_to_the_yardstick_and_drawn():
    row = {"part": "speed cnn", "workload": "cnn", "chosen": False, "peak_bytes": 2_000_000}
    rows = [
        row | {"competitor": "ours, 8 lanes", "lanes": 8, "samples_per_second": 30.0, "chosen": True},
        row | {"competitor": "centralised", "batch_size": 9, "samples_per_second": 60.0},
        {"part": "scale", "clients": 10, "microseconds_per_example": 3.0},
    ]
    content = nothing() | ABOUT | {"rows": rows}
    table = gpu.tables(content)["speed"].splitlines()
    assert table[2] == "| cnn | ours, 8 lanes | 30 | 0.5 | 2 | yes |"
    left, right = gpu.draw(content).axes
    assert left.lines[0].get_ydata() == [0.5]
    assert right.lines[0].get_ydata() == [3.0]


def test_servers_differ_by_their_layers_whole_matrices():
    def server(sign, bias=1.0, last=2.0):
        adapter = Adapter(sign * np.ones((2, 1)), sign * np.array([[1.0, last]]))
        return Server(Trainable({"a": adapter}, {"bias": np.full(3, bias)}), Base({"a": np.zeros((2, 2))}, ()))

    assert gpu_parts.difference(server(-1), server(1)) == 0
    assert gpu_parts.difference(server(1, bias=1.5), server(1)) == pytest.approx(0.5)
    assert gpu_parts.difference(server(1, last=3.0), server(1)) == pytest.approx(1 / 5**0.5)


def test_unknown_parts_are_named(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--parts", "speed"])
    assert "got speed" in capsys.readouterr().err
    assert isinstance(gpu.parse([]), argparse.Namespace)


@pytest.mark.slow
def test_everything_is_rehearsed(tmp_path):
    results = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.speed.gpu", "--rehearse", "--json", str(results)]
    command += ["--parts", ",".join(KINDS)]
    assert {part.partition(" ")[0] for part in KINDS} == {part.partition(" ")[0] for part in gpu_parts.PARTS}
    subprocess.run(command, check=True, timeout=900, cwd=ROOT)
    content = json.loads(results.read_text())
    assert content["finished"] == list(KINDS), content["ended"]
    gaps = [row["difference"] for row in content["rows"] if row["part"] in ("agreement", "svd")]
    assert max(gaps) < 1e-4
    assert all(row["equal_bits"] for row in content["rows"] if row["part"].startswith("graphs"))
    assert {row["workload"] for row in content["rows"] if row.get("finite")} == {"ranks", "pfl"}
    assert results.with_suffix(".png").stat().st_size > 0
