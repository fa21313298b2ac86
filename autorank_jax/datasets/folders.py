"""Datasets that are published as folders of images: `{train,test}/CLASS/*.png`."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autorank_jax.datasets.base import Dataset, DatasetError, Known
from autorank_jax.datasets.progress import OnProgress, Progress
from autorank_jax.interface import checked
from autorank_jax.interface.paths import user_path

FOLDERS: Mapping[str, Sequence[str]] = {
    "cinic10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
"""Published datasets that come as folders, and their classes in the order of their labels."""

PARTS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
GREY = ("1", "L", "LA")
COLOURS = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")
EVERY = 500  # images between reports


def are_image_folders(root: Path) -> bool:
    """Return whether a folder looks as if it held a dataset of images."""
    return any(os.path.isdir(root / part) for part in PARTS)


@checked
def read_image_folders(
    root: str | Path, *, name: str, expected: Known | None = None, on_progress: OnProgress = lambda _: None
) -> Dataset:
    """Read a dataset of the folders `{train,test}/CLASS/*.png`.

    Labels are the positions of the sorted names of the classes. Other folders beside `train` and `test` are left alone:
    `valid` of CINIC-10, whose three parts have 90,000 images each, is meant for choosing hyper-parameters.

    Args:
      root: the folder that holds `train` and `test`.
      name: what the dataset is called, also in messages.
      expected: published sizes; where its examples have colours, grey images get three equal ones.
      on_progress: called while reading.

    Returns:
      The dataset. Its images are grey `(h, w)` if all files are, else `(h, w, 3)`.

    Raises:
      DatasetError: for a missing folder or class, a class without images, an image that cannot be read or is of
        another size than the first; without the package Pillow.
    """
    root, where = user_path(root), f"dataset '{name}'"
    if not os.path.isdir(root):
        raise DatasetError(f"{where}: expected the folders {' and '.join(PARTS)} in {root}, got no such folder")
    try:
        files = {part: _files(root, part, where) for part in PARTS}
    except OSError as error:
        raise DatasetError(f"{where}: expected to read {root}, got: {error.strerror or error}") from error
    classes = FOLDERS.get(name) or list(files["train"])
    for part in PARTS:
        _check_classes(root / part, files[part], classes, where)
    paths = {part: [path for label in classes for path in files[part][label]] for part in PARTS}
    if expected:
        for part in PARTS:
            _check_expected(paths[part], getattr(expected, part), expected.shape, where)
    colour = len(expected.shape) == 3 if expected else _any_colour([*paths["train"], *paths["test"]], where)
    images = {
        part: _read_all(paths[part], colour, where, functools.partial(_report, on_progress, part, len(paths[part])))
        for part in PARTS
    }
    labels = {
        part: np.repeat(np.arange(len(classes), dtype=np.int32), [len(files[part][label]) for label in classes])
        for part in PARTS
    }
    return Dataset(images["train"], labels["train"], images["test"], labels["test"], len(classes), name)


def _files(root: Path, part: str, where: str) -> dict[str, list[Path]]:
    """Return the image files by class, both in the order of their names."""
    folder = root / part
    if not os.path.isdir(folder):
        found = sorted(path for path in root.iterdir() if path.is_dir())
        inside = next((path for path in found if are_image_folders(path)), None)
        raise DatasetError(
            f"{where}: expected the folders {' and '.join(PARTS)} in {root}, got "
            f"{', '.join(path.name for path in found) or 'none'}"
            + (f"; probably those in {inside} are meant" if inside else "")
        )
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {path.name: sorted(f for f in path.iterdir() if _is_image(f)) for path in classes}


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _check_classes(folder: Path, files: Mapping[str, Sequence[Path]], classes: Sequence[str], where: str) -> None:
    """Check that a part has all classes, no others, and images in every one."""
    missing = [label for label in classes if label not in files]
    further = [label for label in files if label not in classes]
    if missing or further or not classes:
        got = [f"no {', '.join(missing)}"] * bool(missing) + [f"also {', '.join(further)}"] * bool(further)
        raise DatasetError(
            f"{where}: expected a folder for each of {', '.join(classes) or 'some classes'} in {folder}, "
            f"got {' and '.join(got) or 'none'}"
        )
    empty = [label for label in classes if not files[label]]
    if empty:
        raise DatasetError(f"{where}: expected images ({', '.join(SUFFIXES)}) in {folder / empty[0]}, got none")


def _check_expected(paths: Sequence[Path], number: int, shape: Sequence[int], where: str) -> None:
    """Check the number of images, and the size of the first, before all are read."""
    folder = paths[0].parent.parent
    if len(paths) != number:
        raise DatasetError(
            f"{where}: expected {number} images in {folder}, got {len(paths)}"
            + "; probably an archive that was not extracted to its end" * (len(paths) < number)
        )
    height, width = _opened(paths[0], where, lambda image: (image.height, image.width))
    if (height, width) != tuple(shape[:2]):
        raise DatasetError(
            f"{where}: expected images of {shape[0]} × {shape[1]} pixels, got {height} × {width} in {paths[0]}"
        )


def _any_colour(paths: Sequence[Path], where: str) -> bool:
    """Return whether any image has colours; only headers are read."""
    return any(_opened(path, where, lambda image: image.mode in COLOURS) for path in paths)


def _report(on_progress: OnProgress, part: str, total: int, done: int) -> None:
    on_progress(Progress(f"reading {part}", done, total))


def _read_all(paths: Sequence[Path], colour: bool, where: str, on_image: Callable[[int], None]) -> np.ndarray:
    """Read images of one size into one array."""

    def pixels(image: Any) -> np.ndarray:
        if image.mode not in (*GREY, *COLOURS):
            raise ValueError(f"unsupported mode {image.mode}")
        return np.asarray(image.convert("RGB" if colour else "L"))

    first = _opened(paths[0], where, pixels)
    images = np.empty((len(paths), *first.shape), np.uint8)
    for number, path in enumerate(paths):
        image = _opened(path, where, pixels)
        if image.shape != first.shape:
            raise DatasetError(
                f"{where}: expected images of one size, got {first.shape[:2]} in {paths[0]} and {image.shape[:2]} in "
                f"{path}; resize them first"
            )
        images[number] = image
        if number % EVERY == 0 or number == len(paths) - 1:
            on_image(number + 1)
    return images


def _opened(path: Path, where: str, use: Callable[[Any], Any]) -> Any:
    """Open an image, use it, and close it; whatever is wrong with the file becomes a DatasetError."""
    try:
        from PIL import Image  # noqa: PLC0415  optional
    except ModuleNotFoundError:
        raise DatasetError(f'{where}: expected the package Pillow, got none: pip install "autorank-jax[cli]"') from None
    try:
        with Image.open(path) as image:
            return use(image)
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:  # Pillow raises them all
        whole = isinstance(error, Image.DecompressionBombError) or getattr(error, "errno", None) is not None
        raise DatasetError(
            f"{where}: expected an image at {path}, got one that cannot be read ({' '.join(str(error).split())})"
            + "; probably truncated or damaged: extract the archive again" * (not whole)
        ) from error
