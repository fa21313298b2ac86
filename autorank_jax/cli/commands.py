"""The commands of the command line: their options, and what each of them does."""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from jax.sharding import Mesh
from rich.console import Console

from autorank_jax.cli import cache
from autorank_jax.cli.comparing import Compare, compare
from autorank_jax.cli.files import checkpoints_of, how_to_resume, save_results, write_results, write_run
from autorank_jax.cli.finetuning import Finetune, finetune
from autorank_jax.cli.folders import check_folder, default_folder, occupied
from autorank_jax.cli.interrupts import INTERRUPTED, Interrupted, Interruption
from autorank_jax.cli.live import Display
from autorank_jax.cli.logs import Logs, log_problems
from autorank_jax.cli.scoring import Ranks, score_table
from autorank_jax.cli.tables import comparison_tables, datasets_table, footnotes, make_console
from autorank_jax.cli.terminal import tell
from autorank_jax.datasets import available_datasets, cache_folder, fetch_dataset
from autorank_jax.experiment.config import ConfigurationError, Experiment, outside
from autorank_jax.experiment.doubts import doubts
from autorank_jax.experiment.events import Compiled, Event, Resumed, Scored, Stopped
from autorank_jax.experiment.launch import Launch, is_first, start
from autorank_jax.experiment.position import DivergedError
from autorank_jax.experiment.results import Results
from autorank_jax.experiment.run import run_experiment

PROGRAM = "autorank-jax"


@dataclasses.dataclass(frozen=True)
class Run:
    """Score double-imbalanced clients, give each its LoRA rank, train them, and compare rank policies.

    Attributes:
        experiment: what to run
        launch: where to run it
        config: take the options from a run's config.json; others on the command line go before it
        resume: folder of a run to go on with from its latest checkpoint; a run of one policy, rule and seed also beyond
            its end, by more --rounds
        checkpoint_every: rounds between checkpoints, 0 = only when interrupted
        keep_checkpoints: how many of the latest checkpoints stay
        out: folder of the results; default runs/DATASET-SPLIT, with a number where that is taken
        overwrite: replace the run that the folder holds
        log: write every round as it happens: jsonl, tensorboard, or both
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
    log: tuple[str, ...] = ()
    quiet: bool = False
    no_cache: bool = False


@dataclasses.dataclass(frozen=True)
class Listing:
    """List the datasets and say for each whether it is there."""


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Convert a dataset into the folder of datasets, once: from TensorFlow Datasets, a folder of images, or a table.

    Attributes:
        name: of TensorFlow Datasets, such as mnist or cifar100; any name for a folder of images
        source: folder of images {train,test}/CLASS/*.png, as CINIC-10 has it, or of archives that need no download,
            or a table FILE.csv
        target: column of the table to predict, the last if not given
        overwrite: replace the file that is there
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    source: Path | None = None
    target: str | None = None
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


def execute(command: Run | Finetune | Compare | Ranks | Data | Cache) -> None:
    """Do what a command says."""
    match command:
        case Cache(clear):
            found = cache.empty() if clear else cache.held()
            what = f"{found.programs} compiled programs, {found.bytes / 1e6:.1f} MB, in {cache.program_folder()}"
            make_console().print(f"Deleted {what}" if clear else what, soft_wrap=True)
        case Run():
            run(command)
        case Finetune():
            finetune(command)
        case Compare():
            compare(command)
        case Ranks():
            score_table(command)
        case Data(Fetch() as fetch):
            path = fetch_dataset(fetch.name, source=fetch.source, target=fetch.target, overwrite=fetch.overwrite)
            make_console().print(f"{path} is complete", soft_wrap=True)
        case Data():
            console = make_console()
            console.print(datasets_table(available_datasets()))
            console.print(f"Files are looked for in {cache_folder()}", soft_wrap=True)
            console.print(
                f"{PROGRAM} data fetch NAME gets what is not there, with --overwrite what is damaged",
                soft_wrap=True,
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
        name = f"{experiment.dataset}-{experiment.split}"
        folder = command.out or default_folder(name, overwrite=command.overwrite)
        folder = check_folder(folder, overwrite=command.overwrite)
    with occupied(folder):
        run_in(folder, command, mesh)


def run_in(folder: Path, command: Run, mesh: Mesh | None) -> None:
    """Run an experiment in its folder."""
    experiment = command.experiment
    checkpoints = checkpoints_of(folder, every=command.checkpoint_every, keep=command.keep_checkpoints)
    if not command.resume:  # an older run's would be gone on with
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
    console = make_console(quiet=command.quiet)
    partial: list[Results] = []

    def listen(event: Event) -> None:
        if isinstance(event, Stopped):
            partial.append(event.results)
        if checkpoints.every and isinstance(
            event, Compiled | Resumed
        ):  # by now options and checkpoint are found to fit
            write_run(folder, experiment, checkpoints)
        display(event)
        logs(event)
        if isinstance(event, Scored) and event.scores.seed == experiment.first_seed and not command.quiet:
            for line in doubts(event.scores):
                tell(line)

    try:
        with Interruption() as interruption, Logs(command.log, folder) as logs, Display(console, experiment) as display:
            results = run_experiment(
                experiment,
                mesh=mesh,
                on_event=interruption.watch(listen),
                on_round=interruption.on_round,
                checkpoints=checkpoints,
            )
    except DivergedError as error:
        if error.results:
            write_results(folder, error.results, overwrite=True)
        raise
    except KeyboardInterrupt as stop:
        for results in partial:
            write_results(folder, results, overwrite=True)
        rounds = f"the rounds so far are in {folder}" if partial else "nothing was written"
        if not isinstance(stop, Interrupted):  # in the middle of a round
            raise Interrupted(f"interrupted; {rounds}", INTERRUPTED) from None
        write_run(folder, experiment, checkpoints)
        raise Interrupted(f"{stop}; {rounds}; go on with: {how_to_resume(folder)}", stop.code) from None
    paths, problem = save_results(folder, results)
    show(console, experiment, results, paths)
    if problem:
        raise problem


def check_run(command: Run) -> None:
    """Check all options of a run.

    Raises:
        ConfigurationError: naming all mistakes.
    """
    problems = [
        *outside("checkpoint_every", command.checkpoint_every, 0, whole=True),
        *outside("keep_checkpoints", command.keep_checkpoints, 1, whole=True),
        *log_problems(command.log),
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
