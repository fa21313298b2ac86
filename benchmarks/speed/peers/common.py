"""What every peer's worker shares: the exported workload, and the conversation with `rounds.py`. NumPy alone.

A worker is started with the exported workload (`.npz`) and the path for its results. It answers each line of its
standard input with one line of JSON: `run` trains one round from the start values and says how many seconds that took,
`save` writes the trained values. So all competitors can take turns in one benchmark and only one works at a time.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

import numpy as np

CORES = len(os.sched_getaffinity(0))
Values = dict[str, Any]
"""Arrays of whatever framework by name: `lora_a:PATH`, `lora_b:PATH`, `dense:NAME`."""


class Workload(NamedTuple):
    """A round as `workloads.export_workload` wrote it."""

    name: str
    network: dict[str, Any]
    inputs: np.ndarray  # (n, ...) float32
    targets: np.ndarray  # (n,)
    start: np.ndarray  # (clients,) first column of a client in `order`
    size: np.ndarray  # (clients,)
    order: np.ndarray  # (epochs, n) example numbers in the order in which clients see them
    trainable: dict[str, np.ndarray]  # see `Values`, at full rank
    frozen: dict[str, np.ndarray]  # `kernel:PATH`, `rest:NAME`
    ranks: dict[str, np.ndarray]  # by adapter path, (clients,)
    batch_size: int
    learning_rate: float

    @property
    def clients(self) -> int:
        """Return how many clients take part."""
        return len(self.size)

    @property
    def steps(self) -> np.ndarray:
        """Return each client's steps, `(clients,)`."""
        return len(self.order) * -(-self.size // self.batch_size)


def load(path: str) -> Workload:
    """Read an exported workload; images become floats in [0, 1] once, here, outside of what is timed."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    about = json.loads(str(arrays.pop("about")))
    inputs = arrays["inputs"]
    return Workload(
        name=about["name"],
        network=about["network"],
        inputs=inputs.astype(np.float32) / np.float32(255) if inputs.dtype == np.uint8 else inputs,
        targets=arrays["targets"].astype(np.int64),
        start=arrays["start"],
        size=arrays["size"],
        order=arrays["order"],
        trainable={name: array for name, array in arrays.items() if name.startswith(("lora_a:", "lora_b:", "dense:"))},
        frozen={name: array for name, array in arrays.items() if name.startswith(("kernel:", "rest:"))},
        ranks={name.partition(":")[2]: array for name, array in arrays.items() if name.startswith("ranks:")},
        batch_size=about["batch_size"],
        learning_rate=about["learning_rate"],
    )


def seen(workload: Workload, client: int) -> np.ndarray:
    """Return the example numbers that a client sees in a round, epoch after epoch, `(epochs, size)`."""
    first = workload.start[client]
    return workload.order[:, first : first + workload.size[client]]


def batches(workload: Workload, client: int) -> list[np.ndarray]:
    """Return the example numbers of each of a client's steps; the last of an epoch may be short."""
    step = workload.batch_size
    return [epoch[i : i + step] for epoch in seen(workload, client) for i in range(0, len(epoch), step)]


def padded_batches(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Return example numbers and weights, `(clients, steps, batch_size)`, padded to the longest client."""
    shape = (workload.clients, int(workload.steps.max()), workload.batch_size)
    examples, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    for client in range(workload.clients):
        for step, batch in enumerate(batches(workload, client)):
            examples[client, step, : len(batch)] = batch
            weights[client, step, : len(batch)] = 1
    return examples, weights


def truncated(workload: Workload, client: int) -> dict[str, np.ndarray]:
    """Return the start of one client, its adapters cut to its rank."""
    cut = {}
    for name, value in workload.trainable.items():
        kind, _, path = name.partition(":")
        if kind == "dense":
            cut[name] = value
        else:
            rank = workload.ranks[path][client]
            cut[name] = value[:, :rank] if kind == "lora_a" else value[:rank]
    return cut


def masks(workload: Workload) -> dict[str, np.ndarray]:
    """Return which values each client owns, `(clients, ...)` of ones and zeros that broadcast against the values."""
    owned = {}
    for name, value in workload.trainable.items():
        kind, _, path = name.partition(":")
        if kind == "dense":
            owned[name] = np.ones((workload.clients, *[1] * value.ndim), np.float32)
            continue
        width = value.shape[1 if kind == "lora_a" else 0]
        mask = (np.arange(width) < workload.ranks[path][:, None]).astype(np.float32)
        owned[name] = mask[:, None, :] if kind == "lora_a" else mask[:, :, None]
    return owned


def owned_weights(workload: Workload) -> dict[str, np.ndarray]:
    """Return RBLA's denominators: the examples of the owners of each value."""
    size = workload.size.astype(np.float32)
    return {name: np.tensordot(size, mask, axes=1) for name, mask in masks(workload).items()}


def serve(
    run: Callable[[], Values],
    export: Callable[[Values], dict[str, np.ndarray]],
    prepare: Callable[[Callable[[], Values]], None] | None = None,
) -> None:
    """Answer commands until the standard input ends.

    Args:
        run: trains one round from the start values and waits for the result.
        export: turns that result into NumPy arrays at full rank.
        prepare: called with `run` before the first answer.
    """
    out, latest = take_stdout(), None
    if prepare is not None:
        prepare(run)
    say(out, {"ready": True})
    for command in map(str.strip, sys.stdin):
        try:
            if command == "run":
                begin = time.perf_counter()
                latest = run()
                answer: dict[str, Any] = {"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}
            else:
                np.savez(sys.argv[2], **export(latest))
                answer = {"saved": sys.argv[2]}
        except Exception as error:  # whatever went wrong is the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        say(out, answer)


def take_stdout() -> TextIO:
    """Keep the standard output for answers; what libraries print goes to the standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def say(out: TextIO, answer: dict[str, Any]) -> None:
    """Write one answer."""
    out.write(json.dumps(answer) + "\n")
    out.flush()


def peak_bytes() -> int:
    """Return the most memory this process ever held; that of processes which it started is not in it."""
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
