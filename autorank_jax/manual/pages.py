"""The guides as text: their order, their blocks, and the public names that they show."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import autorank_jax

HERE = Path(__file__).parent
_INLINE = re.compile(r"(?<![\[}])`((?:ar\.)?([A-Za-z_][\w.]*\w)(?:\([^`<>]*\))?)`")
_FENCED = re.compile(r"(^```.*?^```$)", flags=re.MULTILINE | re.DOTALL)


def guides() -> list[Path]:
    """Return the guides, in the order in which they are read."""
    listed = re.findall(r"^guides/\S+$", (HERE / "index.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [HERE / f"{name}.md" for name in listed]


def code_blocks(page: Path) -> list[str]:
    """Return the blocks of a page that run, in order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```\{code-cell\}[^\n]*\n(?:---\n.*?---\n|:\S[^\n]*\n)*(.*?)^```$", text, flags=re.M | re.S)


def names_in(code: str, known: Mapping[int, str]) -> list[str]:
    """Return the names that code reaches from the package, in order of appearance.

    Args:
        code: Python; lines that begin with `!` are commands.
        known: names by the `id` of what they are names of.

    Raises:
        AttributeError: for a name that a module does not have.
    """
    tree = ast.parse("\n".join(line for line in code.splitlines() if not line.startswith("!")))
    given = dict(imported for node in ast.walk(tree) for imported in _imported(node))
    reached = (_reached(node, given) for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name))
    return list(dict.fromkeys(known[id(value)] for value in reached if id(value) in known))


def _imported(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """Yield what an import of the package gives, by name."""
    if isinstance(node, ast.Import):
        for one in node.names:
            if one.name.split(".")[0] == "autorank_jax":
                yield one.asname or "autorank_jax", importlib.import_module(one.name if one.asname else "autorank_jax")
    elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "autorank_jax":
        for one in node.names:
            yield one.asname or one.name, getattr(importlib.import_module(str(node.module)), one.name)


def _reached(node: ast.expr, given: Mapping[str, Any]) -> Any:
    """Return what `a.b.c` is, or None where it is of no module."""
    if isinstance(node, ast.Name):
        return given.get(node.id)
    room = _reached(node.value, given) if isinstance(node, ast.Attribute) else None
    return getattr(room, node.attr) if isinstance(node, ast.Attribute) and inspect.ismodule(room) else None


def names_in_prose(text: str, known: Mapping[int, str]) -> list[str]:
    """Return the names that inline code outside of blocks begins with, such as `ar.topsis(x)`.

    Args:
        text: of a guide.
        known: names by the `id` of what they are names of.
    """
    found = (_target(one[2], known) for prose in _FENCED.split(text)[::2] for one in _INLINE.finditer(prose))
    return list(dict.fromkeys(name for name in found if name))


def _target(name: str, known: Mapping[int, str]) -> str | None:
    try:
        return known.get(id(attrgetter(name.removeprefix("ar."))(autorank_jax)))
    except AttributeError:
        return None


def shown_in(known: Mapping[int, str]) -> dict[str, list[str]]:
    """Return the guides that show a name, in reading order, by name.

    Args:
        known: names by the `id` of what they are names of.
    """
    found: dict[str, list[str]] = {}
    for guide in guides():
        in_blocks = names_in("\n".join(code_blocks(guide)), known)
        for name in dict.fromkeys([*in_blocks, *names_in_prose(guide.read_text(encoding="utf-8"), known)]):
            found.setdefault(name, []).append(guide.stem)
    return found


def linked(text: str, code: str, known: Mapping[int, str]) -> str:
    """Return a guide whose names lead to the reference: those in the prose, and those of its blocks in a last line.

    Args:
        text: of the guide.
        code: of its blocks.
        known: names by the `id` of what they are names of.
    """

    def link(found: re.Match[str]) -> str:
        target = _target(found[2], known)
        return f"{{py:obj}}`{found[1]} <{target}>`" if target else found[0]

    parts = _FENCED.split(text)
    parts[::2] = [_INLINE.sub(link, prose) for prose in parts[::2]]
    names = ", ".join(f"{{py:obj}}`{name.rpartition('.')[2]} <{name}>`" for name in names_in(code, known))
    return "".join(parts) + (f"\n---\nIn the reference: {names}.\n" if names else "")
