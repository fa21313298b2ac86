"""AutoRank beside uniform ranks, FlexLoRA and controls: accuracy, and what it takes, with seeds, spread and tests.

Four columns are those of the author's result files (AutoRank with RBLA, ranks by hand, a uniform rank, FlexLoRA with
a uniform rank); the others are controls at stated budgets, capped ranks, whole weights, clients alone, and one client
with all data. MLP 784-200-200-10 with maximum ranks 160, 160, 100 on grey images, a CNN on coloured ones; batch 64,
SGD with momentum 0.9, one local epoch, all clients every round, evaluated every second round. A seed varies initial
weights, adapters, split and batch order; differences are paired over seeds. The learning rate of every policy and
rule is the best of 0.01, 0.03 and 0.1 after as many rounds, on a tenth of the training examples, for seeds (1000,
1001) used nowhere else; rates beyond are tried where the best is at an end, and the second seed decides between close
ones. Shuffled and reversed ranks run at AutoRank's rate, and AutoRank once more at that of the uniform rank, where
they differ. The probe trains at the column's own rate, so that AutoRank's ranks depend on it a little.

Command:  AUTORANK_JAX_DATA=DIR python -m benchmarks.study.paper
          (full data: many hours on two cores; it may be stopped and started again, and begins with what matters most;
          datasets, splits, groups and cells narrow what is run, all that is there is reported; another setting needs
          an --out of its own)
          python -m benchmarks.study.paper --quick    (embedded subset, two minutes on two cores)
Writes:   a line per cell in benchmarks/study/results/paper.jsonl, and the tables in paper.md
Expect:   see benchmarks/study/README.md
"""

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from autorank_jax.experiment.config import MODELS
from benchmarks import harness
from benchmarks.study import mixed_ranks, paper_tables
from benchmarks.study.cell_file import CellFile
from benchmarks.study.cells import NOTHING, Bounds
from benchmarks.study.columns import DATASETS, GROUPS, SPLITS, Job, experiment_of, jobs
from benchmarks.study.options import (
    RESULTS,
    add_cell_options,
    check_pattern,
    count,
    keep_published,
    make_parser,
    words,
)
from benchmarks.study.paper_tables import Column
from benchmarks.study.runs import Reached
from benchmarks.study.tuning import Choice, Grid, choose_rates, run_tuned

Key = tuple[str, str]
"""Dataset and split."""


class Plan(NamedTuple):
    """What the command line asks for."""

    jobs: list[Job]
    seeds: range
    options: Mapping[str, Any]  # of every experiment
    grids: Mapping[str, Grid]  # by group
    file: CellFile
    quick: bool  # the small dataset, all seeds in one cell


QUICK = "fashion_mnist_mini"
"""The dataset of `--quick`, and of nothing else."""
USUAL = ("fashion_mnist", "mnist")


def everything(plan: Plan) -> Plan:
    """Return the plan with every group on every split of every dataset: what is reported, whatever part is run."""
    datasets = [name for name in DATASETS if (name == QUICK) == plan.quick]
    return plan._replace(jobs=list(jobs(datasets, list(SPLITS))))


def run_plan(plan: Plan, bounds: Bounds) -> dict[Key, list[Column]]:
    """Run what is missing within bounds, and return columns by dataset and split."""
    found: dict[Key, list[Column]] = {}
    for job in plan.jobs:
        found.setdefault((job.dataset, job.split), []).extend(run_job(plan, job, bounds))
    return found


def run_job(plan: Plan, job: Job, bounds: Bounds) -> list[Column]:
    """Tune a group and run its seeds; no columns where it would be another group's once more."""
    group = GROUPS[job.group]
    experiment = experiment_of(job, **plan.options)
    name, titles = f"{job.dataset}/{job.split}/{job.group}", group.titles
    if group.rates:  # all but ranks, or all but the rate, stays as it is
        source, policy = group.rates
        theirs = rates_of(plan, job._replace(group=source), bounds)
        choices = dict.fromkeys(titles, theirs[policy]) if policy in theirs else {}
        if any(own in theirs and theirs[own].rate == choice.rate for own, choice in choices.items()):
            return []  # the same column as there
    else:
        choices = rates_of(plan, job, bounds)
    how = {"seeds": plan.seeds, "together": plan.quick, "bounds": bounds}
    tuned = run_tuned(experiment, choices, plan.file, name, **how)
    central = job.split == "central"
    return [Column(titles[p], t.choice, _alone(t.runs) if central else t.runs) for p, t in tuned.items()]


def rates_of(plan: Plan, job: Job, bounds: Bounds) -> Mapping[str, Choice]:
    """Choose the learning rates of a group."""
    name = f"{job.dataset}/{job.split}/{job.group}"
    return choose_rates(experiment_of(job, **plan.options), plan.grids[job.group], plan.file, name, bounds)


def _alone(runs: Mapping[int, Reached]) -> dict[int, Reached]:
    """Take bytes and clients away: who has all examples need not send anything, and its test set is the server's."""
    return {seed: run._replace(bytes=np.full(len(run.rounds), np.nan), clients={}) for seed, run in runs.items()}


def make_plan(options: argparse.Namespace) -> Plan:
    """Turn the command line into a plan."""
    keep_published(options, RESULTS, ("seeds", "rounds", "local_epochs", "model", "learning_rate"))
    if options.quick and options.dataset:
        raise SystemExit(f"dataset: expected none beside --quick, which has its own, got {options.dataset}")
    full = [name for name in DATASETS if options.quick or name != QUICK]
    datasets = words("dataset", options.dataset, [QUICK] if options.quick else USUAL, full)
    splits = words("splits", options.splits, ["staircase", "central"] if options.quick else list(SPLITS), SPLITS)
    groups = words("groups", options.groups, list(GROUPS), GROUPS)
    rate = options.learning_rate
    if options.rounds is not None:
        count("rounds", options.rounds, 1)
    grids = dict.fromkeys(GROUPS, Grid(more_seeds=1) if rate is None else Grid((rate,)))
    if options.quick and rate is None:  # one rate but for the first group, which shows how it is chosen
        grids = dict.fromkeys(GROUPS, Grid((0.03,))) | {"main": Grid((0.01, 0.03))}
    seeds = count("seeds", options.seeds, 2 if options.quick else 5)
    given = {name: getattr(options, name) for name in ("rounds", "local_epochs", "model")}
    chosen = {name: value for name, value in given.items() if value is not None} | {"eval_every": 2}
    file = CellFile(options.out / ("paper_mini.jsonl" if options.quick else "paper.jsonl"))
    return Plan(list(jobs(datasets, splits, groups)), range(seeds), chosen, grids, file, options.quick)


def complete(found: Mapping[Key, list[Column]]) -> dict[Key, list[Column]]:
    """Return what has a table: the columns of every split that has runs, with those of central training."""
    return {
        (dataset, split): [*own, *found.get((dataset, "central"), [])]
        for (dataset, split), own in found.items()
        if split != "central" and any(column.runs for column in own)
    }


def tables(plan: Plan, found: Mapping[Key, list[Column]]) -> str:
    """Return the tables of what is there, in Markdown; nothing where no column is there."""
    whole = complete(found)
    parts = [paper_tables.write(*key, own, seeds=len(plan.seeds)) for key, own in whole.items()]
    return "\n".join([paper_tables.NOTES, *parts, *mixed_ranks.write(mixed_ranks.mixed_runs(whole))]) if parts else ""


def report(plan: Plan, found: Mapping[Key, list[Column]]) -> None:
    """Print and write the tables of what is there."""
    text = tables(plan, found)
    print(text or "No column is complete yet.")
    if text:
        harness.write_text(plan.file.path.with_suffix(".md"), text)


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    full, usual = ", ".join(name for name in DATASETS if name != QUICK), ",".join(USUAL)
    parser.add_argument("--dataset", default="", help=f"comma-separated; default {usual}, of {full}")
    parser.add_argument("--groups", default="", help="comma-separated; default all: " + ", ".join(GROUPS))
    parser.add_argument("--rounds", type=int, default=None, help="default 100, on coloured images 200")
    parser.add_argument("--local-epochs", type=int, default=None, help="default 1")
    parser.add_argument("--model", choices=tuple(MODELS), help="default mlp, on coloured images deep_cnn")
    parser.add_argument("--learning-rate", type=float, default=None, help="of all columns, default tuned for each")
    add_cell_options(parser, splits=tuple(SPLITS))
    return parser.parse_args(arguments)


@harness.mistakes_in_words()
def main(arguments: list[str] | None = None) -> None:
    """Run what is missing, then print and write what there is."""
    options = options_of(arguments)
    plan = make_plan(options)
    with harness.shared_programs():
        run_plan(plan, NOTHING if options.report else Bounds.within(options.limit_minutes, options.cells))
    check_pattern(options.cells, plan.file)
    report(plan, run_plan(everything(plan), NOTHING))


if __name__ == "__main__":
    main()
