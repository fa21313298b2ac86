"""A federation of a language model, from its options to adapters: what `autorank-jax finetune` does, without printing.

Load → clients of texts → probe → rank → rounds → results. Clients train with Adam, as is usual for LoRA in decoders
(arXiv 2106.09685), which begins anew with every client and round.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from autorank_jax.adapters import max_ranks, task_from_causal_lm
from autorank_jax.aggregators import make_rule
from autorank_jax.datasets.instructions import load_instructions
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.probe import probe
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.evaluation.costs import ClientCosts, client_costs
from autorank_jax.evaluation.language import (
    client_perplexities,
    continue_text,
    language_flops,
    make_evaluate_language,
)
from autorank_jax.experiment.config import GLOBAL_RULES
from autorank_jax.experiment.language_options import LanguageOptions
from autorank_jax.experiment.mistakes import ConfigurationError
from autorank_jax.experiment.results import LanguageDivergedError
from autorank_jax.federated.texts import TextClients, text_clients
from autorank_jax.models.causal_checkpoint import load_causal_lm
from autorank_jax.models.causal_config import CausalConfig
from autorank_jax.models.causal_lm import ByteTokenizer, CausalLM, init_causal_lm
from autorank_jax.ranks import budgets, policies
from autorank_jax.ranks.criteria import CRITERIA, NEEDS_LOSSES
from autorank_jax.types import (
    Aggregator,
    Array,
    ClientStats,
    FederatedData,
    Key,
    LocalTraining,
    RankInfo,
    RankPolicy,
    RoundInfo,
    State,
    Task,
)

TINY = CausalConfig(vocabulary=258, width=64, depth=2, heads=4, kv_heads=2, head_dim=16, hidden=128)
"""Of the model that needs no files."""
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
    timed = _Timer(on_event)
    model, clients = load(options, timed)
    held, data, count = clients.held_out, clients.data, len(clients.names)
    assert held is not None  # `load` refuses it
    with _mistakes_of("max-rank"):
        task = task_from_causal_lm(model, max_rank=options.max_rank, key=options.seed)
    rule, keys = make_rule(options.aggregator), jax.random.split(jax.random.key(options.seed), 3)
    local = make_local_training(task, lambda h: optax.adam(h["learning_rate"]), batch_size=options.batch_size)
    state = begin(options, task, rule, None, count)
    flops = language_flops(model.config, task, length=options.max_length)
    stats, probe_flops = clients.stats, 0.0
    if options.probed:
        with _mistakes_of("probe"):
            groups = np.zeros(len(data.order), np.int32)
            probed = probe(
                keys[0], local, state, data, epochs=options.probe_epochs, ratio=PROBE_RATIO, lanes=options.lanes,
                groups=groups,
            )  # fmt: skip
        stats = stats._replace(epoch_losses=probed.epoch_losses, epochs=probed.epochs)
        small = {p: np.full(count, max(1, int(PROBE_RATIO * width))) for p, width in max_ranks(task.server).items()}
        cost = client_costs(task.server, small, data.size, flops, local_epochs=options.probe_epochs)
        probe_flops = float(cost.flops.sum())
        timed("probe")
    ratios, ranks, info = jax.jit(make_ranking(options, task))(keys[1], stats)
    state = begin(options, task, rule, ranks, count)
    timed("ranks", f"{_range(ranks)} of {options.max_rank}")
    evaluate = jax.jit(make_evaluate_language(task, held.inputs, held.targets))
    measure = jax.jit(lambda state: client_perplexities(task, state, held))
    prompt, answer = shortest_prompt(held)
    say = jax.jit(lambda server: continue_text(task, server, jnp.asarray(prompt), tokens=options.tokens))
    before, first_words = measure(state), say(state.server)
    cost = client_costs(
        state.server, rule.client_ranks(state.ranks, state.clients), data.size, flops,
        local_epochs=options.local_epochs, traffic=rule.traffic,
    )  # fmt: skip
    metrics = evaluate(state)
    rows = [LanguageRow(0, *_scores(metrics), None, 0.0, 0.0, 0.0, 0.0, 0)]
    timed("evaluation")
    on_round(rows[0])
    state, trained = _train(options, local, rule, keys[2], state, data, evaluate, cost, timed, on_round)
    after, last_words = measure(state), say(state.server)
    decode = _decoder(model.tokenizer)
    some = np.asarray(held.size) > 0
    return LanguageResults(
        options={name: str(v) if v is not None and name in ("model", "data") else v
                 for name, v in dataclasses.asdict(options).items()},
        texts=str(clients.report).partition("\n")[0],
        weights=dict(zip(info.criteria, np.asarray(info.weights).tolist(), strict=True)),
        rows=(*rows, *trained),
        clients=tuple(
            LanguageClient(name, int(data.size[n]), float(ratios[n]), max(int(r[n]) for r in ranks.values()),
                           *(_number(p[n]) if some[n] else None for p in (before, after)))
            for n, name in enumerate(clients.names)
        ),
        sample=Sample(decode(prompt), decode(answer), decode(first_words), decode(last_words)),
        probe_flops=probe_flops,
        task=task,
        state=state,
    )  # fmt: skip


def load(options: LanguageOptions, timed: Callable[..., None] = lambda *_: None) -> tuple[CausalLM, TextClients]:
    """Load the model and make clients of the texts, some of which are held out.

    Args:
        options: for files and clients.
        timed: called with the name of each stage that is done, and what it found.

    Raises:
        ConfigurationError: for folders and files that are not what they should be, and data of fewer than two clients.
        DatasetError: for files of instructions that cannot be read.
    """
    instructions = load_instructions(options.data, skip=options.skip_odd_lines) if options.data else load_instructions()
    left_out = f", {len(instructions.problems)} lines left out" if instructions.problems else ""
    timed("data", f"{len(instructions.examples)} texts{left_out}")
    if options.model:
        with _mistakes_of("model"):
            dtype = None if options.dtype == "auto" else jnp.dtype(options.dtype)
            model = load_causal_lm(options.model, dtype=dtype)
    else:
        dtype = jnp.float32 if options.dtype == "auto" else jnp.dtype(options.dtype)
        model = init_causal_lm(TINY, seed=options.seed, dtype=dtype, tokenizer=ByteTokenizer())
    if options.max_rank > model.config.width:
        raise ConfigurationError(
            [f"max-rank: expected at most the model's width, {model.config.width}, got {options.max_rank}"]
        )
    timed("model", f"{sum(p.size for p in model.params.values()) / 1e6:.3g} M parameters")
    with _mistakes_of("data"):
        clients = text_clients(
            instructions, model.tokenizer, length=options.max_length, clients_by=options.clients_by,
            clients=options.clients or None, alpha=options.alpha, seed=options.seed, hold_out=options.hold_out,
        )  # fmt: skip
    if len(clients.names) < 2:
        raise ConfigurationError(
            [f"clients-by: expected a field of at least two values, got {options.clients_by!r} with one, "
             f"{clients.names[0]!r}; --clients makes several of it"]
        )  # fmt: skip
    if clients.held_out is None or not bool(jnp.any(clients.held_out.targets >= 0)):
        raise ConfigurationError(
            [f"hold-out: expected a share that leaves some client a text, got {options.hold_out} of few texts each"]
        )
    timed("clients", f"{len(clients.names)} of {str(clients.report).partition(chr(10))[0]}")
    return model, clients


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


def begin(
    options: LanguageOptions, task: Task, rule: Aggregator, ranks: dict[str, Array] | None, clients: int
) -> State:
    """Make the state before the first round; everybody's ranks are the maximum where None."""
    return init_state(
        task.server, rule, ranks, learning_rate=options.learning_rate, local_epochs=options.local_epochs,
        max_epochs=options.local_epochs, clients=clients,
    )  # fmt: skip


def _train(
    options: LanguageOptions,
    local: LocalTraining,
    rule: Aggregator,
    key: Key,
    state: State,
    data: FederatedData,
    evaluate: Callable[[State], dict[str, Array]],
    cost: ClientCosts,
    timed: "_Timer",
    on_round: Callable[[LanguageRow], None],
) -> tuple[State, list[LanguageRow]]:
    """Run the rounds."""
    round_fn = jax.jit(make_round(local, rule, lanes=options.lanes)).lower(key, state, data).compile()
    timed("compilation")
    rows = []
    for number in range(1, options.rounds + 1):
        began = time.perf_counter()
        state, info = jax.block_until_ready(round_fn(key, state, data))
        seconds = time.perf_counter() - began
        perplexity, loss = _scores(evaluate(state))
        _check(number, loss, info)
        row = LanguageRow(
            number, perplexity, loss, float(info.loss), seconds,
            *(float(each.sum()) for each in (cost.bytes_up, cost.bytes_down, cost.flops)), int(info.excluded),
        )  # fmt: skip
        rows.append(row)
        on_round(row)
    return state, rows


def _check(number: int, loss: float, info: RoundInfo) -> None:
    lost, there = int(info.excluded), int(info.participants) - int(info.dropped)
    if not math.isfinite(loss) or lost == there:
        what = f"a loss of {loss}" if not math.isfinite(loss) else f"no finite update of any of {there} clients"
        raise LanguageDivergedError(
            f"round {number}: expected finite losses, got {what}; probably the learning rate is too large"
        )


def shortest_prompt(held: FederatedData) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of the shortest prompt among texts, and those of its answer."""
    ids, segments, targets = map(np.asarray, (held.inputs.ids, held.inputs.segments, held.targets))
    found: list[tuple[int, int, int, int]] = []
    for row in range(len(ids)):
        for segment in range(1, int(segments[row].max()) + 1):
            where = np.flatnonzero(segments[row] == segment)
            learnt = where[targets[row, where] >= 0]
            if len(learnt):
                first = int(learnt[0]) + 1
                gap = np.flatnonzero(np.diff(learnt) > 1)
                last = int(learnt[gap[0]] if len(gap) else learnt[-1]) + 2
                found.append((first - int(where[0]), row, first, last))
    length, row, first, last = min(found)
    return ids[row, first - length : first], ids[row, first:last]


def _decoder(tokenizer: Any) -> Callable[[Any], str]:
    """Make the function that turns tokens into a text, up to the token that ends one."""
    eos = tokenizer.encode(tokenizer.eos) if tokenizer.eos else []

    def decode(ids: Any) -> str:
        told = np.asarray(ids).tolist()
        end = told.index(eos[0]) if len(eos) == 1 and eos[0] in told[1:] and told[0] != eos[0] else len(told)
        return str(tokenizer.decode(told[:end]))

    return decode


def _scores(metrics: dict[str, Array]) -> tuple[float, float]:
    return float(metrics["perplexity"]), float(metrics["loss"])


def _number(value: Array) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


def _range(ranks: dict[str, Array]) -> str:
    low, high = min(int(r.min()) for r in ranks.values()), max(int(r.max()) for r in ranks.values())
    return str(low) if low == high else f"{low}–{high}"


@contextlib.contextmanager
def _mistakes_of(option: str) -> Iterator[None]:
    """Turn what the library refuses into a mistake of an option."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        raise ConfigurationError([f"{option}: {' '.join(str(error).split())}"]) from error


class _Timer:
    """Tells what was done since the last time."""

    def __init__(self, on_event: Callable[[Stage], None]) -> None:
        self.on_event, self.began = on_event, time.perf_counter()

    def __call__(self, name: str, detail: str = "") -> None:
        now = time.perf_counter()
        self.on_event(Stage(name, now - self.began, detail))
        self.began = now
