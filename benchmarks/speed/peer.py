"""Peers as processes: each a worker in an environment of its own, commanded to train one round at a time."""

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "peers"
ENVIRONMENTS = {
    "drjax": "drjax",
    "fedjax": "fedjax",
    "pfl": "pfl",
    "flower": "flower",
    "torch": "torch",
    "torch_vmap": "torch",
}
PACKAGES = {"drjax": "drjax", "fedjax": "fedjax", "pfl": "pfl", "flower": "flwr", "torch": "torch"}


class PeerError(RuntimeError):
    """Why a peer gives no number."""


class Peer:
    """One peer on one workload."""

    def __init__(
        self, name: str, environments: Path, workload: Path, folder: Path, *, patience: float, double: bool = False
    ) -> None:
        """Start the worker and wait until it has read the workload.

        Args:
            name: a key of `ENVIRONMENTS`.
            environments: the folder that `peers/setup.sh` filled.
            workload: written by `workloads.export_workload`.
            folder: for what the worker writes.
            patience: seconds that an answer may take.
            double: let JAX compute in float64, which the workload is written in.

        Raises:
            PeerError: if the environment is missing or the worker dies.
        """
        python = environments / ENVIRONMENTS[name] / "bin" / "python"
        if not python.exists():
            raise PeerError(f"not installed: run benchmarks/speed/peers/setup.sh {environments} {ENVIRONMENTS[name]}")
        self.name, self.patience, self.saved = name, patience, folder / f"{name}.npz"
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the worker
        threads = {v: str(len(os.sched_getaffinity(0))) for v in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        quiet = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1" if double else "0", "PYTHONPATH": str(HERE)}
        command = [str(python), str(HERE / f"{name}_worker.py"), str(workload), str(self.saved)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | threads | quiet,
            start_new_session=True,
        )
        self.unread = b""
        try:
            self.answer()
        except PeerError:
            self.close()
            raise

    def ask(self, command: str) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(command.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise PeerError(self.last_words()) from error
        answer = self.answer()
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def answer(self) -> dict[str, Any]:
        """Read the next line of JSON; what libraries print in between is passed over."""
        until = time.monotonic() + self.patience
        while True:
            try:
                answer = json.loads(self.line(until))
            except ValueError:
                continue
            if isinstance(answer, dict):
                return answer

    def line(self, until: float) -> bytes:
        """Read one line, or raise `PeerError` when the time is up."""
        stdout = self.process.stdout
        assert stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while b"\n" not in self.unread:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise PeerError(f"no answer within {self.patience:.0f} s")
                part = os.read(stdout.fileno(), 65536)
                if not part:
                    raise PeerError(self.last_words())
                self.unread += part
        line, _, self.unread = self.unread.partition(b"\n")
        return line

    def last_words(self) -> str:
        """Return the last line that the worker wrote to its standard error."""
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        return f"the worker ended: {lines[-1] if lines else 'no message'}"

    def values(self) -> dict[str, np.ndarray]:
        """Return what the latest round trained."""
        self.ask("save")
        with np.load(self.saved) as stored:
            return {name: stored[name] for name in stored.files}

    def close(self) -> None:
        """End the worker, and with it what it started."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.errors.close()


def peer_versions(environments: Path, names: list[str]) -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    found = {}
    for name in (name for name in names if name in ENVIRONMENTS):
        listed = environments / ENVIRONMENTS[name] / "versions.txt"
        if listed.exists():
            pins = dict(line.split("==") for line in listed.read_text().splitlines() if line.count("==") == 1)
            package = PACKAGES[ENVIRONMENTS[name]]
            found[package] = pins.get(package, "unknown")
    return found
