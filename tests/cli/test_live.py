"""What a run shows: one block in place on terminals of any width, a line per stage elsewhere."""

import dataclasses
import io
import re
import time
import types

import numpy as np
import pytest
from rich.console import Console

from autorank_jax.cli import live, stages
from autorank_jax.cli.live import Display, about_levels
from autorank_jax.engine import LevelChoice
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.events import Compiled, Leveled, RoundDone, Scored, Stage, Started
from autorank_jax.experiment.results import Row
from tests.cli.cases import make_scores

EXPERIMENT = Experiment(rank_policies=("autorank", "by_size_bytes"), aggregators=("rbla", "raflora"), rounds=3)


def row(policy, aggregator, number):
    zeros = dict.fromkeys(Row._fields, 0)
    given = {"policy": policy, "aggregator": aggregator, "round": number, "accuracy": 0.5 + number / 10}
    return Row(**zeros | given | {"participants": 4, "reported": 3, "dropped": 1, "seconds": 0.5})


def story():
    yield from (Stage("reading mini"), Stage("compiling", 1, 2, told=True), Stage("probing"), Stage("ranking"))
    yield Leveled(LevelChoice(({"a": 4},), 1.5, 2.1))
    for number, rule in enumerate(EXPERIMENT.aggregators, 1):
        yield Stage("compiling", number, 2, told=True)
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
def test_a_terminal_keeps_one_copy_of_every_bar(width, environment, clock):  # noqa: ARG001
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=30, _environ=environment)
    seen_stages, widest = [], []

    def seen(display):
        plain = Console(file=io.StringIO(), width=width)
        plain.print(display._view())
        seen_stages.append(plain.file.getvalue().partition("\n")[0][2:].rstrip())
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
    assert seen_stages[:4] == [f"{stage} 0 s" for stage in ("reading mini", "compiling 1 of 2", "probing", "ranking")]
    first = "training autorank+rbla, round 1 of 3, 0 s"
    assert seen_stages[5:10] == [
        "compiling 1 of 2 0 s", "starting 0 s", first if width == 100 else "round 1 of 3, 0 s",
        first.replace("1 of", "2 of") if width == 100 else "round 2 of 3, 0 s",
        first.replace("1 of", "3 of") if width == 100 else "round 3 of 3, 0 s",
    ]  # fmt: skip
    assert seen_stages[10] == "finishing autorank+rbla 0 s"
    (heads,) = {line for line in lines if "rounds" in line}
    assert heads.split()[:2] == ["rounds", "accuracy"]


@pytest.mark.parametrize(
    "options", [{}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}], ids=["pipe", "dumb terminal"]
)
def test_elsewhere_a_stage_is_a_line(options):
    text = show(Console(file=io.StringIO(), width=200, **options))
    assert "\x1b" not in text
    assert "\r" not in text
    names = [line.partition(":")[0] for line in text.splitlines()]
    before = ["reading mini", "probing", "ranking", "One rank level (width that adapters are compiled in)"]
    compiled = "Compiled one round of {} in 2.0 s; it serves every policy and trains 4 clients at a time."
    assert names == [*before, compiled.format("rbla"), compiled.format("raflora")]  # one time for one compilation


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
        wait_for("training autorank+rbla, seed 0, round 1 of 3: 0 s so far\n")
        display.since -= 20  # seconds
        display(RoundDone(row("autorank", "rbla", 1), 100.0))
        wait_for("training autorank+rbla, seed 0, round 2 of 3: ")
        wait_for(" s so far, about 4 min left; accuracy 60.0 % after round 1\n")
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


@pytest.fixture
def clock(monkeypatch):
    """A clock that is put forward by hand, in seconds."""
    now = types.SimpleNamespace(seconds=0.0)
    for module in (stages, live):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def started(width, *, moving, **options):
    console = Console(file=io.StringIO(), force_terminal=moving, width=width)
    display = Display(console, dataclasses.replace(EXPERIMENT, aggregators=("rbla",), **options))
    display(Started("autorank", "rbla", 0))
    return display


def first_line(display):
    console = Console(file=io.StringIO(), width=display.console.width)
    console.print(display._view())
    return console.file.getvalue().partition("\n")[0][2:].rstrip()


def test_what_is_left_counts_down_and_never_below_the_rounds_to_come(clock):
    display = started(80, moving=True)
    clock.seconds += 12
    assert first_line(display) == "training autorank, round 1 of 3, 12 s"
    display(RoundDone(row("autorank", "rbla", 1), 100.0))  # five to come, of which three are of another policy
    seen = []
    for _ in range(4):
        seen.append(first_line(display).partition("about ")[2])
        clock.seconds += 5
    assert seen == ["60 s left", "55 s left", "50 s left", "48 s left"]
    display(RoundDone(row("autorank", "rbla", 2), 100.0))
    display(RoundDone(row("autorank", "rbla", 3), 100.0))
    display(Started("by_size_bytes", "rbla", 0))
    clock.seconds += 4
    display(RoundDone(row("by_size_bytes", "rbla", 1), 100.0))
    seen = []
    for _ in range(4):
        seen.append(first_line(display))
        clock.seconds += 2
    where = "training by_size_bytes, round 2 of 3"
    assert seen == [
        f"{where}, 0 s, about 8 s left", f"{where}, 2 s, about 6 s left", f"{where}, 4 s, about 4 s left",
        f"{where}, 6 s, about 4 s left",
    ]  # fmt: skip
    display(RoundDone(row("by_size_bytes", "rbla", 2), 100.0))
    clock.seconds += 50
    assert first_line(display) == "training by_size_bytes, round 3 of 3, 50 s"  # the estimate is used up


@pytest.mark.parametrize(
    ("width", "stage"),
    [
        (80, "training autorank, seed 0, round 2 of 3, 8 s, about 52 s left"),
        (40, "seed 0, round 2 of 3, about 52 s left"),
    ],
)
def test_with_several_seeds_the_seed_is_named(width, stage, clock):
    display = started(width, moving=True, seeds=2, rank_policies=("autorank",))
    clock.seconds += 12
    display(RoundDone(row("autorank", "rbla", 1), 100.0))
    clock.seconds += 8
    assert first_line(display) == stage
    console = Console(file=io.StringIO(), width=width)
    console.print(display._view())
    _, heads, bar = console.file.getvalue().splitlines()
    assert heads.split() == ["2", "seeds", "rounds", "accuracy"]
    assert (bar.split()[0], bar.split()[2:5]) == ("autorank", ["1/6", "60.0", "%"])


def test_the_ranks_shown_are_said_to_be_of_the_first_seed():
    display = started(80, moving=False, seeds=2)
    display(Scored(make_scores(0)))
    display(Scored(make_scores(1)))
    text = " ".join(display.console.file.getvalue().split())
    assert text.count("Clients under seed") == 1
    assert "Clients under seed 0" in text
    assert text.endswith("Shown is the first of 2 seeds; criteria.csv has all.")


def test_the_choice_of_levels_is_told():
    level = "rank level (width that adapters are compiled in)"
    several = level.replace("level (width", "levels (widths")
    assert about_levels(LevelChoice(({"a": 2}, {"a": 4}), 40.0, 2.1)) == (
        f"2 {several}: beside one, they save about 40 s of training and cost about 2.1 s of compilation (estimates)."
    )
    assert about_levels(LevelChoice(({"a": 4},), float(np.float64(1.55)), 2.1)) == (
        f"One {level}: another would save about 1.6 s of training and cost about 2.1 s of compilation (estimates)."
    )
    assert about_levels(LevelChoice(({"a": 4},), 0.0, 0.0)) == f"One {level}: there is one rank."
