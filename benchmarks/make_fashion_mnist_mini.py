"""Make the embedded Fashion-MNIST subset: 5,000 training and 1,000 test examples, evenly over the ten classes.

Command:  AUTORANK_JAX_DATA=FOLDER python -m benchmarks.make_fashion_mnist_mini   (FOLDER holds fashion_mnist.npz)
Hardware: any, 3 seconds on one CPU core.
Result:   autorank_jax/datasets/embedded/fashion_mnist_mini.npz, 2.6 MB. The first examples of each class, in their
          original order, so that nothing depends on a random number generator.
"""

from pathlib import Path

import numpy as np

from autorank_jax.datasets import load_dataset, save_dataset

TARGET = Path(__file__).parents[1] / "autorank_jax" / "datasets" / "embedded" / "fashion_mnist_mini.npz"


def first_of_each_class(labels: np.ndarray, amount: int) -> np.ndarray:
    """Return the positions of the first `amount` examples of each class, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:amount] for label in np.unique(labels)]))


def main() -> None:
    full = load_dataset("fashion_mnist")
    train = first_of_each_class(full.y_train, 500)
    test = first_of_each_class(full.y_test, 100)
    mini = full._replace(
        x_train=full.x_train[train],
        y_train=full.y_train[train],
        x_test=full.x_test[test],
        y_test=full.y_test[test],
        name="fashion_mnist_mini",
    )
    path = save_dataset(TARGET, mini)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
