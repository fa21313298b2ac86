"""A federation of a language model, from its options to adapters: what `autorank-jax finetune` does, without printing.

Load → clients of texts → probe → rank → rounds → results. Clients train with Adam, as is usual for LoRA in decoders
(arXiv 2106.09685), which begins anew with every client and round.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.adapters.lora import equal_ranks, max_ranks
from autorank_jax.engine.ahead import compile_ahead
from autorank_jax.engine.probe import part_sizes, probe
from autorank_jax.engine.round import make_round
from autorank_jax.evaluation.costs import client_costs
from autorank_jax.evaluation.language import (
    client_perplexities,
    continue_text,
    make_evaluate_language,
)
from autorank_jax.experiment.checkpoints import Checkpoints
from autorank_jax.experiment.doubts import little_variation, without_curves
from autorank_jax.experiment.events import Resumed
from autorank_jax.experiment.language_options import LanguageOptions, as_json
from autorank_jax.experiment.language_position import LanguagePosition, Save, make_save, restore
from autorank_jax.experiment.language_results import (
    Clock,
    LanguageClient,
    LanguageEvent,
    LanguageResults,
    LanguageRow,
    LanguageStopped,
    Sample,
    check_round,
)
from autorank_jax.experiment.language_setup import Parts, begin, make_parts, mistakes_of, shortest_prompt
from autorank_jax.experiment.mistakes import ConfigurationError
from autorank_jax.experiment.results import LanguageDivergedError
from autorank_jax.experiment.waiting import wait_for
from autorank_jax.interface import checked
from autorank_jax.ranks import budgets, policies
from autorank_jax.ranks.criteria import CRITERIA, NEEDS_LOSSES
from autorank_jax.types import Array, ClientStats, Key, RankInfo, RankPolicy, Server, State, Task

PROBE_RATIO = 0.1
"""Rank of the probe over the maximum rank, as `probe` has it."""

FORWARD = 1 / 3
"""What evaluating a row takes of training on it: the backward pass computes the activations again."""

OnRow = Callable[[LanguageRow], object]
"""Called after every round, and with round 0 before the first."""


class Tools(NamedTuple):
    """What a model is looked at with."""

    evaluate: Callable[[State], dict[str, Array]]
    measure: Callable[[State], Array]  # perplexity of each client
    say: Callable[[Server], Array]  # the sample
    prompt: np.ndarray
    answer: np.ndarray


@checked
def run_language(
    options: LanguageOptions,
    *,
    on_event: Callable[[LanguageEvent], None] = lambda _: None,
    on_round: OnRow = lambda _: None,
    checkpoints: Checkpoints | None = None,
) -> LanguageResults:
    """Train a language model by federated LoRA, a rank for every client.

    Args:
        options: all of them.
        on_event: called when a stage begins, goes on and is over.
        on_round: called after every round, and with round 0 before the first. Whatever it raises leaves through here,
            after a checkpoint.
        checkpoints: where to save and how often. If the folder holds checkpoints of these options, model and texts, it
            goes on from the latest: results are bit for bit those of a run that was never interrupted.

    Raises:
        ConfigurationError: for mistakes in options and files, in lines.
        DatasetError: for files of instructions that cannot be read.
        CheckpointError: for checkpoints of something else, damaged ones, or those of a newer version.
        LanguageDivergedError: for a loss that is no number.
    """
    options.validate()
    options = dataclasses.replace(options, learning_rate=options.rate)
    clock = Clock(on_event)
    parts = make_parts(options, clock)
    keys = jax.random.split(jax.random.key(options.seed), 3)
    tools = make_tools(options, parts, clock)
    save = make_save(checkpoints, options, parts)
    position, differing = restore(checkpoints, options, parts)
    if position is None:
        position = prepare(keys, options, parts, tools, clock)
        on_round(position.rows[0])
        save(position, False)
    else:
        on_event(Resumed(position.round, differing))
    position = run_rounds(keys[2], options, parts, position, tools=tools, clock=clock, save=save, on_round=on_round)
    return finish(options, parts, position, tools, clock)


def make_tools(options: LanguageOptions, parts: Parts, clock: Clock) -> Tools:
    """Compile the evaluation; the other functions are compiled when first called."""
    task, held = parts.task, parts.held_out
    prompt, answer = shortest_prompt(held)
    tokens = min(options.tokens, parts.positions - len(prompt))  # an answer's first token fits, and so one does
    clock.begin("compilation of the evaluation")
    evaluate = jax.jit(make_evaluate_language(task, held.inputs, held.targets))
    compiled = evaluate.lower(begin(options, parts, None)).compile()
    clock.end()
    return Tools(
        compiled,
        jax.jit(lambda state: client_perplexities(task, state, held)),
        jax.jit(lambda server: continue_text(task, server, jnp.asarray(prompt), tokens=tokens)),
        prompt,
        answer,
    )


def prepare(keys: Key, options: LanguageOptions, parts: Parts, tools: Tools, clock: Clock) -> LanguagePosition:
    """Evaluate the model as it came, probe, and give every client its rank."""
    begun = begin(options, parts, None)
    clock.begin("evaluation")
    scores = _scores(wait_for(tools.evaluate(begun)))
    if not math.isfinite(scores[0]):
        raise ConfigurationError([f"model: expected a finite perplexity before training, got {scores[0]}"])
    clock.end(flops=parts.flops.base * float(parts.held_out.size.sum()) * FORWARD)
    clock.begin("sample")
    words = wait_for(tools.say(begun.server))
    clock.end()
    stats, spent = parts.stats, 0.0
    if options.probed:
        stats, spent = run_probe(keys[0], options, parts, clock)
    clock.begin("ranks")
    ratios, ranks, info = jax.jit(make_ranking(options, parts.task))(keys[1], stats)
    state = begin(options, parts, ranks)
    doubts = [little_variation(info.criteria, np.asarray(info.matrix))]
    if options.probed:
        doubts += [without_curves(int(jnp.sum(stats.epochs == 0)), len(parts.names))]
    clock.end("; ".join([f"{_range(ranks)} of {options.max_rank}", *filter(None, doubts)]))
    before = measure_clients(state, tools, clock)
    weights = dict(zip(info.criteria, np.asarray(info.weights).tolist(), strict=True))
    row = LanguageRow(0, *scores, None, 0.0, 0.0, 0.0, 0.0, 0)
    return LanguagePosition((row,), state, ratios, weights, spent, before, words)


def run_probe(key: Key, options: LanguageOptions, parts: Parts, clock: Clock) -> tuple[ClientStats, float]:
    """Return the clients' statistics with loss curves, and the FLOPs that they took.

    Raises:
        ConfigurationError: if no client's losses are finite.
    """
    ranks = equal_ranks(max_ranks(parts.task), len(parts.names), PROBE_RATIO)
    size = part_sizes(parts.data.size, options.probe_share)
    cost = client_costs(parts.task.server, ranks, size, parts.flops, local_epochs=options.probe_epochs)
    flops = float(cost.flops.sum())

    def run(one: Callable[..., Any], *given: Any) -> Any:
        clock.begin("compilation of the probe")
        compiled = jax.jit(one).lower(*given).compile()
        clock.end()
        clock.begin("probe", flops)
        done = wait_for(compiled(*given))
        clock.end(flops=flops)
        return done

    with mistakes_of("probe"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* clients was not finite")  # it is told with the ranks
        probed = probe(
            key,
            parts.local,
            begin(options, parts, None),
            parts.data,
            epochs=options.probe_epochs,
            ratio=PROBE_RATIO,
            share=options.probe_share,
            lanes=min(options.lanes, len(parts.names)),
            groups=np.zeros(len(parts.data.order), np.int32),
            run=run,
        )
    return parts.stats._replace(epoch_losses=probed.epoch_losses, epochs=probed.epochs), flops


def rank_policy(options: LanguageOptions) -> RankPolicy:
    """Make the rank policy: scores look at loss curves where there was a probe."""
    if options.policy == "full":
        return policies.uniform(1.0)
    criteria = [name for name in CRITERIA if options.probed or name not in NEEDS_LOSSES]
    scored = policies.autorank(criteria=criteria, min_ratio=options.min_ratio)
    return budgets.with_one_ratio(scored) if options.policy == "uniform_bytes" else scored


def make_ranking(
    options: LanguageOptions, task: Task
) -> Callable[[Key, ClientStats], tuple[Array, dict[str, Array], RankInfo]]:
    """Make the function that gives ratios, ranks and what led to them."""
    policy = rank_policy(options)

    def rank(key: Key, stats: ClientStats) -> tuple[Array, dict[str, Array], RankInfo]:
        ratios, info = policy(key, stats)
        return ratios, policies.ranks_from_ratios(ratios, max_ranks(task.server)), info

    return rank


def measure_clients(state: State, tools: Tools, clock: Clock) -> Array:
    """Return the perplexity of each client."""
    clock.begin("evaluation of the clients")
    measured = wait_for(tools.measure(state))
    clock.end()
    return measured


def run_rounds(
    key: Key,
    options: LanguageOptions,
    parts: Parts,
    position: LanguagePosition,
    *,
    tools: Tools,
    clock: Clock,
    save: Save,
    on_round: OnRow,
) -> LanguagePosition:
    """Run all rounds, or those that a checkpoint did not hold.

    Raises:
        LanguageDivergedError: for a round that led nowhere.
    """
    if position.round >= options.rounds:
        return position
    clock.begin("compilation")
    round_fn = make_round(parts.local, parts.rule, lanes=min(options.lanes, len(parts.names)))
    compiled = compile_ahead(round_fn, key, position.state, parts.data)
    clock.end()
    try:
        while position.round < options.rounds:
            position = next_round(compiled, key, options, parts, position, tools=tools, clock=clock)
            try:
                on_round(position.rows[-1])
            except BaseException:
                save(position, True)
                raise
            save(position, False)
    except (KeyboardInterrupt, LanguageDivergedError):
        clock.on_event(LanguageStopped(as_json(options), position.rows))
        raise
    return position


def next_round(
    compiled: Callable[..., Any],
    key: Key,
    options: LanguageOptions,
    parts: Parts,
    position: LanguagePosition,
    *,
    tools: Tools,
    clock: Clock,
) -> LanguagePosition:
    """Run one round and look at the server.

    Raises:
        LanguageDivergedError: if it led nowhere.
    """
    up, down, flops = cost_of(options, parts, position.state)
    number = position.round + 1
    clock.begin(f"round {number} of {options.rounds}", flops, number=number)
    state, done = wait_for(compiled(key, position.state, parts.data))
    seconds = clock.end(flops=flops, tell=False)
    scores = _scores(wait_for(tools.evaluate(state)))
    check_round(number, scores[0], done)
    row = LanguageRow(number, *scores, _number(done.loss), seconds, up, down, flops, int(done.excluded))
    return position._replace(rows=(*position.rows, row), state=state)


def cost_of(options: LanguageOptions, parts: Parts, state: State) -> tuple[float, float, float]:
    """Return bytes to the server, bytes to the clients and FLOPs of the next round, of all clients together."""
    cost = client_costs(
        state.server, parts.rule.client_ranks(state.ranks, state.clients), parts.data.size, parts.flops,
        local_epochs=options.local_epochs, traffic=parts.rule.traffic,
    )  # fmt: skip
    return float(cost.bytes_up.sum()), float(cost.bytes_down.sum()), float(cost.flops.sum())


def finish(
    options: LanguageOptions, parts: Parts, position: LanguagePosition, tools: Tools, clock: Clock
) -> LanguageResults:
    """Measure the clients again and sum everything up."""
    state, some = position.state, np.asarray(parts.held_out.size) > 0
    after = measure_clients(state, tools, clock)
    clock.begin("sample")
    last_words = wait_for(tools.say(state.server))
    clock.end()
    return LanguageResults(
        options=as_json(options),
        texts=parts.texts,
        weights=dict(position.weights),
        rows=position.rows,
        clients=tuple(
            LanguageClient(
                name,
                int(parts.data.size[n]),
                float(position.ratios[n]),
                max(int(rank[n]) for rank in state.ranks.values()),
                _number(position.before[n]) if some[n] else None,
                _number(after[n]) if some[n] else None,
            )
            for n, name in enumerate(parts.names)
        ),
        sample=Sample(
            parts.decode(tools.prompt, whole=True), *map(parts.decode, (tools.answer, position.words, last_words))
        ),
        probe_flops=position.probe_flops,
        task=parts.task,
        state=state,
    )


def _scores(metrics: dict[str, Array]) -> tuple[float, float]:
    return float(metrics["perplexity"]), float(metrics["loss"])


def _number(value: Array) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


def _range(ranks: Mapping[str, Array]) -> str:
    low, high = min(int(r.min()) for r in ranks.values()), max(int(r.max()) for r in ranks.values())
    return str(low) if low == high else f"{low}–{high}"
