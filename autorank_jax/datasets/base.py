"""What a dataset is, which ones are published, and where their files lie."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from autorank_jax.interface import checked
from autorank_jax.interface.paths import user_path

ENVIRONMENT_VARIABLE = "AUTORANK_JAX_DATA"
KEYS = ("x_train", "y_train", "x_test", "y_test")


class DatasetError(ValueError):
    """A dataset that is missing, damaged or not what its name promises. The message is one line."""


class Dataset(NamedTuple):
    """Examples with labels or with numbers to predict, split into training and test."""

    x_train: np.ndarray  # (n, ...) uint8 images, or float32 features
    y_train: np.ndarray  # (n,) int32 in 0 .. classes-1; float32 (n,) or (n, outputs) where there are no classes
    x_test: np.ndarray  # (n_test, ...)
    y_test: np.ndarray  # (n_test, ...)
    classes: int  # 0 for regression
    name: str


class DatasetInfo(NamedTuple):
    """One line of the list of datasets."""

    name: str
    present: bool
    where: str
    description: str
    damaged: bool = False  # present, but its end is missing: most likely a download that stopped


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


@checked
def cache_folder(cache: str | Path | None = None) -> Path:
    """Return the folder of cached datasets.

    Args:
      cache: the folder itself; where None it is `$AUTORANK_JAX_DATA`, else the user's cache folder.
    """
    if cache is not None:
        return user_path(cache)
    if os.environ.get(ENVIRONMENT_VARIABLE):
        return user_path(os.environ[ENVIRONMENT_VARIABLE])
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else user_path("~/.cache")) / "autorank_jax"
