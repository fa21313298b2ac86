"""Paths as people write them."""

from pathlib import Path


class PathError(ValueError):
    """A path that leads nowhere. The message is one line."""


def user_path(path: str | Path) -> Path:
    """Return a path in which `~` or `~name` at the beginning has become that user's home folder.

    Raises:
        PathError: if there is no such user, or none whose home is known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise PathError(f"expected a path, got {str(path)!r}, of whose user no home folder is known") from error
