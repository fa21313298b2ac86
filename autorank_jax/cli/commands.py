"""The commands of the command line: their options, and what each of them does."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from rich.console import Console

from autorank_jax.cli import cache
from autorank_jax.cli.files import (
    begin_folder,
    check_folder,
    checkpoints_of,
    held_of_a_run,
    how_to_resume,
    write_results,
    write_run,
)
from autorank_jax.cli.interrupts import Interrupted, Interruption
from autorank_jax.cli.live import Display
from autorank_jax.cli.tables import comparison_tables, criteria_table, datasets_table, footnotes
from autorank_jax.datasets import available_datasets, cache_folder, fetch_dataset
from autorank_jax.experiment.config import ConfigurationError, Experiment, outside, unknown
from autorank_jax.experiment.launch import Launch, is_first, start
from autorank_jax.experiment.position import DivergedError
from autorank_jax.experiment.results import Results
from autorank_jax.experiment.run import run_experiment
from autorank_jax.ranks import mcda, policies
from autorank_jax.ranks.table_file import read_criteria

PROGRAM = "autorank-jax"


@dataclasses.dataclass(frozen=True)
class Run:
    """Score double-imbalanced clients, give each its LoRA rank, train them, and compare rank policies.

    Attributes:
        experiment: what to run
        launch: where to run it
        config: take the options from a run's config.json; others on the command line go before it
        resume: folder of a run to go on with from its latest checkpoint
        checkpoint_every: rounds between checkpoints, 0 = only when interrupted
        keep_checkpoints: how many of the latest checkpoints stay
        out: folder of the results; default runs/DATASET-SPLIT, with a number where that is taken
        overwrite: replace the run that the folder holds
        quiet: print nothing but errors
        no_cache: compile anew, and keep no compiled programs for the next run
    """

    experiment: tyro.conf.OmitArgPrefixes[Experiment] = dataclasses.field(default_factory=Experiment)
    launch: tyro.conf.OmitArgPrefixes[Launch] = dataclasses.field(default_factory=Launch)
    config: Path | None = None
    resume: Path | None = None
    checkpoint_every: int = 0
    keep_checkpoints: int = 3
    out: Path | None = None
    overwrite: bool = False
    quiet: bool = False
    no_cache: bool = False


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Score the clients of a table and give each its rank: for use with any other training stack.

    Attributes:
        criteria: CSV file with a header and one row per client; the first column may hold names
        max_rank: rank of the most complex client
        min_ratio: share of it that the least complex client gets
        cost: columns of which less means more complex
        normalization: of TOPSIS: vector or minmax
        json: print JSON in place of tables
    """

    criteria: Path
    max_rank: int = 64
    min_ratio: float = 0.1
    cost: tuple[str, ...] = ()
    normalization: str = "vector"
    json: bool = False


@dataclasses.dataclass(frozen=True)
class Listing:
    """List the datasets and say for each whether it is there."""


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Convert a dataset into the folder of datasets, once: from TensorFlow Datasets, or from a folder of images.

    Attributes:
        name: of TensorFlow Datasets, such as mnist or cifar100; any name for a folder of images
        source: folder of images {train,test}/CLASS/*.png, as CINIC-10 has it, or of archives that need no download
        overwrite: replace the file that is there
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    source: Path | None = None
    overwrite: bool = False


Action = Annotated[Listing, tyro.conf.subcommand("list")] | Annotated[Fetch, tyro.conf.subcommand("fetch")]


@dataclasses.dataclass(frozen=True)
class Data:
    """List the datasets, or fetch one.

    Attributes:
        action: what to do
    """

    action: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Action]] = dataclasses.field(
        default_factory=Listing
    )


@dataclasses.dataclass(frozen=True)
class Cache:
    """Say what is kept of compiled programs, from which later runs start at once, or empty the folder.

    Attributes:
        clear: delete all of them
    """

    clear: bool = False


def execute(command: Run | Ranks | Data | Cache) -> None:
    """Do what a command says."""
    match command:
        case Cache(clear):
            found = cache.empty() if clear else cache.held()
            what = f"{found.programs} compiled programs, {found.bytes / 1e6:.1f} MB, in {cache.program_folder()}"
            Console().print(f"Deleted {what}" if clear else what, soft_wrap=True, highlight=False)
        case Run():
            run(command)
        case Ranks():
            rank(command)
        case Data(Fetch() as fetch):
            path = fetch_dataset(fetch.name, source=fetch.source, overwrite=fetch.overwrite)
            Console().print(f"{path} is complete", soft_wrap=True, highlight=False)
        case Data():
            console = Console()
            console.print(datasets_table(available_datasets()))
            console.print(f"Files are looked for in {cache_folder()}", soft_wrap=True, highlight=False)
            console.print(
                f"{PROGRAM} data fetch NAME gets what is not there, with --overwrite what is damaged",
                soft_wrap=True,
                highlight=False,
            )


def run(command: Run) -> None:
    """Run an experiment, or what is left of it, show it, and write its files."""
    experiment = command.experiment
    check_run(command)
    refused = None if command.no_cache else cache.use_cache()
    if refused:
        sys.stderr.write(f"{PROGRAM}: {refused}\n")
    mesh = start(command.launch, cohort=experiment.cohort)
    if not is_first():
        checkpoints = checkpoints_of(command.resume, every=0, keep=1) if command.resume else None
        run_experiment(experiment, mesh=mesh, checkpoints=checkpoints)
        return
    if command.resume:
        folder = check_folder(command.resume, overwrite=True)
    else:
        folder = command.out or default_folder(experiment, command.overwrite)
        folder = check_folder(folder, overwrite=command.overwrite)
    checkpoints = checkpoints_of(folder, every=command.checkpoint_every, keep=command.keep_checkpoints)
    if not command.resume:
        begin_folder(folder, experiment, checkpoints)
    console = Console(quiet=command.quiet, highlight=False)
    try:
        with Interruption() as interruption, Display(console, experiment) as display:
            results = run_experiment(
                experiment,
                mesh=mesh,
                on_event=interruption.watch(display),
                on_round=interruption.on_round,
                checkpoints=checkpoints,
            )
    except Interrupted as stop:
        write_run(folder, experiment, checkpoints)
        raise Interrupted(f"{stop}; go on with: {how_to_resume(folder)}", stop.code) from None
    except DivergedError as error:
        if error.results:
            write_results(folder, error.results, overwrite=True)
        raise
    show(console, experiment, results, write_results(folder, results, overwrite=True))


def check_run(command: Run) -> None:
    """Check all options of a run.

    Raises:
        ConfigurationError: naming all mistakes.
    """
    problems = [
        *outside("checkpoint_every", command.checkpoint_every, 0, whole=True),
        *outside("keep_checkpoints", command.keep_checkpoints, 1, whole=True),
    ]
    if command.resume and command.out:
        problems.append("out: expected none beside --resume, got one: a run goes on in its own folder")
    for part in (command.launch, command.experiment):
        try:
            part.validate()
        except ConfigurationError as error:
            problems = [*error.problems, *problems]
    if problems:
        raise ConfigurationError(problems)


def show(console: Console, experiment: Experiment, results: Results, paths: Sequence[Path]) -> None:
    """Print what was found and where it was written."""
    for table in comparison_tables(results):
        console.print(table)
    for line in footnotes(results):
        console.print(line)
    if experiment.split == "staircase":
        console.print(
            "On the staircase any rule that grows with a client's size gives nearly the same ranks, so it cannot tell "
            "such rules apart: try --split dirichlet_lognormal --aggregators rbla,raflora, with several --seeds."
        )
    names = ", ".join(path.name for path in paths)
    console.print(f"Written to {paths[0].parent}: {names}", soft_wrap=True)


def default_folder(experiment: Experiment, overwrite: bool) -> Path:
    """Return `runs/DATASET-SPLIT`, with the first free number where it holds a run that is to be kept."""
    base = Path("runs") / f"{experiment.dataset}-{experiment.split}"
    numbered = (base.with_name(f"{base.name}-{number}") for number in itertools.count(2))
    return base if overwrite else next(path for path in itertools.chain([base], numbered) if not held_of_a_run(path))


def rank(command: Ranks) -> None:
    """Score the clients of a criteria file and print their ranks."""
    problems = [
        *outside("max_rank", command.max_rank, 1, whole=True),
        *outside("min_ratio", command.min_ratio, 0, 1, open_start=True, cause="a percentage"),
        *unknown("normalization", [command.normalization], mcda.NORMALIZATIONS),
    ]
    if problems:
        raise ConfigurationError(problems)
    table = read_criteria(command.criteria, cost=command.cost)
    with jax.enable_x64(True):
        weights = mcda.critic_weights(table.matrix, benefit=table.benefit)
        closeness = mcda.topsis(table.matrix, weights, benefit=table.benefit, normalization=command.normalization)
        ratios = policies.ratios_from_scores(closeness, min_ratio=command.min_ratio)
        ranks = policies.ranks_from_ratios(ratios, {"rank": command.max_rank})["rank"]
    columns = [np.asarray(column) for column in (closeness, ratios, ranks)]
    named = dict(zip(table.criteria, np.asarray(weights).tolist(), strict=True))
    if command.json:
        keys = ("client", "closeness", "ratio", "rank")
        rows = zip(table.clients, *(column.tolist() for column in columns), strict=True)
        content = {
            "weights": named,
            "clients": [dict(zip(keys, row, strict=True)) for row in rows],
            "max_rank": command.max_rank,
            "min_ratio": command.min_ratio,
        }
        sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        return
    console = Console(highlight=False)
    for shown in criteria_table(table.clients, named, *columns):
        console.print(shown)
