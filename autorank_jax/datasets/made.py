"""Datasets that need no files: an embedded one and a made one."""

import importlib.resources
from collections.abc import Callable, Mapping

import numpy as np

from autorank_jax.datasets.base import Dataset, DatasetError, Known
from autorank_jax.datasets.files import read_dataset
from autorank_jax.interface import checked

MINI = Known((28, 28), 5_000, 1_000, 10, "balanced subset of Fashion-MNIST, part of this package")


@checked
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


def _fashion_mnist_mini() -> Dataset:
    resource = importlib.resources.files("autorank_jax.datasets") / "embedded" / "fashion_mnist_mini.npz"
    with resource.open("rb") as file:
        return read_dataset(file, name="fashion_mnist_mini", expected=MINI)


BUILT_IN: Mapping[str, tuple[Callable[[], Dataset], str]] = {
    "fashion_mnist_mini": (_fashion_mnist_mini, MINI.description),
    "synthetic": (synthetic, "one noisy pattern per class, made on the fly for tests"),
}
