"""What a run shows while it goes on: one block that is updated in place on a terminal.

Elsewhere there is a line for every stage, and one now and then for what takes longer.
"""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from autorank_jax.cli.stages import Stages, spoken
from autorank_jax.cli.tables import fitted, scores_table
from autorank_jax.cli.terminal import counted
from autorank_jax.engine import LevelChoice
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.events import (
    Compiled,
    Event,
    Finished,
    Leveled,
    Resumed,
    RoundDone,
    Scored,
    Stage,
    Started,
)
from autorank_jax.experiment.results import Row, accuracies, run_name

NARROW = 76
"""Columns below which speed and faults are not shown."""


class Bar:
    """How far one policy under one rule is, over all seeds."""

    def __init__(self, total: int) -> None:
        """Begin with no round done."""
        self.total = total
        self.done = 0
        self.seconds: list[float] = []  # of every round of this process, evaluation included
        self.accuracy = self.speed = self.faults = ""


class Going(NamedTuple):
    """The round that is trained just now."""

    name: str  # of policy and rule
    seed: int
    round: int


class Display(Stages):
    """A context manager to be called with the events of an experiment."""

    def __init__(self, console: Console, experiment: Experiment) -> None:
        """Prepare to show an experiment on a console."""
        self.experiment = experiment
        rounds = experiment.rounds * experiment.seeds
        self.bars = {self._name(p, a): Bar(rounds) for a in experiment.aggregators for p in experiment.rank_policies}
        self.score, self.reached = "accuracy", ""
        self.going: Going | None = None
        self.training = self.told = False  # that there were rounds; that the stage is told of when it ends
        super().__init__(console)  # it looks at the view

    def leave(self) -> None:
        """End the stage, with a line that stays where nothing moves."""
        self._enter("")

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Stage(name, number, total, told):
                self._enter(f"{name} {number} of {total}" if total > 1 else name, told=told)
            case Leveled(choice):
                self._enter("")
                self.say(about_levels(choice))
            case Compiled(aggregator, seconds, lanes):
                self._enter("")
                self.say(
                    f"Compiled one round of {aggregator} in {seconds:.1f} s; it serves every policy and trains "
                    f"{counted(lanes, 'client')} at a time."
                )
                self._enter("starting", told=True)
            case Scored(scores) if scores.seed == self.experiment.first_seed:
                for part in fitted(scores_table(scores, seeds=self.experiment.seeds), self.console):
                    self.console.print(part)
            case Resumed(rounds, differences):
                self.say_resumed(rounds, differences)
            case Started(policy, aggregator, seed, done, score):
                self.score, self.reached, self.training = score, "", True
                name = self._name(policy, aggregator)
                self.bars[name].done += done
                self._go_on(Going(name, seed, done + 1))
            case RoundDone(row, examples):
                self._advance(row, examples)
            case Finished(run) if not self.moving:
                curve = accuracies(run)
                last = f"{self.score} {100 * curve[-1][1]:.1f} %" if curve else f"no {self.score}"
                name = self._name(run.policy, run.aggregator)
                what = f"{name}, seed {run.seed}: {last} after {counted(len(run.rows), 'round')}, {run.seconds:.1f} s"
                self.say(", ".join([what, *faults_of(run.rows)]))

    def _name(self, policy: str, aggregator: str) -> str:
        return run_name(policy, aggregator, several=len(self.experiment.aggregators) > 1)

    def progress(self) -> str:
        """Return what is said where nothing was for a while."""
        going = self.going
        if not going:
            return super().progress()
        where = f"training {going.name}, seed {going.seed}, round {going.round} of {self.experiment.rounds}"
        return f"{where}: {self.elapsed()} so far{self._left(going)}{self.reached}"

    def _enter(self, stage: str, *, told: bool = False, going: Going | None = None) -> None:
        """End a stage, with a line that stays where nothing moves, and begin another."""
        now = time.monotonic()
        if self.stage and not self.moving and not self.told:
            self.say(f"{self.stage}: {now - self.since:.1f} s")
        self.stage, self.told, self.going, self.since = stage, told, going, now

    def _go_on(self, going: Going) -> None:
        """Begin a round, or what comes after the last."""
        last = going.round > self.experiment.rounds
        self._enter(f"finishing {going.name}" if last else "training", told=True, going=None if last else going)

    def _advance(self, row: Row, examples: float) -> None:
        name = self._name(row.policy, row.aggregator)
        bar = self.bars[name]
        bar.seconds.append(time.monotonic() - self.since)
        bar.done += 1
        where = f"{name}, seed {row.seed}, round {row.round}"
        if row.excluded:
            self.say(
                f"{where}: left out {row.excluded} of {counted(row.participants, 'client')}, "
                "their updates were not finite; probably the learning rate is too large",
            )
        if not row.reported:
            self.say(f"{where}: none of {counted(row.participants, 'client')} reported; the server stays as it was")
        if row.accuracy is not None:
            bar.accuracy = f"{100 * row.accuracy:.1f} %"
            self.reached = f"; {self.score} {bar.accuracy} after round {row.round}"
        bar.speed = f"{examples / max(row.seconds, 1e-9):,.0f} samples/s"
        bar.faults = ", ".join(faults_of([row]))
        self._go_on(Going(name, row.seed, row.round + 1))

    def _left(self, going: Going) -> str:
        """Return how long the rounds will take that are left, if some are over: as a policy's own, else as all."""
        known = [seconds for bar in self.bars.values() for seconds in bar.seconds]
        if not known:
            return ""
        each = {name: statistics.median(bar.seconds or known) for name, bar in self.bars.items()}
        seconds = sum(each[name] * (bar.total - bar.done) for name, bar in self.bars.items())
        seconds -= min(time.monotonic() - self.since, each[going.name])
        return f", about {spoken(seconds)} left" if seconds >= 1 else ""

    def _round(self, going: Going) -> str:
        """Return which round goes on, in as many words as there is room for."""
        seed = f"seed {going.seed}, " if self.experiment.seeds > 1 else ""
        where, elapsed = f"{seed}round {going.round} of {self.experiment.rounds}", f", {self.elapsed()}"
        left = self._left(going)
        texts = f"training {going.name}, {where}{elapsed}{left}", f"{where}{elapsed}{left}", f"{where}{left or elapsed}"
        return next((text for text in texts if len(text) <= self.console.width - 2), texts[-1])

    def _view(self) -> RenderableType:
        """Return the block: what is done just now, and a bar for every policy once there are rounds."""
        parts: list[RenderableType] = []
        if self.stage:
            parts.append(self._line(self._round(self.going) if self.going else f"{self.stage} {self.elapsed()}"))
        if self.training:
            parts.append(self._bars())
        return Group(*parts)

    def _bars(self) -> Table:
        width = self.console.width
        wide = width >= NARROW
        longest = max(map(len, self.bars))
        bar_width = 20 if wide else min(8, width - 18 - longest)  # names go before bars
        name_width = 32 if wide else max(width - 17 - max(bar_width, 0), 4)
        table = Table.grid(padding=(0, 1))
        for right in (False, False, True, True, True, False)[: 6 if wide else 4]:
            table.add_column(justify="right" if right else "left", no_wrap=True, overflow="ellipsis")
        heads = [counted(self.experiment.seeds, "seed") if self.experiment.seeds > 1 else "", "", "rounds", self.score]
        table.add_row(*heads, style="dim")
        for name, bar in self.bars.items():
            short = name if len(name) <= name_width else name[: max(name_width - 2, 1)] + ".."
            drawn = ProgressBar(bar.total, bar.done, width=bar_width) if bar_width > 2 else ""
            cells: list[RenderableType] = [Text(short), drawn]
            texts = [f"{bar.done}/{bar.total}", bar.accuracy, bar.speed, bar.faults][: 4 if wide else 2]
            table.add_row(*cells, *map(Text, texts))
        return table


def about_levels(choice: LevelChoice) -> str:
    """Say which rank levels were chosen, and why."""
    if len(choice.levels) > 1:
        return (
            f"{len(choice.levels)} rank levels (widths that adapters are compiled in): beside one, they save about "
            f"{choice.saved:.0f} s of training and cost about {choice.paid:.1f} s of compilation (estimates)."
        )
    if not choice.paid:
        return "One rank level (width that adapters are compiled in): there is one rank."
    return (
        "One rank level (width that adapters are compiled in): another would save about "
        f"{choice.saved:.1f} s of training and cost about {choice.paid:.1f} s of compilation (estimates)."
    )


def faults_of(rows: Sequence[Row]) -> list[str]:
    """Count in words what went wrong in some rounds, nothing where nothing did."""
    words = {"dropped": "dropped out", "cut_short": "cut short", "excluded": "not finite"}
    counts = {word: sum(getattr(row, field) for row in rows) for field, word in words.items()}
    return [f"{count} {word}" for word, count in counts.items() if count]
