"""From words to a command; what does not parse ends in one line."""

import contextlib
import difflib
import io
import itertools
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_origin

import tyro

from autorank_jax.cli.formats import read_config, read_run
from autorank_jax.cli.help import GROUPS, NEARBY, help_on_run
from autorank_jax.cli.options import PROGRAM, Cache, Compare, Data, Finetune, Ranks, Run
from autorank_jax.experiment.config import ConfigurationError, experiment_from
from autorank_jax.experiment.language_options import language_options_from

COMMANDS = ("run", "finetune", "compare", "ranks", "data", "cache")
SHELLS = ("bash", "zsh", "fish", "tcsh")
DESCRIPTION = (
    "Federated LoRA with a rank for every client, chosen by AutoRank.\n\n"
    f"Also: {PROGRAM} --version, and {PROGRAM} completion SHELL, which prints a\n"
    f"script for {', '.join(SHELLS)}."
)


def parse(arguments: Sequence[str]) -> Run | Finetune | Compare | Ranks | Data | Cache:
    """Parse the command line.

    Raises:
        ConfigurationError: in one line, for options that do not exist or do not parse; for a file of options that
            cannot be used.
        SystemExit: of code 0, after help.
    """
    words = list(arguments)
    if words[:1] == ["run"]:
        for asked in (word for word in words if word in ("-h", "--help", "--help-all")):
            print_and_leave(help_on_run(everything=asked == "--help-all"))
    if words[:1] == ["--version"]:
        print_and_leave(f"{PROGRAM} {version()}, jax {metadata.version('jax')}")
    if words[:1] == ["completion"]:
        words = ["--tyro-print-completion", shell(words[1:])]
    elif any(word.startswith("--tyro-") for word in words):
        raise ConfigurationError([f"expected options of {PROGRAM}, got one of tyro; try {PROGRAM} --help"])
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(comma_separated)
    commands = (
        Annotated[Run, tyro.conf.subcommand("run", default=starting_point(words))]
        | Annotated[Finetune, tyro.conf.subcommand("finetune", default=taken_up(words))]
        | Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Ranks, tyro.conf.subcommand("ranks")]
        | Annotated[Data, tyro.conf.subcommand("data")]
        | Annotated[Cache, tyro.conf.subcommand("cache")]
    )
    message = io.StringIO()
    try:
        with registry, contextlib.redirect_stderr(message):
            return tyro.cli(
                commands,
                args=words,
                prog=PROGRAM,
                description=DESCRIPTION,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        command = " ".join([PROGRAM, *(word for word in arguments[:1] if word in COMMANDS), "--help"])
        raise ConfigurationError([one_line(message.getvalue(), command)]) from stop


def print_and_leave(text: str) -> NoReturn:
    """Print help and end the program."""
    sys.stdout.write(f"{text}\n")
    raise SystemExit(0)


def version() -> str:
    """Return the version of the package, read from its metadata."""
    return metadata.version("autorank-jax")


def shell(words: Sequence[str]) -> str:
    """Return the shell that a completion is asked for.

    Raises:
        ConfigurationError: for anything else.
    """
    if len(words) != 1 or words[0] not in SHELLS:
        got = " ".join(words) or "none"
        raise ConfigurationError([f"completion: expected one shell out of {', '.join(SHELLS)}, got {got}"])
    return words[0]


def starting_point(arguments: Sequence[str]) -> Run:
    """Return a run's defaults: those of the package, of a file of options, or of a run to be taken up again."""
    if list(arguments[:1]) != ["run"]:
        return Run()
    config, resume = word_after(arguments, "--config"), word_after(arguments, "--resume")
    if config and resume:
        raise ConfigurationError(["resume: expected no --config beside it: a run goes on with its own options"])
    if resume:
        experiment, every, keep = read_run(Path(resume), "experiment", experiment_from)
        return Run(experiment, checkpoint_every=every, keep_checkpoints=keep)
    return Run(read_config(Path(config))) if config else Run()


def taken_up(arguments: Sequence[str]) -> Finetune:
    """Return the defaults of `finetune`: those of the package, or of a run to be taken up again."""
    resume = word_after(arguments, "--resume") if list(arguments[:1]) == ["finetune"] else None
    if not resume:
        return Finetune()
    options, every, keep = read_run(Path(resume), "training", language_options_from)
    return Finetune(options, checkpoint_every=every, keep_checkpoints=keep)


def comma_separated(info: Any) -> Any:
    """Read a tuple of any length from one word with commas: the rule that tyro is given."""
    arguments = get_args(info.type)
    if get_origin(info.type) is not tuple or len(arguments) != 2 or arguments[1] is not Ellipsis:
        return None
    item = arguments[0]
    if item is Path:  # file names have commas
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{item.__name__.upper()},…",
        instance_from_str=lambda words: tuple(item(word.strip()) for word in words[0].split(",") if word.strip()),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(v, item) for v in value),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


def word_after(arguments: Sequence[str], option: str) -> str | None:
    """Return the value of an option before the command line is parsed, as it changes the others' defaults.

    Raises:
        ConfigurationError: if it is there more than once.
    """
    found = []
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, sign, value = word.partition("=")
        if name == option:
            found.append(value if sign else following)
    if len(found) > 1:
        raise ConfigurationError([f"{option[2:]}: expected it once, got it {len(found)} times"])
    return found[0] if found else None


def one_line(message: str, helpful: str) -> str:
    """Condense tyro's boxed message: what was expected, what came, and what was probably meant.

    Args:
        message: what tyro writes.
        helpful: the command that prints help.
    """
    lines = [line.strip("╭╮╰╯│─| \t") for line in message.splitlines()[1:]]
    lines = [line for line in lines if line.strip("-+| ") and not line.startswith("For full help")]
    if lines and lines[0].startswith("Unrecognized"):
        what = _unknown(lines)
    elif lines and lines[0].startswith("Missing from"):
        what = _missing(lines)
    else:
        what = " ".join(itertools.takewhile(lambda line: not line.startswith("Argument helptext"), lines))
    return f"{what or message.strip() or 'unknown mistake'} (see {helpful})"


def _unknown(lines: Sequence[str]) -> str:
    """Say which words are no options, with the nearest option of each where there is one, in the same order."""
    misplaced = " (applied to "  # words that another command has as options are listed line by line
    if any(misplaced in line for line in lines):
        listed = [line.partition(misplaced)[0] for line in lines if misplaced in line]
        lines = [f"Unrecognized options: {', '.join(listed)}"]
    head = list(itertools.takewhile(lambda line: not line.endswith(":") and not line.startswith("Available"), lines))
    words = " ".join(head).partition(": ")[2].split(", ")
    words = [word.partition("=")[0] for word in words if word.startswith("-")] or words
    known, about = "options that exist", ""
    nearest: dict[str, str] = {}
    for line in lines[len(head) :]:
        if line.startswith("Available subcommands: "):
            known = f"one of {line.partition(': ')[2]}"
        elif line.endswith(":"):
            about = line.removeprefix("Arguments similar to ").rstrip(":").partition("=")[0]
        elif line.startswith("--"):
            nearest.setdefault(about, line.split()[0])
    if len(words) == 1 and nearest:
        nearest = {words[0]: next(iter(nearest.values()))}
    for word in words:
        near = nearby(word) if word.startswith("--") and word not in nearest else ""
        if near:
            nearest[word] = near
    meant = [nearest[word] for word in sorted(nearest, key=lambda word: words.index(word) if word in words else 0)]
    return f"expected {known}, got {', '.join(words)}" + (f", probably {', '.join(meant)}" if meant else "")


def nearby(word: str) -> str:
    """Return the option of `run` that is meant by a word that other programs have, or by a part of its name."""
    name = word.strip("-").replace("_", "-")
    options = [field.replace("_", "-") for group in GROUPS for field in (*group.first, *group.more)]
    parts = [option for option in options if name in option.split("-")] if len(name) > 2 else []
    close = difflib.get_close_matches(name, options, n=1)
    found = NEARBY.get(name) or (close or parts or [""])[0]
    return f"--{found}" if found else ""


def _missing(lines: Sequence[str]) -> str:
    """Say which options a command needs, and which words it got that are none."""

    def options(part: Sequence[str]) -> str:
        return ", ".join(line.split()[0] for line in part if line.startswith("--") or line.isupper())

    cut = next((i for i, line in enumerate(lines) if line.startswith("Unrecognized")), len(lines))
    return f"expected {options(lines[:cut])}, got {options(lines[cut:]) or 'none'}"
