"""From conversations to tokens: chat templates, and which tokens are a model's own words.

A model brings its template, Jinja source in `tokenizer_config.json`. Where there is none, or for `template="plain"`:

    <bos>System: ...
    User: ...
    Assistant: ...<eos>

with a line for each turn; what the assistant says, and the token that ends it, is what is learnt. A
template gets what `transformers` gives it but for additional special tokens and `strftime_now`: with the date of today
every day's run would be another.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, Protocol

from autorank_jax.datasets.instructions import Example, Message
from autorank_jax.interface import describe

Piece = tuple[str, bool]  # a text, and whether it is learnt


class Tokenizer(Protocol):
    """What turns texts into tokens."""

    bos: str  # the token that begins a text, as text; may be empty
    eos: str
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, special tokens only where it spells them out."""


def make_chat(
    tokenizer: Tokenizer, template: Literal["own", "plain"] = "own"
) -> Callable[[Example], tuple[list[int], list[bool]]]:
    """Make the function that turns an example into tokens, and which of them are learnt.

    Args:
        tokenizer: of the model.
        template: "own" is the tokenizer's chat template where it has one; "plain" the format of this module.

    Returns:
        `example -> (ids, learnt)`. It raises `ValueError` where the template cannot render the example.

    Raises:
        ImportError: without the package jinja2, where a chat template needs it.
        ValueError: for another `template`, or one that is no Jinja, and what is no such tokenizer.
    """
    _check_tokenizer(tokenizer)
    if template not in ("own", "plain"):
        raise ValueError(f"expected the template 'own' or 'plain', got {template!r}")
    render = None
    if template == "own" and tokenizer.chat_template:
        render = _compile(tokenizer.chat_template, tokenizer)

    def tokenize(example: Example) -> tuple[list[int], list[bool]]:
        if example.raw:
            prompt, completion = (message.content for message in example.messages)
            pieces = [(tokenizer.bos + prompt, False), (completion + tokenizer.eos, True)]
        elif render is None:
            pieces = _plain(example, tokenizer)
        else:
            pieces = _split(example, render)
        ids: list[int] = []
        learnt: list[bool] = []
        for text, own in pieces:
            tokens = tokenizer.encode(text)
            ids += tokens
            learnt += [own] * len(tokens)
        if not any(learnt):
            raise ValueError("a conversation of whose answers the chat template leaves nothing")
        return ids, learnt

    return tokenize


def _check_tokenizer(tokenizer: Any) -> None:
    """Refuse what lacks anything of a `Tokenizer`."""
    if all(hasattr(tokenizer, name) for name in ("bos", "eos", "chat_template", "encode")):
        return
    cause = ", probably of a model without one: load_causal_lm brings its own" if tokenizer is None else ""
    if hasattr(tokenizer, "tokenizer"):
        cause = ", probably the model in place of its .tokenizer"
    if hasattr(tokenizer, "bos_token") or hasattr(tokenizer, "no_padding"):
        cause = ", probably of another library: load_causal_lm(folder).tokenizer is one"
    raise ValueError(f"expected a tokenizer with bos, eos, chat_template and encode, got {describe(tokenizer)}{cause}")


def _plain(example: Example, tokenizer: Tokenizer) -> list[Piece]:
    pieces = [(tokenizer.bos, False)]
    for number, (role, content) in enumerate(example.messages):
        pieces.append((f"{role.capitalize()}: ", False))
        said = role == "assistant"
        learnt = said and number >= example.asked
        pieces += [(content + tokenizer.eos, learnt), ("\n", False)] if said else [(f"{content}\n", False)]
    return pieces[:-1]  # nothing follows the last answer


def _split(example: Example, render: Callable[[Sequence[Message], bool], str]) -> list[Piece]:
    """Take a rendered conversation apart: what comes before each answer that is learnt, and the answer."""
    pieces: list[Piece] = []
    done, messages = "", example.messages
    for number, message in enumerate(messages):
        if message.role != "assistant" or number < example.asked:
            continue
        before, after = render(messages[:number], True), render(messages[: number + 1], False)
        if not before.startswith(done) or not after.startswith(before):
            raise ValueError("a conversation whose earlier turns the chat template changes, split it into several")
        pieces += [(before.removeprefix(done), False), (after.removeprefix(before), True)]
        done = after
    return pieces


def _compile(source: str, tokenizer: Tokenizer) -> Callable[[Sequence[Message], bool], str]:
    """Compile a chat template as `transformers` does, in Jinja's sandbox: templates are foreign code."""
    try:
        from jinja2 import TemplateError  # noqa: PLC0415  optional
        from jinja2.ext import Extension  # noqa: PLC0415
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "expected the package 'jinja2' for the tokenizer's chat template, got none: pip install "
            "'autorank-jax[text]', or template='plain'"
        ) from error

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    class Generation(Extension):
        """`{% generation %}`, which marks what the assistant says, and changes no text."""

        tags = {"generation"}  # noqa: RUF012  as the library has it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, **{"ensure_ascii": False} | how)
    try:
        compiled = environment.from_string(source)
    except TemplateError as error:
        raise ValueError(f"expected a chat template in Jinja, got {error!s:.100}") from error
    named: dict[str, Any] = {**getattr(tokenizer, "special", {}), "bos_token": tokenizer.bos}
    named |= {"eos_token": tokenizer.eos, "tools": None, "documents": None}

    def render(messages: Sequence[Message], prompt: bool) -> str:
        told = [message._asdict() for message in messages]
        try:
            return compiled.render(messages=told, add_generation_prompt=prompt, **named)
        except Exception as error:  # foreign code may raise anything
            raise ValueError(f"a conversation that the chat template refuses ({error!s:.100})") from error

    return render
