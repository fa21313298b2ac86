"""Waiting for what a device computes, without being deaf: signals are noticed meanwhile."""

import threading
from typing import TypeVar

import jax

T = TypeVar("T")


def wait_for(tree: T) -> T:
    """Wait until all arrays of a tree are computed.

    `jax.block_until_ready` holds the thread that it is called in, and Python acts on Ctrl-C in the first thread only
    when that is back: after the whole program, which may take hours.

    Args:
        tree: arrays.

    Returns:
        The tree.

    Raises:
        Exception: what computing it raised.
    """
    failures: list[BaseException] = []

    def block() -> None:
        try:
            jax.block_until_ready(tree)
        except BaseException as error:  # raised in the thread that waits
            failures.append(error)

    blocked = threading.Thread(target=block, daemon=True)
    blocked.start()
    blocked.join()
    if failures:
        raise failures[0]
    return tree
