"""The command `finetune`: a language model trained by many clients, from its folder to adapters that `peft` loads."""

import dataclasses
import shutil
from pathlib import Path

from rich.console import Console

from autorank_jax.checkpoint import CheckpointError, saved_steps
from autorank_jax.cli.files import checkpoints_of, how_to_resume, resuming_problems, write_run
from autorank_jax.cli.folders import CHECKPOINTS, ReportError, check_folder, default_folder, occupied
from autorank_jax.cli.interrupts import Interrupted, Interruption
from autorank_jax.cli.language_report import show_language_results, write_language_results
from autorank_jax.cli.options import Finetune
from autorank_jax.cli.stages import Stages
from autorank_jax.cli.tables import make_console
from autorank_jax.experiment.events import Resumed
from autorank_jax.experiment.language import run_language
from autorank_jax.experiment.language_options import as_json
from autorank_jax.experiment.language_results import Begun, Ended, LanguageEvent, LanguageResults, LanguageRow
from autorank_jax.experiment.mistakes import ConfigurationError


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
        names = [path.stem if path else "tiny" for path in (options.model, options.data)]
        folder = command.out or default_folder("-".join(dict.fromkeys(names)), overwrite=command.overwrite)
        folder = check_folder(folder, overwrite=command.overwrite)
    with occupied(folder):
        if not command.resume:  # an older run's would be gone on with
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        console = make_console(quiet=command.quiet)
        try:
            results = train_in(folder, command, console)
        except CheckpointError as error:
            raise ReportError(str(error)) from error
        show_language_results(console, results)
        written = write_language_results(folder, results)
        console.print(f"Written to {folder}: {', '.join(written)}", soft_wrap=True)


def train_in(folder: Path, command: Finetune, console: Console) -> LanguageResults:
    """Train in a folder, and say how to go on where it is stopped."""
    checkpoints = checkpoints_of(folder, every=command.checkpoint_every, keep=command.keep_checkpoints)
    options = command.training

    def note() -> None:
        model, data = (path and path.expanduser().absolute() for path in (options.model, options.data))
        write_run(folder, {"training": as_json(dataclasses.replace(options, model=model, data=data))}, checkpoints)

    interruption = Interruption()
    try:
        with interruption, Stages(console) as stages:

            def on_event(event: LanguageEvent) -> None:
                interruption.training |= isinstance(event, Begun) and event.round > 0
                if isinstance(event, Resumed) and checkpoints.every:
                    note()
                show_stage(stages, event)

            def on_round(row: LanguageRow) -> None:
                if row.round == 0 and checkpoints.every:  # by now options and files are found to fit
                    note()
                stages.say(f"round {row.round}: perplexity {row.perplexity:.4g}, {row.seconds:.1f} s")
                interruption.stop_after(f"round {row.round}")

            return run_language(options, on_event=on_event, on_round=on_round, checkpoints=checkpoints)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Interrupted):
            note()
        if not saved_steps(checkpoints.folder):
            raise Interrupted("interrupted; nothing was written", interruption.code) from None
        raise Interrupted(
            f"{str(stop) or 'interrupted'}; go on with: {how_to_resume(folder, 'finetune')}", interruption.code
        ) from None


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
