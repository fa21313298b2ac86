"""Tables for the terminal."""

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from autorank_jax.cli.terminal import counted
from autorank_jax.cli.wrapping import Words, wrapped
from autorank_jax.datasets import DatasetInfo
from autorank_jax.experiment.config import Experiment
from autorank_jax.experiment.names import POLICIES
from autorank_jax.experiment.results import SCORES, Results, Scores, si, summarize

SHOWN_CLIENTS = 20
SHOWN_RANKS = 200
SHOWN_LAYERS = 3
POLICIES_PER_TABLE = 4
EQUAL = {"uniform": "uniform\n(equal FLOPs)", "uniform_bytes": "uniform\n(equal bytes)"}
"""What the policies of one rank for all have in common with AutoRank, written where their names are."""
EXPLAINED = ("covered", "uniform", "uniform_bytes", "by_size_bytes")
"""Policies whose names do not say what they hold equal."""


def make_console(*, quiet: bool = False) -> Console:
    """Return a console of standard output that knows its encoding."""
    return Console(file=sys.stdout, quiet=quiet, highlight=False, markup=False, emoji=False)


def scores_table(scores: Scores, *, seeds: int = 1) -> Table:
    """Show criteria, CRITIC weights, closeness, and the ratio and ranks of AutoRank (else of the first policy).

    Args:
        scores: of one seed.
        seeds: of which only the first is shown.
    """
    policy = "autorank" if "autorank" in scores.ratios else next(iter(scores.ratios))
    ranks, meaning = _shown_ranks(scores.ranks[policy])
    table = make_table(f"Clients under seed {scores.seed}, ranks by {policy}", padding=0)  # to fit 80 columns
    table.add_column("client", justify="right")
    for name in (*scores.criteria, "closeness", "ratio", "ranks"):
        table.add_column(name.replace("_", "\n"), justify="right")
    if scores.weights is not None:
        weights = [f"{weight:.3f}" for weight in scores.weights]
        table.add_row("weight", *weights, "", "", "", style="bold", end_section=True)
    for client in range(min(len(scores.size), SHOWN_CLIENTS)):
        closeness = "–" if scores.closeness is None else f"{scores.closeness[client]:.3f}"
        table.add_row(
            str(client),
            *(f"{value:.4g}" if value < 1e4 else f"{value:.0f}" for value in scores.matrix[client]),
            closeness,
            f"{scores.ratios[policy][client]:.3f}",
            "/".join(str(rank[client]) for rank in ranks),
        )
    more = len(scores.size) - SHOWN_CLIENTS
    table.caption = f"{meaning} More of a criterion means more complex data."
    table.caption += f" {counted(more, 'more client')} in criteria.csv." if more > 0 else ""
    table.caption += f" Shown is the first of {seeds} seeds; criteria.csv has all." if seeds > 1 else ""
    return table


def _shown_ranks(ranks: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], str]:
    """Return the ranks of few layers, or those of the widest one, and say which they are."""
    if not ranks:
        return [], "Whole weights, no ranks."
    if len(ranks) <= SHOWN_LAYERS:
        return list(ranks.values()), f"Ranks of {', '.join(ranks)}."
    widest = max(ranks, key=lambda path: ranks[path].max())
    return [ranks[widest]], f"Ranks of {widest}, the widest of {len(ranks)} layers; criteria.csv has all."


def criteria_table(
    clients: Sequence[str], weights: Mapping[str, float], closeness: np.ndarray, ratios: np.ndarray, ranks: np.ndarray
) -> Iterator[Table]:
    """Show the weights of criteria, then closeness, ratio and rank of every client."""
    first = make_table("CRITIC weights")
    first.add_column("criterion")
    first.add_column("weight", justify="right")
    for name, weight in weights.items():
        first.add_row(name, f"{weight:.4f}")
    yield first
    second = make_table("Ranks")
    second.add_column("client", overflow="fold")
    for name in ("closeness", "ratio", "rank"):
        second.add_column(name, justify="right")
    shown = zip(clients, closeness, ratios, ranks, strict=True)
    for name, *numbers in itertools.islice(shown, SHOWN_RANKS):
        second.add_row(name, f"{numbers[0]:.4f}", f"{numbers[1]:.4f}", str(numbers[2]))
    if len(clients) > SHOWN_RANKS:
        second.caption = f"{counted(len(clients) - SHOWN_RANKS, 'more client')}: --output FILE.csv writes all."
    yield second


def comparison_tables(results: Results) -> Iterator[Table]:
    """Show what every policy reached and what it cost: a column per policy, a few policies per table."""
    summary = summarize(results)["policies"]
    names = list(summary)
    for begin in range(0, len(names), POLICIES_PER_TABLE):
        chosen = names[begin : begin + POLICIES_PER_TABLE]
        seeds = len(results.scores)
        table = make_table("Comparison" + (f", mean ± sd over {seeds} seeds" if seeds > 1 else ""))
        table.add_column("")
        for name in chosen:
            policy, *rule = name.split("+")
            table.add_column("\n+ ".join([EQUAL.get(policy, policy), *rule]), justify="right")
        for label, show, ends in _lines(results, summary):
            table.add_row(label, *(show(summary[name]) for name in chosen), end_section=ends)
        yield table


def footnotes(results: Results) -> Iterator[str]:
    """Explain what the comparison's names leave open."""
    for name in results.config["rank_policies"]:
        if name in EXPLAINED:
            yield f"{name}: {POLICIES[name]}."
    yield (
        "* Share of all examples that the clients of the highest ratio hold. Rules that average a rank position over "
        "its owners, such as rbla, leave the last positions to these clients alone."
    )
    if results.score == "r2":
        yield "R²: share of the test targets' variance that is explained; history and summary call it accuracy."
    promise = Experiment(**results.config).privacy
    if promise:
        yield promise.promise
    if any(row.excluded or not row.reported for run in results.runs for row in run.rows):
        yield (
            "** What is not finite is left out, probably as the learning rate is too large; a round in which nobody "
            "reports leaves the server as it was."
        )
    compiling = ", ".join(f"{s:.1f} s for {rule}" for rule, s in results.compile_seconds.items())
    yield f"Seconds to train and to compile depend on the machine and its load. To compile took {compiling}."


def about(results: Results) -> str:
    """Say in a line what a run was of; the rule where there is one, as several are named beside the policies."""
    config = results.config
    seeds = f"mean ± sd of {config['seeds']} seeds" if config["seeds"] > 1 else f"seed {config['first_seed']}"
    rule = f"{config['aggregators'][0]} · " if len(config["aggregators"]) == 1 else ""
    private = f" · ε = {config['dp_epsilon']:g}" if config.get("dp_epsilon") else ""
    return (
        f"{config['dataset']} · {config['split']} · {config['clients']} clients · {config['model']} · {rule}"
        f"learning rate {config['learning_rate']:g} · local epochs {config['local_epochs']} · {seeds}{private}"
    )


_MEASURED = {
    "label_weighted": "label-weighted accuracy",
    "before": "clients' own accuracy",
    "after": "own accuracy, trained once more",
}


def _lines(results: Results, policies: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[Any], str], bool]]:
    """Yield the lines of the comparison: label, contents, whether a section ends."""
    score = SCORES[results.score]
    yield f"final {score}", lambda p: percent(p["final_accuracy"]), False
    yield f"best {score}", lambda p: percent(p["best_accuracy"]), False
    if results.config.get("dp_epsilon"):
        yield f"ε spent, at δ = {results.config['dp_delta']:g}", lambda p: f"{p['epsilon']:.3g}", False
    targets = [f"{target:g}" for target in results.config["targets"]]
    yield "area under the curve", lambda p: percent(p["area_under_curve"]), not targets
    for target in targets:
        show = lambda p, key=target: "–" if p["rounds_to"][key] is None else f"{p['rounds_to'][key]:.3g}"  # noqa: E731
        yield f"rounds to {100 * float(target):g} %", show, target == targets[-1]
    for what, label in _MEASURED.items():
        if all(what in p.get("clients", {}) for p in policies.values()):
            show = lambda p, key=what: percent(p["clients"][key]["mean"])  # noqa: E731
            yield f"{label}, mean over clients", show, False
            show = lambda p, key=what: percent(p["clients"][key]["worst"])  # noqa: E731
            yield "  of the worst client", show, what == "after" and not _lost(policies)
    if _lost(policies):
        yield "  without diverged clients", lambda p: f"{p['clients']['after']['diverged']['mean']:.3g}", True
    if any(p["lost"]["rounds"] or p["lost"]["excluded"] for p in policies.values()):
        yield "participants excluded**", lambda p: f"{100 * p['lost']['excluded']:.3g} %", False
        yield "rounds without any update**", lambda p: f"{p['lost']['rounds']:.3g}", True
    yield "mean ratio over clients", lambda p: f"{p['mean_ratio']['clients']:.3f}", False
    yield "mean ratio over examples", lambda p: f"{p['mean_ratio']['examples']:.3f}", False
    yield "examples at the highest ratio*", lambda p: f"{100 * p['examples_behind_highest_ratio']:.3g} %", False
    yield "trained parameters", lambda p: si(p["trained_parameters"]), True
    yield "bytes up per round", lambda p: si(p["bytes_per_round"]["up"]), False
    yield "bytes down per round", lambda p: si(p["bytes_per_round"]["down"]), True
    yield "training FLOPs per round", lambda p: si(p["train_flops"]["per_round"]), False
    yield "  of the slowest client", lambda p: si(p["train_flops"]["slowest_client"]), False
    yield "  of the probe", lambda p: si(p["train_flops"]["probe"]), False
    yield "  in total, with the probe", lambda p: si(p["train_flops"]["total"]), True
    yield "seconds to train", lambda p: f"{p['seconds']['train']:.1f}", False


def _lost(policies: Mapping[str, Any]) -> bool:
    """Tell whether clients are missing in the clients' own accuracy, because their training gave nothing finite."""
    return any(p.get("clients", {}).get("after", {}).get("diverged", {}).get("mean") for p in policies.values())


def percent(spread: Mapping[str, Any]) -> str:
    """Show mean and deviation of shares."""
    if spread["mean"] is None:
        return "–"
    deviation = f" ± {100 * spread['sd']:.1f}" if len(spread["values"]) > 1 else ""
    return f"{100 * spread['mean']:.1f}{deviation} %"


def datasets_table(rows: Sequence[DatasetInfo]) -> Table:
    """Show the datasets, whether each is there and a whole file, and in which file."""
    table = make_table("Datasets")
    for name in ("name", "there", "file", "what"):
        table.add_column(name, overflow="fold")
    for row in rows:
        there = "damaged" if row.damaged else "yes" if row.present else "no"
        table.add_row(row.name, there, Path(row.where).name, row.description)
    return table


def fitted(table: Table, console: Console) -> Iterator[Table | Text]:
    """Yield a table, and its caption; in parts that share the first column where there is no room for all words."""
    unlimited, many = console.options.update(max_width=10_000), len(table.columns)
    first = 1
    for last in range(2, many + 1):
        wider = _part(table, first, last + 1) if last < many else None
        if wider is None or Measurement.get(console, unlimited, wider).minimum > console.width:
            yield _part(table, first, last)
            first = last
    if table.caption:
        yield Text("\n".join(wrapped(str(table.caption), console.width)), "table.caption")


def _part(table: Table, first: int, last: int) -> Table:
    """Return the first of a table's columns and some of the others."""
    columns = [table.columns[0], *table.columns[first:last]]
    part = make_table(str(table.title) if first == 1 else "", table.padding[1])
    for column in columns:
        part.add_column(Words(str(column.header)), justify=column.justify)
    for row, *cells in zip(table.rows, *(column.cells for column in columns), strict=True):
        if any(cells[1:]):
            part.add_row(*map(Words, map(str, cells)), style=row.style, end_section=row.end_section)
    return part


def make_table(title: str, padding: int = 1) -> Table:
    """Return an empty table in the style of all."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, padding),
        pad_edge=False,
        collapse_padding=True,
    )
