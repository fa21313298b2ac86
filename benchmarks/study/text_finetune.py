"""Federated LoRA fine-tuning of a pretrained encoder: AutoRank on all-MiniLM-L6-v2 and movie reviews.

IMDB and Rotten Tomatoes reviews go to clients double-imbalanced by source × sentiment: amounts are log-normal, mixes of
the four groups are Dirichlet, and the complexity criteria count those groups, since two labels alone would say little.
The encoder is frozen; adapters sit on query, key, value, out and the feed-forward layers; the head is trained whole.
AutoRank (with its probe) against ranks by size and uniform ranks of the same mean over clients (equal bytes) and of the
same mean over examples (equal FLOPs), and against the head alone. Every policy has its own learning rate under every
rule: of those given, the one with the least held-out loss under a seed used nowhere else. What is there is not run
again.

Needs the extras `text` and `cli`, and a folder with `minilm/` (config, tokenizer, model.safetensors of
sentence-transformers/all-MiniLM-L6-v2) and `movie_reviews.csv` (columns text, label, source).

Command:  python -m benchmarks.study.text_finetune --data FOLDER --json text_finetune.json
          python -m benchmarks.study.text_finetune --quick --seeds 3 --aggregators rbla raflora flora \
              --policies autorank "uniform, equal bytes" --learning-rates 0.0005 0.002 \
              --data FOLDER --json benchmarks/study/results/texts.json
          python -m benchmarks.study.text_finetune --report    (runs nothing: prints the published rows)
Expect:   see benchmarks/study/README.md

`--quick`: 480 reviews of 32 tokens, 4 rounds, one seed and rate, `rbla`; minutes on two cores. With 600 held-out
reviews an accuracy has a standard error of 0.02.
"""

import csv
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from autorank_jax import aggregators
from autorank_jax.adapters.lora import max_ranks
from autorank_jax.adapters.nnx import task_from_nnx
from autorank_jax.engine.flops import FlopModel
from autorank_jax.engine.local import make_local_training
from autorank_jax.engine.probe import probe as ar_probe
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.evaluation.costs import client_costs
from autorank_jax.evaluation.metrics import make_evaluate
from autorank_jax.experiment.names import GLOBAL_RULES
from autorank_jax.federated import partition
from autorank_jax.federated.data import from_parts
from autorank_jax.models.bert import load_bert, load_tokenizer
from autorank_jax.models.transformer import TextClassifier
from autorank_jax.ranks import budgets, policies
from autorank_jax.types import Aggregator, ClientStats, FederatedData, LocalTraining, State, Task
from benchmarks import script
from benchmarks.harness import Row, compiled, device, versions, write_json
from benchmarks.study.text_tables import ALONE, NAME, POLICIES, TUNING_SEED, published, tables

SOURCES = ("imdb", "rotten_tomatoes")


@dataclass(frozen=True)
class Options:
    """Fine-tune MiniLM on movie reviews in a federation."""

    data: str = os.environ.get("AUTORANK_JAX_DATA", "")
    """Folder with minilm/ and movie_reviews.csv."""
    quick: bool = False
    """Other defaults, small enough for two CPU cores."""
    clients: int = 20
    train: int = 12_000
    """Reviews that clients have."""
    test: int = 2_000
    length: int = 128
    """Tokens per review."""
    rounds: int = 10
    max_rank: int = 8
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Of which every policy under every rule has its own: that of the least loss under a seed used nowhere else."""
    head_rate: float = 5e-3
    """Learning rate where the head is trained alone."""
    batch_size: int = 16
    lanes: int = 1
    seeds: int = 3
    aggregators: tuple[str, ...] = ("rbla", "raflora", "flora")
    """Rules for mixed ranks."""
    policies: tuple[str, ...] = POLICIES
    """What gives the ranks."""
    alpha: float = 0.3
    """Of the Dirichlet mixes of groups."""
    sigma: float = 1.0
    """Of the log-normal amounts."""
    report: bool = False
    """Run nothing: show what is published."""
    json: str = ""


QUICK: Mapping[str, Any] = {
    "clients": 8,
    "train": 480,
    "test": 600,
    "length": 32,
    "rounds": 4,
    "seeds": 1,
    "aggregators": ("rbla",),
    "learning_rates": (2e-3,),
    "batch_size": 4,
    "alpha": 1.0,
}


class Reviews(NamedTuple):
    """Tokenised reviews."""

    train: tuple[dict[str, np.ndarray], np.ndarray]
    test: tuple[dict[str, np.ndarray], np.ndarray]
    groups: np.ndarray  # of the training reviews: source × sentiment


class Federation(NamedTuple):
    """Clients and the start of the model under one seed."""

    data: FederatedData
    adapted: Task
    head: Task  # without adapters
    groups: np.ndarray  # of the training reviews
    key: Any


class Trainer(NamedTuple):
    """Compiled programs for one task and rule."""

    task: Task
    rule: Aggregator
    round: Callable[..., Any]
    evaluate: Callable[[State], dict[str, jax.Array]]


def main(options: Options) -> None:
    """Run every policy under every seed, and print the tables."""
    if options.report:
        print(tables(published()))
        return
    if strange := sorted(set(options.policies) - set(POLICIES)):
        sys.exit(f"expected --policies out of {', '.join(POLICIES)}, got {', '.join(strange)}")
    if unknown := sorted(set(options.aggregators) - set(GLOBAL_RULES)):
        sys.exit(f"expected --aggregators out of {', '.join(GLOBAL_RULES)}, got {', '.join(unknown)}")
    folder = check_folder(options.data)
    known = script.read(Path(options.json) if options.json else None)
    rows, begin = known_rows(options, known.get(NAME, {})), time.perf_counter()
    for seed in [TUNING_SEED] * (len(options.learning_rates) > 1) + list(range(options.seeds)):
        there = {(_place(row), row["rate"]) for row in rows}
        left = [run for run in wanted(options, rows, seed) if ((run.rule, run.policy, seed), run.rate) not in there]
        if not left:
            continue
        say(begin, f"seed {seed}: reading and tokenising")
        reviews = read_reviews(folder, options, seed)
        federation = make_federation(folder, options, reviews, seed)
        say(begin, f"clients hold {np.sort(np.asarray(federation.data.size)).tolist()} reviews")
        for row in run_seed(options, reviews, federation, left, begin):
            rows.append(row | {"seed": seed})
            content = {"rows": rows, "options": shown(options), "device": device()}
            content["versions"] = versions("safetensors", "tokenizers")
            write_json(options.json or None, known | {NAME: content})
    print("\n" + tables(rows))


def known_rows(options: Options, known: Mapping[str, Any]) -> list[Row]:
    """Return the rows that a file holds: what is there is gone on with.

    Raises:
        SystemExit: if they are of other options, but for the number of seeds and what is compared.
    """
    free = ("seeds", "aggregators", "policies")
    ours, others = json.loads(json.dumps(shown(options))), known.get("options", {})
    differing = [name for name in ours if known and name not in free and ours[name] != others.get(name)]
    if differing:
        name = differing[0]
        sys.exit(
            f"expected {options.json} of {name} {ours[name]}, got one of {others.get(name)}: choose another --json"
        )
    return list(known.get("rows", []))


def check_folder(data: str) -> Path:
    folder = Path(data or ".")
    missing = [name for name in ("minilm/model.safetensors", "movie_reviews.csv") if not (folder / name).is_file()]
    if missing:
        sys.exit(f"expected --data FOLDER (or AUTORANK_JAX_DATA) with {missing}, got {str(folder)!r}")
    return folder


def shown(options: Options) -> dict[str, Any]:
    """Return the options that describe the measurement, without paths."""
    return {name: value for name, value in vars(options).items() if name not in ("data", "json", "report")}


def say(begin: float, text: str) -> None:
    print(f"[{time.perf_counter() - begin:6.1f} s] {text}", flush=True)


def read_reviews(folder: Path, options: Options, seed: int) -> Reviews:
    """Draw equally many reviews of each source and sentiment, and tokenise them."""
    with (folder / "movie_reviews.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    group = np.array([2 * SOURCES.index(row["source"]) + int(row["label"]) for row in rows])
    rng = np.random.default_rng(seed)
    wanted = (options.train + options.test) // 4
    drawn = np.concatenate([rng.permutation(np.flatnonzero(group == g))[:wanted] for g in range(4)])
    drawn = rng.permutation(drawn)
    tokens = load_tokenizer(folder / "minilm")([rows[i]["text"] for i in drawn], length=options.length)
    parts = []
    for half in (slice(options.test, None), slice(options.test)):
        parts.append(({name: leaf[half] for name, leaf in tokens.items()}, (group[drawn[half]] % 2).astype(np.int32)))
    return Reviews(parts[0], parts[1], group[drawn[options.test :]])


def make_federation(folder: Path, options: Options, reviews: Reviews, seed: int) -> Federation:
    parts = partition.dirichlet_lognormal(
        reviews.groups, options.clients, alpha=options.alpha, sigma=options.sigma, seed=seed
    )
    data = from_parts(*reviews.train, parts, classes=2)
    model = TextClassifier(load_bert(folder / "minilm"), 2, rngs=nnx.Rngs(seed))
    ranks = {f"encoder/blocks/*/{layer}": options.max_rank for layer in ("attention/*", "up", "down")}
    adapted, head = (task_from_nnx(model, max_rank=r, key=seed, train_dense="head/*") for r in (ranks, {}))
    return Federation(data, adapted, head, reviews.groups, jax.random.key(seed))


class Wanted(NamedTuple):
    """A run: the head alone has neither rule nor policy."""

    rule: str
    policy: str
    rate: float


def wanted(options: Options, rows: Sequence[Row], seed: int) -> list[Wanted]:
    """Return what a seed runs: every rate where rates are tuned, elsewhere the one that ended with the least loss."""
    found = []
    for rule, policy in itertools.product(options.aggregators, options.policies):
        tried = {row["rate"]: row["loss"] for row in rows if _place(row) == (rule, policy, TUNING_SEED)}
        rates = (
            [min(tried, key=lambda rate: np.nan_to_num(tried[rate], nan=np.inf))]
            if tried and seed != TUNING_SEED
            else options.learning_rates
        )
        found += [Wanted(rule, policy, rate) for rate in rates]
    return found if seed == TUNING_SEED else [*found, Wanted("–", ALONE, options.head_rate)]


def _place(row: Row) -> tuple[str, str, int]:
    return row["rule"], row["policy"], row["seed"]


def run_seed(
    options: Options, reviews: Reviews, federation: Federation, runs: Sequence[Wanted], begin: float
) -> Iterator[Row]:
    """Yield the row of each run; a rule is compiled once."""
    trainers: dict[str, Trainer] = {}
    ratios = all_ratios(probe(options, federation), federation.key) | {ALONE: jnp.zeros(options.clients)}
    say(begin, "probed")
    for rule, policy, rate in runs:
        if rule not in trainers:
            task, name = (federation.head, "rbla") if policy == ALONE else (federation.adapted, rule)
            trainers[rule] = compile_round(options, reviews, federation, task, name)
            say(begin, f"{rule}: compiled")
        row = train(options, federation, trainers[rule], ratios[policy], rate)
        say(begin, f"{rule}, {policy}, {rate:g}: held-out accuracy {row['accuracy']:.3f}, loss {row['loss']:.3f}")
        yield {"rule": rule, "policy": policy, "rate": rate} | row


def probe(options: Options, federation: Federation) -> ClientStats:
    """Return the clients' statistics with the loss curves of the package's probe, at the middle one of the rates."""
    rates = sorted(options.learning_rates)
    state = init_state(
        federation.adapted.server, aggregators.rbla(), None, clients=options.clients,
        learning_rate=rates[len(rates) // 2],
    )  # fmt: skip
    return ar_probe(
        federation.key, local_training(options, federation.adapted), state, federation.data, lanes=options.lanes,
        groups=federation.groups, classes=4,
    )  # fmt: skip


def all_ratios(stats: ClientStats, key: Any) -> dict[str, jax.Array]:
    """Return the ratios of AutoRank and of its competitors at its budgets."""
    scored = policies.autorank()(key, stats)[0]
    weight = stats.size.astype(scored.dtype)
    by_clients, by_examples = float(jnp.mean(scored)), float(jnp.sum(scored * weight) / jnp.sum(weight))
    return {
        "autorank": scored,
        "uniform, equal bytes": policies.uniform(by_clients)(key, stats)[0],
        "uniform, equal FLOPs": policies.uniform(by_examples)(key, stats)[0],
        "by size, equal bytes": budgets.with_budget(policies.by_size(), by_clients)(key, stats)[0],
    }


def compile_round(options: Options, reviews: Reviews, federation: Federation, task: Task, rule: str) -> Trainer:
    """Compile a round; ranks are data, so all policies share it."""
    one = make_round(local_training(options, task), aggregators.RULES[rule](), lanes=options.lanes)
    evaluate = jax.jit(make_evaluate(task, *reviews.test, batch_size=100))
    trainer = Trainer(task, aggregators.RULES[rule](), one, evaluate)
    begin = start(options, trainer, jnp.ones(options.clients), 1.0)
    program, _ = compiled(one, federation.key, begin, federation.data)
    return trainer._replace(round=program)


def local_training(options: Options, task: Task) -> LocalTraining:
    return make_local_training(task, lambda h: optax.adam(h["learning_rate"]), batch_size=options.batch_size)


def start(options: Options, trainer: Trainer, ratios: jax.Array, rate: float) -> State:
    """Make the start of a run."""
    widest = max_ranks(trainer.task.server.trainable)
    return init_state(
        trainer.task.server,
        trainer.rule,
        policies.ranks_from_ratios(ratios, widest) if widest else {},
        learning_rate=rate,
        clients=options.clients,
    )


def train(options: Options, federation: Federation, trainer: Trainer, ratios: jax.Array, rate: float) -> Row:
    """Run all rounds and test the server; costs are those of training, the probe apart."""
    state, examples = start(options, trainer, ratios, rate), np.asarray(federation.data.size, float)
    begin, costs = time.perf_counter(), cost_per_round(options, federation, trainer.task, state)
    for _ in range(options.rounds):
        state, _ = trainer.round(federation.key, state, federation.data)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - begin
    described = {"mean ratio": float(np.mean(ratios)), "ratio by examples": float(np.average(ratios, weights=examples))}
    scores = {name: float(value) for name, value in trainer.evaluate(state).items()}
    return scores | described | {name: options.rounds * cost for name, cost in costs.items()} | {"seconds": seconds}


def cost_per_round(options: Options, federation: Federation, task: Task, state: State) -> dict[str, float]:
    """Count a round's megabytes up and its FLOPs: 2 per weight and token forward, again for each gradient taken.

    Kernels need the gradient of their inputs only, and none at all where nothing beneath the head is trained; factors
    need both.
    """
    flops = flop_model(options, federation, task)
    costs = client_costs(task.server, state.ranks, federation.data.size, flops, local_epochs=1)
    return {"MB up": float(np.sum(costs.bytes_up)) / 1e6, "TFLOP": float(np.sum(costs.flops)) / 1e12}


def flop_model(options: Options, federation: Federation, task: Task) -> FlopModel:
    kernels = federation.adapted.server.frozen.kernels.values()
    weights = sum(kernel.size for kernel in kernels) * options.length
    adapters = task.server.trainable.adapters
    per_rank = {p: 6.0 * options.length * (a.lora_a.shape[0] + a.lora_b.shape[1]) for p, a in adapters.items()}
    return FlopModel((4.0 if adapters else 2.0) * weights, per_rank)


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line; `--quick` changes the defaults and nothing that is given."""
    default = Options(quick=True, **QUICK) if "--quick" in arguments else Options()
    return tyro.cli(Options, args=arguments, default=default)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
