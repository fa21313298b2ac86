"""What a run shows: one block in place on terminals of any width, a line per stage elsewhere."""

import io
import re
import time

import numpy as np
import pytest
from rich.console import Console

from autorank_jax.cli import stages
from autorank_jax.cli.live import Display, about_levels
from autorank_jax.engine import LevelChoice
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.events import Compiled, Leveled, RoundDone, Stage, Started
from autorank_jax.experiment.results import Row

EXPERIMENT = Experiment(rank_policies=("autorank", "by_size_bytes"), aggregators=("rbla", "raflora"), rounds=3)


def row(policy, aggregator, number):
    zeros = dict.fromkeys(Row._fields, 0)
    given = {"policy": policy, "aggregator": aggregator, "round": number, "accuracy": 0.5 + number / 10}
    return Row(**zeros | given | {"participants": 4, "reported": 3, "dropped": 1, "seconds": 0.5})


def story():
    yield from (Stage("reading mini"), Stage("compiling", 1, 2), Stage("probing"), Stage("ranking"))
    yield Leveled(LevelChoice(({"a": 4},), 1.5, 2.1))
    for number, rule in enumerate(EXPERIMENT.aggregators, 1):
        yield Stage("compiling", number, 2)
        yield Compiled(rule, 2.0, 4)
        for policy in EXPERIMENT.rank_policies:
            yield Started(policy, rule, 0)
            yield from (RoundDone(row(policy, rule, n), 100.0) for n in (1, 2, 3))


def show(console, seen=lambda _: None):
    with Display(console, EXPERIMENT) as display:
        for event in story():
            display(event)
            if display.moving:
                display.live.refresh()
            seen(display)
    return console.file.getvalue()


def screen(text):
    """Return the lines that a terminal shows after all of a text."""
    lines, at, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            at, column = at + 1, 0
            lines += [""] * (at + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b"):
            at -= int(part[2:-1] or 1) if part.endswith("A") else 0
            lines[at] = "" if part == "\x1b[2K" else lines[at]
        else:
            lines[at] = (lines[at][:column].ljust(column) + part)[: column + len(part)] + lines[at][
                column + len(part) :
            ]
            column += len(part)
    return lines


@pytest.mark.parametrize("width", [40, 100])
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_a_terminal_keeps_one_copy_of_every_bar(width, environment):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=30, _environ=environment)
    stages, widest = [], []

    def seen(display):
        stages.append(display.stage)
        plain = Console(file=io.StringIO(), width=width)
        plain.print(display._view())
        widest.append(max(map(len, plain.file.getvalue().splitlines()), default=0))

    lines = [line.rstrip() for line in screen(show(console, seen)) if line.strip()]
    bars = [line for line in lines if "3/3" in line]
    assert lines[-4:] == bars
    assert len(bars) == 4
    assert [bar.split()[0] for bar in bars] == [
        "autorank+rbla", "by_size_bytes+rbla", "autorank+raflora", "by_size_bytes+raflora",
    ]  # fmt: skip
    assert ("samples/s" in bars[0], "1 dropped out" in bars[0]) == (width == 100,) * 2
    assert max(widest) <= width
    assert {"reading mini", "compiling 1 of 2", "compiling 2 of 2", "probing", "ranking"} <= set(stages)
    assert any(re.fullmatch(r"round 2 of 3, 70.0 %, about \d+ s left", stage) for stage in stages)


@pytest.mark.parametrize(
    "options", [{}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}], ids=["pipe", "dumb terminal"]
)
def test_elsewhere_a_stage_is_a_line(options):
    text = show(Console(file=io.StringIO(), width=80, **options))
    assert "\x1b" not in text
    assert "\r" not in text
    names = [line.partition(":")[0] for line in text.splitlines()]
    before = ["reading mini", "compiling 1 of 2", "probing", "ranking", "One rank level", "compiling 1 of 2"]
    compiled = "Compiled one round of {} in 2.0 s; it serves every policy and trains 4 clients at a time."
    assert names == [*before, compiled.format("rbla"), "compiling 2 of 2", compiled.format("raflora")]


def test_nothing_is_silent_for_long(monkeypatch):
    monkeypatch.setattr(stages, "SILENCE", 0.02)
    console = Console(file=io.StringIO(), width=100)

    def wait_for(words):
        begin = time.monotonic()
        while words not in console.file.getvalue():
            assert time.monotonic() - begin < 20, words
            time.sleep(0.01)

    with Display(console, EXPERIMENT) as display:
        display(Stage("compiling", 1, 2))
        wait_for("compiling 1 of 2: 0 s so far\n")
        display(Started("autorank", "rbla", 0))
        display(RoundDone(row("autorank", "rbla", 1), 100.0))
        wait_for("autorank+rbla, seed 0: round 1 of 3, 60.0 %, about 0 s left\n")
    text = console.file.getvalue()
    time.sleep(0.05)
    assert console.file.getvalue() == text  # whose last line is said before the end


def test_a_terminal_without_unicode_gets_none():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=file, force_terminal=True, width=60)
    with Display(console, EXPERIMENT) as display:
        for event in story():
            display(event)
            display.live.refresh()  # what has no place in the encoding would raise


def test_the_choice_of_levels_is_told():
    assert about_levels(LevelChoice(({"a": 2}, {"a": 4}), 40.0, 2.1)).startswith("2 rank levels: they save about 40 s")
    assert about_levels(LevelChoice(({"a": 4},), float(np.float64(1.55)), 2.1)).endswith("cost 2.1 s of compilation.")
    assert about_levels(LevelChoice(({"a": 4},), 0.0, 0.0)) == "One rank level: there is one rank."
