"""The options of a command, read off the fields of its dataclass and their docstring."""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from autorank_jax.interface.paths import user_path


class Option(NamedTuple):
    """One option."""

    name: str  # of its field
    kind: Any  # bool, int, float, str or Path: of what is given
    several: bool  # of them, with commas between them
    words: tuple[str, ...]  # that may be given in place of a number: auto
    default: Any  # `dataclasses.MISSING` where it must be given
    about: str
    part: str  # the field of the command whose options it belongs to; "" for the command's own
    bare: str  # what stands for its words in the help where no option is before them; "" where one is

    @property
    def flag(self) -> str:
        """Return the word of the command line that names it."""
        return self.bare or f"--{self.name.replace('_', '-')}"


def options_of(command: type) -> Mapping[str, Option]:
    """Return the options of a command by the names of their fields, those of its parts among them."""
    return {option.name: option for option in _options(command, "")}


def _options(kind: type, part: str) -> Iterator[Option]:
    hints, about = get_type_hints(kind), explanations(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _options(hint, field.name)
        else:
            single, several, words = _taken_apart(hint)
            shown = field.metadata.get("bare", "")
            yield Option(field.name, single, several, words, field.default, about[field.name], part, shown)


def _taken_apart(hint: Any) -> tuple[Any, bool, tuple[str, ...]]:
    """Return the type of one value, whether there may be several, and the words in place of it."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))
    kind = next(part for part in parts if part is not NoneType and get_origin(part) is not Literal)
    return (get_args(kind)[0], True, words) if get_origin(kind) is tuple else (kind, False, words)


def explanations(kind: type) -> dict[str, str]:
    """Return what a dataclass's docstring says about every attribute."""
    about = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", about, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def read_word(option: Option, word: str) -> Any:
    """Read the word that is given to an option.

    Raises:
        ValueError: saying what was expected, what was given, and what was probably meant.
    """
    if option.several and not option.bare:
        items = [item.strip() for item in word.split(",") if item.strip()]
        try:
            return tuple(_read(option.kind, item) for item in items)
        except ValueError:
            pass
    elif word in option.words:
        return word
    elif word or option.kind is str:
        try:
            return _read(option.kind, word)
        except ValueError:
            pass
    raise ValueError(f"expected {expected(option)}, got {shortly(word)}{_meant(option, word)}")


def _read(kind: Any, word: str) -> Any:
    """Read one value; numbers in plain digits alone, where Python takes `1_000` and those of other scripts too."""
    if kind in (int, float) and ("_" in word or not word.isascii()):
        raise ValueError
    return user_path(word) if kind is Path else kind(word)


def expected(option: Option) -> str:
    """Return in words what an option takes."""
    names = {int: "a whole number", float: "a number", str: "a name", Path: "a path"}
    if option.several and not option.bare:
        return f"{names[option.kind].removeprefix('a ')}s with commas between them"
    return " or ".join([names[option.kind], *option.words])


def shortly(word: str) -> str:
    """Return a word as it is shown in a message."""
    return repr(word if len(word) <= 40 else f"{word[:37]}...")


def _meant(option: Option, word: str) -> str:
    """Say which number was probably meant by a word that is none."""
    percent = word.endswith("%")
    try:
        number = float(word.rstrip("%").replace(",", "." if option.kind is float else "")) / (100 if percent else 1)
    except ValueError:
        if option.kind is not Path:
            return ""
        return ", of whose user no home folder is known" if word else ", probably a shell variable that is empty"
    if option.several or option.kind not in (int, float) or (option.kind is int and not number.is_integer()):
        return ""
    return f", probably {number:g}" if option.kind is float else f", probably {int(number)}" if number < 1e9 else ""
