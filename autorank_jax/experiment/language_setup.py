"""What a federation of a language model is made of: model, clients of texts, task, local training and rule."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from autorank_jax.adapters import task_from_causal_lm
from autorank_jax.aggregators import make_rule
from autorank_jax.datasets.instructions import by_line, few, load_instructions
from autorank_jax.engine.flops import FlopModel
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.simulation import init_state
from autorank_jax.evaluation.language import language_flops
from autorank_jax.experiment.language_options import LanguageOptions
from autorank_jax.experiment.language_results import Clock
from autorank_jax.experiment.mistakes import ConfigurationError
from autorank_jax.federated.texts import TextClients, TextReport, padding_in_batches, text_clients
from autorank_jax.models.causal_checkpoint import load_causal_lm
from autorank_jax.models.causal_config import CausalConfig
from autorank_jax.models.causal_lm import ByteTokenizer, CausalLM, init_causal_lm
from autorank_jax.types import Aggregator, Array, ClientStats, FederatedData, LocalTraining, State, Task

MUCH_PADDING = 0.25
"""Share of what is computed from which on it is told how to compute less."""
TINY = CausalConfig(vocabulary=258, width=64, depth=2, heads=4, kv_heads=2, head_dim=16, hidden=128)
"""Of the model that needs no files."""


class Parts(NamedTuple):
    """What the rounds are made of."""

    task: Task
    local: LocalTraining
    rule: Aggregator
    flops: FlopModel  # of a row
    data: FederatedData
    held_out: FederatedData
    names: tuple[str, ...]  # of the clients
    stats: ClientStats
    texts: TextReport
    decode: Callable[..., str]
    positions: int  # that the model was made for


def make_parts(options: LanguageOptions, clock: Clock) -> Parts:
    """Load the files and make task, local training and rule.

    Args:
        options: all of them.
        clock: told of each stage, and what it found.

    Raises:
        ConfigurationError: as `load`.
        DatasetError: likewise.
    """
    model, clients = load(options, clock)
    task = task_from_causal_lm(model, max_rank=options.max_rank, key=options.seed)
    assert clients.held_out is not None  # `load` refuses it
    return Parts(
        task=task,
        local=make_local_training(task, lambda h: optax.adam(h["learning_rate"]), batch_size=options.batch_size),
        rule=make_rule(options.aggregator),
        flops=language_flops(model.config, task, length=options.max_length),
        data=clients.data,
        held_out=clients.held_out,
        names=clients.names,
        stats=clients.stats,
        texts=clients.report,
        decode=_decoder(model.tokenizer),
        positions=model.config.length,
    )


def load(options: LanguageOptions, clock: Clock) -> tuple[CausalLM, TextClients]:
    """Load the model and make clients of the texts, some of which are held out.

    Args:
        options: for files and clients.
        clock: told of each stage, and what it found.

    Raises:
        ConfigurationError: for folders and files that are not what they should be, and data of fewer than two clients.
        DatasetError: for files of instructions that cannot be read.
    """
    clock.begin("data")
    instructions = load_instructions(options.data, skip=options.skip_odd_lines) if options.data else load_instructions()
    clock.end("; ".join([f"{len(instructions.examples)} texts", *_told("left out", instructions.problems)]))
    clock.begin("model")
    dtype = None if options.dtype == "auto" else jnp.dtype(options.dtype)
    form: Any = None if options.quantize == "none" else options.quantize
    if options.model:
        with mistakes_of("model"):
            model = load_causal_lm(options.model, dtype=dtype, quantize=form)
    else:
        tokenizer = ByteTokenizer()
        model = init_causal_lm(TINY, seed=options.seed, dtype=dtype or jnp.float32, tokenizer=tokenizer, quantize=form)
    most = {"max-rank": ("width", options.max_rank), "max-length": ("length", options.max_length)}
    problems = [
        f"{name}: expected at most the model's {what}, {getattr(model.config, what)}, got {given}"
        for name, (what, given) in most.items()
        if given > getattr(model.config, what)
    ]
    if problems:
        raise ConfigurationError(problems)
    numbers, size = (sum(getattr(p, what) for p in model.params.values()) for what in ("size", "nbytes"))
    clock.end(f"{numbers / 1e6:.3g} M parameters in {size / 1e6:.3g} MB")
    clock.begin("clients")
    template: Any = options.template
    size_of: Any = options.size
    with mistakes_of("data"):
        clients = text_clients(
            instructions, model.tokenizer, length=options.max_length, clients_by=options.clients_by,
            groups_by=options.groups_by, template=template, size=size_of,
            clients=options.clients or None, alpha=options.alpha, seed=options.seed, hold_out=options.hold_out,
            skip=options.skip_odd_lines,
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
    report = clients.report
    told = [*_told("cut", report.cut), *_told("left out", report.left_out)]
    clock.end("; ".join([f"{len(clients.names)} of {report.counts()}{_in_batches(clients, options)}", *told]))
    left_out = by_line(*instructions.problems, *report.left_out)
    return model, clients._replace(report=report._replace(left_out=left_out))


def _in_batches(clients: TextClients, options: LanguageOptions) -> str:
    """Tell the padding that steps compute where much of it comes from batches that are not full, and what to do."""
    if options.batch_size == 1:
        return ""
    paddings = {n: padding_in_batches(clients.report, clients.data.size, n) for n in range(1, options.batch_size + 1)}
    padding, least = paddings[options.batch_size], min(paddings, key=lambda n: (paddings[n], -n))
    if padding < MUCH_PADDING:
        return ""
    advice = "" if least == options.batch_size else f", {paddings[least]:.1%} by --batch-size {least}"
    return f", {padding:.1%} in batches of {options.batch_size}{advice}"


def _told(what: str, lines: Sequence[str]) -> list[str]:
    return [f"{what}: {few(lines)}"] if lines else []


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


def _decoder(tokenizer: Any) -> Callable[..., str]:
    """Make the function that turns tokens into a text, up to the token that ends one, or all of them.

    A chat template ends every turn with that token, so a prompt has several.
    """
    eos = tokenizer.encode(tokenizer.eos) if tokenizer.eos else []

    def decode(ids: Any, *, whole: bool = False) -> str:
        told = np.asarray(ids).tolist()
        if whole:
            return str(tokenizer.decode(told))
        end = told.index(eos[0]) if len(eos) == 1 and eos[0] in told[1:] and told[0] != eos[0] else len(told)
        return str(tokenizer.decode(told[:end]))

    return decode


@contextlib.contextmanager
def mistakes_of(option: str) -> Iterator[None]:
    """Turn what the library refuses into a mistake of an option."""
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        raise ConfigurationError([f"{option}: {' '.join(str(error).split())}"]) from error
