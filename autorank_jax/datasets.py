"""Datasets as NumPy arrays: an embedded one, a made one, and files in a cache folder.

A cached dataset is one file `NAME.npz` with the arrays `x_train, y_train, x_test, y_test`, inputs as uint8. The folder
is the argument `cache`, else the environment variable `AUTORANK_JAX_DATA`, else the user's cache folder.
"""

import contextlib
import difflib
import importlib.resources
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

ENVIRONMENT_VARIABLE = "AUTORANK_JAX_DATA"
KEYS = ("x_train", "y_train", "x_test", "y_test")
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


class DatasetError(ValueError):
    """A dataset that is missing, damaged or not what its name promises. The message is one line."""


class Dataset(NamedTuple):
    """Labelled examples, split into training and test."""

    x_train: np.ndarray  # (n, ...) uint8
    y_train: np.ndarray  # (n,) int32 in 0 .. classes-1
    x_test: np.ndarray  # (n_test, ...) uint8
    y_test: np.ndarray  # (n_test,) int32
    classes: int
    name: str


class DatasetInfo(NamedTuple):
    """One line of the list of datasets."""

    name: str
    present: bool
    where: str
    description: str


class Known(NamedTuple):
    """What a published dataset must look like."""

    shape: tuple[int, ...]  # of one example
    train: int
    test: int
    classes: int
    description: str


KNOWN: Mapping[str, Known] = {
    "mnist": Known((28, 28), 60_000, 10_000, 10, "handwritten digits, 28×28 grey"),
    "fashion_mnist": Known((28, 28), 60_000, 10_000, 10, "articles of clothing, 28×28 grey"),
    "cifar10": Known((32, 32, 3), 50_000, 10_000, 10, "objects, 32×32 colour"),
    "cinic10": Known((32, 32, 3), 90_000, 90_000, 10, "objects from CIFAR-10 and ImageNet, 32×32 colour"),
}
MINI = Known((28, 28), 5_000, 1_000, 10, "balanced subset of Fashion-MNIST, part of this package")


def load_dataset(name: str, *, cache: str | Path | None = None) -> Dataset:
    """Load a dataset by name: embedded, made, or from the cache folder.

    Args:
      name: `fashion_mnist_mini` and `synthetic` need no files. Any other name is the file `NAME.npz` of the cache
        folder; the names in `KNOWN` are also checked against their published sizes.
      cache: the cache folder; default as in `cache_folder`.

    Returns:
      The dataset, inputs as uint8 and labels as int32.

    Raises:
      DatasetError: unknown name, missing file, damaged file, or arrays that are not what they should be.

    Example:
      >>> load_dataset("fashion_mnist_mini").x_train.shape
      (5000, 28, 28)
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name][0]()
    if not re.fullmatch(r"[A-Za-z0-9][\w.\-]*", name):
        raise DatasetError(f"expected the name of a dataset, got {name!r}; {_known_names(name)}")
    path = cache_folder(cache) / f"{name}.npz"
    if not path.is_file():
        raise DatasetError(_missing(name, path))
    return read_dataset(path, name=name, expected=KNOWN.get(name))


def available_datasets(*, cache: str | Path | None = None) -> list[DatasetInfo]:
    """List every dataset that can be named: built in, published, and further files of the cache folder."""
    folder = cache_folder(cache)
    rows = [DatasetInfo(name, True, "built in", description) for name, (_, description) in _BUILT_IN.items()]
    for name, known in KNOWN.items():
        path = folder / f"{name}.npz"
        rows.append(DatasetInfo(name, path.is_file(), str(path), known.description))
    names = {row.name for row in rows}
    others = sorted(path for path in folder.glob("[A-Za-z0-9]*.npz") if path.stem not in names)
    return rows + [DatasetInfo(path.stem, True, str(path), "your own file") for path in others]


def cache_folder(cache: str | Path | None = None) -> Path:
    """Return the folder of cached datasets: `cache`, else `$AUTORANK_JAX_DATA`, else the user's cache folder."""
    if cache is not None:
        return Path(cache).expanduser()
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(os.environ[ENVIRONMENT_VARIABLE]).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "autorank_jax"


def synthetic(
    *,
    train: int = 1_000,
    test: int = 200,
    classes: int = 10,
    shape: tuple[int, ...] = (8, 8),
    noise: float = 40.0,
    seed: int = 0,
) -> Dataset:
    """Make a dataset that can be learned: one random pattern per class plus Gaussian noise, `x = clip(μ_y + noise·ε)`.

    Args:
      train: training examples, classes as even as possible.
      test: test examples, likewise.
      classes: number of classes, at least 1.
      shape: of one example: an image `(h, w)`, `(h, w, c)`, or a feature vector `(d,)`.
      noise: standard deviation in grey values of 0 .. 255; 40 is easy, 200 is hard.
      seed: fixes patterns, labels and noise.

    Raises:
      DatasetError: a number below its range.

    Example:
      >>> synthetic(train=20, test=10, classes=2, shape=(3,)).x_train.shape
      (20, 3)
    """
    if min(train, test, classes, *shape) < 1 or not 0 <= noise < float("inf"):
        got = f"train={train}, test={test}, classes={classes}, shape={shape}, noise={noise}"
        raise DatasetError(f"expected positive sizes and noise of at least 0, got {got}")
    rng = np.random.default_rng(seed)
    patterns = rng.uniform(32, 224, size=(classes, *shape))

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(np.arange(n) % classes).astype(np.int32)
        pixels = patterns[labels] + noise * rng.standard_normal((n, *shape))
        return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), labels

    return Dataset(*draw(train), *draw(test), classes=classes, name="synthetic")


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
    arrays = _read_arrays(file, where)
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


def save_dataset(path: str | Path, dataset: Dataset) -> Path:
    """Write a dataset in the npz format of the cache, whole or not at all.

    The file is written under a temporary name in the same folder and then renamed, so that an interrupted or failed
    write never leaves something that counts as complete, and an older file stays until the new one is.

    Raises:
      DatasetError: arrays that `read_dataset` would refuse, or a folder that cannot be written (or is full).
    """
    path = Path(path).expanduser()
    arrays = {key: np.asarray(getattr(dataset, key)) for key in KEYS}
    _check_arrays(arrays, f"dataset '{dataset.name}'", None)
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
        reason = error.strerror or error
        raise DatasetError(
            f"expected to write dataset '{dataset.name}' to {path}, got: {reason}; "
            f"probably the disk is full or the folder read-only: choose another with {ENVIRONMENT_VARIABLE}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _read_arrays(file: str | Path | IO[bytes], where: str) -> dict[str, np.ndarray]:
    """Read the four arrays of an npz file; whatever is wrong with the file becomes a DatasetError."""
    try:
        # numpy would leave a damaged file open, so it is given an open one
        with Path(file).open("rb") if isinstance(file, (str, Path)) else contextlib.nullcontext(file) as stream:
            stored = np.load(stream, allow_pickle=False)
            found = {} if isinstance(stored, np.ndarray) else {key: stored[key] for key in KEYS if key in stored.files}
    except _UNREADABLE as error:
        raise DatasetError(
            f"{where}: expected a complete npz file, got one that cannot be read ({' '.join(str(error).split())}); "
            "probably truncated or damaged on its way: delete it and put it there again"
        ) from error
    if isinstance(stored, np.ndarray):
        raise DatasetError(f"{where}: expected an npz file, got a single array; probably saved with numpy.save")
    if len(found) < len(KEYS):
        raise DatasetError(
            f"{where}: expected the arrays {', '.join(KEYS)}, got {', '.join(sorted(stored.files)) or 'none'}; "
            "probably the file comes from elsewhere: rename its arrays"
        )
    return found


def _check_arrays(arrays: Mapping[str, np.ndarray], where: str, expected: Known | None) -> None:
    """Check dtypes, lengths, shapes, numbers of examples and label range."""

    def refuse(what: str, got: Any, cause: str) -> None:
        raise DatasetError(f"{where}: expected {what}, got {got}; probably {cause}")

    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8:
            refuse(f"x_{part} as uint8 in 0 .. 255", x.dtype, "already scaled: multiply by 255 and convert")
        if y.ndim != 1 or y.dtype.kind not in "iu":
            refuse(f"y_{part} as a vector of integers", f"{y.dtype}{y.shape}", "one-hot or a column: flatten it")
        if x.ndim < 2 or len(x) != len(y) or not x.size:
            got = f"x_{part}{x.shape} and y_{part}{y.shape}"
            refuse("as many examples as labels, at least one", got, "a partial conversion")
        if expected and x.shape != (getattr(expected, part), *expected.shape):
            shape = (getattr(expected, part), *expected.shape)
            refuse(f"x_{part} of shape {shape}", x.shape, "a partial conversion, or another dataset under this name")
        last = expected.classes - 1 if expected else np.iinfo(np.int32).max - 1
        if int(y.min()) < 0 or int(y.max()) > last:
            refuse(f"labels in 0 .. {last} in y_{part}", f"{y.min()} .. {y.max()}", "labels that count from 1")
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        got = f"{arrays['x_train'].shape[1:]} and {arrays['x_test'].shape[1:]}"
        refuse("training and test examples of one shape", got, "two datasets in one file")


def _fashion_mnist_mini() -> Dataset:
    resource = importlib.resources.files("autorank_jax") / "data" / "fashion_mnist_mini.npz"
    with resource.open("rb") as file:
        return read_dataset(file, name="fashion_mnist_mini", expected=MINI)


def _known_names(name: str) -> str:
    """Say which names exist and which of them come close to a wrong one."""
    names = [*_BUILT_IN, *KNOWN]
    close = difflib.get_close_matches(name, names, n=2)
    return (f"did you mean {' or '.join(close)}? " if close else "") + f"known datasets: {', '.join(names)}"


def _missing(name: str, path: Path) -> str:
    """Explain a dataset that is not in the cache."""
    if name not in KNOWN:
        return (
            f"expected a known dataset or the file {path}, got {name!r}; probably a typing error: {_known_names(name)}"
        )
    known = KNOWN[name]
    return (
        f"expected dataset '{name}' at {path}, got no such file; put an npz file with {', '.join(KEYS)} there "
        f"(x_train uint8 {(known.train, *known.shape)}) or set {ENVIRONMENT_VARIABLE} to the folder that holds it"
    )


_BUILT_IN: Mapping[str, tuple[Callable[[], Dataset], str]] = {
    "fashion_mnist_mini": (_fashion_mnist_mini, MINI.description),
    "synthetic": (synthetic, "one noisy pattern per class, made on the fly for tests"),
}
