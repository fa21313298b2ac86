"""Compiled programs of `run` and `finetune` in the user's cache folder: a second run compiles little.

JAX runs what it finds there, so the folder must belong to the user alone. Only the command line uses it: importing the
library changes nothing.
"""

import importlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from autorank_jax.cli.terminal import warn
from autorank_jax.interface.paths import PathError, user_path

_MIN_SECONDS = 0.1  # of compilation, from which on a program is kept


class Held(NamedTuple):
    """What a folder of compiled programs holds."""

    programs: int
    bytes: int


def program_folder() -> Path:
    """Return the user's folder of compiled programs, whether it is there or not."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else user_path("~/.cache")) / "autorank_jax" / "programs"


def use_cache() -> str | None:
    """Let JAX keep compiled programs in the user's folder, unless `JAX_COMPILATION_CACHE_DIR` names another.

    Returns:
        Why it cannot, in one line; None where it can.
    """
    jax = importlib.import_module("jax")  # what counts and empties the folder needs none
    if jax.config.jax_compilation_cache_dir:
        return None
    try:
        folder = private_folder(program_folder())
    except (OSError, PathError) as error:
        return f"compiled programs are not kept: {getattr(error, 'strerror', None) or error}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    return None


def keep_programs(*, wanted: bool) -> None:
    """Keep compiled programs for the next run, or say in a line why not; unwanted, neither keep nor look for any."""
    if not wanted:
        importlib.import_module("jax").config.update("jax_enable_compilation_cache", False)
    elif refused := use_cache():
        warn(refused)


def out_of_use() -> str | None:
    """Return why runs do not use the user's folder, in one line; None where they do."""
    if other := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return f"not in use: JAX_COMPILATION_CACHE_DIR names {other}"
    folder = program_folder()
    try:
        if folder.exists():
            private_folder(folder)
    except OSError as error:
        return f"not in use: {error.strerror}"
    return None


def private_folder(folder: Path) -> Path:
    """Make a folder, mode 700, and make sure that nobody else can put anything there.

    Raises:
        PermissionError: if others own it, may write there, or may put another in its place.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    for path in (folder, *folder.parents):
        about = path.lstat() if path == folder else path.stat()
        trusted = not hasattr(os, "geteuid") or about.st_uid in (os.geteuid(), 0)
        sticky = path != folder and about.st_mode & stat.S_ISVTX
        if not stat.S_ISDIR(about.st_mode) or not trusted or (about.st_mode & 0o022 and not sticky):
            raise PermissionError(
                0,
                f"expected {path} as a folder that only its owner can write, got one that others can change; "
                f"chmod go-w {path} mends it, if it is yours",
            )
    return folder


def held() -> Held:
    """Count what the user's folder holds."""
    files = list(_files())
    return Held(sum(path.name.endswith("-cache") for path in files), sum(path.stat().st_size for path in files))


def empty() -> Held:
    """Delete every file of the user's folder; return what it held."""
    before = held()
    for path in _files():
        path.unlink(missing_ok=True)
    return before


def _files() -> Iterator[Path]:
    folder = program_folder()
    if folder.is_dir() and not folder.is_symlink():
        yield from (path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
