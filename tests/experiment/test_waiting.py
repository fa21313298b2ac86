"""Waiting for arrays: failures and signals come through."""

import os
import signal
import threading

import jax.numpy as jnp
import pytest

from autorank_jax.experiment.waiting import wait_for


class Late:
    """Something that is there when it is let go."""

    def __init__(self):
        self.there = threading.Event()

    def block_until_ready(self):
        assert self.there.wait(60)
        return self


def test_arrays_and_failures_come_through():
    assert float(wait_for({"a": jnp.ones(())})["a"]) == 1

    class Broken:
        def block_until_ready(self):
            raise ZeroDivisionError("broken")

    with pytest.raises(ZeroDivisionError, match="broken"):
        wait_for(Broken())


def test_a_signal_ends_the_waiting():
    late = Late()
    sender = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    sender.start()
    with pytest.raises(KeyboardInterrupt):
        wait_for(late)
    late.there.set()
