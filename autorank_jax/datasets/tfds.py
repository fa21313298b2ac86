"""Datasets of TensorFlow Datasets, prepared in a process of their own that is watched and can be stopped."""

import importlib.util
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from autorank_jax.datasets.base import Dataset, DatasetError
from autorank_jax.datasets.progress import OnProgress, Progress

WORKER = Path(__file__).with_name("tfds_worker.py")
PACKAGES = ("tensorflow_datasets", "tensorflow", "importlib_resources")
INSTALL = 'pip install "autorank-jax[tfds]"'
PATIENCE = 8.0  # seconds without an answer while a connection is being made
QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "CUDA_VISIBLE_DEVICES": "-1",
    "PYTHONWARNINGS": "ignore",
}
MOST_CHARACTERS = 300  # of somebody else's message
MISTAKES = {
    "network": "expected to download it from {host}, got no connection ({text}){nor}; without a network {instead}, or "
    "download its archives elsewhere and give autorank-jax data fetch {name} --source FOLDER",
    "unsuitable": "expected {text}; {instead}",
    "package": f"expected the package {{text}} to prepare it, got none; {INSTALL} brings what most datasets need, "
    "install by itself what only this one needs",
    "disk": "expected room for what TensorFlow Datasets keeps, got {text}: choose another folder with {variable}",
    "checksum": "expected the published archives, got {text}",
    "manual": "expected archives that must be downloaded by hand: give autorank-jax data fetch {name} --source FOLDER; "
    "TensorFlow Datasets says: {text}",
    "other": "expected TensorFlow Datasets to prepare it, got {text}; {instead}",
}


class UnknownNameError(DatasetError):
    """A name that TensorFlow Datasets does not have; `names` are similar ones."""

    def __init__(self, names: list[str]) -> None:
        """Keep the similar names."""
        self.names = names
        super().__init__(f"expected a name of TensorFlow Datasets, got one that is not; similar: {', '.join(names)}")


def read_from_tfds(
    name: str, *, source: Path | None = None, instead: str = "", on_progress: OnProgress = lambda _: None
) -> Dataset:
    """Prepare a dataset with TensorFlow Datasets, unless its data folder has it, and read it.

    A connection that is not made within seconds is given up; TensorFlow Datasets alone would try for minutes.

    Args:
        name: in the catalogue of TensorFlow Datasets.
        source: folder of the archives that it would download, so that no network is needed.
        instead: what else to do, in the messages of what only needs another way.
        on_progress: called with what is being done.

    Returns:
        The dataset, not yet checked.

    Raises:
        DatasetError: one line, for whatever keeps the dataset from being read.
        UnknownNameError: if there is no dataset of that name.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise DatasetError(
            f"dataset '{name}': expected the package {missing[0]} to fetch it, got none; {INSTALL}, or {instead}"
        )
    host = ""
    on_progress(Progress("starting TensorFlow Datasets", 0, 0))
    for message in _messages(name, source):
        match message["kind"]:
            case "progress":
                on_progress(Progress(message["stage"], message["done"], message["total"]))
            case "connecting":
                host = message["host"]
            case "arrays":
                return Dataset(**message["arrays"], classes=message["classes"], name=name)
            case "error":
                words = {"name": name, "host": host or "its site", "instead": instead, "variable": "TFDS_DATA_DIR"}
                raise _mistake(message, words | {"nor": f" and no such archive in {source}" if source else ""})
    raise AssertionError("the last message is arrays or an error")


def _messages(name: str, source: Path | None) -> Iterator[dict[str, Any]]:
    """Start the worker and yield what it says; the last message is the arrays or an error."""
    received: queue.Queue[dict[str, Any]] = queue.Queue()
    with _temporary_file(name) as errors_file:
        worker = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), name, str(source or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors_file,
            env={**os.environ, **QUIET},
            start_new_session=True,  # Ctrl-C is ours to handle
        )
        reader = threading.Thread(target=_receive, args=(worker.stdout, received), daemon=True)
        reader.start()
        try:
            connecting = 0
            while True:
                try:
                    message = received.get(timeout=PATIENCE if connecting else None)
                except queue.Empty:
                    message = {"kind": "error", "error": "network", "text": f"no answer in {PATIENCE:.0f} s"}
                if message["kind"] == "end":
                    message = {"kind": "error", "error": "other", "text": _last_line(errors_file, worker.wait())}
                connecting += {"connecting": 1, "connected": -1}.get(message["kind"], 0)
                yield message
        finally:
            worker.kill()
            worker.wait()
            reader.join()
            for pipe in (worker.stdin, worker.stdout):
                if pipe is not None:
                    pipe.close()


def _temporary_file(name: str) -> IO[bytes]:
    """Open a file for what the worker complains about."""
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        message = {"error": "disk", "text": " ".join(str(error).split())}
        raise _mistake(message, {"name": name, "variable": "TMPDIR"}) from error


def _receive(stream: IO[bytes], received: "queue.Queue[dict[str, Any]]") -> None:
    """Put what the worker says into a queue, until it ends; what is cut off in the middle is left out."""
    try:
        for line in iter(stream.readline, b""):
            if not line.endswith(b"\n"):
                break
            message = json.loads(line)
            if message["kind"] == "arrays":
                shapes = {key: (np.dtype(dtype), shape) for key, (dtype, shape) in message["arrays"].items()}
                content = {
                    key: stream.read(dtype.itemsize * math.prod(shape)) for key, (dtype, shape) in shapes.items()
                }
                if stream.readline() != b"end\n":
                    break
                message["arrays"] = {
                    key: np.frombuffer(content[key], dtype).reshape(shape) for key, (dtype, shape) in shapes.items()
                }
            received.put(message)
    finally:
        received.put({"kind": "end"})


def _last_line(errors_file: IO[bytes], code: int) -> str:
    """Return the end of what the worker wrote to standard error."""
    errors_file.seek(0)
    lines = errors_file.read().decode(errors="replace").strip().splitlines()
    return f"exit code {code}" + (f", {lines[-1].strip()}" if lines else "")


def _mistake(message: Mapping[str, Any], words: Mapping[str, str]) -> DatasetError:
    """Make one line of what the worker reports."""
    if message["error"] == "unknown":
        return UnknownNameError(message["names"])
    line = MISTAKES[message["error"]].format(**words, text=message["text"][:MOST_CHARACTERS])
    return DatasetError(f"dataset '{words['name']}': {line}")
