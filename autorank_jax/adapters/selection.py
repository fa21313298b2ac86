"""Which layers get adapters and which parameters are trained whole: patterns and predicates over paths."""

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

Where = str | tuple[str, ...] | Callable[[str, Any], bool]
"""Glob patterns over paths (`*` crosses `/`), or a predicate `(path, layer) -> bool`."""

MaxRank = int | Mapping[str, int]
"""One maximum rank, or one by path pattern, of which the first that matches counts."""


def choose_ranks(
    layers: Mapping[str, Any], others: Mapping[str, Any], max_rank: MaxRank, where: Where
) -> dict[str, int]:
    """Return the maximum rank by path of the layers that get an adapter.

    Args:
        layers: the layers that can be adapted, by path.
        others: those that cannot, for error messages.
        max_rank: see `MaxRank`; `{}` adapts nothing.
        where: see `Where`.

    Raises:
        ValueError: if a pattern or the predicate matches nothing, or matches only what cannot be adapted, or if a rank
            is no whole number ≥ 1.
    """
    if isinstance(max_rank, Mapping) and not max_rank:
        return {}
    patterns = dict(max_rank) if isinstance(max_rank, Mapping) else {"*": max_rank}
    chosen = _chosen(layers, others, where)
    for pattern, rank in patterns.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"expected maximum ranks as whole numbers >= 1, got {rank!r} for {pattern!r}")
        _check_match("max_rank", pattern, chosen, others)
    ranks = {}
    for path in sorted(chosen):
        matching = [rank for pattern, rank in patterns.items() if fnmatchcase(path, pattern)]
        if matching:
            ranks[path] = matching[0]
    return ranks


def _chosen(layers: Mapping[str, Any], others: Mapping[str, Any], where: Where) -> list[str]:
    if callable(where):
        chosen = [path for path, layer in layers.items() if where(path, layer)]
        if not chosen:
            raise ValueError(f"expected a predicate `where` that takes some layer, got none of {_listed(layers)}")
        return chosen
    globs = (where,) if isinstance(where, str) else where
    for pattern in globs:
        _check_match("where", pattern, layers, others)
    return [path for path in layers if any(fnmatchcase(path, pattern) for pattern in globs)]


def _check_match(argument: str, pattern: str, paths: Collection[str], others: Mapping[str, Any]) -> None:
    if any(fnmatchcase(path, pattern) for path in paths):
        return
    unfit = {path: layer for path, layer in others.items() if fnmatchcase(path, pattern)}
    if unfit:
        raise ValueError(
            f"expected {argument} patterns of layers that can be adapted, got {pattern!r}, which matches "
            f"{_listed(unfit)}: train these whole through train_dense; the candidates are {sorted(paths)}"
        )
    raise ValueError(
        f"expected {argument} patterns that match a layer, got {pattern!r}, probably a misspelt path: the candidates "
        f"are {sorted(paths)}"
    )


def _listed(layers: Mapping[str, Any], most: int = 20) -> str:
    names = [f"{path!r} ({type(layer).__name__})" for path, layer in sorted(layers.items())]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def choose_parameters(names: Collection[str], patterns: str | tuple[str, ...], *, optional: str = "*/bias") -> set[str]:
    """Return the names of the parameters that are trained whole.

    Args:
        names: of all parameters that are not adapted.
        patterns: globs.
        optional: a pattern that may match nothing, being the default.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    globs = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in globs:
        if pattern != optional and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"expected train_dense patterns that match a parameter, got {pattern!r}, probably a misspelt path or "
                f"the kernel of an adapted layer: the candidates are {sorted(names)}"
            )
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in globs)}
