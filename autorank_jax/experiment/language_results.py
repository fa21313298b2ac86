"""What a federation of a language model tells while it goes on, and what it leaves behind."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from autorank_jax.experiment.events import Resumed
from autorank_jax.experiment.results import LanguageDivergedError
from autorank_jax.federated.texts import TextReport, padding_in_batches
from autorank_jax.types import RoundInfo, State, Task


class Begun(NamedTuple):
    """Event: a stage begins."""

    name: str
    expected: float | None = None  # seconds, where earlier stages tell
    round: int = 0  # its number, from 1; 0 where it is no round


class Ended(NamedTuple):
    """Event: a stage is over; of rounds the row tells."""

    name: str
    seconds: float
    detail: str = ""


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


class LanguageStopped(NamedTuple):
    """Event: the rounds end before their time, by what is raised next."""

    options: dict[str, Any]
    rows: tuple[LanguageRow, ...]  # so far


LanguageEvent = Begun | Ended | Resumed | LanguageStopped


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
    texts: TextReport  # what became of those to train on, and of all lines
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

    def begin(self, name: str, flops: float = 0.0, *, number: int = 0) -> None:
        """Begin a stage, which trains so much, and has a number where it is a round."""
        self.name, self.began = name, time.perf_counter()
        self.on_event(Begun(name, flops / self.rate if self.rate and flops else None, number))

    def end(self, detail: str = "", *, flops: float = 0.0, tell: bool = True) -> float:
        """End the stage, which has trained so much, and return its seconds."""
        seconds = time.perf_counter() - self.began
        if flops:
            self.rate = flops / max(seconds, 1e-9)
        if tell:
            self.on_event(Ended(self.name, seconds, detail))
        return seconds


def summarize_language(results: LanguageResults) -> dict[str, Any]:
    """Return what `summary.json` says; costs are those of all rounds and clients."""
    first, last = results.rows[0], results.rows[-1]
    clients = [client for client in results.clients if client.before is not None and client.after is not None]
    befores, afters = ([getattr(client, name) for client in clients] for name in ("before", "after"))

    def total(name: str) -> float:
        return float(sum(getattr(row, name) for row in results.rows))

    def told(values: list[float]) -> dict[str, float | None]:
        return {"mean": sum(values) / len(values) if values else None, "worst": max(values, default=None)}

    ranks = [client.rank for client in results.clients]
    return {
        "perplexity": {"before": first.perplexity, "after": last.perplexity},
        "clients_perplexity": {"before": told(befores), "after": told(afters)},
        "ranks": {"least": min(ranks), "mean": sum(ranks) / len(ranks), "most": max(ranks)},
        "bytes_up": total("bytes_up"),
        "bytes_down": total("bytes_down"),
        "flops": total("flops"),
        "probe_flops": results.probe_flops,
        "excluded": sum(row.excluded for row in results.rows),
        "seconds": total("seconds"),
        "texts": {
            **{name: value for name, value in results.texts._asdict().items() if name not in ("cut", "left_out")},
            "padding_in_batches": padding_in_batches(
                results.texts, [client.rows for client in results.clients], results.options["batch_size"]
            ),
        },
        "cut": list(results.texts.cut),
        "left_out": list(results.texts.left_out),
        "criteria_weights": results.weights,
        "clients": [client._asdict() for client in results.clients],
        "sample": results.sample._asdict(),
    }


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
