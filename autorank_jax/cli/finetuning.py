"""The command `finetune`: a language model trained by many clients, from its folder to adapters that `peft` loads."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from autorank_jax.checkpoint import CheckpointError, saved_steps
from autorank_jax.cli.cache import keep_programs
from autorank_jax.cli.files import (
    checkpoints_of,
    how_to_resume,
    idle_checkpoints,
    resuming_problems,
    saved,
    write_run,
)
from autorank_jax.cli.folders import ADAPTER, CHECKPOINTS, ReportError, check_folder, default_folder, occupied
from autorank_jax.cli.interrupts import Interrupted, Interruption
from autorank_jax.cli.language_report import show_language_results, write_language_results, write_rounds
from autorank_jax.cli.options import Finetune
from autorank_jax.cli.stages import Stages
from autorank_jax.cli.tables import make_console
from autorank_jax.cli.terminal import tell, warn
from autorank_jax.experiment.events import Resumed
from autorank_jax.experiment.language import run_language
from autorank_jax.experiment.language_options import as_json
from autorank_jax.experiment.language_results import (
    Begun,
    Ended,
    LanguageEvent,
    LanguageResults,
    LanguageRow,
    LanguageStopped,
)
from autorank_jax.experiment.mistakes import ConfigurationError
from autorank_jax.experiment.results import LanguageDivergedError
from autorank_jax.interface.paths import user_path


def finetune(command: Finetune) -> None:
    """Train, or what is left of it, show, and write the files.

    Raises:
        ConfigurationError: for mistakes in options and files.
        DatasetError: for instructions that cannot be read.
        ReportError: for a folder that results cannot be written to, and checkpoints that cannot be gone on with.
        LanguageDivergedError: for a loss that is no number.
    """
    options = command.training
    options.validate()
    if problems := list(resuming_problems(command)):
        raise ConfigurationError(problems)
    if command.resume:
        folder = check_folder(command.resume, overwrite=True)
    else:
        names = [path.stem[:60] if path else "tiny" for path in (options.model, options.data)]
        folder = command.out or default_folder("-".join(dict.fromkeys(names)), overwrite=command.overwrite)
        folder = check_folder(folder, overwrite=command.overwrite)
    keep_programs(wanted=not command.no_cache)
    for line in [] if command.quiet else idle_checkpoints(command):
        warn(line)
    with occupied(folder):
        if not command.resume:  # an older run's would be gone on with
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        console = make_console(quiet=command.quiet)
        try:
            results = train_in(folder, command, console)
        except CheckpointError as error:
            raise ReportError(str(error)) from error
        show_language_results(console, results)
        written, place, problem = saved(lambda place: write_language_results(place, results), folder)
        console.print(f"Written to {place}: {', '.join(written)}", soft_wrap=True)
        if problem:
            raise problem


def train_in(folder: Path, command: Finetune, console: Console) -> LanguageResults:
    """Train in a folder, and say how to go on where it is stopped."""
    checkpoints = checkpoints_of(folder, every=command.checkpoint_every, keep=command.keep_checkpoints)
    model, data = (path and user_path(path).absolute() for path in (command.training.model, command.training.data))
    options = dataclasses.replace(command.training, model=model, data=data)

    def note() -> None:
        write_run(folder, {"training": as_json(options)}, checkpoints)

    interruption = Interruption()
    stopped: list[LanguageStopped] = []
    try:
        with interruption, Stages(console) as stages:

            def on_event(event: LanguageEvent) -> None:
                interruption.training |= isinstance(event, Begun) and event.round > 0
                if isinstance(event, Resumed) and checkpoints.every:
                    note()
                if isinstance(event, LanguageStopped):
                    stopped.append(event)
                show_stage(stages, event)

            def on_round(row: LanguageRow) -> None:
                if row.round == 0 and checkpoints.every:  # by now options and files are found to fit
                    note()
                stages.say(f"round {row.round}: perplexity {row.perplexity:.4g}, {row.seconds:.1f} s")
                interruption.stop_after(f"round {row.round}")

            return run_language(options, on_event=on_event, on_round=on_round, checkpoints=checkpoints)
    except LanguageDivergedError as error:
        raise LanguageDivergedError(f"{error}{keep_rounds(folder, stopped, command)}") from error
    except KeyboardInterrupt as stop:
        kept = keep_rounds(folder, stopped, command)
        if isinstance(stop, Interrupted):
            note()
        if not saved_steps(checkpoints.folder):
            raise Interrupted(f"interrupted{kept or '; nothing was written'}", interruption.code) from None
        raise Interrupted(
            f"{str(stop) or 'interrupted'}{kept}; go on with: {how_to_resume(folder, 'finetune')}", interruption.code
        ) from None


def keep_rounds(folder: Path, stopped: Sequence[LanguageStopped], command: Finetune) -> str:
    """Write what there is of a run that ended before its time, and say where; nothing where there are no rounds."""
    if not stopped:
        return ""
    options, rows = stopped[-1]
    _, place, problem = saved(lambda place: write_rounds(place, options, rows), folder)
    if not command.resume:  # an older run's
        shutil.rmtree(place / ADAPTER, ignore_errors=True)
    if problem:
        tell(str(problem))
    return f"; the rounds so far are in {place}"


def show_stage(stages: Stages, event: LanguageEvent) -> None:
    """Show one event: a line for every stage that is over, with what it found."""
    match event:
        case Begun(name, expected):
            stages.begin(name, expected)
        case Ended(name, seconds, detail):
            stages.leave()
            stages.say(f"{name}: {seconds:.1f} s" + (f", {detail}" if detail else ""))
        case Resumed(rounds, differences):
            stages.say_resumed(rounds, differences)
