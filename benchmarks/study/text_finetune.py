"""Federated LoRA fine-tuning of a pretrained encoder: AutoRank on all-MiniLM-L6-v2 and movie reviews.

IMDB and Rotten Tomatoes reviews go to clients double-imbalanced by source × sentiment: amounts are log-normal, mixes of
the four groups are Dirichlet, and the complexity criteria count those groups, since two labels alone would say little.
The encoder is frozen; adapters sit on query, key, value, out and the feed-forward layers; the head is trained whole.
AutoRank (with the probe its `loss_entropy` needs) against ranks by size and uniform ranks of the same mean over clients
(equal bytes) and of the same mean over examples (equal FLOPs), and against the head alone.

Needs the extras `text` and `cli`, and a folder with `minilm/` (config, tokenizer, model.safetensors of
sentence-transformers/all-MiniLM-L6-v2) and `movie_reviews.csv` (columns text, label, source).

Command:  python -m benchmarks.study.text_finetune --data FOLDER --json text_finetune.json
          python -m benchmarks.study.text_finetune --quick --seeds 3 --aggregators rbla raflora --data FOLDER \
              --json benchmarks/study/results/text_finetune_quick.json
          python -m benchmarks.study.text_finetune --report    (runs nothing: prints the published rows)
Expect:   see benchmarks/study/README.md

`--quick`: 480 reviews of 32 tokens, 4 rounds, one seed, `rbla`; minutes on two cores. With 600 held-out reviews an
accuracy has a standard error of 0.02.
"""

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
from autorank_jax.engine.round import make_round
from autorank_jax.engine.simulation import init_state
from autorank_jax.evaluation.costs import client_costs
from autorank_jax.evaluation.metrics import make_evaluate
from autorank_jax.experiment.names import GLOBAL_RULES
from autorank_jax.federated import partition
from autorank_jax.federated.data import client_stats, from_parts
from autorank_jax.models.bert import load_bert, load_tokenizer
from autorank_jax.models.transformer import TextClassifier
from autorank_jax.ranks import budgets, policies
from autorank_jax.types import Aggregator, ClientStats, FederatedData, State, Task
from benchmarks.harness import Row, compiled, device, markdown_table, versions, write_json
from benchmarks.study.options import RESULTS
from benchmarks.study.paired import difference, in_points

COLUMNS = ("rule", "policy", "seed", "accuracy", "loss", "mean ratio", "ratio by examples", "MB up", "TFLOP", "seconds")
MEANS = ("rule", "policy", "accuracy, %", "minus head alone", "loss")
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
    learning_rate: float = 2e-3
    head_rate: float = 5e-3
    """Learning rate where the head is trained alone."""
    batch_size: int = 16
    lanes: int = 1
    seeds: int = 3
    aggregators: tuple[str, ...] = ("rbla", "raflora")
    """Rules; the first one also serves the probe and the head alone."""
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
    stats: ClientStats
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
        print(tables(json.loads((RESULTS / "text_finetune_quick.json").read_text(encoding="utf-8"))["rows"]))
        return
    if unknown := sorted(set(options.aggregators) - set(GLOBAL_RULES)):
        sys.exit(f"expected --aggregators out of {', '.join(GLOBAL_RULES)}, got {', '.join(unknown)}")
    folder = check_folder(options.data)
    rows, begin = [], time.perf_counter()
    for seed in range(options.seeds):
        say(begin, f"seed {seed}: reading and tokenising")
        reviews = read_reviews(folder, options, seed)
        federation = make_federation(folder, options, reviews, seed)
        say(begin, f"clients hold {np.sort(np.asarray(federation.data.size)).tolist()} reviews")
        rows += run_seed(options, reviews, federation, seed, begin)
        content = {"rows": rows, "options": shown(options), "device": device()}
        write_json(options.json or None, content | {"versions": versions("safetensors", "tokenizers")})
    print("\n" + tables(rows))


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
    return Federation(data, adapted, head, client_stats(data, groups=reviews.groups, classes=4), jax.random.key(seed))


def run_seed(options: Options, reviews: Reviews, federation: Federation, seed: int, begin: float) -> list[Row]:
    """Train with every rule and policy, then the head alone."""
    rows: list[Row] = []
    ratios: dict[str, jax.Array] = {}
    for name in options.aggregators:
        trainer = compile_round(options, reviews, federation, federation.adapted, name)
        say(begin, f"{name}: compiled")
        if not ratios:
            stats = federation.stats._replace(**probe(options, federation, trainer))
            ratios = all_ratios(stats, federation.key)
            say(begin, "probed three epochs at full rank")
        for policy, given in ratios.items():
            row = train(options, federation, trainer, given)
            rows.append({"rule": name, "policy": policy, "seed": seed} | row)
            say(begin, f"{name}, {policy}: held-out accuracy {row['accuracy']:.3f}")
    trainer = compile_round(options, reviews, federation, federation.head, options.aggregators[0])
    row = train(options, federation, trainer, jnp.zeros(options.clients))
    say(begin, f"head alone: held-out accuracy {row['accuracy']:.3f}")
    return [*rows, {"rule": "–", "policy": "head alone", "seed": seed} | row]


def probe(options: Options, federation: Federation, trainer: Trainer) -> dict[str, jax.Array]:
    """Return the losses of three local epochs at full rank, and how many epochs there were."""
    state = start(options, trainer, jnp.ones(options.clients), local_epochs=3)
    probed, _ = trainer.round(federation.key, state, federation.data)
    jax.block_until_ready(probed)
    return {"epoch_losses": probed.epoch_losses, "epochs": probed.epochs}


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
    training = make_local_training(task, lambda h: optax.adam(h["learning_rate"]), batch_size=options.batch_size)
    one = make_round(training, aggregators.RULES[rule](), lanes=options.lanes)
    evaluate = jax.jit(make_evaluate(task, *reviews.test, batch_size=100))
    trainer = Trainer(task, aggregators.RULES[rule](), one, evaluate)
    program, _ = compiled(one, federation.key, start(options, trainer, jnp.ones(options.clients)), federation.data)
    return trainer._replace(round=program)


def start(options: Options, trainer: Trainer, ratios: jax.Array, *, local_epochs: int = 1) -> State:
    """Make the start of a run; the head alone has a learning rate of its own."""
    widest = max_ranks(trainer.task.server.trainable)
    return init_state(
        trainer.task.server,
        trainer.rule,
        policies.ranks_from_ratios(ratios, widest) if widest else {},
        learning_rate=options.learning_rate if widest else options.head_rate,
        local_epochs=local_epochs,
        max_epochs=3,
        clients=options.clients,
    )


def train(options: Options, federation: Federation, trainer: Trainer, ratios: jax.Array) -> Row:
    """Run all rounds and test the server; costs are those of training, the probe apart."""
    state, examples = start(options, trainer, ratios), np.asarray(federation.data.size, float)
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


def tables(rows: Sequence[Row]) -> str:
    """Return all rows, and their means."""
    return f"{markdown_table(rows, COLUMNS)}\n\n{markdown_table(means(rows), MEANS)}"


def means(rows: Sequence[Row]) -> list[Row]:
    """Return mean ± sample sd over seeds by rule and policy; differences are paired over seeds, with t intervals."""

    def by_seed(rule: str, policy: str) -> dict[int, float]:
        return {row["seed"]: row["accuracy"] for row in rows if (row["rule"], row["policy"]) == (rule, policy)}

    def over_seeds(values: Sequence[float], digits: int) -> str:
        return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")

    alone, found = by_seed("–", "head alone"), []
    for rule, policy in dict.fromkeys((row["rule"], row["policy"]) for row in rows):
        own = by_seed(rule, policy)
        losses = [row["loss"] for row in rows if (row["rule"], row["policy"]) == (rule, policy)]
        scores = {"accuracy, %": over_seeds([100 * value for value in own.values()], 1), "loss": over_seeds(losses, 3)}
        paired = None if policy == "head alone" else in_points(difference(own, alone))
        found.append({"rule": rule, "policy": policy, "minus head alone": paired} | scores)
    return found


def parse(arguments: Sequence[str]) -> Options:
    """Read the command line; `--quick` changes the defaults and nothing that is given."""
    default = Options(quick=True, **QUICK) if "--quick" in arguments else Options()
    return tyro.cli(Options, args=arguments, default=default)


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
