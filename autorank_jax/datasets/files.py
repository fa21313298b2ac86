"""Datasets in npz files: arrays `x_train, y_train, x_test, y_test`, read and written whole or not at all."""

import contextlib
import functools
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from autorank_jax.datasets.base import ENVIRONMENT_VARIABLE, KEYS, Dataset, DatasetError, Known
from autorank_jax.datasets.folders import FOLDERS
from autorank_jax.interface import checked
from autorank_jax.interface.paths import user_path

_UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
OBJECTS = "it holds Python objects"
LARGEST = 1e6  # of features and targets: squares of larger ones say little in float32
GAPS = 100  # times as many numbers as there are different labels do not count classes; as many targets are no labels
STARTS = (b"PK", b"\x93NUMPY")  # of npz files and of single arrays


@checked
def read_dataset(file: str | Path | IO[bytes], *, name: str, expected: Known | None = None) -> Dataset:
    """Read and check a dataset in the npz format of the cache.

    Args:
      file: path or open binary file.
      name: what the dataset is called, also in messages.
      expected: published sizes to check against; without it the number of classes is the largest label plus one, and
        0 where the targets are floats.

    Raises:
      DatasetError: damaged file, missing arrays, wrong dtype, shape, label range or number of examples.
    """
    where = f"dataset '{name}'" + (f" at {file}" if isinstance(file, (str, Path)) else "")
    arrays = _read_arrays(file, where, name)
    _check_arrays(arrays, where, expected)
    labelled = arrays["y_train"].dtype.kind in "iu"
    largest = max(int(arrays["y_train"].max()), int(arrays["y_test"].max())) if labelled else -1
    kinds = (
        arrays["x_train"].dtype if arrays["x_train"].dtype == np.uint8 else np.float32,
        np.int32 if labelled else np.float32,
    )
    return Dataset(
        **{key: arrays[key].astype(kinds[key.startswith("y")], copy=False) for key in KEYS},
        classes=expected.classes if expected else largest + 1,
        name=name,
    )


@checked
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
    path = user_path(path)
    arrays = {key: np.asarray(getattr(dataset, key)) for key in KEYS}
    _check_arrays(arrays, f"dataset '{dataset.name}'", expected)
    for key in ("y_train", "y_test") if dataset.classes else ():
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
    made = [folder for folder in path.parents if not os.path.exists(folder)]
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
    cause = "; a file lies where its folder should be" if in_the_way else ""
    return DatasetError(
        f"expected to write dataset '{name}' to {path}, got: {error.strerror or error}{cause}: choose another folder "
        f"with {ENVIRONMENT_VARIABLE}"
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
            raise DatasetError(f"{where}: expected arrays of numbers, got Python objects") from error
        remedy = (
            f": delete it and put it there again, or autorank-jax data fetch {name}{source} --overwrite"
            if getattr(error, "errno", None) is None  # it can be read, and is not whole
            else ""
        )
        raise DatasetError(
            f"{where}: expected a complete npz file, got one that cannot be read ({reason}){remedy}"
        ) from error
    if isinstance(stored, np.ndarray):
        raise DatasetError(f"{where}: expected an npz file, got a single array; probably saved with numpy.save")
    if len(found) < len(KEYS):
        raise DatasetError(
            f"{where}: expected the arrays {', '.join(KEYS)}, got {', '.join(sorted(stored.files)) or 'none'}"
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
    refuse = functools.partial(_refuse, where)
    labelled = expected is not None or arrays["y_train"].dtype.kind in "iu"
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim < 2 or y.ndim < 1 or len(x) != len(y) or not x.size:
            got = f"x_{part}{x.shape} and y_{part}{y.shape}"
            refuse("as many examples as labels, at least one", got)
        if expected and x.shape != (getattr(expected, part), *expected.shape):
            shape = (getattr(expected, part), *expected.shape)
            refuse(f"x_{part} of shape {shape}", x.shape)
        _check_inputs(x, f"x_{part}", refuse, images=expected is not None)
        (_check_labels if labelled else _check_numbers)(y, f"y_{part}", refuse, expected)
    for axis, what in (("x", "examples"), ("y", "targets")):
        train, test = arrays[f"{axis}_train"], arrays[f"{axis}_test"]
        if train.shape[1:] != test.shape[1:]:
            got = f"{train.shape[1:]} and {test.shape[1:]}"
            refuse(f"training and test {what} of one shape", got)
        if axis == "x" and (train.dtype == np.uint8) != (test.dtype == np.uint8):
            refuse("uint8 images or float features in both parts", f"{train.dtype} and {test.dtype}")
    if labelled and not expected:
        _check_gaps(np.unique(np.concatenate([arrays["y_train"], arrays["y_test"]])), refuse)


def _refuse(where: str, what: str, got: Any, hint: str = "") -> None:
    raise DatasetError(f"{where}: expected {what}, got {got}{hint}")


def _check_inputs(x: np.ndarray, name: str, refuse: Callable[..., None], *, images: bool) -> None:
    if images and x.dtype != np.uint8:
        scaled = x.dtype.kind == "f" and bool(((x >= 0) & (x <= 1)).all())
        hint = "; probably already scaled: multiply by 255 and convert" if scaled else ""
        refuse(f"{name} as uint8 in 0 .. 255", x.dtype, hint)
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        refuse(f"{name} as uint8 images or float features", x.dtype, ": convert features to float32")
    if x.dtype.kind == "f" and not (np.abs(x) <= LARGEST).all():
        refuse(f"finite numbers of at most {LARGEST:g} in {name}", *_beyond(x))


def _check_labels(y: np.ndarray, name: str, refuse: Callable[..., None], expected: Known | None) -> None:
    if y.ndim != 1 or y.dtype.kind not in "iu":
        refuse(f"{name} as a vector of integers", f"{y.dtype}{y.shape}")
    last = expected.classes - 1 if expected else np.iinfo(np.int32).max - 1
    if int(y.min()) < 0 or int(y.max()) > last:
        hint = "; probably a marker of unknown labels" if int(y.min()) == -1 else ""
        hint = "; probably labels that count from 1" if (int(y.min()), int(y.max())) == (1, last + 1) else hint
        refuse(f"labels in 0 .. {last} in {name}", f"{y.min()} .. {y.max()}", hint)


def _beyond(values: np.ndarray) -> tuple[str, str]:
    """Return what is found among numbers that are not finite, or huge, and why that may be."""
    if np.isnan(values).any():
        return "NaN", "; probably missing values"
    return f"{np.abs(values).max():g}", ": choose a larger unit"


def _check_numbers(y: np.ndarray, name: str, refuse: Callable[..., None], _: Known | None) -> None:
    """Check what is to be predicted where there are no classes."""
    if y.dtype.kind != "f" or y.ndim > 2:
        refuse(f"{name} as integer labels or float targets (n,) or (n, outputs)", f"{y.dtype}{y.shape}")
    if not (np.abs(y) <= LARGEST).all():
        refuse(f"finite numbers of at most {LARGEST:g} in {name}", *_beyond(y))
    if (y == np.round(y)).all() and len(np.unique(y)) < GAPS:
        refuse(f"{name} as a vector of integers", f"{y.dtype}{y.shape} of whole numbers", ": convert them")
    if len(y) > 1 and (y == y[:1]).all():
        refuse(f"different numbers in {name}", f"{y.flat[0]:g} everywhere")


def _check_gaps(labels: np.ndarray, refuse: Callable[..., None]) -> None:
    if int(labels[-1]) >= GAPS * len(labels):
        got = f"{len(labels)} different ones up to {labels[-1]}"
        refuse("labels in 0 .. classes - 1", got, ": number the classes from 0 on")
