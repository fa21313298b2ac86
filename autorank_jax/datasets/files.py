"""Datasets in npz files: arrays `x_train, y_train, x_test, y_test`, read and written whole or not at all."""

import contextlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from autorank_jax.datasets.base import ENVIRONMENT_VARIABLE, KEYS, Dataset, DatasetError, Known
from autorank_jax.datasets.folders import FOLDERS

_UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
OBJECTS = "it holds Python objects"
GAPS = 100  # times as many numbers as there are different labels: those do not count classes
STARTS = (b"PK", b"\x93NUMPY")  # of npz files and of single arrays


def read_dataset(file: str | Path | IO[bytes], *, name: str, expected: Known | None = None) -> Dataset:
    """Read and check a dataset in the npz format of the cache.

    Args:
      file: path or open binary file.
      name: what the dataset is called, also in messages.
      expected: published sizes to check against; without it the number of classes is the largest label plus one.

    Raises:
      DatasetError: damaged file, missing arrays, wrong dtype, shape, label range or number of examples.
    """
    where = f"dataset '{name}'" + (f" at {file}" if isinstance(file, (str, Path)) else "")
    arrays = _read_arrays(file, where, name)
    _check_arrays(arrays, where, expected)
    largest = max(int(arrays["y_train"].max()), int(arrays["y_test"].max()))
    return Dataset(
        x_train=arrays["x_train"],
        y_train=arrays["y_train"].astype(np.int32),
        x_test=arrays["x_test"],
        y_test=arrays["y_test"].astype(np.int32),
        classes=expected.classes if expected else largest + 1,
        name=name,
    )


def save_dataset(path: str | Path, dataset: Dataset, *, expected: Known | None = None) -> Path:
    """Write a dataset in the npz format of the cache, whole or not at all.

    The file is written under a temporary name in the same folder and then renamed, so that an interrupted or failed
    write never leaves something that counts as complete, and an older file stays until the new one is.

    Args:
      path: of the file; its folder is made.
      dataset: what to write.
      expected: published sizes to check against, as in `read_dataset`.

    Raises:
      DatasetError: arrays that `read_dataset` would refuse, or a folder that cannot be written (or is full).
    """
    path = Path(path).expanduser()
    arrays = {key: np.asarray(getattr(dataset, key)) for key in KEYS}
    _check_arrays(arrays, f"dataset '{dataset.name}'", expected)
    for key in ("y_train", "y_test"):
        arrays[key] = arrays[key].astype(np.min_scalar_type(max(dataset.classes - 1, int(arrays[key].max()))))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes them for allow_pickle
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _not_written(path, dataset.name, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def check_writable(path: Path, name: str) -> None:
    """Try whether a file can be written, before the work that it takes; leave everything as it was.

    Raises:
      DatasetError: it cannot.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _not_written(path, name, error) from error
    finally:
        for folder in made:  # the innermost first; some may not have been made
            with contextlib.suppress(OSError):
                folder.rmdir()


def _not_written(path: Path, name: str, error: OSError) -> DatasetError:
    in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
    cause = "a file lies where its folder should be" if in_the_way else "the disk is full or the folder read-only"
    return DatasetError(
        f"expected to write dataset '{name}' to {path}, got: {error.strerror or error}; probably {cause}: choose "
        f"another folder with {ENVIRONMENT_VARIABLE}"
    )


def _read_arrays(file: str | Path | IO[bytes], where: str, name: str) -> dict[str, np.ndarray]:
    """Read the four arrays of an npz file; whatever is wrong with the file becomes a DatasetError."""
    try:
        # numpy would leave a damaged file open, so it is given an open one
        with Path(file).open("rb") if isinstance(file, (str, Path)) else contextlib.nullcontext(file) as stream:
            _check_start(stream)
            stored = np.load(stream, allow_pickle=False)
            found = {} if isinstance(stored, np.ndarray) else {key: stored[key] for key in KEYS if key in stored.files}
    except _UNREADABLE as error:
        source = " --source FOLDER" if name in FOLDERS else ""
        if (reason := _reason(error)) == OBJECTS:
            raise DatasetError(
                f"{where}: expected arrays of numbers, got Python objects; probably made of lists of unequal lengths"
            ) from error
        raise DatasetError(
            f"{where}: expected a complete npz file, got one that cannot be read ({reason}); probably "
            "truncated or damaged on its way, or something else under its name: delete it and put it there again, or "
            f"autorank-jax data fetch {name}{source} --overwrite"
        ) from error
    if isinstance(stored, np.ndarray):
        raise DatasetError(f"{where}: expected an npz file, got a single array; probably saved with numpy.save")
    if len(found) < len(KEYS):
        raise DatasetError(
            f"{where}: expected the arrays {', '.join(KEYS)}, got {', '.join(sorted(stored.files)) or 'none'}; "
            "probably the file comes from elsewhere: rename its arrays"
        )
    return found


def _check_start(stream: IO[bytes]) -> None:
    """Refuse what is not of NumPy, which would take it for pickled objects; an empty file is left to NumPy."""
    start = stream.read(len(STARTS[-1]))
    if start and not start.startswith(STARTS):
        raise ValueError("it is no npz file")
    stream.seek(0)


def _reason(error: BaseException) -> str:
    """Return what is wrong in one line, without NumPy's hint at its argument for files that run programs."""
    text = " ".join(str(error).split())
    return OBJECTS if "allow_pickle" in text else text


def _check_arrays(arrays: Mapping[str, np.ndarray], where: str, expected: Known | None) -> None:
    """Check dtypes, lengths, shapes, numbers of examples and label range."""

    def refuse(what: str, got: Any, cause: str) -> None:
        raise DatasetError(f"{where}: expected {what}, got {got}; probably {cause}")

    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8:
            refuse(f"x_{part} as uint8 in 0 .. 255", x.dtype, "already scaled: multiply by 255 and convert")
        if y.ndim != 1 or y.dtype.kind not in "iu":
            cause = "one-hot or a column: flatten it" if y.ndim != 1 else "whole numbers of another dtype: convert them"
            refuse(f"y_{part} as a vector of integers", f"{y.dtype}{y.shape}", cause)
        if x.ndim < 2 or len(x) != len(y) or not x.size:
            got = f"x_{part}{x.shape} and y_{part}{y.shape}"
            refuse("as many examples as labels, at least one", got, "a partial conversion")
        if expected and x.shape != (getattr(expected, part), *expected.shape):
            shape = (getattr(expected, part), *expected.shape)
            refuse(f"x_{part} of shape {shape}", x.shape, "a partial conversion, or another dataset under this name")
        last = expected.classes - 1 if expected else np.iinfo(np.int32).max - 1
        if int(y.min()) < 0 or int(y.max()) > last:
            cause = "examples without labels" if int(y.min()) < 0 else "labels that count from 1"
            refuse(f"labels in 0 .. {last} in y_{part}", f"{y.min()} .. {y.max()}", cause)
    labels = np.unique(np.concatenate([arrays["y_train"], arrays["y_test"]]))
    if not expected and int(labels[-1]) >= GAPS * len(labels):
        got = f"{len(labels)} different ones up to {labels[-1]}"
        refuse("labels in 0 .. classes - 1", got, "numbers of another list: number the classes from 0 on")
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        got = f"{arrays['x_train'].shape[1:]} and {arrays['x_test'].shape[1:]}"
        refuse("training and test examples of one shape", got, "two datasets in one file")
