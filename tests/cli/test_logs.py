"""Rounds for other programs, as they happen and once each, and the report that stands alone."""

import html.parser
import importlib
import json
import struct

import pytest

from autorank_jax.cli import main as cli
from autorank_jax.cli.files import write_results
from autorank_jax.cli.logs import SCALARS, Logs, log_problems
from autorank_jax.experiment.events import RoundDone, Started
from tests.cli.cases import make_results, make_run

ROWS = make_run("autorank", 0, [0.1, None, 0.3, 0.4]).rows


def train(folder, names, first, last, policy="autorank"):
    """Log some rounds, counted from 1, of a process that goes on after those before."""
    with Logs(names, folder) as logs:
        logs(Started(policy, "rbla", 0, first - 1))
        for row in ROWS[first - 1 : last]:
            logs(RoundDone(row._replace(policy=policy), 1.0))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def scalars_of(folder, parse):
    """Return `(name, round, value)` of all event files, oldest first, and at which rounds older ones become void."""
    found, purged = [], []
    for path in sorted((folder / "tensorboard" / "autorank-rbla-0").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = parse(content[12 : 12 + length])
            content = content[16 + length :]
            purged += [event.step] if event.HasField("session_log") else []
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found, purged


def test_lines_of_json_are_the_history(tmp_path):
    train(tmp_path, ["jsonl"], 1, 3)
    assert lines_of(tmp_path) == [row._asdict() for row in ROWS[:3]]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"policy": "autor')  # cut off by a kill
    train(tmp_path, ["jsonl"], 3, 4)  # from the checkpoint after round 2
    assert lines_of(tmp_path) == [row._asdict() for row in ROWS]
    train(tmp_path, ["jsonl"], 1, 1)  # a run that begins again forgets the older one
    assert lines_of(tmp_path) == [ROWS[0]._asdict()]


def test_several_runs_share_a_file(tmp_path):
    with Logs(["jsonl"], tmp_path) as logs:
        for policy in ("autorank", "full"):
            logs(Started(policy, "rbla", 0))
            logs(RoundDone(ROWS[0]._replace(policy=policy), 1.0))
    assert [row["policy"] for row in lines_of(tmp_path)] == ["autorank", "full"]


def test_tensorboard_has_every_number_once(tmp_path):
    written = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    train(tmp_path, ["tensorboard"], 1, 3)
    found, purged = scalars_of(tmp_path, written.FromString)
    expected = [
        (name, row.round, pytest.approx(getattr(row, name)))
        for row in ROWS[:3]
        for name in SCALARS
        if getattr(row, name) is not None
    ]
    assert found == expected
    assert purged == [1]


def test_a_log_that_fails_does_not_end_the_run(tmp_path, capsys):
    train(tmp_path / "none", ["jsonl"], 1, 3)
    assert capsys.readouterr().err == (
        "autorank-jax: warning: log: expected to write jsonl, got: No such file or directory; nothing more is logged "
        "there\n"
    )


def test_unknown_and_missing_logs(monkeypatch):
    assert list(log_problems(["json"])) == ["log: expected one of jsonl, tensorboard, got 'json', probably 'jsonl'"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    assert list(log_problems(["jsonl", "tensorboard"])) == [
        'log: expected tensorboardX for tensorboard, got none; pip install "autorank-jax[log]"'
    ]


def test_a_run_logs(tmp_path, monkeypatch):
    running = importlib.import_module("autorank_jax.cli.running")

    def train_one_round(experiment, *, on_event, **options):  # noqa: ARG001
        on_event(Started("autorank", "rbla", 0))
        on_event(RoundDone(ROWS[0], 1.0))
        return make_results()

    monkeypatch.setattr(running, "run_experiment", train_one_round)
    out = tmp_path / "out"
    run = ["run", "--dataset", "synthetic", "--split", "iid", "--devices", "1", "--log", "jsonl", "--out", str(out)]
    assert cli.main(run) == 0
    assert lines_of(out) == [ROWS[0]._asdict()]
    assert cli.main(run) == 2


class Page(html.parser.HTMLParser):
    """The tags, sources and text of a page, whose tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_needs_no_other_file(tmp_path, monkeypatch):
    monkeypatch.setattr("autorank_jax.cli.report.doubts", lambda scores: [f"seed {scores.seed} hardly varies"])
    results = make_results()
    results = results._replace(config=results.config | {"dataset": "<script>&"}, stopped="interrupted after round 3")
    write_results(tmp_path / "out", results)
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert page.open == []
    assert len(page.sources) == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "script" not in page.tags
    text = " ".join(page.words)
    for words in (
        "60.0 ± 14.1 %",
        "Clients under seed 0",
        "Clients under seed 1",
        "seed 1 hardly varies",
        "learning-rate",
        "interrupted after",
    ):
        assert words in text
