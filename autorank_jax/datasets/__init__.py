"""Raw data sets: one checked file each, and where it comes from.

A `Dataset` is `x_train, y_train, x_test, y_test` with its number of classes: uint8 images or float features, integer labels
or, for regression, float targets and 0 classes.
`load_dataset(name)` gives one, `fetch_dataset` gets it, `available_datasets` lists them; `DatasetError` says in one line
what is wrong with a file, a folder, a name, a disk or a network.

```bash
autorank-jax data                                      # what is there, and where files are looked for
autorank-jax data fetch mnist                          # once, from TensorFlow Datasets: pip install "autorank-jax[tfds]"
autorank-jax data fetch cinic10 --source CINIC-10      # from a folder of images {train,test}/CLASS/*.png
autorank-jax data fetch wine --source wine.csv         # from a table; --target COLUMN is to be predicted, else the last
autorank-jax data fetch mnist --source ARCHIVES        # without a network, out of archives downloaded elsewhere
autorank-jax run --dataset mnist
```

A dataset is one checked file `NAME.npz` with these four arrays in
`$AUTORANK_JAX_DATA`, else `~/.cache/autorank_jax`; put your own there and it is a name like any other. A subset of
Fashion-MNIST comes with the package. `fetch` takes any image classification set of
[TensorFlow Datasets](https://www.tensorflow.org/datasets/catalog) whose images have one size, and any folder of images; in
Python `ar.load_dataset("mnist")` fetches what is not there. TensorFlow runs in a process of its own, a network that does not
answer is given up after seconds, and what is interrupted leaves no file behind. What TensorFlow Datasets keeps in
`$TFDS_DATA_DIR`, else `~/tensorflow_datasets`, may be deleted afterwards.

CINIC-10 has three parts of 90,000 images: `train` is split over the clients, `test` is the test set, `valid` is left alone,
so that hyper-parameters can be chosen on it [D].

Instructions for language models are files of JSON lines, or the embedded `instructions_mini`: `load_instructions`.
`ar.text_clients` makes clients of them, `chat` says how they become tokens.

```python
import autorank_jax as ar

images = ar.load_dataset("synthetic")
print(images.x_train.shape, images.classes)
```
"""  # noqa: E501

import difflib
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from autorank_jax.datasets.base import (
    ENVIRONMENT_VARIABLE,
    KEYS,
    KNOWN,
    Dataset,
    DatasetError,
    DatasetInfo,
    Known,
    cache_folder,
)
from autorank_jax.datasets.files import check_writable, read_dataset, save_dataset
from autorank_jax.datasets.folders import FOLDERS, PARTS, are_image_folders, read_image_folders
from autorank_jax.datasets.instructions import Instructions, load_instructions, split_instructions
from autorank_jax.datasets.made import BUILT_IN, synthetic
from autorank_jax.datasets.progress import Bar, OnProgress, Progress
from autorank_jax.datasets.tables import is_table, read_table
from autorank_jax.datasets.tfds import UnknownNameError, read_from_tfds
from autorank_jax.interface import checked
from autorank_jax.interface.paths import user_path

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "KEYS",
    "KNOWN",
    "Dataset",
    "DatasetError",
    "DatasetInfo",
    "Instructions",
    "Known",
    "Progress",
    "available_datasets",
    "cache_folder",
    "fetch_dataset",
    "how_to_get",
    "load_dataset",
    "load_instructions",
    "read_dataset",
    "read_image_folders",
    "read_table",
    "save_dataset",
    "split_instructions",
    "synthetic",
]


@checked
def load_dataset(name: str, *, cache: str | Path | None = None, fetch: bool = True) -> Dataset:
    """Load a dataset by name: embedded, made, from the cache folder, or fetched into it.

    Args:
      name: `fashion_mnist_mini` and `synthetic` need no files. Any other name is the file `NAME.npz` of the cache
        folder; the names in `KNOWN` are also checked against their published sizes.
      cache: the cache folder; default as in `cache_folder`.
      fetch: where there is no such file, convert the dataset of that name from TensorFlow Datasets, once, as
        `fetch_dataset` does. It needs the extra `tfds`.

    Returns:
      The dataset: inputs as uint8, or float32 as they are; labels as int32, or float32 targets of a regression.

    Raises:
      DatasetError: unknown name, missing file, damaged file, arrays that are not what they should be, no network.

    Example:
      >>> load_dataset("fashion_mnist_mini").x_train.shape
      (5000, 28, 28)
    """
    if name in BUILT_IN:
        return BUILT_IN[name][0]()
    path = _file(name, cache)
    if not os.path.isfile(path):
        if not fetch:
            raise DatasetError(_missing(name, path))
        fetch_dataset(name, cache=cache)
    return read_dataset(path, name=name, expected=KNOWN.get(name))


@checked
def fetch_dataset(
    name: str,
    *,
    source: str | Path | None = None,
    target: str | None = None,
    cache: str | Path | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Convert a dataset into the cache folder, unless it is there already.

    Args:
      name: the file will be `NAME.npz`. A name of TensorFlow Datasets whose examples are images of one size with one
        label each is prepared by TensorFlow Datasets (extra `tfds`), in its own data folder, which may be deleted
        afterwards.
      source: a folder of images `{train,test}/CLASS/*.png`, as CINIC-10 is published, or one that holds the archives
        that TensorFlow Datasets would download, for computers without a network; or a table (`FILE.csv`), as
        `read_table` reads it.
      target: of a table, the column to predict; the last where None.
      cache: the cache folder; default as in `cache_folder`.
      overwrite: convert again and replace the file that is there.
      on_progress: called with what is being done; default a bar on standard error.

    Returns:
      The path of the file, complete and checked. A conversion that fails leaves the cache folder as it was.

    Raises:
      DatasetError: for whatever keeps the dataset from being converted, in one line.
    """
    if name in BUILT_IN:
        raise DatasetError(f"expected the name of a dataset that comes in files, got {name!r}, which needs none")
    path, known = _file(name, cache), KNOWN.get(name)
    if os.path.isfile(path) and not overwrite:
        read_dataset(path, name=name, expected=known)
        return path
    table = None if source is None or not is_table(Path(source)) else Path(source)
    if target is not None and table is None:
        raise DatasetError(f"target: expected a table FILE.csv as source for column {target!r}, got {source}")
    folder = None if table else _source_folder(source)
    check_writable(path, name)
    with Bar(name) as bar:
        report = bar if on_progress is None else on_progress
        if table:
            report(Progress("reading", 0, 0))
            dataset = read_table(table, name=name, target=target)
            report(Progress("writing", 0, 0))
            return save_dataset(path, dataset, expected=known)
        if folder is not None and (name in FOLDERS or are_image_folders(folder)):
            dataset = read_image_folders(folder, name=name, expected=known, on_progress=report)
        elif name in FOLDERS:
            raise DatasetError(_missing(name, path))
        else:
            try:
                dataset = read_from_tfds(name, source=folder, on_progress=report, instead=_instead(name, path))
            except UnknownNameError as error:
                raise DatasetError(_unknown(name, path, error.names, folder)) from None
        report(Progress("writing", 0, 0))
        return save_dataset(path, dataset, expected=known)


@checked
def available_datasets(*, cache: str | Path | None = None) -> list[DatasetInfo]:
    """List every dataset that can be named: built in, published, and further files of the cache folder.

    Args:
      cache: the cache folder; default as in `cache_folder`.
    """
    folder = cache_folder(cache)
    rows = [DatasetInfo(name, True, "built in", description) for name, (_, description) in BUILT_IN.items()]
    for name, known in KNOWN.items():
        rows.append(_info(folder / f"{name}.npz", known.description))
    names = {row.name for row in rows}
    found = folder.glob("[A-Za-z0-9]*.npz") if os.path.isdir(folder) else ()
    others = sorted(path for path in found if path.stem not in names)
    return rows + [_info(path, "your own file") for path in others]


def _info(path: Path, description: str) -> DatasetInfo:
    """Describe a file by what can be seen without reading its arrays."""
    present = os.path.isfile(path)
    return DatasetInfo(path.stem, present, str(path), description, present and not zipfile.is_zipfile(path))


@checked
def how_to_get(name: str) -> str:
    """Return what to do about a published dataset whose file is not there, as part of a sentence.

    Args:
      name: of the dataset, one of `KNOWN`.
    """
    if name in FOLDERS:
        return f"extract its archive to FOLDER and give autorank-jax data fetch {name} --source FOLDER"
    return f"get it with autorank-jax data fetch {name}"


def _file(name: str, cache: str | Path | None) -> Path:
    """Return the file of a dataset, whose name must not lead out of the cache folder."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.\-]*", name):
        raise DatasetError(f"expected the name of a dataset, got {name!r}; {_known_names(name)}")
    return cache_folder(cache) / f"{name}.npz"


def _source_folder(source: str | Path | None) -> Path | None:
    """Check that the source is a folder."""
    if source is None:
        return None
    folder = user_path(source)
    if not os.path.isdir(folder):
        file = os.path.isfile(folder)
        archive = file and {".tar", ".tgz", ".zip"} & set(folder.suffixes)
        hint = "; probably an archive to be extracted" if archive else ""
        raise DatasetError(f"source: expected a folder, got {'a file' if file else 'nothing'} at {folder}{hint}")
    return folder


def _known_names(name: str, further: Sequence[str] = ()) -> str:
    """Say which names exist and which of them come close to a wrong one."""
    names = [*BUILT_IN, *KNOWN]
    close = difflib.get_close_matches(name, dict.fromkeys([*names, *further]), n=2)
    return (f"did you mean {' or '.join(close)}? " if close else "") + f"known datasets: {', '.join(names)}"


def _missing(name: str, path: Path) -> str:
    """Explain a dataset that is not in the cache."""
    if name not in KNOWN:
        return _unknown(name, path)
    return f"expected dataset '{name}' at {path}, got no such file; {how_to_get(name)}, or {_instead(name, path)}"


def _unknown(name: str, path: Path, further: Sequence[str] = (), source: Path | None = None) -> str:
    """Explain a name that is neither known nor that of a file, nor given with folders of images."""
    folders = f", or folders {' and '.join(PARTS)} in {source}" if source else ""
    return (
        f"expected a known dataset or the file {path}{folders}, got {name!r}; {_known_names(name, further)}, and those "
        "of TensorFlow Datasets"
    )


def _instead(name: str, path: Path) -> str:
    """Say how to do without fetching."""
    known = KNOWN.get(name)
    shape = f" (x_train uint8 {(known.train, *known.shape)})" if known else ""
    return (
        f"put an npz file with {', '.join(KEYS)}{shape} at {path}, or set {ENVIRONMENT_VARIABLE} to the folder "
        "that holds it"
    )
