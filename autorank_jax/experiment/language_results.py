"""What a federation of a language model tells while it goes on, and what it leaves behind."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from autorank_jax.experiment.events import Resumed
from autorank_jax.experiment.results import LanguageDivergedError
from autorank_jax.types import RoundInfo, State, Task


class Begun(NamedTuple):
    """Event: a stage begins."""

    name: str
    expected: float | None = None  # seconds, where earlier stages tell


class Ended(NamedTuple):
    """Event: a stage is over; of rounds the row tells."""

    name: str
    seconds: float
    detail: str = ""


LanguageEvent = Begun | Ended | Resumed


class LanguageRow(NamedTuple):
    """One round; number 0 is the model as it came."""

    round: int
    perplexity: float  # of the server on all held-out completions
    loss: float  # its logarithm
    train_loss: float | None
    seconds: float  # of training
    bytes_up: float
    bytes_down: float
    flops: float
    excluded: int  # clients whose update was not finite


class LanguageClient(NamedTuple):
    """One client; perplexities of the server cut to its rank, on its held-out completions, None where it has none."""

    name: str
    rows: int
    ratio: float
    rank: int
    before: float | None
    after: float | None


class Sample(NamedTuple):
    """A held-out prompt, the answer in the data, and what the model says, greedily."""

    prompt: str
    answer: str
    before: str
    after: str


class LanguageResults(NamedTuple):
    """Everything that was found, and what it takes to export it."""

    options: dict[str, Any]
    texts: str  # what became of them
    weights: dict[str, float]  # CRITIC weights by criterion, {} without scores
    rows: tuple[LanguageRow, ...]
    clients: tuple[LanguageClient, ...]
    sample: Sample
    probe_flops: float
    task: Task
    state: State


class Clock:
    """Tells stages as they come and go, and how long the next one will take by how fast the latest training was."""

    def __init__(self, on_event: Callable[[LanguageEvent], None]) -> None:
        """Begin with no stage."""
        self.on_event = on_event
        self.name, self.began = "", 0.0
        self.rate: float | None = None  # FLOPs of training per second, as they are counted

    def begin(self, name: str, flops: float = 0.0) -> None:
        """Begin a stage, which trains so much."""
        self.name, self.began = name, time.perf_counter()
        self.on_event(Begun(name, flops / self.rate if self.rate and flops else None))

    def end(self, detail: str = "", *, flops: float = 0.0, tell: bool = True) -> float:
        """End the stage, which has trained so much, and return its seconds."""
        seconds = time.perf_counter() - self.began
        if flops:
            self.rate = flops / max(seconds, 1e-9)
        if tell:
            self.on_event(Ended(self.name, seconds, detail))
        return seconds


def check_round(number: int, perplexity: float, info: RoundInfo) -> None:
    """Refuse a round that led nowhere.

    Raises:
        LanguageDivergedError: for a perplexity that is no finite number, or no client with a finite update.
    """
    there = int(info.participants) - int(info.dropped)
    if not math.isfinite(perplexity) or int(info.excluded) == there:
        what = f"no finite update of any of {there} clients" if math.isfinite(perplexity) else f"{perplexity}"
        raise LanguageDivergedError(
            f"round {number}: expected a finite perplexity, got {what}; probably the learning rate is too large"
        )
