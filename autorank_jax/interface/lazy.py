"""Names that a package imports when they are first asked for, so that whoever needs one of them does not load all.

A package keeps its imports under `if TYPE_CHECKING:`, where type checkers look, and gives them to `lazy` in its `else`.
The idea is that of scientific Python's SPEC 1 (lazy loading of submodules and functions) and PEP 562.
"""

import ast
import importlib
from collections.abc import Callable
from typing import Any


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` of a package from the imports in its `if TYPE_CHECKING:`.

    Args:
        package: its `__name__`; its source must be there.

    Returns:
        Both functions. The first imports a name from where it is written, once; and a module of the package itself.

    Source: PEP 562; https://scientific-python.org/specs/spec-0001.
    """
    module = importlib.import_module(package)  # itself, whose import goes on
    homes = _homes(module.__spec__.loader.get_source(package))  # type: ignore[union-attr]
    inner = {home.removeprefix(f"{package}."): package for home in homes.values() if home.startswith(f"{package}.")}
    homes = inner | homes  # as after an import of all

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] == package:
            value = importlib.import_module(f"{package}.{name}")
        else:
            value = getattr(__import__(homes[name], fromlist=[name]), name)
        setattr(module, name, value)
        return value

    return get, lambda: sorted({*vars(module), *homes})


def _homes(source: str) -> dict[str, str]:
    """Return the names that a source imports where it is type-checked alone, and the module of each."""
    checked = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    imports = [node for block in checked if ast.unparse(block.test) == "TYPE_CHECKING" for node in block.body]
    return {alias.name: str(n.module) for n in imports if isinstance(n, ast.ImportFrom) for alias in n.names}
