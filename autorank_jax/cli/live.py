"""What a run shows while it goes on: live bars on a terminal, a line per run elsewhere."""

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.status import Status

from autorank_jax.cli.tables import scores_table
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.events import Compiled, Event, Finished, Resumed, RoundDone, Scored, Started
from autorank_jax.experiment.results import Row, accuracies


class Display:
    """A context manager to be called with the events of an experiment."""

    def __init__(self, console: Console, experiment: Experiment) -> None:
        """Prepare to show an experiment on a console."""
        self.console = console
        self.experiment = experiment
        self.status = Status("Preparing data, model and one compiled round …", console=console)
        self.bars = Progress(
            TextColumn("{task.description:<18}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[accuracy]:>8}"),
            TextColumn("{task.fields[speed]:>16}"),
            TextColumn("{task.fields[faults]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
        )
        self.tasks: dict[str, TaskID] = {}
        self.last: Row | None = None

    def __enter__(self) -> "Display":
        """Say that preparations begin."""
        if self.console.is_terminal:
            self.status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was, the bars at where they stand."""
        self._pause()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Compiled(aggregator, seconds):
                self._pause()
                self.console.print(f"Compiled one round of {aggregator} in {seconds:.1f} s; it serves every policy.")
            case Scored(scores) if scores.seed == self.experiment.first_seed:
                self._pause()
                self.console.print(scores_table(scores))
            case Resumed(rounds, differences):
                self._pause()
                self.console.print(f"Going on after {rounds} rounds of an earlier process.")
                for difference in differences:
                    self.console.print(f"Since then: {difference}; results are equal up to rounding only.")
            case Started():
                self._begin(self._name(event.policy, event.aggregator), event.done)
            case RoundDone(row, examples):
                self._advance(row, examples)
            case Finished(run) if not self.console.is_terminal:
                curve = accuracies(run)
                last = f"accuracy {100 * curve[-1][1]:.1f} %" if curve else "no accuracy"
                name = self._name(run.policy, run.aggregator)
                what = f"{name}, seed {run.seed}: {last} after {len(run.rows)} rounds, {run.seconds:.1f} s"
                self.console.print(", ".join([what, *faults_of(run.rows)]))

    def _name(self, policy: str, aggregator: str) -> str:
        return f"{policy}+{aggregator}" if len(self.experiment.aggregators) > 1 else policy

    def _pause(self) -> None:
        self.status.stop()
        if self.bars.live.is_started:
            self.bars.stop()

    def _begin(self, name: str, done: int) -> None:
        if not self.console.is_terminal:
            return
        self._pause()
        self.bars.start()
        if name not in self.tasks:
            total = self.experiment.rounds * self.experiment.seeds
            self.tasks[name] = self.bars.add_task(name, total=total, accuracy="", speed="", faults="")
        self.bars.advance(self.tasks[name], done)

    def _advance(self, row: Row, examples: float) -> None:
        name = self._name(row.policy, row.aggregator)
        where = f"{name}, seed {row.seed}, round {row.round}"
        if row.excluded:
            self.console.print(
                f"{where}: left out {row.excluded} of {row.participants} clients, "
                "their updates were not finite; probably the learning rate is too large",
            )
        if not row.reported:
            self.console.print(f"{where}: none of {row.participants} clients reported; the server stays as it was")
        if name not in self.tasks:
            return
        known = {} if row.accuracy is None else {"accuracy": f"{100 * row.accuracy:.1f} %"}
        speed = f"{examples / max(row.seconds, 1e-9):,.0f} samples/s"
        self.bars.update(self.tasks[name], advance=1, speed=speed, faults=", ".join(faults_of([row])), **known)  # type: ignore[arg-type]


def faults_of(rows: Sequence[Row]) -> list[str]:
    """Count in words what went wrong in some rounds, nothing where nothing did."""
    words = {"dropped": "dropped out", "cut_short": "cut short", "excluded": "not finite"}
    counts = {word: sum(getattr(row, field) for row in rows) for field, word in words.items()}
    return [f"{count} {word}" for word, count in counts.items() if count]
