"""What a run tells while it goes on."""

from collections.abc import Callable
from typing import NamedTuple

from autorank_jax.engine import LevelChoice
from autorank_jax.experiment.results import Results, Row, Run, Scores


class Stage(NamedTuple):
    """Event: a part of the preparations begins."""

    name: str
    number: int = 1
    total: int = 1  # of its kind
    told: bool = False  # how long it took, by a later event


class Leveled(NamedTuple):
    """Event: rank levels are chosen by what they save and cost."""

    choice: LevelChoice


class Compiled(NamedTuple):
    """Event: the program of an aggregator is ready."""

    aggregator: str
    seconds: float
    lanes: int  # clients that each device trains side by side


class Scored(NamedTuple):
    """Event: the clients of a seed have their scores and ranks."""

    scores: Scores


class Resumed(NamedTuple):
    """Event: the rounds of an earlier process are taken over."""

    rounds: int  # of all runs together
    differences: tuple[str, ...]  # of device and versions; where there are any, results are equal up to rounding only


class Started(NamedTuple):
    """Event: a run begins, or goes on after `done` rounds."""

    policy: str
    aggregator: str
    seed: int
    done: int = 0
    score: str = "accuracy"  # what rows call so: accuracy, or R²


class RoundDone(NamedTuple):
    """Event: a round is over."""

    row: Row
    examples: float  # seen in this round, counted once per epoch


class Finished(NamedTuple):
    """Event: a run is over."""

    run: Run


class Stopped(NamedTuple):
    """Event: the experiment ends before its time, by what is raised next."""

    results: Results  # so far, whole rounds


Event = Stage | Leveled | Compiled | Scored | Resumed | Started | RoundDone | Finished | Stopped
OnEvent = Callable[[Event], None]
