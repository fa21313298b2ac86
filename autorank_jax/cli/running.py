"""The command `run`: an experiment shown while it goes on, and written to its folder."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console

from autorank_jax.checkpoint import CheckpointError, saved_steps
from autorank_jax.cli import cache
from autorank_jax.cli.files import (
    checkpoints_of,
    how_to_resume,
    idle_checkpoints,
    resuming_problems,
    save_results,
    write_run,
)
from autorank_jax.cli.folders import ReportError, check_folder, default_folder, occupied
from autorank_jax.cli.interrupts import Interrupted, Interruption
from autorank_jax.cli.live import Display
from autorank_jax.cli.logs import Logs, log_problems
from autorank_jax.cli.options import Run
from autorank_jax.cli.stages import Stages
from autorank_jax.cli.tables import comparison_tables, fitted, footnotes, make_console
from autorank_jax.cli.terminal import tell, warn
from autorank_jax.cli.wrapping import print_line
from autorank_jax.experiment.checkpoints import Checkpoints, expected_rounds
from autorank_jax.experiment.config import ConfigurationError, Experiment, without_effect
from autorank_jax.experiment.doubts import doubts, without_curves
from autorank_jax.experiment.events import Compiled, Event, Resumed, Scored, Stopped
from autorank_jax.experiment.launch import is_first, start
from autorank_jax.experiment.results import DivergedError, Record, Results
from autorank_jax.experiment.run import run_experiment


def run(command: Run) -> None:
    """Run an experiment, or what is left of it, show it, and write its files.

    Raises:
        ReportError: for files that cannot be written, and checkpoints that cannot be gone on with.
    """
    try:
        run_here(command)
    except CheckpointError as error:
        raise ReportError(str(error)) from error


def run_here(command: Run) -> None:
    """Run an experiment on the devices and in the folder that a command names."""
    experiment = command.experiment
    check_run(command)
    cache.keep_programs(wanted=not command.no_cache)
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
    idle = [] if command.resume else [*without_effect(experiment)]
    for line in [] if command.quiet else [*idle, *idle_checkpoints(command)]:
        warn(line)
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
            write_run(folder, {"experiment": dataclasses.asdict(experiment)}, checkpoints)
        display(event)
        logs(event)
        if isinstance(event, Scored) and not command.quiet:
            scores = event.scores
            first = scores.seed == experiment.first_seed  # the others differ as little
            for line in doubts(scores) if first else filter(None, [without_curves(scores.unprobed, len(scores.size))]):
                warn(line if first else f"seed {scores.seed}: {line}")

    interruption = Interruption()
    try:
        with interruption, Logs(command.log, folder) as logs, Display(console, experiment) as display:
            results = run_experiment(
                experiment,
                mesh=mesh,
                on_event=interruption.watch(listen),
                on_round=interruption.on_round,
                checkpoints=checkpoints,
            )
    except DivergedError as error:
        if error.results:
            keep_rounds(folder, error.results)
        raise
    except KeyboardInterrupt as stop:
        places = [f"the rounds so far are in {keep_rounds(folder, results)}" for results in partial]
        rounds = "; ".join(places) or "nothing was written"
        if not isinstance(stop, Interrupted):  # in the middle of a round
            raise Interrupted(f"interrupted; {rounds}", interruption.code) from None
        write_run(folder, {"experiment": dataclasses.asdict(experiment)}, checkpoints)
        raise Interrupted(f"{stop}; {rounds}; go on with: {how_to_resume(folder, 'run')}", stop.code) from None
    with Stages(console) as stages:
        stages.begin("drawing and writing")
        paths, problem = save_results(folder, results)
    show(console, experiment, results, paths)
    for line in about_extension(folder, experiment, results, checkpoints).splitlines():
        print_line(console, line)
    if problem:
        raise problem


def keep_rounds(folder: Path, results: Results) -> Path:
    """Write what there is of a run that ended before its time, and return where."""
    paths, problem = save_results(folder, results)
    if problem:
        tell(str(problem))
    return paths[0].parent


def about_extension(folder: Path, experiment: Experiment, results: Results, checkpoints: Checkpoints) -> str:
    """Say how a finished run goes on to more rounds, or why it cannot."""
    if not saved_steps(checkpoints.folder):
        return "It cannot be extended by more rounds, as no checkpoints were kept: --checkpoint-every N keeps some."
    records = [Record(run.policy, run.aggregator, run.seed, run.rows, over=True) for run in results.runs]
    more = dataclasses.replace(experiment, rounds=experiment.rounds + 1)
    kept = expected_rounds(records, more, experiment.rounds)
    if kept:
        return f"It cannot be extended by more rounds, {kept.partition(', ')[2]}."
    return f"It can be extended by more rounds:\n{how_to_resume(folder, 'run')} --rounds N"


def check_run(command: Run) -> None:
    """Check all options of a run.

    Raises:
        ConfigurationError: naming all mistakes.
    """
    problems = [*resuming_problems(command), *log_problems(command.log)]
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
        for part in fitted(table, console):
            console.print(part)
    for line in footnotes(results):
        print_line(console, line)
    if experiment.split == "staircase":
        print_line(
            console,
            "On the staircase any rule that grows with a client's size gives nearly the same ranks, so it cannot tell "
            "such rules apart: try --split dirichlet_lognormal --aggregators rbla,raflora, with several --seeds.",
        )
    names = ", ".join(path.name for path in paths)
    print_line(console, f"Written to {paths[0].parent}: {names}")
