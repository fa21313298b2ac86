"""Instructions and their answers from JSON lines, in the three forms in use."""

import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autorank_jax.datasets.base import DatasetError
from autorank_jax.interface import checked
from autorank_jax.interface.paths import user_path

MINI = "instructions_mini"
"""Seventy-four instructions of six kinds, made for this package."""

_FORMS = (
    (("instruction", "output"), ("input",)),
    (("instruction", "response"), ("context",)),
    (("messages",), ()),
    (("prompt", "completion"), ()),
)
SKIPPING = "skip=True, on the command line --skip-odd-lines, omits them"
_ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


class Example(NamedTuple):
    """A conversation whose answers are to be learnt, or a bare prompt with its completion."""

    messages: tuple[Message, ...]
    raw: bool = False  # a bare prompt and its completion, which no template goes around
    asked: int = 0  # so many messages at the beginning are a prompt, of which nothing is learnt


class Instructions(NamedTuple):
    """Examples in the order of their lines, and what else the lines say."""

    examples: tuple[Example, ...]
    fields: dict[str, tuple[Any, ...]]  # by name, of each example; None where its line has none
    lines: tuple[int, ...]  # the number of each example's line, from 1 on
    problems: tuple[str, ...] = ()  # lines that gave no example, in their order, and why

    def take(self, numbers: Sequence[int]) -> "Instructions":
        """Return the examples of these numbers."""
        fields = {name: tuple(values[n] for n in numbers) for name, values in self.fields.items()}
        examples, lines = tuple(self.examples[n] for n in numbers), tuple(self.lines[n] for n in numbers)
        return Instructions(examples, fields, lines)


@checked
def load_instructions(path: str | Path = MINI, *, skip: bool = False) -> Instructions:
    r"""Read instructions from a file of JSON lines, each an object in one of these forms.

    - `{"instruction": ..., "input": ..., "output": ...}`, `input` may be missing; or `instruction, context, response`
    - `{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}`, any number of turns
    - `{"prompt": ..., "completion": ...}`: texts that no template goes around, or lists of messages

    A field `system`, a text, becomes the first message, except beside a `prompt` that is a bare text. It stays a field,
    as further ones do, such as `category`: clients can be made of them.

    Args:
        path: of the file, or "instructions_mini", which comes with the package.
        skip: leave lines out that cannot be read and tell them in `problems`; they are an error where False.

    Returns:
        The instructions. Empty lines are told in `problems` in either case.

    Raises:
        DatasetError: in one line, for a missing file, one without examples, and lines that cannot be read, by number.
    """
    if path == MINI:
        raw = (importlib.resources.files("autorank_jax.datasets") / "embedded" / f"{MINI}.jsonl").read_bytes()
    else:
        file = user_path(path)
        if not os.path.isfile(file):
            raise DatasetError(f"expected a file of JSON lines, got none at {str(file)!r}")
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise DatasetError(f"expected to read {str(file)!r}, got: {error.strerror or error}") from error
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DatasetError(f"expected UTF-8 in {str(path)!r}, got UTF-16: save it as UTF-8")
    examples, others, lines, bad, empty = [], [], [], [], []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            empty.append(f"line {number}: empty")
            continue
        try:
            example, other = parse_line(line)
        except ValueError as error:
            bad.append(f"line {number}: {error}")
            continue
        examples.append(example)
        others.append(other)
        lines.append(number)
    one = bad and _is_one_text(raw.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0].strip())
    cause = ", probably one JSON text over all lines: write each example in a line of its own" if one else ""
    if bad and not skip:
        advice = cause or f"; {SKIPPING}"
        raise DatasetError(f"expected instructions in each line of {str(path)!r}, got {few(bad)}{advice}")
    if not examples:
        raise DatasetError(f"expected instructions in {str(path)!r}, got none in {len(bad) + len(empty)} lines{cause}")
    names = sorted({name for other in others for name in other})
    fields = {name: tuple(other.get(name) for other in others) for name in names}
    return Instructions(tuple(examples), fields, tuple(lines), by_line(*bad, *empty))


def _is_one_text(first: bytes) -> bool:
    """Return whether a JSON text over several lines, or a list of objects, begins with this line."""
    try:
        told = json.loads(first)
    except (ValueError, RecursionError):
        return first in (b"{", b"[") or first.startswith((b"[{", b"[ {"))
    return isinstance(told, list) and bool(told) and all(isinstance(each, dict) for each in told)


def by_line(*problems: str) -> tuple[str, ...]:
    """Return problems in the order of their lines; each begins with `line N`."""
    return tuple(sorted(problems, key=lambda each: int(each.split()[1].rstrip(":"))))


def few(problems: Sequence[str], most: int = 5) -> str:
    """Write the first problems in one line, and how many more there are."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def parse_line(line: bytes) -> tuple[Example, dict[str, Any]]:
    """Read one line: the example, and the fields that are no part of it.

    Raises:
        ValueError: for a line that is no example, saying why.

    Example:
        >>> parse_line(b'{"prompt": "1 + 1 =", "completion": " 2", "category": "sums"}')[1]
        {'category': 'sums'}
    """
    try:
        told = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("no UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(told, dict):
        raise ValueError(f"a {type(told).__name__} in place of an object")
    forms = [(needed, optional) for needed, optional in _FORMS if all(told.get(name) is not None for name in needed)]
    forms = forms or [form for form in _FORMS if all(name in told for name in form[0])]
    if len(forms) > 1:
        raise ValueError(f"fields of two forms, {' and '.join('/'.join(needed) for needed, _ in forms[:2])}")
    for needed, optional in forms:
        other = {name: value for name, value in told.items() if name not in (*needed, *optional)}
        return _example(told, needed, optional), other
    raise ValueError(f"fields {sorted(told)!s:.80} in place of instruction/output, messages or prompt/completion")


def _example(told: Mapping[str, Any], needed: tuple[str, ...], optional: tuple[str, ...]) -> Example:
    if needed == ("messages",):
        return Example(_with_system(_messages(told["messages"], "messages"), told))
    first, last = (told[name] for name in needed)
    if isinstance(first, list) and isinstance(last, list):
        if not last:
            raise ValueError(f"{needed[1]} without messages")
        messages = _messages([*first, *last], needed[1])
        begun = _with_system(messages, told)
        return Example(begun, asked=len(first) + len(begun) - len(messages))
    asked, answer = _text(first, needed[0]), _text(last, needed[1])
    if needed == ("prompt", "completion"):
        return Example((Message("user", asked), Message("assistant", answer)), raw=True)
    more = told.get(optional[0])
    none = more is None or (isinstance(more, str) and not more.strip())
    question = asked if none else f"{asked}\n\n{_text(more, optional[0])}"
    return Example(_with_system((Message("user", question), Message("assistant", answer)), told))


def _with_system(messages: tuple[Message, ...], told: Mapping[str, Any]) -> tuple[Message, ...]:
    """Let a conversation begin with what a line has as `system`."""
    system = told.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    first = Message("system", _text(system, "system"))
    others = [message.content.strip() for message in messages if message.role == "system"]
    if others and others != [first.content.strip()]:
        raise ValueError("a system field beside another system message")
    return messages if others else (first, *messages)


def _messages(told: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(told, list) or not all(isinstance(each, dict) for each in told):
        raise ValueError(f"{name} that are no list of objects")
    for each in told:
        odd = sorted(key for key, value in each.items() if value and key not in ("role", "content"))
        if odd or each.get("role") not in _ROLES:
            raise ValueError(f"a message with {odd or ['role ' + repr(each.get('role'))]} in place of role and content")
    messages = tuple(Message(each["role"], _text(each.get("content"), "content")) for each in told)
    if not messages or messages[-1].role != "assistant":
        raise ValueError(f"{name} that do not end with the assistant's answer")
    return messages


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} of type {type(value).__name__} in place of a text")
    if not value.strip():
        raise ValueError(f"{name} without text")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} with half a surrogate pair, which is no text")
    return value


@checked
def split_instructions(
    instructions: Instructions, *, test: float = 0.1, seed: int = 0
) -> tuple[Instructions, Instructions]:
    """Split instructions at random into those to train on and those to test with.

    Args:
        instructions: at least two.
        test: share of the test, above 0 and below 1; at least one example on either side.
        seed: of the split.

    Raises:
        ValueError: for another share, or a single example.
    """
    count = len(instructions.examples)
    if not 0 < test < 1 or count < 2:
        raise ValueError(f"expected a share above 0 and below 1 of at least two examples, got {test} of {count}")
    order = np.random.default_rng(seed).permutation(count)
    first = min(max(1, round(test * count)), count - 1)
    return instructions.take(sorted(order[first:])), instructions.take(sorted(order[:first]))
