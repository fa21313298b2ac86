"""TensorFlow Datasets itself: the real sets out of archives and without a network; its mistakes in one line each."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from autorank_jax.datasets import DatasetError, cache_folder, fetch_dataset, load_dataset, read_dataset, tfds

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.tfds,
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("tensorflow_datasets"), reason="needs the extra tfds"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """TensorFlow Datasets has an empty folder and no network."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there


@pytest.fixture
def arrays():
    """The folder of the real sets' arrays."""
    return cache_folder()


def seed(*arguments):
    """Write archives."""
    subprocess.run([sys.executable, HERE / "seed_tfds.py", *map(str, arguments)], check=True, capture_output=True)


def check_equal(path, name, arrays):
    """Check that a dataset holds the examples of the published one; TensorFlow Datasets shuffles them."""
    fetched, real = read_dataset(path, name=name), read_dataset(arrays / f"{name}.npz", name=name)
    for part in ("train", "test"):
        rows = []
        for data in (fetched, real):
            x, y = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
            assert x.shape == getattr(real, f"x_{part}").shape
            labelled = np.concatenate([x.reshape(len(x), -1), y[:, None].astype(np.uint8)], axis=1)
            rows.append(np.sort(np.ascontiguousarray(labelled).view(f"V{labelled.shape[1]}").ravel()))
        assert (rows[0] == rows[1]).all()


def need(arrays, name):
    if not (arrays / f"{name}.npz").is_file():
        pytest.skip(f"needs the full set: $AUTORANK_JAX_DATA/{name}.npz")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_downloaded_set_is_prepared_offline_after_an_interrupt(arrays, name, tmp_path):
    need(arrays, name)
    seed(tmp_path / "tfds", arrays, name)
    stages = []

    def interrupt(progress):
        if progress.stage == "preparing train" and progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_dataset(name, cache=tmp_path / "cache", on_progress=interrupt)
    assert not (tmp_path / "cache").exists()
    path = fetch_dataset(name, cache=tmp_path / "cache", on_progress=stages.append)
    check_equal(path, name, arrays)
    assert [stage for n, (stage, *_) in enumerate(stages) if n == 0 or stages[n - 1].stage != stage][-5:] == [
        "preparing train", "preparing test", "converting train", "converting test", "writing",
    ]  # fmt: skip


@pytest.mark.slow
def test_archives_of_a_folder_are_prepared_apart_from_others_of_the_same_name(arrays, tmp_path, monkeypatch):
    need(arrays, "mnist")
    seed(tmp_path / "tfds", arrays, "mnist", tmp_path / "archives")
    others = tmp_path / "tfds" / "downloads" / "extracted"
    others.mkdir(parents=True)
    for archive in (tmp_path / "archives").iterdir():
        (others / f"GZIP.{archive.name}").write_bytes(b"of Fashion-MNIST, say")
    monkeypatch.setattr(tfds, "WORKER", HERE / "trusting_worker.py")
    check_equal(fetch_dataset("mnist", source=tmp_path / "archives", cache=tmp_path / "cache"), "mnist", arrays)


def test_wrong_archives_are_refused(tmp_path):
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte.gz").write_bytes(b"half")
    with pytest.raises(DatasetError, match=r"expected the published archives, got .*checksum"):
        fetch_dataset("mnist", source=tmp_path, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("patience", [1.0, 600.0])
def test_a_network_that_never_answers_is_given_up(patience, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for variable in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(variable, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(tfds, "PATIENCE", patience)
        start = time.monotonic()
        with pytest.raises(DatasetError, match="got no connection"):
            load_dataset("mnist", cache=tmp_path / "cache")
        assert time.monotonic() - start < 45


MISTAKES = {
    "mnist": r"'mnist': expected to download it from \S+, got no connection .*cache/mnist.npz.* data fetch mnist --so",
    "kmnst": r"got 'kmnst'; did you mean kmnist or mnist\?",
    "imdb_reviews": "expected images with one label each, got text: Text, label: ClassLabel",
    "cats_vs_dogs": r"expected images of one size as uint8, got uint8 of shape \(None, None, 3\)",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_within_seconds(name, tmp_path):
    start = time.monotonic()
    with pytest.raises(DatasetError, match=MISTAKES[name]) as caught:
        load_dataset(name, cache=tmp_path / "cache")
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


MOCKED = """
from unittest import mock
import numpy as np
import tensorflow_datasets as tfds
from autorank_jax.datasets import tfds_worker

def prepared(name, *splits):
    known = tfds.core.SplitInfo("any", shard_lengths=[7], num_bytes=1, filename_template=None)
    splits = dict.fromkeys(splits, known)  # elsewhere they are known once a dataset is prepared
    with tfds.testing.mock_data(num_examples=7), mock.patch.object(tfds.core.DatasetInfo, "splits", splits):
        return tfds_worker.prepare(name, None, lambda kind, **content: told.append(content))

for name, classes, shape, test in (("cifar100", 100, (32, 32, 3), "test"), ("kmnist", 10, (28, 28), "validation")):
    told = []
    arrays, found = prepared(name, "train", test)
    assert found == classes, found
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((7, *shape), np.uint8, (7,), np.int32), (x.shape, y.dtype)
        assert 0 <= y.min() <= y.max() < classes
    assert told[-1] == {"stage": "converting test", "done": 7, "total": 7}, told
try:
    prepared("kmnist", "train")
except tfds_worker.Unsuitable as error:
    assert str(error) == "the splits train and test, got train"
else:
    raise AssertionError("there is nothing to test with")
"""


def test_further_names_by_the_mock_of_tensorflow_datasets():
    done = subprocess.run(
        [sys.executable, "-c", MOCKED],
        env={**os.environ, **tfds.QUIET},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
