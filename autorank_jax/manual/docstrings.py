"""Docstrings are Markdown with Google's sections; Sphinx reads reStructuredText."""

import inspect
import re
from typing import Any

_FENCE = re.compile(r"^(\s*)```(\w*)\s*$")
_LINK = re.compile(r"\[([^\]]+)\]\((https?://[^)]+)\)")
_CODE = re.compile(r"(?<![`:\\\w])`([^`]+)`(?!`)")
_PLURAL = re.compile(r"(``[^`]+``)(?=\w)")  # `Array`s
_SHORTER = (
    (
        r"~jax\S*\.Array \| ~numpy\.ndarray \| ~numpy\.bool \| ~numpy\.number \| bool \| int \| float \| complex",
        "ArrayLike",
    ),
    (r"~numpy\._typing\.[^,=()]*?_NestedSequence\[[\w |]+\]", "ArrayLike"),
    (r"~jax\S*\._jax\.Array", "~jax.Array"),
    (r"<function <lambda>[^>]*>", "..."),  # with what is no expression Sphinx gives up on the whole signature
    (r"<function ([\w.]+)[^>]*>", r"\1"),
)
_FIELD = re.compile(r"^    (\w+): [^#\n]*(?:#\s*(.*))?$", flags=re.MULTILINE)


def to_rst(lines: list[str]) -> list[str]:
    """Turn fenced blocks, tables and links of Markdown into reStructuredText, and leave everything else.

    Args:
        lines: of a docstring.
    """
    out: list[str] = []
    fence = None
    for line in lines:
        found = _FENCE.match(line)
        if found and fence is None:
            fence = found[1]
            out += ["", f"{fence}.. code-block:: {found[2] or 'text'}", ""]
        elif found:
            fence = None
            out.append("")
        elif fence is not None:
            out.append(f"    {line}" if line.strip() else "")
        else:
            code = _PLURAL.sub(r"\1\\ ", _CODE.sub(r"``\1``", line))
            _add(out, _LINK.sub(r"`\1 <\2>`__", code))
    return out


def _add(out: list[str], line: str) -> None:
    """Add a line; lists begin after a blank line, and rows of a table are shown as they are."""
    if line.startswith("|"):
        if not (out and out[-1].startswith("    |")):
            out += ["", "::", ""]
        out.append(f"    {line}")
        return
    indent = len(line) - len(line.lstrip())
    begins = line.lstrip().startswith(("- ", "* ")) and out and out[-1].strip()
    if begins and not out[-1].lstrip().startswith(("- ", "* ")) and len(out[-1]) - len(out[-1].lstrip()) <= indent:
        out.append("")
    out.append(line)


def field_comments(cls: type) -> dict[str, str]:
    """Return what the comment behind each field of a NamedTuple or dataclass says."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    return {name: comment.strip() for name, comment in _FIELD.findall(source) if comment}


def process(what: str, obj: Any, lines: list[str]) -> None:
    """Rewrite the docstring of something (a "class", "data" …) in place."""
    if what == "data" and "\n".join(lines).strip() == (inspect.getdoc(type(obj)) or "").strip():
        lines[:] = []  # of its type, not its own
    lines[:] = to_rst(lines)
    if what == "class":
        comments = field_comments(obj)
        fields = [
            f":ivar {field}: {_escaped(comments[field])}" for field in getattr(obj, "_fields", ()) if field in comments
        ]
        lines += ["", *fields, ""] if fields else []


def shorten(signature: str | None, returns: str | None) -> tuple[str | None, str | None]:
    """Write `ArrayLike` for the types that it stands for."""
    return _shortened(signature), _shortened(returns)


def _shortened(text: str | None) -> str | None:
    for long, short in _SHORTER:
        text = text and re.sub(long, short, text)
    return text


def skip(obj: Any) -> bool | None:
    """Leave out the fields of a NamedTuple, which the class itself lists with their comments."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("*", "\\*").replace("|", "\\|").replace("_ ", "\\_ ")
