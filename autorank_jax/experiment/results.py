"""What an experiment leaves behind, and the numbers that sum it up."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from autorank_jax.interface import checked


class Row(NamedTuple):
    """One round of one run: a row of the history."""

    policy: str
    aggregator: str
    seed: int
    round: int  # counted from 1
    accuracy: float | None  # on the test set, or R²; None in rounds without evaluation, and where it is not finite
    loss: float | None  # on the test set, likewise
    train_loss: float | None  # mean over the examples seen in this round
    participants: int  # clients that were to train
    dropped: int  # of them, dropped out and sent nothing
    excluded: int  # of them, left out because their update was not finite
    cut_short: int  # of them, stopped by their budget of steps before their epochs were over
    reported: int  # of them, neither dropped nor excluded; where 0, the server stays as it was
    train_flops: float  # spent so far, with the probe, by all that trained: excluded clients too, dropped ones not
    bytes: float  # sent so far, down to all participants and up from those that did not drop out
    seconds: float  # training of this round
    epsilon: float | None = None  # of the clients' differential privacy, spent so far; None where there is none


class Record(NamedTuple):
    """The rounds of one run so far."""

    policy: str
    aggregator: str
    seed: int
    rows: tuple[Row, ...] = ()
    over: bool = False
    clients: Mapping[str, Mapping[str, float]] = {}  # their own accuracy at the end, where it was asked for

    @property
    def round(self) -> int:
        """Rounds done."""
        return len(self.rows)


class Costs(NamedTuple):
    """What one round costs if nobody fails, in expectation over who takes part; rows are charged for what happened."""

    trained_parameters: float  # summed over the clients of a round
    bytes_up: float
    bytes_down: float
    flops: float
    slowest_client: float  # FLOPs of the client that needs most of them


class Scores(NamedTuple):
    """What AutoRank saw of the clients under one seed."""

    seed: int
    criteria: tuple[str, ...]
    size: np.ndarray  # (clients,) whole numbers; where ranks are private, what was released
    label_counts: np.ndarray  # (clients, classes) likewise
    matrix: np.ndarray  # (clients, criteria)
    weights: np.ndarray | None  # (criteria,); None where no policy needs scores
    closeness: np.ndarray | None  # (clients,)
    ratios: Mapping[str, np.ndarray]  # by policy, (clients,): the first ranking
    ranks: Mapping[str, Mapping[str, np.ndarray]]  # by policy and layer, (clients,)
    probe_flops: float
    unprobed: int = 0  # clients without a loss curve, as their training in the probe was not finite


class Run(NamedTuple):
    """One policy under one aggregator and one seed."""

    policy: str
    aggregator: str
    seed: int
    rows: tuple[Row, ...]
    costs: Costs  # under the first ranking
    ratio_by_clients: float  # mean ratio under the first ranking, as is the next
    ratio_by_examples: float
    probe_flops: float  # charged to this policy: 0 where its ranks do not come from scores
    clients: Mapping[str, Mapping[str, float]] = {}  # their own accuracy at the end, where it was asked for

    @property
    def seconds(self) -> float:
        """Training time of all rounds."""
        return sum(row.seconds for row in self.rows)


class Results(NamedTuple):
    """Everything a run of an experiment found."""

    config: Mapping[str, Any]
    scores: tuple[Scores, ...]  # one per seed
    runs: tuple[Run, ...]
    compile_seconds: Mapping[str, float]  # by aggregator
    device: str
    versions: Mapping[str, str]
    score: str = "accuracy"  # what accuracies are, in `SCORES`: accuracy, or "r2", the share of variance explained
    stopped: str = ""  # why it ended before its time, if it did


class LanguageDivergedError(RuntimeError):
    """A federation whose loss is no number any more. The message is one line."""


class DivergedError(RuntimeError):
    """A run that trains for nothing, as its loss is no number any more. The message is one line."""

    def __init__(self, message: str, record: Record, results: Results | None = None) -> None:
        """Keep the rounds of the run, and what was found so far, these included."""
        self.record = record
        self.results = results
        super().__init__(message)


SCORES = {"accuracy": "accuracy", "r2": "R²"}
"""What accuracies are, as files name it and as it is shown."""


def run_name(policy: str, aggregator: str, *, several: bool) -> str:
    """Return how a policy under a rule is called: by both, where there are several rules."""
    return f"{policy}+{aggregator}" if several else policy


def run_names(results: Results) -> dict[str, list[Run]]:
    """Group the runs of all seeds by name: the policy, or `policy+aggregator` where there are several aggregators."""
    several = len({run.aggregator for run in results.runs}) > 1
    groups: dict[str, list[Run]] = {}
    for run in results.runs:
        groups.setdefault(run_name(run.policy, run.aggregator, several=several), []).append(run)
    return groups


def accuracies(run: Run) -> list[tuple[int, float]]:
    """Return round and accuracy of the rounds that were evaluated."""
    return [(row.round, row.accuracy) for row in run.rows if row.accuracy is not None]


@checked
def summarize(results: Results) -> dict[str, Any]:
    """Sum up an experiment as the contents of `summary.json`.

    Args:
        results: from `run_experiment`.
    """
    weights = [s.weights for s in results.scores if s.weights is not None]
    mean_weights = np.mean(weights, axis=0).tolist() if weights else []
    return {
        "policies": {name: _summarize_runs(runs, results) for name, runs in run_names(results).items()},
        "critic_weights": dict(zip(results.scores[0].criteria, mean_weights, strict=False)),
        "clients": [row for scores in results.scores for row in client_rows(scores)],
        "score": results.score,
        "device": results.device,
        "versions": dict(results.versions),
        "config": dict(results.config),
    } | ({"stopped": results.stopped} if results.stopped else {})


def _summarize_runs(runs: Sequence[Run], results: Results) -> dict[str, Any]:
    curves = [[accuracy for _, accuracy in accuracies(run)] for run in runs]
    costs = [run.costs for run in runs]
    total = [run.rows[-1].train_flops for run in runs]
    measured = {what: list(row) for what, row in runs[0].clients.items() if all(what in run.clients for run in runs)}
    clients = {what: {k: spread([r.clients[what][k] for r in runs]) for k in kinds} for what, kinds in measured.items()}
    private = {} if runs[0].rows[-1].epsilon is None else {"epsilon": runs[0].rows[-1].epsilon}
    return (
        ({"clients": clients} if clients else {})
        | private
        | {
            "final_accuracy": spread([curve[-1] if curve else None for curve in curves]),
            "best_accuracy": spread([max(curve, default=None) for curve in curves]),
            "area_under_curve": spread([statistics.fmean(curve) if curve else None for curve in curves]),
            "rounds_to": {f"{t:g}": _mean([rounds_to(run, t) for run in runs]) for t in results.config["targets"]},
            "mean_ratio": {
                "clients": _mean([run.ratio_by_clients for run in runs]),
                "examples": _mean([run.ratio_by_examples for run in runs]),
            },
            "examples_behind_highest_ratio": _mean([_behind(results, run) for run in runs]),
            "trained_parameters": _mean([c.trained_parameters for c in costs]),
            "bytes_per_round": {"up": _mean([c.bytes_up for c in costs]), "down": _mean([c.bytes_down for c in costs])},
            "train_flops": {
                "per_round": _mean([c.flops for c in costs]),
                "total": _mean(total),
                "probe": _mean([run.probe_flops for run in runs]),
                "slowest_client": _mean([c.slowest_client for c in costs]),
            },
            "lost": {
                "excluded": _mean([share_of(run.rows, "excluded") for run in runs]),
                "rounds": _mean([sum(row.reported == 0 for row in run.rows) for run in runs]),
            },
            "seconds": {
                "compile": results.compile_seconds[runs[0].aggregator],
                "train": _mean([run.seconds for run in runs]),
            },
        }
    )


def share_of(rows: Sequence[Row], count: str) -> float:
    """Return a count of participants as a share of them, over all rounds."""
    return sum(getattr(row, count) for row in rows) / max(1, sum(row.participants for row in rows))


def _behind(results: Results, run: Run) -> float:
    scores = next(scores for scores in results.scores if scores.seed == run.seed)
    return behind_highest(scores.ratios[run.policy], scores.size)


def behind_highest(ratios: np.ndarray, size: np.ndarray) -> float:
    """Return the share of all examples that the clients of the highest ratio hold.

    Rules that average a rank position over its owners, such as `rbla`, leave the last ones to these clients, and to
    those whose ratios round to the same rank.

    Args:
        ratios: `(clients,)`.
        size: `(clients,)` examples.
    """
    return float(size[ratios == ratios.max()].sum() / max(1, size.sum()))


def rounds_to(run: Run, target: float) -> int | None:
    """Return the first round whose accuracy reaches a target."""
    return next((number for number, accuracy in accuracies(run) if accuracy >= target), None)


def client_rows(scores: Scores) -> list[dict[str, Any]]:
    """Return one row per client, as in `criteria.csv`: criteria, closeness, and every policy's ratio and ranks."""
    rows = []
    for client, size in enumerate(scores.size.tolist()):
        row: dict[str, Any] = {"seed": scores.seed, "client": client, "examples": size}
        row |= dict(zip(scores.criteria, map(_exactly, scores.matrix[client]), strict=True))
        row["closeness"] = None if scores.closeness is None else _tidy(scores.closeness[client])
        for policy, ratios in scores.ratios.items():
            row[f"ratio.{policy}"] = _tidy(ratios[client])
            row |= {f"rank.{policy}.{path}": int(ranks[client]) for path, ranks in scores.ranks[policy].items()}
        rows.append(row)
    return rows


def _exactly(value: Any) -> float:
    """Return a float32 in as few digits as tell it from all others: ranks of such a file are those of the run."""
    return float(str(np.float32(value)))


def si(value: float | None, digits: int = 3) -> str:
    """Write a number with a prefix: 4.2e11 is `420 G`; a missing one is a dash."""
    if value is None:
        return "–"
    value = float(f"{value:.{digits}g}")  # 999.9e6 is 1 G
    scale, prefix = si_scale(value)
    return f"{value / scale:.{max(digits, 3)}g}{prefix}"


def si_scale(value: float) -> tuple[float, str]:
    """Return the unit in which a number is written, and its prefix after a space: 4.2e11 has `(1e9, " G")`."""
    for scale, prefix in ((1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return scale, prefix
    return 1.0, ""


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """Return mean, sample standard deviation (0 for one value) and the values; null where a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "sd": None, "values": list(values)}
    return {
        "mean": statistics.fmean(known),
        "sd": statistics.stdev(known) if len(known) > 1 else 0.0,
        "values": known,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if any value is missing."""
    return spread(values)["mean"]


def _tidy(value: float) -> float:
    """Round to the digits that float32 holds."""
    return float(f"{float(value):.6g}") if math.isfinite(value) else float(value)
