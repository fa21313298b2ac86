"""A federation of a language model, from its options to adapters: what `autorank-jax finetune` does, without printing.

Load → clients of texts → probe → rank → rounds → results. Clients train with Adam, as is usual for LoRA in decoders
(arXiv 2106.09685), which begins anew with every client and round.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.adapters import max_ranks
from autorank_jax.engine.probe import probe
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.evaluation.costs import client_costs
from autorank_jax.evaluation.language import (
    client_perplexities,
    continue_text,
    make_evaluate_language,
)
from autorank_jax.experiment.config import GLOBAL_RULES
from autorank_jax.experiment.language_options import LanguageOptions
from autorank_jax.experiment.language_setup import Parts, make_parts, mistakes_of, shortest_prompt
from autorank_jax.experiment.results import LanguageDivergedError
from autorank_jax.ranks import budgets, policies
from autorank_jax.ranks.criteria import CRITERIA, NEEDS_LOSSES
from autorank_jax.types import (
    Array,
    ClientStats,
    Key,
    RankInfo,
    RankPolicy,
    RoundInfo,
    State,
    Task,
)

PROBE_RATIO = 1 / 8
"""Rank of the probe over the maximum rank."""


class Stage(NamedTuple):
    """An event: something is done."""

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


def run_language(
    options: LanguageOptions,
    *,
    on_event: Callable[[Stage], None] = lambda _: None,
    on_round: Callable[[LanguageRow], None] = lambda _: None,
) -> LanguageResults:
    """Train a language model by federated LoRA, a rank for every client.

    Args:
        options: all of them.
        on_event: called when a stage is done.
        on_round: called after every round, and with round 0 before the first.

    Raises:
        ConfigurationError: for mistakes in options and files, in lines.
        DatasetError: for files of instructions that cannot be read.
        LanguageDivergedError: for a loss that is no number.
    """
    options.validate(GLOBAL_RULES)
    options = dataclasses.replace(options, learning_rate=options.rate)
    timed = _Timer(on_event)
    parts = make_parts(options, timed)
    task, rule, data, held = parts.task, parts.rule, parts.data, parts.held_out
    keys = jax.random.split(jax.random.key(options.seed), 3)
    stats, probe_flops = parts.stats, 0.0
    if options.probed:
        stats, probe_flops = run_probe(keys[0], options, parts)
        timed("probe")
    ratios, ranks, info = jax.jit(make_ranking(options, task))(keys[1], stats)
    state = begin(options, parts, ranks)
    timed("ranks", f"{_range(ranks)} of {options.max_rank}")
    prompt, answer = shortest_prompt(held)
    measure = jax.jit(lambda state: client_perplexities(task, state, held))
    say = jax.jit(lambda server: continue_text(task, server, jnp.asarray(prompt), tokens=options.tokens))
    evaluate = jax.jit(make_evaluate_language(task, held.inputs, held.targets))
    before, first_words = measure(state), say(state.server)
    rows = [LanguageRow(0, *_scores(evaluate(state)), None, 0.0, 0.0, 0.0, 0.0, 0)]
    timed("evaluation")
    on_round(rows[0])
    round_fn = jax.jit(make_round(parts.local, rule, lanes=options.lanes)).lower(keys[2], state, data).compile()
    timed("compilation")
    cost = client_costs(
        state.server, rule.client_ranks(state.ranks, state.clients), data.size, parts.flops,
        local_epochs=options.local_epochs, traffic=rule.traffic,
    )  # fmt: skip
    up, down, flops = (float(each.sum()) for each in (cost.bytes_up, cost.bytes_down, cost.flops))
    for number in range(1, options.rounds + 1):
        began = time.perf_counter()
        state, done = jax.block_until_ready(round_fn(keys[2], state, data))
        seconds = time.perf_counter() - began
        perplexity, loss = _scores(evaluate(state))
        check_round(number, perplexity, done)
        rows.append(
            LanguageRow(number, perplexity, loss, float(done.loss), seconds, up, down, flops, int(done.excluded))
        )
        on_round(rows[-1])
    after, last_words = measure(state), say(state.server)
    some = np.asarray(held.size) > 0
    return LanguageResults(
        options={
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(options).items()
        },
        texts=parts.texts,
        weights=dict(zip(info.criteria, np.asarray(info.weights).tolist(), strict=True)),
        rows=tuple(rows),
        clients=tuple(
            LanguageClient(
                name,
                int(data.size[n]),
                float(ratios[n]),
                max(int(rank[n]) for rank in ranks.values()),
                _number(before[n]) if some[n] else None,
                _number(after[n]) if some[n] else None,
            )
            for n, name in enumerate(parts.names)
        ),
        sample=Sample(*map(parts.decode, (prompt, answer, first_words, last_words))),
        probe_flops=probe_flops,
        task=task,
        state=state,
    )


def run_probe(key: Key, options: LanguageOptions, parts: Parts) -> tuple[ClientStats, float]:
    """Return the clients' statistics with loss curves, and the FLOPs that they took.

    Raises:
        ConfigurationError: if no client's losses are finite.
    """
    data, count = parts.data, len(parts.names)
    with mistakes_of("probe"):
        probed = probe(
            key,
            parts.local,
            begin(options, parts, None),
            data,
            epochs=options.probe_epochs,
            ratio=PROBE_RATIO,
            lanes=options.lanes,
            groups=np.zeros(len(data.order), np.int32),
        )
    widest = max_ranks(parts.task.server)
    ranks = {path: jnp.full(count, max(1, int(PROBE_RATIO * width)), jnp.int32) for path, width in widest.items()}
    cost = client_costs(parts.task.server, ranks, data.size, parts.flops, local_epochs=options.probe_epochs)
    stats = parts.stats._replace(epoch_losses=probed.epoch_losses, epochs=probed.epochs)
    return stats, float(cost.flops.sum())


def rank_policy(options: LanguageOptions) -> RankPolicy:
    """Make the rank policy: scores look at loss curves where there was a probe."""
    if options.policy == "full":
        return policies.uniform(1.0)
    criteria = [name for name in CRITERIA if options.probed or name not in NEEDS_LOSSES]
    scored = policies.autorank(criteria=criteria, min_ratio=options.min_ratio)
    return budgets.with_one_ratio(scored) if options.policy == "uniform" else scored


def make_ranking(
    options: LanguageOptions, task: Task
) -> Callable[[Key, ClientStats], tuple[Array, dict[str, Array], RankInfo]]:
    """Make the function that gives ratios, ranks and what led to them; to be compiled, as ratios round beyond 1."""
    policy = rank_policy(options)

    def rank(key: Key, stats: ClientStats) -> tuple[Array, dict[str, Array], RankInfo]:
        ratios, info = policy(key, stats)
        ratios = jnp.minimum(ratios, 1)
        return ratios, policies.ranks_from_ratios(ratios, max_ranks(task.server)), info

    return rank


def begin(options: LanguageOptions, parts: Parts, ranks: Mapping[str, Array] | None) -> State:
    """Make the state before the first round; everybody's ranks are the maximum where None."""
    return init_state(
        parts.task.server,
        parts.rule,
        ranks,
        learning_rate=options.rate,
        local_epochs=options.local_epochs,
        max_epochs=options.local_epochs,
        clients=len(parts.names),
    )


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


def _scores(metrics: dict[str, Array]) -> tuple[float, float]:
    return float(metrics["perplexity"]), float(metrics["loss"])


def _number(value: Array) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


def _range(ranks: dict[str, Array]) -> str:
    low, high = min(int(r.min()) for r in ranks.values()), max(int(r.max()) for r in ranks.values())
    return str(low) if low == high else f"{low}–{high}"


class _Timer:
    """Tells what was done since the last time."""

    def __init__(self, on_event: Callable[[Stage], None]) -> None:
        self.on_event, self.began = on_event, time.perf_counter()

    def __call__(self, name: str, detail: str = "") -> None:
        now = time.perf_counter()
        self.on_event(Stage(name, now - self.began, detail))
        self.began = now
