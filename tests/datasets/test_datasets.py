"""Datasets: what is embedded, made and cached; and every way in which a file can be wrong."""

import io
import os
from pathlib import Path

import numpy as np
import pytest

from autorank_jax import datasets
from autorank_jax.datasets import (
    ENVIRONMENT_VARIABLE,
    KNOWN,
    DatasetError,
    available_datasets,
    cache_folder,
    load_dataset,
    read_dataset,
    save_dataset,
    synthetic,
)
from autorank_jax.datasets.files import check_writable

SMALL = synthetic(train=30, test=10, classes=3, shape=(4, 4))


def nearest_pattern_accuracy(data):
    """Accuracy of the class mean that is nearest: learnable at all?"""
    x = data.x_train.reshape(len(data.x_train), -1).astype(float)
    means = np.stack([x[data.y_train == c].mean(axis=0) for c in range(data.classes)])
    test = data.x_test.reshape(len(data.x_test), -1).astype(float)
    guess = ((test[:, None] - means) ** 2).sum(-1).argmin(-1)
    return (guess == data.y_test).mean()


def write(folder, name="mine", **changes):
    """Write the small dataset with some arrays replaced (or left out: None), past all checks."""
    arrays = {key: getattr(SMALL, key) for key in datasets.KEYS} | changes
    np.savez(folder / f"{name}.npz", **{key: value for key, value in arrays.items() if value is not None})
    return folder / f"{name}.npz"


def test_embedded_subset_is_balanced_real_and_small():
    mini = load_dataset("fashion_mnist_mini")
    assert (mini.x_train.shape, mini.x_test.shape) == ((5_000, 28, 28), (1_000, 28, 28))
    assert (mini.x_train.dtype, mini.y_train.dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(np.bincount(mini.y_train), 500)
    np.testing.assert_array_equal(np.bincount(mini.y_test), 100)
    assert nearest_pattern_accuracy(mini) > 0.6  # the class means of Fashion-MNIST reach about 0.68
    assert mini.classes == 10
    file = Path(datasets.__file__).parent / "embedded" / "fashion_mnist_mini.npz"
    assert file.stat().st_size < 3e6
    assert "Copyright (c) 2017 Zalando SE" in (file.parent / "FASHION_MNIST_LICENSE").read_text()


@pytest.mark.parametrize("name", KNOWN)
def test_full_sets_are_as_published(name):
    path = cache_folder() / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"needs the full set: ${ENVIRONMENT_VARIABLE}/{name}.npz")
    data = load_dataset(name)
    assert (data.x_train.shape, len(data.x_test)) == ((KNOWN[name].train, *KNOWN[name].shape), KNOWN[name].test)
    assert set(data.y_test) == set(range(KNOWN[name].classes))


def test_embedded_subset_consists_of_the_first_examples_of_the_full_set():
    if not (cache_folder() / "fashion_mnist.npz").is_file():
        pytest.skip(f"needs the full set: ${ENVIRONMENT_VARIABLE}/fashion_mnist.npz")
    full, mini = load_dataset("fashion_mnist"), load_dataset("fashion_mnist_mini")
    for c in range(10):
        np.testing.assert_array_equal(mini.x_train[mini.y_train == c], full.x_train[full.y_train == c][:500])
        np.testing.assert_array_equal(mini.x_test[mini.y_test == c], full.x_test[full.y_test == c][:100])


@pytest.mark.parametrize("shape", [(6,), (5, 4), (4, 4, 3)])
def test_synthetic_is_learnable_balanced_and_deterministic(shape):
    data = synthetic(train=60, test=30, classes=3, shape=shape, seed=1)
    assert (data.x_train.shape, data.x_train.dtype) == ((60, *shape), np.uint8)
    np.testing.assert_array_equal(np.bincount(data.y_train), 20)
    assert nearest_pattern_accuracy(data) > 0.9
    assert nearest_pattern_accuracy(data._replace(y_test=np.roll(data.y_test, 1))) < 0.7
    again = synthetic(train=60, test=30, classes=3, shape=shape, seed=1)
    np.testing.assert_array_equal(data.x_train, again.x_train)
    assert not np.array_equal(data.x_train, synthetic(train=60, test=30, classes=3, shape=shape, seed=2).x_train)


@pytest.mark.parametrize(
    "wrong", [{"train": 0}, {"classes": 0}, {"shape": (0,)}, {"noise": -1}, {"noise": float("nan")}]
)
def test_synthetic_refuses_numbers_out_of_range(wrong):
    with pytest.raises(DatasetError, match="expected positive sizes and noise of at least 0, got train="):
        synthetic(**wrong)


def test_saved_dataset_comes_back(tmp_path):
    path = save_dataset(tmp_path / "new" / "mine.npz", SMALL)
    back = load_dataset("mine", cache=tmp_path / "new")
    assert (back.classes, back.name) == (3, "mine")
    for key in datasets.KEYS:
        np.testing.assert_array_equal(getattr(back, key), getattr(SMALL, key))
        assert getattr(back, key).dtype == getattr(SMALL, key).dtype
    with np.load(path) as stored:
        assert {stored[key].dtype for key in datasets.KEYS} == {np.dtype(np.uint8)}
    assert [file.name for file in path.parent.iterdir()] == ["mine.npz"]


def test_saving_uses_wider_labels_where_needed(tmp_path):
    data = SMALL._replace(y_train=SMALL.y_train + 300, classes=303)
    save_dataset(tmp_path / "many.npz", data)
    np.testing.assert_array_equal(load_dataset("many", cache=tmp_path).y_train, data.y_train)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure):
    path = save_dataset(tmp_path / "mine.npz", SMALL)
    before = path.read_bytes()

    def fail(file, **_):
        file.write(b"half")
        raise failure

    monkeypatch.setattr(np, "savez_compressed", fail)
    wanted = DatasetError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(wanted, match="No space left" if isinstance(failure, OSError) else None):
        save_dataset(path, SMALL._replace(y_train=SMALL.y_train[::-1]))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["mine.npz"]


def test_bad_arrays_are_not_saved(tmp_path):
    with pytest.raises(DatasetError, match="images or float features in both parts"):
        save_dataset(tmp_path / "mine.npz", SMALL._replace(x_train=SMALL.x_train / 255))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "expected the arrays x_train, y_train, x_test, y_test, got x_test, x_train, y_train"),
        (
            {"x_train": SMALL.x_train.astype(np.float32)},
            r"images or float features in both parts, got float32 and uint8$",
        ),
        ({"x_train": SMALL.x_train.astype(int)}, r"expected x_train as uint8 images or float features, got int64"),
        (
            {"y_train": np.eye(3)[SMALL.y_train]},
            r"y_train as a vector of integers, got float64\(30, 3\) of whole numbers: convert them",
        ),
        ({"y_train": SMALL.y_train[:, None]}, r"got int32\(30, 1\)"),
        (
            {"y_train": SMALL.y_train.astype(float)},
            r"y_train as a vector of integers, got float64\(30,\) of whole numbers: convert",
        ),
        (
            {"y_test": SMALL.y_test * 900},
            "labels in 0 .. classes - 1, got .* different ones up to 1800: number the classes",
        ),
        ({"y_train": SMALL.y_train[:-1]}, r"as many examples as labels.* got x_train\(30, 4, 4\) and y_train\(29,\)"),
        (
            {"y_test": SMALL.y_test - 1},
            r"expected labels in 0 .. .* in y_test, got -1 .. 1; probably a marker of unknown",
        ),
        ({"x_test": SMALL.x_test[:, :2]}, r"of one shape, got \(4, 4\) and \(2, 4\)"),
        ({"x_test": SMALL.x_test[:0], "y_test": SMALL.y_test[:0]}, "at least one, got x_test"),
        ({"x_train": np.array([None] * 30)}, "expected arrays of numbers, got Python objects"),
    ],
)
def test_wrong_arrays_are_refused_by_name(tmp_path, changes, message):
    path = write(tmp_path, **changes)
    with pytest.raises(DatasetError, match=message) as caught:
        load_dataset("mine", cache=tmp_path)
    assert str(caught.value).startswith(f"dataset 'mine' at {path}: ")
    assert "\n" not in str(caught.value)
    assert "allow_pickle" not in str(caught.value)


def test_published_sizes_are_checked(tmp_path):
    write(tmp_path, "mnist")
    with pytest.raises(DatasetError, match=r"expected x_train of shape \(60000, 28, 28\), got \(30, 4, 4\)$"):
        load_dataset("mnist", cache=tmp_path)
    known = datasets.Known((4, 4), 30, 10, 2, "")
    with pytest.raises(DatasetError, match=r"expected labels in 0 .. 1 in y_train, got 0 .. 2"):
        read_dataset(write(tmp_path), name="mine", expected=known)
    with pytest.raises(DatasetError, match=r"got 1 .. 3; probably labels that count from 1"):
        read_dataset(write(tmp_path, y_train=SMALL.y_train + 1), name="mine", expected=known._replace(classes=3))
    assert read_dataset(write(tmp_path), name="mine", expected=known._replace(classes=5)).classes == 5


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused(tmp_path, keep):
    path = save_dataset(tmp_path / "mine.npz", SMALL)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DatasetError, match=r"cannot be read.*put it there again"):
        load_dataset("mine", cache=tmp_path)


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    path = save_dataset(tmp_path / "mine.npz", SMALL)
    content = bytearray(path.read_bytes())
    for position in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 0x55
        try:
            back = read_dataset(io.BytesIO(bytes(damaged)), name="mine")
        except DatasetError:
            continue
        np.testing.assert_array_equal(back.x_train, SMALL.x_train)
        np.testing.assert_array_equal(back.y_train, SMALL.y_train)


def test_text_and_single_arrays_are_refused(tmp_path):
    for name, option in (("mnist", ""), ("cinic10", " --source FOLDER")):
        (tmp_path / f"{name}.npz").write_text("<html>not found</html>")
        with pytest.raises(
            DatasetError, match=rf"no npz file\).*delete it .* data fetch {name}{option} --over"
        ) as caught:
            load_dataset(name, cache=tmp_path)
        assert "allow_pickle" not in str(caught.value)
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DatasetError, match="expected an npz file, got a single array"):
        load_dataset("one", cache=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cinic10"])
def test_missing_file_names_dataset_path_and_remedies(tmp_path, name):
    with pytest.raises(DatasetError) as caught:
        load_dataset(name, cache=tmp_path, fetch=False)
    parts = (f"'{name}'", str(tmp_path / f"{name}.npz"), ENVIRONMENT_VARIABLE, "x_train", "0000, 32, 32, 3)")
    for part in (*parts, f"autorank-jax data fetch {name}"):
        assert part in str(caught.value)
    assert ("--source FOLDER" in str(caught.value)) == (name == "cinic10")
    assert "\n" not in str(caught.value)


def test_unknown_name_lists_names_and_close_ones(tmp_path):
    with pytest.raises(
        DatasetError, match=r"did you mean fashion_mnist or .*known datasets: fashion_mnist_mini, synth"
    ):
        load_dataset("fashon_mnist", cache=tmp_path, fetch=False)
    with pytest.raises(DatasetError, match=r"got 'zzz'.*known datasets: .*cinic10"):
        load_dataset("zzz", cache=tmp_path, fetch=False)


@pytest.mark.parametrize("name", ["../mine", "a/b", "", ".hidden", "a b"])
def test_names_never_leave_the_folder(tmp_path, name):
    write(tmp_path)
    with pytest.raises(DatasetError, match="expected the name of a dataset, got"):
        load_dataset(name, cache=tmp_path / "sub")


def test_cache_folder_order(tmp_path, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "env"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert cache_folder() == tmp_path / "env"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert cache_folder() == tmp_path / "xdg" / "autorank_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "home" / ".cache" / "autorank_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("~/mine") == tmp_path / "home" / "mine"
    assert cache_folder() == tmp_path / "home" / ".cache" / "autorank_jax"


def test_list_says_what_is_there(tmp_path):
    write(tmp_path)
    write(tmp_path, "mnist")
    (tmp_path / ".mnist.npz.1.tmp").touch()
    rows = {row.name: row for row in available_datasets(cache=tmp_path)}
    present = {name for name, row in rows.items() if row.present}
    assert present == {"fashion_mnist_mini", "synthetic", "mnist", "mine"}
    assert set(KNOWN) < set(rows)
    assert rows["cifar10"].where == str(tmp_path / "cifar10.npz")
    assert rows["synthetic"].where == "built in"


def test_list_works_without_a_cache_folder(tmp_path):
    assert {row.name for row in available_datasets(cache=tmp_path / "none")} == {
        "fashion_mnist_mini",
        "synthetic",
        *KNOWN,
    }


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file_is_one_line(tmp_path):
    write(tmp_path).chmod(0)
    with pytest.raises(DatasetError, match="cannot be read"):
        load_dataset("mine", cache=tmp_path)


def test_trying_a_folder_leaves_everything_as_it_was(tmp_path, monkeypatch):
    check_writable(tmp_path / "some" / "deep" / "mine.npz", "mine")
    assert list(tmp_path.iterdir()) == []
    make, last = type(tmp_path).mkdir, tmp_path / "some" / "deep" / "last"

    def full(folder, *args, **how):
        if folder == last:
            make(folder.parent, parents=True)
            raise OSError(28, "No space left on device")
        return make(folder, *args, **how)

    monkeypatch.setattr(type(tmp_path), "mkdir", full)
    with pytest.raises(DatasetError, match=r"to write dataset 'mine' .*No space left .*: choose another folder"):
        check_writable(last / "mine.npz", "mine")
    assert list(tmp_path.iterdir()) == []
