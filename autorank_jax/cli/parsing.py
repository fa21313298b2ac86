"""From words to a command; every mistake in a line of its own, all of them at once."""

import dataclasses
import difflib
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from autorank_jax.cli.completion import SHELLS, completion
from autorank_jax.cli.fields import Option, expected, options_of, read_word, shortly
from autorank_jax.cli.formats import read_config, read_run
from autorank_jax.cli.help import NEARBY, help_on, help_on_program
from autorank_jax.cli.options import COMMANDS, PROGRAM, Command, Finetune, Run
from autorank_jax.experiment.config import ConfigurationError, Experiment, experiment_from
from autorank_jax.experiment.language_options import language_options_from

HELP = ("-h", "--help", "--help-all")
FIRST = (*dict.fromkeys(name.partition(" ")[0] for name in COMMANDS), "completion")


class Piece(NamedTuple):
    """An option and the value behind it, or a word without an option."""

    flag: str
    value: str | None


def parse(arguments: Sequence[str]) -> Command:
    """Parse the command line.

    Raises:
        ConfigurationError: a line each for all options that do not exist or do not parse; for a file of options that
            cannot be used.
        SystemExit: of code 0, after help, the version, or a script for a shell.
    """
    name, words = command_of(arguments)
    for asked in words:
        if asked in HELP:
            print_and_leave(help_on(name, everything=asked == "--help-all"))
    options = options_of(COMMANDS[name])
    given, problems = read_pieces(name, list(pieces(words, options)), options)
    if problems:
        raise ConfigurationError([*problems, *_further(COMMANDS[name], given, problems)])
    made = _made(COMMANDS[name], given)
    if isinstance(made, Run) and (problems := list(_meant_private(made.experiment, given))):
        raise ConfigurationError(problems)
    return made


def _meant_private(experiment: Experiment, given: Mapping[str, Any]) -> Iterable[str]:
    """Yield a line for every option of privacy that is given to a run without; even one that is as by default."""
    if experiment.dp_epsilon == 0:
        for name in (name for name in given if name.startswith("dp_")):
            if name == "dp_epsilon":
                yield "dp-epsilon: expected a number above 0, got 0: leave it out for a run without privacy"
            else:
                yield f"{name.replace('_', '-')}: expected only with --dp-epsilon, got it without, probably forgotten"


def command_of(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the name of the command and the words after it.

    Raises:
        ConfigurationError: if there is no such command.
        SystemExit: of code 0, after what is printed at once.
    """
    first, second = [*arguments, "", ""][:2]
    if first in HELP:
        print_and_leave(help_on_program())
    if first == "--version":
        print_and_leave(f"{PROGRAM} {version()}, jax {metadata.version('jax')}")
    if first == "completion":
        if second in HELP:
            print_and_leave(help_on_program())
        print_and_leave(completion(shell(arguments[1:])))
    if f"{first} {second}" in COMMANDS:
        return f"{first} {second}", arguments[2:]
    if first == "data" and second and not second.startswith("-"):
        _check_word(second, ("list", "fetch"), "data ")
        return first, arguments[2:]
    _check_word(first, FIRST, "")
    return first, arguments[1:]


def _check_word(word: str, known: Sequence[str], before: str) -> None:
    if word not in known:
        close = difflib.get_close_matches(word, known, n=1)
        meant = f", probably {close[0]}" if close else ""
        line = f"expected one of {', '.join(known)}, got {shortly(word) if word else 'none'}{meant}"
        raise ConfigurationError([f"{line} (see {PROGRAM} {before}--help)"])


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


def pieces(words: Sequence[str], options: Mapping[str, Option]) -> Iterator[Piece]:
    """Take options and what belongs to them together.

    A value may begin with one dash, as negative numbers do, and with two only behind `=`.
    """
    left = deque(words)
    while left:
        word = left.popleft()
        flag, sign, value = word.partition("=")
        if not word.startswith("-") or word == "-":
            yield Piece("", word)
        elif sign:
            yield Piece(flag, value)
        else:
            option = _option(flag, options)
            alone = (option is not None and option.kind is bool) or not left or left[0].startswith("--")
            yield Piece(flag, None if alone else left.popleft())


def _option(flag: str, options: Mapping[str, Option]) -> Option | None:
    """Return the option that a word names; `--no-` before a flag that is on names it too."""
    name = flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""
    off = options.get(name.removeprefix("no_"))
    found = options.get(name, off if off and off.kind is bool else None)
    return found if found and not found.bare else None


def read_pieces(
    command: str, found: Sequence[Piece], options: Mapping[str, Option]
) -> tuple[dict[str, Any], list[str]]:
    """Return the values that are given, by field, and a line for every mistake."""
    given: dict[str, Any] = {}
    problems: list[str] = []
    strays: list[tuple[Option | None, str]] = []  # words without an option, and the option before
    before, names = None, []
    place = next((option for option in options.values() if option.bare), None)
    for flag, value in found:
        option = _option(flag, options)
        if flag and option is None:
            problems.append(_no_option(command, flag, options))
        elif option is None and place and (place.several or place.name not in given):
            try:
                one = read_word(place, str(value))
                given[place.name] = (*given.get(place.name, ()), one) if place.several else one
            except ValueError as error:
                problems.append(f"{place.name}: {error}")
        elif option is None:
            strays.append((before, str(value)))
        else:
            names.append(option.name)
            try:
                given[option.name] = _value(option, flag, value)
            except ValueError as error:
                problems.append(f"{option.name.replace('_', '-')}: {error}")
        before = option
    for name in ("config", "resume"):  # the defaults of all others come from there
        if names.count(name) > 1:
            problems.append(f"{name}: expected it once, got it {names.count(name)} times")
            given.pop(name, None)
    missing = [o for o in options.values() if o.default is dataclasses.MISSING and o.name not in {*given, *names}]
    if len(missing) == len(strays) == 1 and not missing[0].bare:
        word = strays.pop()[1]
        problems.append(f"{_needed(missing.pop())}, got {shortly(word)} alone, probably without the option before it")
    problems += [_stray(command, option, word, given) for option, word in strays]
    meant = [nearby(flag, options) for flag, _ in found if flag and not _option(flag, options)]
    missing = [option for option in missing if option.flag not in meant]
    problems += [f"{_needed(option)}, got none (see {PROGRAM} {command} --help)" for option in missing]
    return given, problems


def _value(option: Option, flag: str, value: str | None) -> Any:
    """Read the value behind an option.

    Raises:
        ValueError: if it is not there, or none of its kind.
    """
    if option.kind is bool:
        if value is not None:
            raise ValueError(f"expected no value, got {shortly(value)}, probably {flag} alone")
        return flag == option.flag
    if value is None:
        raise ValueError(f"expected {expected(option)}, got none")
    return read_word(option, value)


def _needed(option: Option) -> str:
    return f"{option.name.replace('_', '-')}: expected {option.bare or f'{option.flag} {option.kind.__name__.upper()}'}"


def _stray(command: str, before: Option | None, word: str, given: Mapping[str, Any]) -> str:
    """Say what is wrong with a word that no option is before."""
    if before and before.kind is bool:
        return f"{before.name.replace('_', '-')}: expected no value, got {shortly(word)}, probably {before.flag} alone"
    if before and before.several and before.name in given:
        whole = ",".join([*map(str, given[before.name]), word])
        return f"{before.name.replace('_', '-')}: expected {expected(before)}, got spaces, probably {shortly(whole)}"
    return f"{command}: expected an option, got {shortly(word)} (see {PROGRAM} {command} --help)"


def _no_option(command: str, flag: str, options: Mapping[str, Option]) -> str:
    """Say that there is no such option, and which was probably meant."""
    near = nearby(flag, options)
    others = " and ".join(name for name in COMMANDS if _option(flag, options_of(COMMANDS[name])))
    meant = f", probably {near}" if near else f", which belongs to {others}" if others else ""
    meant += f", or {others}, which has it" if near.startswith(flag) and others and " and " not in others else ""
    shown = flag if len(flag) <= 40 else f"{flag[:37]}..."
    what = "an option" if options else "no option"
    return f"{command}: expected {what}, got {shown}{meant} (see {PROGRAM} {command} --help)"


def nearby(flag: str, options: Mapping[str, Option]) -> str:
    """Return the option that is meant by another program's word for it, by a misspelling, or by a part of its name."""
    name = flag.strip("-").replace("_", "-")
    known = {option.name.replace("_", "-"): option.flag for option in options.values()}
    exact = any(name.replace("-", "_") in options_of(kind) for kind in COMMANDS.values())
    other = [word for word in NEARBY.get(name, ()) if word in known]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.8 if exact else 0.6)
    parts = [word for word in known if name in word.split("-")] if len(name) > 2 else []
    return known[(other or close or parts)[0]] if other or close or parts else ""


def _made(kind: type[Any], given: Mapping[str, Any]) -> Command:
    """Make a command of what is given, and of the defaults for everything else."""
    options = options_of(kind)
    own = {name: value for name, value in given.items() if not options[name].part}
    if kind not in (Run, Finetune):
        made: Command = kind(**own)
        return made
    begin = starting_point(kind, given)
    for part in dict.fromkeys(option.part for option in options.values() if option.part):
        values = {name: value for name, value in given.items() if options[name].part == part}
        own[part] = dataclasses.replace(getattr(begin, part), **values)
    return dataclasses.replace(begin, **own)


def starting_point(kind: type[Any], given: Mapping[str, Any]) -> Run | Finetune:
    """Return the defaults: those of the package, of a file of options, or of a run to be taken up again."""
    config, resume = given.get("config"), given.get("resume")
    if config and resume:
        raise ConfigurationError(["resume: expected no --config beside it: a run goes on with its own options"])
    if resume:
        make = experiment_from if kind is Run else language_options_from
        options, every, keep = read_run(resume, "experiment" if kind is Run else "training", make)
        _check_unchanged(options, given)
        begin: Run | Finetune = kind(options, checkpoint_every=every, keep_checkpoints=keep)
        return begin
    return Run(read_config(config)) if config else kind()


def _check_unchanged(options: object, given: Mapping[str, Any]) -> None:
    """Check that what is taken up again is asked to do the same, but for the number of rounds."""
    problems = [
        f"{name.replace('_', '-')}: expected {_spelled(getattr(options, name))} beside --resume, as that run has it,"
        f" got {_spelled(value)}; what has other options begins anew, without --resume"
        for name, value in given.items()
        if name != "rounds" and _spelled(value) != _spelled(getattr(options, name, value))
    ]
    if problems:
        raise ConfigurationError(problems)


def _spelled(value: Any) -> str:
    if isinstance(value, Path):
        return str(value.expanduser().absolute())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _further(kind: type[Any], given: Mapping[str, Any], problems: Iterable[str]) -> list[str]:
    """Return what is wrong with the options that could be read, beside those that could not."""
    unread = {line.partition(":")[0] for line in problems}
    found: list[str] = []
    try:
        made = _made(kind, given) if kind in (Run, Finetune) else None
    except ConfigurationError as error:
        return list(error.problems)
    for part in (made.launch, made.experiment) if isinstance(made, Run) else ():
        found += _problems_of(part.validate)
    if isinstance(made, Finetune):
        found += _problems_of(made.training.validate)
    return [line for line in found if unread.isdisjoint(re.findall(r"[\w-]+", line))]


def _problems_of(check: Callable[[], None]) -> Sequence[str]:
    try:
        check()
    except ConfigurationError as error:
        return error.problems
    return ()
