"""Checkpoints: any pytree of arrays in a folder, whole or not at all, and refused where it is not what was asked for.

A checkpoint is a folder `step_00000012` with the arrays as Orbax writes them and `about.json`: the format's number, the
configuration, the name, shape and type of every array, and the checksum of every file. It is built under a hidden name
and renamed when all of it is on the disk, so that a process killed at any moment leaves the checkpoints before it.
"""

import hashlib
import importlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from autorank_jax.interface import checked
from autorank_jax.types import Array, PyTree

__all__ = ["About", "CheckpointError", "Restored", "read_about", "restore_state", "save_state", "saved_steps"]

FORMAT = 1
"""Number of the layout of a checkpoint. A reader refuses a higher one."""

_ABOUT, _ARRAYS, _HIDDEN = "about.json", "arrays", ".saving-"
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, newer than this package, or of something else. The message is one line."""


class About(NamedTuple):
    """What a checkpoint says about itself."""

    step: int
    config: Mapping[str, Any]
    extra: Any  # whatever JSON was saved beside the arrays


class Restored(NamedTuple):
    """What a checkpoint held."""

    state: PyTree
    about: About


@checked
def save_state(
    folder: str | Path,
    state: PyTree,
    *,
    step: int,
    config: Mapping[str, Any] | None = None,
    extra: Any = None,
    keep: int = 3,
) -> Path:
    """Save a pytree of arrays, such as `(key, State, History)`, as the checkpoint of a step.

    Args:
        folder: of all checkpoints of a run; is made if needed.
        state: any pytree of arrays; random keys too.
        step: number of the checkpoint, ≥ 0, usually the rounds done. One that exists is replaced.
        config: JSON that says what the state belongs to; `restore_state` refuses another one.
        extra: JSON to keep beside the arrays.
        keep: how many of the latest checkpoints stay, ≥ 1.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: for a step or a number to keep that is out of range, or what JSON does not know.
        CheckpointError: if the folder cannot be written.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"expected step >= 0 and keep >= 1, got step={step}, keep={keep}")
    folder = Path(folder).expanduser().absolute()
    leaves = [_describe(path, leaf) for path, leaf in _named(state)]
    about = {"format": FORMAT, "step": step, "config": config or {}, "extra": extra, "leaves": leaves}
    target, hidden = step_folder(folder, step), folder / f"{_HIDDEN}{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_HIDDEN}*"):
            shutil.rmtree(left)
        _write(hidden, about, [_values(leaf) for _, leaf in _named(state)])
        if target.exists():
            target.replace(folder / f"{_HIDDEN}replaced")
        hidden.replace(target)
        _sync(folder)
        for old in [folder / f"{_HIDDEN}replaced", *(step_folder(folder, s) for s in saved_steps(folder)[:-keep])]:
            if old.exists():
                shutil.rmtree(old)
    except OSError as error:
        raise CheckpointError(f"expected to write a checkpoint to {folder}, got: {error.strerror or error}") from error
    return target


@checked
def restore_state(
    folder: str | Path, like: PyTree, *, step: int | None = None, config: Mapping[str, Any] | None = None
) -> Restored:
    """Restore a pytree of arrays, bit for bit, onto the devices where `like` has them.

    Args:
        folder: that `save_state` was given.
        like: a pytree of the same structure, shapes and types, such as the state before the first round.
        step: which checkpoint; the latest where None.
        config: what the state must belong to; not compared where None.

    Returns:
        The state, and what the checkpoint says about itself.

    Raises:
        CheckpointError: if there is none, it is damaged, of a newer format, of another configuration, or holds other
            arrays than `like`; the difference is named.
    """
    path = _find(folder, step)
    content = _read(path)
    _compare("configuration", config, content["config"], path)
    wanted = [(_describe(name, leaf), leaf) for name, leaf in _named(like)]
    _compare("arrays", _by_name([about for about, _ in wanted]), _by_name(content["leaves"]), path)
    with _orbax() as checkpointer:
        held = checkpointer.restore(path / _ARRAYS) if any(map(_count, content["leaves"])) else {}
    number = {leaf["name"]: str(place) for place, leaf in enumerate(content["leaves"])}
    leaves = [_revive(held.get(number[about["name"]]), about, leaf) for about, leaf in wanted]
    return Restored(jax.tree.unflatten(jax.tree.structure(like), leaves), _about(content))


@checked
def read_about(folder: str | Path, *, step: int | None = None, config: Mapping[str, Any] | None = None) -> About:
    """Read what a checkpoint says about itself, and check it as `restore_state` does.

    Args:
        folder: that was given to `save_state`.
        step: of the checkpoint; the last where None.
        config: what the configuration must be; anything where None.

    Raises:
        CheckpointError: if there is none, it is damaged, of a newer format, or of another configuration.
    """
    path = _find(folder, step)
    content = _read(path)
    _compare("configuration", config, content["config"], path)
    return _about(content)


@checked
def saved_steps(folder: str | Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, in ascending order.

    Args:
        folder: that was given to `save_state`; one that does not exist has none.
    """
    folder = Path(folder).expanduser()
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def _about(content: Mapping[str, Any]) -> About:
    return About(content["step"], content["config"], content["extra"])


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return folder / f"step_{step:08d}"


def _find(folder: str | Path, step: int | None) -> Path:
    folder = Path(folder).expanduser().absolute()
    steps = saved_steps(folder)
    if not steps:
        raise CheckpointError(f"expected checkpoints in {folder}, got none")
    if step is not None and step not in steps:
        raise CheckpointError(f"expected a checkpoint of step {step} in {folder}, got steps {steps}")
    return step_folder(folder, steps[-1] if step is None else step)


def _named(tree: PyTree) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path), leaf


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _values(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    values = _values(leaf)
    if values.dtype.kind in "OUSMm":
        raise ValueError(f"expected arrays of numbers to save, got {type(leaf).__name__} at {name}; use extra= for it")
    kind = f"key<{jax.random.key_impl(leaf)}>" if _is_key(leaf) else str(values.dtype)
    return {"name": name, "shape": list(values.shape), "dtype": kind}


def _count(leaf: Mapping[str, Any]) -> int:
    return int(np.prod(leaf["shape"], dtype=np.int64))


def _write(target: Path, about: Mapping[str, Any], values: Iterable[np.ndarray]) -> None:
    """Write one checkpoint and see to it that it is on the disk."""
    text = json.dumps(about, allow_nan=False)  # before anything is written: it may refuse
    target.mkdir()
    arrays = {str(number): np.atleast_1d(leaf) for number, leaf in enumerate(values) if leaf.size}
    if arrays:  # Orbax refuses arrays without elements
        with _orbax() as checkpointer:
            checkpointer.save(target / _ARRAYS, arrays)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    sums = {path.relative_to(target).as_posix(): _checksum(path.read_bytes()) for path in files}
    content = {"content": json.loads(text) | {"files": sums}}
    sealed = content | {"checksum": _seal(content["content"])}
    (target / _ABOUT).write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
    for path in (*files, target / _ABOUT):
        _sync(path)
    for path in (*(p for p in target.rglob("*") if p.is_dir()), target):
        _sync(path)


def _orbax() -> Any:
    """Return Orbax for this process alone: arrays are whole in each, and only one of them may be writing.

    It takes a sixth of the time of all imports, so it is loaded when something is saved.
    """
    ocp = importlib.import_module("orbax.checkpoint")
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{me}")
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _seal(content: Any) -> str:
    return _checksum(json.dumps(content, sort_keys=True).encode())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    """Read `about.json` and check the format's number and every file."""
    cause = f"delete {path} to go on from the checkpoint before it"
    try:
        sealed = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
        content, checksum = sealed["content"], sealed["checksum"]
        version = content["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        remedy = "" if isinstance(error, PermissionError) else f"; {cause}"
        raise CheckpointError(f"expected a whole checkpoint, got {path / _ABOUT} that does not read{remedy}") from error
    if version > FORMAT:
        raise CheckpointError(
            f"expected a checkpoint of format {FORMAT} or older, got format {version} in {path}; "
            "probably written by a newer autorank-jax: upgrade"
        )
    if _seal(content) != checksum:
        raise CheckpointError(f"expected a whole checkpoint, got a wrong checksum of {path / _ABOUT}; {cause}")
    for name, expected in content["files"].items():
        if not (path / name).is_file() or _checksum((path / name).read_bytes()) != expected:
            state = "a wrong checksum of" if (path / name).is_file() else "no"
            raise CheckpointError(f"expected a whole checkpoint, got {state} {path / name}; {cause}")
    return dict(content)


def _by_name(leaves: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {leaf["name"]: f"{leaf['dtype']}{leaf['shape']}" for leaf in leaves}


def _compare(what: str, expected: Mapping[str, Any] | None, got: Mapping[str, Any], path: Path) -> None:
    """Name what differs between what was asked for and what a checkpoint holds."""
    if expected is None:
        return
    expected = json.loads(json.dumps(expected))
    differing = [name for name in (*expected, *(got.keys() - expected.keys())) if _at(expected, name) != _at(got, name)]
    if differing:
        shown = "; ".join(f"{n}: expected {_at(expected, n)}, got {_at(got, n)}" for n in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointError(f"expected a checkpoint of the same {what}, got another in {path}; {shown}{more}")


def _at(content: Mapping[str, Any], name: str) -> str:
    return json.dumps(content[name]).strip('"') if name in content else "nothing"


def _revive(values: Any, about: Mapping[str, Any], like: Any) -> Array:
    """Put restored values where `like` has its own."""
    shape, key = tuple(about["shape"]), _is_key(like)
    dtype = np.dtype("uint32") if key else np.dtype(jnp.dtype(about["dtype"]))
    whole = np.zeros(shape, dtype) if values is None else np.asarray(values).astype(dtype, copy=False).reshape(shape)
    placed = jax.device_put(whole, None if key or not isinstance(like, jax.Array) else like.sharding)
    return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(like)) if key else placed
