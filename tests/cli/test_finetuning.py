"""The command `finetune`: what it leaves behind, and a line for every mistake."""

import csv
import dataclasses
import json
import math
import signal
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autorank_jax.checkpoint import CheckpointError, save_state, saved_steps
from autorank_jax.cli import finetuning, language_report, stages
from autorank_jax.cli import main as cli
from autorank_jax.cli.language_report import ADAPTER
from autorank_jax.experiment import language
from autorank_jax.experiment.checkpoints import Checkpoints
from autorank_jax.experiment.events import Resumed
from autorank_jax.experiment.language_options import LanguageOptions, as_json
from autorank_jax.experiment.language_results import (
    Begun,
    Clock,
    Ended,
    LanguageClient,
    LanguageResults,
    LanguageRow,
    LanguageStopped,
    Sample,
    check_round,
)
from autorank_jax.experiment.language_setup import _decoder, load, shortest_prompt
from autorank_jax.experiment.mistakes import ConfigurationError
from autorank_jax.experiment.results import LanguageDivergedError
from autorank_jax.federated.texts import TextReport
from autorank_jax.models.causal_lm import ByteTokenizer
from autorank_jax.types import Base, RoundInfo, Server, State, Task, Trainable
from tests.cli.cases import fails
from tests.models.causal_cases import CONFIG

REPORT = TextReport(42, 42, 1800, 400, 64, 0.33, ("line 7: 99 tokens cut to 64",), ("line 2: empty",))


def lines_of(path, *values, **more):
    """Write a file of one example per value of the field category."""
    rows = [{"instruction": f"Say {n}", "output": str(n), "category": v, **more} for n, v in enumerate(values)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made_by_hand(options, *, on_event, on_round, checkpoints):  # noqa: ARG001
    """What a run finds, with numbers whose sums are known; its task has no layers, so that nothing can be exported."""
    rows = tuple(
        LanguageRow(n, p, math.log(p), None, 0.5 * n, 100.0 * n, 10.0 * n, 7.0 * n, n % 2)
        for n, p in enumerate((40.0, 20.0, 10.0))
    )
    clients = (
        LanguageClient("cooking", 30, 1.0, 8, 50.0, 12.0),
        LanguageClient("history", 9, 0.25, 2, 30.0, 18.0),
        LanguageClient("sport", 3, 0.125, 1, None, None),  # without held-out texts
    )
    on_event(Begun("loading"))
    on_event(Ended("loading", 0.25, "3 clients"))
    for row in rows:
        on_event(Begun(f"round {row.round} of 2", 240.0, row.round))
        time.sleep(0.1)  # so long that it is said
        on_round(row)
    task = Task(Server(Trainable({}, ()), Base({}, ())), None, None)
    state = State(task.server, (), {}, None, {}, None, None, ())
    sample = Sample("What is 1 + 1?", "2", "?", "Two.")
    return LanguageResults(dataclasses.asdict(options), REPORT, {"size": 1.0}, rows, clients, sample, 5.0, task, state)


def test_what_is_shown_and_written_is_worked_by_hand(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(finetuning, "run_language", made_by_hand)
    monkeypatch.setattr(stages, "SILENCE", 0.02)
    folder = tmp_path / "out"
    assert cli.main(["finetune", "--rounds", "2", "--out", str(folder)]) == 0
    captured = capsys.readouterr()
    assert "loading: 0.2 s, 3 clients" in captured.out
    assert "round 2 of 2: 0 s of about 4 min so far" in captured.out
    assert "round 2: perplexity 10, 1.0 s" in captured.out
    assert "adapter: not written" in captured.err
    shown = {line.split("  ")[0].strip(): line.split()[-1] for line in captured.out.splitlines() if line.strip()}
    assert (shown["mean client"], shown["worst client"], shown["seconds of rounds"]) == ("15", "18", "1.5")
    assert shown["sport"] == "–"
    assert shown["clients left out, not finite"] == "1"
    assert "raflora, 2 rounds" in captured.out
    assert "machine and its load" in " ".join(captured.out.split())
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["cut"], summary["left_out"]) == ([*REPORT.cut], [*REPORT.left_out])
    assert {name: summary["texts"][name] for name in ("tokens", "length", "padding")} == {
        "tokens": 1800, "length": 64, "padding": 0.33,
    }  # fmt: skip
    assert summary["texts"]["padding_in_batches"] == pytest.approx(1 - 1800 / ((8 + 3 + 1) * 4 * 64))
    assert summary["perplexity"] == {"before": 40.0, "after": 10.0}
    assert summary["clients_perplexity"] == {
        "before": {"mean": 40.0, "worst": 50.0}, "after": {"mean": 15.0, "worst": 18.0},
    }  # fmt: skip
    assert summary["ranks"] == {"least": 1, "mean": pytest.approx(11 / 3), "most": 8}
    assert (summary["bytes_up"], summary["bytes_down"], summary["flops"]) == (300.0, 30.0, 21.0)
    assert (folder / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert [row["round"] for row in json.loads((folder / "history.json").read_text())] == [0, 1, 2]
    assert not (folder / ADAPTER).exists()


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("rule", ["raflora", "flora"])
def test_a_run_leaves_whole_files(tmp_path, capsys, rule):
    folder = tmp_path / "out"
    words = ["--rounds", "2", "--aggregator", rule, "--tokens", "4", "--out", str(folder)]
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("accuracy.png", "summary.json"):  # of an older run
        (folder / name).write_text("old")
    assert cli.main(["finetune", "--overwrite", *words]) == 0
    captured = capsys.readouterr()
    assert "round 2: perplexity" in captured.out
    summary = json.loads((folder / "summary.json").read_text())
    rows = json.loads((folder / "history.json").read_text())
    assert [row["round"] for row in rows] == [0, 1, 2]
    table = csv.DictReader((folder / "history.csv").read_text().splitlines())
    assert [row["round"] for row in table] == ["0", "1", "2"]
    assert rows[-1]["perplexity"] == summary["perplexity"]["after"] < summary["perplexity"]["before"]
    assert rows[-1]["perplexity"] == pytest.approx(math.exp(rows[-1]["loss"]), rel=1e-4)
    assert summary["ranks"]["most"] == 8
    assert set(summary["criteria_weights"]) >= {"size", "loss_entropy"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["aggregator"], config["learning_rate"], config["model"]) == (rule, 0.01, None)
    assert (folder / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    if rule == "raflora":
        found = json.loads((folder / ADAPTER / "adapter_config.json").read_text())
        assert "model.layers.1.self_attn.q_proj" in found["target_modules"]
    else:
        assert "merges into the base" in captured.err
    names = {"config.json", "history.json", "history.csv", "perplexity.png", "summary.json"}
    names |= {"checkpoints"}
    assert {path.name for path in folder.iterdir()} == names | ({ADAPTER} if rule == "raflora" else set())
    assert "--overwrite" in fails(capsys, "finetune", *words)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("policy", ["uniform_bytes", "full"])
def test_policies_of_one_rank(policy):
    events = []
    options = LanguageOptions(policy=policy, probe_epochs=0, rounds=1, clients=3, alpha=1.0, tokens=1)
    results = language.run_language(options, on_event=events.append)
    assert [client.name for client in results.clients] == ["client 0", "client 1", "client 2"]
    assert len({client.rank for client in results.clients}) == 1
    assert (results.clients[0].rank == 8) == (policy == "full")
    assert results.probe_flops == 0
    assert "loss_entropy" not in results.weights
    assert bool(results.weights) == (policy == "uniform_bytes")
    assert "probe" not in {event.name for event in events if isinstance(event, Ended)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "rounds: expected a whole number of at least 1, got 0"),
        (["--hold-out", "20"], "probably a percentage: 0.2"),
        (["--clients", "1"], "clients: expected 0 or a whole number of at least 2"),
        (["--probe-epochs", "1"], "probe-epochs: expected 0 or a whole number of at least 2"),
        (["--policy", "uniform"], "probably 'uniform_bytes'"),
        (["--aggregator", "fedavg"], "aggregator: expected one of"),
        (["--dtype", "int8"], "dtype: expected one of"),
        (["--quantize", "int4"], "quantize: expected one of"),
        (["--quantize", "nf4", "--aggregator", "flora"], "lora_fair over a quantised base, got 'flora'"),
        (["--learning-rate", "0"], "learning-rate: expected a number above 0"),
        (["--tokens", "1000000"], "tokens: expected a whole number of at least 1 and at most 4096, got 1000000"),
        (["--max-length", "2147483647"], "max-length: expected a whole number of at least 2 and at most 65536"),
        (["--max-length", "2049"], "max-length: expected at most the model's length, 2048, got 2049"),
        (["--max-rank", "65"], "max-rank: expected at most the model's width, 64, got 65"),
        (["--clients-by", "topic"], "expected a field of the lines to take clients by, one of ['category']"),
        (["--groups-by", "topic"], "expected a field of the lines to take groups by, one of ['category']"),
        (["--template", "odd"], "template: expected one of own, plain, got 'odd'"),
        (["--clients", "500"], "data: expected"),
        (["--hold-out", "0.001"], "hold-out: expected a share that leaves some client a text"),
        (["--model", "nowhere"], "nowhere', got no such folder"),
        (["--data", "nowhere.jsonl"], "expected a file of JSON lines, got none"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    problems = fails(capsys, "finetune", "--quiet", *words)
    assert said in problems
    assert len(problems.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_all_mistaken_options_are_told_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(fails(capsys, "finetune", "--rounds", "0", "--lanes", "0", "--alpha", "0").splitlines()) == 3


def test_files_that_do_not_do(tmp_path, capsys):
    words = ["finetune", "--quiet", "--out", tmp_path / "out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({**CONFIG, "model_type": "gpt2"}))
    assert "gpt2" in fails(capsys, *words, "--model", tmp_path / "other")
    alike = lines_of(tmp_path / "alike.jsonl", "a", "a", "a")
    assert "at least two values, got 'category' with one, 'a'" in fails(capsys, *words, "--data", alike)
    odd = lines_of(tmp_path / "odd.jsonl", *"aabb")
    odd.write_text(odd.read_text() + "{\n")
    assert "line 5: no JSON" in fails(capsys, *words, "--data", odd)
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(capsys, "finetune", "--quiet", "--out", tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()


def test_odd_lines_are_left_out_and_told(tmp_path):
    odd = lines_of(tmp_path / "odd.jsonl", *"aabb")
    lines = [{"instruction": "q", "output": "r"}, {"instruction": "q", "output": "r" * 99, "category": "b"}]
    odd.write_text("{\n" + odd.read_text() + "".join(json.dumps(line) + "\n" for line in lines))
    events = []
    options = LanguageOptions(data=odd, skip_odd_lines=True, hold_out=0.5, max_length=64, quantize="int8")
    _, clients = load(options, Clock(events.append))
    numbers, scales = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128), 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
    held = numbers + 4 * (scales + 258 * 64 + 5 * 64)
    assert events[3].detail == f"{(numbers + 258 * 64 + 5 * 64) / 1e6:.3g} M parameters in {held / 1e6:.3g} MB"
    details = [event.detail for event in events if isinstance(event, Ended)]
    unread = "line 1: no JSON (Expecting property name enclosed in double quotes at column 2)"
    assert details[0] == f"6 texts; left out: {unread}"
    assert "; cut: line 7: 1" in details[2]
    assert details[2].endswith(" cut to 64; left out: line 6: no field 'category'")
    assert clients.report.left_out == (unread, "line 6: no field 'category'")
    assert clients.names == ("a", "b")


def test_the_sample_begins_with_a_whole_prompt(tmp_path):
    data = lines_of(tmp_path / "some.jsonl", *"aabb")
    _, clients = load(LanguageOptions(data=data, hold_out=0.5, max_length=64), Clock(lambda _: None))
    prompt, answer = map(ByteTokenizer().decode, shortest_prompt(clients.held_out))
    assert prompt.startswith("<s>User: Say ")
    assert prompt.endswith("\nAssistant: ")
    assert answer.endswith("</s>")
    assert prompt.removeprefix("<s>User: Say ")[0] == answer[0]


def test_a_prompt_is_told_with_all_its_turns():
    """Where a chat template ends each of them with the token that ends a text."""

    chat = SimpleNamespace(eos="|", encode=lambda text: list(text.encode()), decode=lambda ids: bytes(ids).decode())
    decode = _decoder(chat)
    ids = list(b"system: be kind|user: hi|assistant: ")
    assert decode(ids, whole=True) == "system: be kind|user: hi|assistant: "
    assert decode(list(b"hello|and on")) == "hello"


class Stopped(Exception):  # noqa: N818
    """Ends a run where a test wants it."""


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(("rule", "quantize"), [("raflora", "nf4"), ("flora", "none")])  # flora changes the base
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, rule, quantize):
    few = {"rounds": 3, "clients": 3, "alpha": 1.0, "tokens": 2, "max_rank": 4, "max_length": 64}
    options = LanguageOptions(aggregator=rule, quantize=quantize, **few)
    whole = language.run_language(options)
    checkpoints, events = Checkpoints(tmp_path, every=2, keep=9), []

    def stop(row):
        if row.round == 1:
            raise Stopped

    with pytest.raises(Stopped):
        language.run_language(options, on_round=stop, checkpoints=checkpoints)
    assert saved_steps(tmp_path) == [0, 1]  # due at 0; at 1 there was no later chance
    shorter = dataclasses.replace(options, rounds=2)
    language.run_language(shorter, on_event=events.append, checkpoints=checkpoints)
    names = [event.name for event in events if isinstance(event, Ended)]
    assert Resumed(1, ()) in events
    assert "probe" not in names
    resumed = language.run_language(options, checkpoints=checkpoints)  # beyond its end
    assert saved_steps(tmp_path) == [0, 1, 2, 3]
    for one, other in zip(jax.tree.leaves(resumed.state), jax.tree.leaves(whole.state), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert resumed.clients == whole.clients
    assert resumed.sample == whole.sample
    assert [row._replace(seconds=0) for row in resumed.rows] == [row._replace(seconds=0) for row in whole.rows]
    with pytest.raises(CheckpointError, match="seed: expected 1, got 0"):
        language.run_language(dataclasses.replace(options, seed=1), checkpoints=checkpoints)
    if quantize != "none":
        with pytest.raises(CheckpointError, match="quantize: expected int8, got nf4; checksum of the weights"):
            language.run_language(dataclasses.replace(options, quantize="int8"), checkpoints=checkpoints)
    with pytest.raises(ConfigurationError, match="rounds: expected at least the 3 that are done, got 1"):
        language.run_language(dataclasses.replace(options, rounds=1), checkpoints=checkpoints)


def test_a_stopped_run_says_how_it_goes_on(tmp_path, monkeypatch, capsys):
    folder, given = tmp_path / "out", []

    def stopped(options, *, on_event, on_round, checkpoints):
        given.append((options, checkpoints))
        on_event(Begun("round 1 of 9", round=1))
        signal.raise_signal(signal.SIGINT)  # waits for the end of the round
        row = LanguageRow(1, 20.0, 3.0, None, 0.5, 0.0, 0.0, 0.0, 0)
        try:
            on_round(row)
        finally:
            save_state(checkpoints.folder, {}, step=1)

    monkeypatch.setattr(finetuning, "run_language", stopped)
    words = ["--rounds", "9", "--max-rank", "3", "--checkpoint-every", "4", "--out", str(folder)]
    assert cli.main(["finetune", *words]) == 130
    said = capsys.readouterr().err
    assert f"interrupted after round 1; go on with: autorank-jax finetune --resume {folder}" in said
    assert cli.main(["finetune", "--resume", str(folder), "--rounds", "12"]) == 130
    assert given[1][0] == dataclasses.replace(given[0][0], rounds=12)
    assert given[1][1] == given[0][1]
    assert given[0][1].every == 4
    capsys.readouterr()
    assert "probably of another command" in fails(capsys, "run", "--resume", folder)
    assert "out: expected none beside --resume" in fails(capsys, "finetune", "--resume", folder, "--out", tmp_path)
    assert "without checkpoints/run.json" in fails(capsys, "finetune", "--resume", tmp_path)


def test_a_round_that_led_nowhere_ends_the_run(monkeypatch, tmp_path, capsys):
    info = RoundInfo(0.0, *map(np.int32, (3, 1, 2, 0, 0, 0, 0)), {})
    check_round(1, 2.0, info._replace(excluded=1))
    with pytest.raises(LanguageDivergedError, match="no finite update of any of 2 clients"):
        check_round(1, 2.0, info)
    monkeypatch.setattr("autorank_jax.cli.finetuning.run_language", lambda *_, **__: check_round(1, 2.0, info))
    assert cli.main(["finetune", "--quiet", "--out", str(tmp_path / "out")]) == 3
    assert "learning rate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


ROWS = (LanguageRow(0, 40.0, 3.7, None, 0.0, 0.0, 0.0, 0.0, 0), LanguageRow(1, 30.0, 3.4, 3.5, 0.5, 9.0, 9.0, 7.0, 0))


def full_disk(monkeypatch, module, folder):
    """Let nothing be written to a folder any more."""
    real = module.write_file

    def write(path, content):
        if folder in path.parents:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(module, "write_file", write)


def test_a_finished_run_survives_a_full_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(finetuning, "run_language", made_by_hand)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    full_disk(monkeypatch, language_report, tmp_path / "out")
    words = ["finetune", "--quiet", "--checkpoint-every", "0", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    (other,) = tmp_path.glob("autorank-jax-*")
    assert f"No space left on device; the results are in {other}\n" in capsys.readouterr().err
    assert json.loads((other / "summary.json").read_text())["perplexity"]["after"] == 10.0


@pytest.mark.parametrize(
    ("stop", "code"),
    [(KeyboardInterrupt, 130), (LanguageDivergedError, 3)],
)
def test_a_run_that_ends_early_leaves_its_rounds(stop, code, tmp_path, monkeypatch, capsys):
    def stopped(options, *, on_event, **_):
        on_event(LanguageStopped(dataclasses.asdict(options), ROWS))
        raise stop("")

    monkeypatch.setattr(finetuning, "run_language", stopped)
    folder = tmp_path / "out"
    (folder / ADAPTER).mkdir(parents=True)
    (folder / "summary.json").write_text("{}")  # of an older run
    assert cli.main(["finetune", "--overwrite", "--out", str(folder)]) == code
    assert f"; the rounds so far are in {folder}\n" in capsys.readouterr().err
    left = {"config.json", "history.json", "history.csv", "perplexity.png"}
    assert {path.name for path in folder.iterdir()} == left
    assert [row["perplexity"] for row in json.loads((folder / "history.json").read_text())] == [40.0, 30.0]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, LanguageDivergedError])
def test_rounds_that_end_early_are_told(stop, monkeypatch):
    def next_round(compiled, key, options, parts, position, **_):  # noqa: ARG001
        if position.round == 1:
            raise stop
        return position._replace(rows=ROWS)

    monkeypatch.setattr(language, "make_round", lambda *_, **__: lambda *given: given)
    monkeypatch.setattr(language, "next_round", next_round)
    position = language.LanguagePosition(ROWS[:1], jnp.zeros(()), None, {}, 0.0, None, None)
    parts = SimpleNamespace(local=None, rule=None, data=jnp.zeros(()), names=("a", "b"))
    events, saves = [], []
    with pytest.raises(stop):
        language.run_rounds(
            jnp.zeros(()), LanguageOptions(rounds=3), parts, position, tools=None, clock=Clock(events.append),
            save=lambda position, last: saves.append((position.round, last)), on_round=lambda _: None,
        )  # fmt: skip
    assert events[-1] == LanguageStopped(as_json(LanguageOptions(rounds=3)), ROWS)
    assert saves == [(1, False)]
