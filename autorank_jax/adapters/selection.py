"""Which layers get adapters and which parameters are trained whole: patterns and predicates over paths."""

import warnings
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax

from autorank_jax.interface.kinds import is_whole
from autorank_jax.types import PyTree, Trainable

Where = str | tuple[str, ...] | Callable[[str, Any], bool]
"""Glob patterns over paths (`*` crosses `/`), or a predicate `(path, layer) -> bool`."""

MaxRank = int | Mapping[str, int]
"""One maximum rank, or one by path pattern, of which the first that matches counts."""


def matches(path: str, pattern: str) -> bool:
    """Say whether a path matches a glob; `*/bias` takes the `bias` of the model itself too."""
    return fnmatchcase(path, pattern) or fnmatchcase(f"/{path}", pattern)


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
        if not is_whole(rank) or rank < 1:
            cause = ", probably to adapt nothing: max_rank={}" if rank == 0 else ""
            raise ValueError(f"expected maximum ranks as whole numbers >= 1, got {rank!r} for {pattern!r}{cause}")
        _check_match("max_rank", pattern, chosen, others)
    ranks = {}
    for path in sorted(chosen):
        matching = [rank for pattern, rank in patterns.items() if matches(path, pattern)]
        if matching:
            ranks[path] = int(matching[0])
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
    return [path for path in layers if any(matches(path, pattern) for pattern in globs)]


def _check_match(argument: str, pattern: str, paths: Collection[str], others: Mapping[str, Any]) -> None:
    if any(matches(path, pattern) for path in paths):
        return
    unfit = {path: layer for path, layer in others.items() if matches(path, pattern)}
    if unfit:
        raise ValueError(
            f"expected {argument} patterns of layers that can be adapted, got {pattern!r}, which matches "
            f"{_listed(unfit)}: train these whole through train_dense, or give an NNX model adapters for them by "
            f"adapters.with_qwix; the candidates are {sorted(paths)}"
        )
    raise ValueError(
        f"expected {argument} patterns that match a layer, got {pattern!r}: the candidates are {sorted(paths)}"
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
        if pattern != optional and not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"expected train_dense patterns that match a parameter that is not adapted, got {pattern!r}: the "
                f"candidates are {sorted(names)}"
            )
    return {name for name in names if any(matches(name, pattern) for pattern in globs)}


def dense_names(dense: PyTree) -> list[str]:
    """Return the path of every dense parameter, in the order of its leaves."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(dense)]


def choose_parts(trainable: Trainable, patterns: tuple[str, ...]) -> tuple[set[str], set[str]]:
    """Return the paths of the adapters and of the dense parameters that patterns match.

    Args:
        trainable: what clients train.
        patterns: globs; `"head/*"` takes the adapter of `head` too, whose factors are `head/lora_a` and `head/lora_b`.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    adapters, dense, names = set(), set(), dense_names(trainable.dense)
    for pattern in patterns:
        layers = {p for p in trainable.adapters if matches(p, pattern) or matches(f"{p}/lora_a", pattern)}
        parameters = {name for name in names if matches(name, pattern)}
        if not layers and not parameters:
            raise ValueError(
                f"expected patterns that match an adapter or a parameter trained whole, got {pattern!r}: there are "
                f"{sorted({*trainable.adapters, *names})}"
            )
        adapters |= layers
        dense |= parameters
    return adapters, dense


def leave_out(trainable: Trainable, patterns: tuple[str, ...], *, invert: bool = False) -> Trainable:
    """Return what patterns do not match, or with `invert` what they match; other dense parameters become None."""
    adapters, dense = choose_parts(trainable, patterns)
    leaves, structure = jax.tree.flatten(trainable.dense)
    kept = [
        leaf if (name in dense) == invert else None
        for name, leaf in zip(dense_names(trainable.dense), leaves, strict=True)
    ]
    return Trainable(
        {path: adapter for path, adapter in trainable.adapters.items() if (path in adapters) == invert},
        jax.tree.unflatten(structure, kept),
    )


def kind_of(layer: Any, known: Collection[type]) -> type | None:
    """Return the known type that a layer is, or that it derives from without another call; None for all others.

    Args:
        layer: any.
        known: types of layers that can be adapted.
    """
    base = next((one for one in type(layer).__mro__ if one in known), None)
    alike = all(getattr(type(layer), name, None) is getattr(base, name, None) for name in ("__call__", "attend"))
    return base if alike else None


def why_unadapted(
    layers: Mapping[str, Any], matrices: Collection[str], known: tuple[type, ...], *, wanted: tuple[MaxRank, Where]
) -> dict[str, str]:
    """Return by path why layers that hold matrices have no adapter, and warn of those that the patterns take.

    Args:
        layers: by path.
        matrices: paths of their frozen parameters of two axes or more.
        known: types of layers that can be adapted.
        wanted: `max_rank` and `where`.
    """
    max_rank, where = wanted
    patterns = tuple(max_rank) if isinstance(max_rank, Mapping) else ("*",)
    globs = () if callable(where) else (where,) if isinstance(where, str) else where
    reasons, surprising = {}, []
    for path in sorted({name.rpartition("/")[0] for name in matrices}):
        layer = layers.get(path)
        taken = all(any(matches(path, glob) for glob in choice) for choice in (patterns, globs))
        if kind_of(layer, known):
            reasons[path] = "no pattern takes it"
            continue
        reasons[path] = _reason(layer, known)
        if taken and path and callable(layer) and not any(other.startswith(f"{path}/") for other in layers):
            surprising.append(path)
    if surprising:
        said = "; ".join(f"{path!r} because {reasons[path]}" for path in surprising[:5])
        more = f" and {len(surprising) - 5} more" if len(surprising) > 5 else ""
        warnings.warn(
            f"layers that hold matrices are frozen without an adapter: {said}{more}; leave them out of `where`, or "
            "train them whole through train_dense, or give an NNX model adapters for them by adapters.with_qwix; "
            "print(task.report) shows every layer",
            stacklevel=3,
        )
    return reasons


def _reason(layer: Any, known: tuple[type, ...]) -> str:
    if hasattr(layer, "ndim"):
        return f"it has {layer.ndim} axes, and a function is given adapters on matrices alone"
    name = type(layer).__name__
    base = next((kind.__name__ for kind in known if isinstance(layer, kind)), None)
    if base:
        return f"{name} is a subclass of {base} with a call of its own"
    carried = ": LoRA that a model carries is trained by task_from_lora_params" * ("lora" in name.lower())
    return f"{name} is no layer that can be adapted{carried}" if layer is not None else "it is not called as a layer"
