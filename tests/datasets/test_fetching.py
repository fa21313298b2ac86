"""Datasets are fetched once and whole: image folders, and a process that prepares them elsewhere, here made up."""

import errno
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
import textwrap
import time

import numpy as np
import pytest
from PIL import Image

from autorank_jax import datasets
from autorank_jax.cli import main as cli
from autorank_jax.datasets import DatasetError, Known, Progress, fetch_dataset, load_dataset, tfds, tfds_worker
from autorank_jax.datasets.folders import FOLDERS
from autorank_jax.datasets.progress import Bar

CLASSES = FOLDERS["cinic10"]
SMALL_CINIC = Known((32, 32, 3), 20, 20, 10, "")


def picture(label, number, size=(32, 32), mode="RGB"):
    """An image whose pixels tell its class and number."""
    pixels = np.full((*size, 3), (20 * label, 50 * number, 7), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def tree(tmp_path):
    """The folders of CINIC-10 with two images in each class of each part."""
    for part in ("train", "valid", "test"):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "cinic" / part / name
            folder.mkdir(parents=True)
            for number in range(2):
                picture(label, number + 2 * (part == "test")).save(folder / f"n{number}.png")
    return tmp_path / "cinic"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(datasets.KNOWN, "cinic10", SMALL_CINIC)


@pytest.mark.usefixtures("small")
def test_cinic_folders_become_a_cached_dataset(tree, tmp_path):
    seen = []
    path = fetch_dataset("cinic10", source=tree, cache=tmp_path / "cache", on_progress=seen.append)
    shutil.rmtree(tree)
    data = load_dataset("cinic10", cache=tmp_path / "cache", fetch=False)
    assert path == tmp_path / "cache" / "cinic10.npz"
    assert [file.name for file in path.parent.iterdir()] == ["cinic10.npz"]
    for labels, images, first in ((data.y_train, data.x_train, 0), (data.y_test, data.x_test, 2)):
        np.testing.assert_array_equal(labels, np.repeat(np.arange(10), 2))
        expected = np.stack([20 * labels, 50 * (np.arange(20) % 2 + first), np.full(20, 7)], -1)
        np.testing.assert_array_equal(images, np.broadcast_to(expected[:, None, None], (20, 32, 32, 3)))
    assert Progress("reading train", 20, 20) in seen
    assert seen[-1].stage == "writing"


def drop_class(tree):
    shutil.rmtree(tree / "test" / "dog")


def empty_class(tree):
    for file in (tree / "train" / "frog").iterdir():
        file.rename(file.with_suffix(".txt"))


def truncate(tree):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    noise.save(tree / "train" / "cat" / "n1.png")
    content = (tree / "train" / "cat" / "n1.png").read_bytes()
    (tree / "train" / "cat" / "n1.png").write_bytes(content[: len(content) // 2])


def one_folder_down(tree):
    whole = tree.rename(tree.with_name("whole"))
    tree.mkdir()
    whole.rename(tree / "CINIC-10")


FAULTS = {
    "one folder down": (
        one_folder_down,
        r"folders train and test in .*/cinic, got CINIC-10; probably those in .*/cinic/CINIC-10 are meant",
    ),
    "an empty folder": (lambda t: [shutil.rmtree(path) for path in t.iterdir()], "train and test in .*, got none"),
    "no test part": (lambda t: shutil.rmtree(t / "test"), r"folders train and test in .*, got train, valid"),
    "a class is missing": (drop_class, r"each of airplane, .*/test, got no dog"),
    "a class too many": (lambda t: (t / "train" / "tree").mkdir(), r"/train, got also tree"),
    "an empty class": (empty_class, r"expected images \(.png, .* in .*/train/frog, got none"),
    "no image": (lambda t: (t / "test" / "cat" / "n0.png").write_text("<html>"), "cat/n0.png, got one that cannot be"),
    "half an image": (truncate, r"cat/n1.png, got one that cannot be read \(.*probably truncated"),
    "another size": (
        lambda t: picture(0, 0, (28, 28)).save(t / "train" / "truck" / "n1.png"),
        r"of one size, got \(32, 32\) in .*n0.png and \(28, 28\) in .*truck/n1.png",
    ),
    "16 bits": (
        lambda t: Image.fromarray(np.zeros((32, 32), np.uint16)).save(t / "test" / "cat" / "n0.png"),
        "unsupported mode I",
    ),
    "one image too few": (
        lambda t: (t / "test" / "cat" / "n0.png").unlink(),
        r"expected 20 images in .*/test, got 19; probably an archive that was not extracted to its end",
    ),
    "the first of another size": (
        lambda t: picture(0, 0, (28, 30)).save(t / "train" / "airplane" / "n0.png"),
        r"expected images of 32 × 32 pixels, got 28 × 30 in .*/airplane/n0.png",
    ),
}


@pytest.mark.usefixtures("small")
def test_a_cache_folder_that_cannot_be_written_is_told_before_the_work(tree, tmp_path):
    (tmp_path / "file").write_text("")
    seen = []
    with pytest.raises(DatasetError, match=r"to write dataset 'cinic10' to .*; a file lies where its folder"):
        fetch_dataset("cinic10", source=tree, cache=tmp_path / "file" / "cache", on_progress=seen.append)
    assert not seen


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_folders_are_one_line_and_change_nothing(fault, tree, tmp_path):
    break_it, message = FAULTS[fault]
    cached = fetch_dataset("cinic10", source=tree, cache=tmp_path / "cache")
    before = cached.read_bytes()
    break_it(tree)
    with pytest.raises(DatasetError, match=message) as caught:
        fetch_dataset("cinic10", source=tree, cache=tmp_path / "cache", overwrite=True)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("dataset 'cinic10'")
    assert cached.read_bytes() == before
    assert list(cached.parent.iterdir()) == [cached]


@pytest.mark.parametrize(("modes", "shape"), [(("L", "1"), (6, 5)), (("L", "RGB"), (6, 5, 3)), (("P",), (6, 5, 3))])
def test_any_image_folders_keep_their_colours(tmp_path, modes, shape):
    for part in ("train", "test"):
        for label in range(3):
            (tmp_path / part / f"class{label}").mkdir(parents=True)
            for number, mode in enumerate(modes):
                picture(label, number, (6, 5), mode).save(tmp_path / part / f"class{label}" / f"{number}.png")
    data = load_dataset(fetch_dataset("mine", source=tmp_path, cache=tmp_path / "c").stem, cache=tmp_path / "c")
    assert data.x_train.shape == (3 * len(modes), *shape)
    assert data.classes == 3


def test_what_is_there_is_not_fetched_again(tmp_path, monkeypatch):
    path = datasets.save_dataset(tmp_path / "mine.npz", datasets.synthetic(train=20, test=10))
    monkeypatch.setattr(datasets, "read_from_tfds", lambda *_, **__: pytest.fail("it was there"))
    assert fetch_dataset("mine", cache=tmp_path) == path
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match=r"cannot be read .*put it there again"):
        fetch_dataset("mine", cache=tmp_path)


def test_names_and_sources_that_make_no_sense(tmp_path):
    for name in ("../mine", "a/b", ""):
        with pytest.raises(DatasetError, match="expected the name of a dataset"):
            fetch_dataset(name, cache=tmp_path)
    with pytest.raises(DatasetError, match="needs none"):
        fetch_dataset("synthetic", cache=tmp_path)
    with pytest.raises(DatasetError, match=r"extract its archive to FOLDER and give .* --source FOLDER"):
        fetch_dataset("cinic10", cache=tmp_path)
    (tmp_path / "archive.tar").touch()
    with pytest.raises(DatasetError, match=r"source: expected a folder, got a file at .*archive.tar; probably an arch"):
        fetch_dataset("cinic10", source=tmp_path / "archive.tar", cache=tmp_path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DatasetError, match=r'package tensorflow_datasets .*pip install "autorank-jax\[tfds\]".*an npz'):
        load_dataset("mnist", cache=tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "0.png").touch()
    with pytest.raises(DatasetError, match=r'expected the package Pillow, got none: pip install "autorank-jax\[cli\]"'):
        fetch_dataset("mine", source=tmp_path, cache=tmp_path)


WORKER = """
import json, sys, time
import numpy as np
def tell(kind, **content):
    sys.stdout.buffer.write(json.dumps({"kind": kind, **content}).encode() + b"\\n")
    sys.stdout.buffer.flush()
ARRAYS = {"x_train": np.arange(240, dtype=np.uint8).reshape(15, 4, 4), "y_train": np.arange(15, dtype=np.int32) % 3,
          "x_test": np.zeros((3, 4, 4), np.uint8), "y_test": np.arange(3, dtype=np.int32)}
def send(part=1.0):
    tell("arrays", arrays={k: [str(v.dtype), v.shape] for k, v in ARRAYS.items()}, classes=3)
    content = b"".join(v.tobytes() for v in ARRAYS.values()) + b"end\\n"
    sys.stdout.buffer.write(content[:int(part * len(content))])
    sys.stdout.buffer.flush()
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A function that puts a program in the place of the one that runs TensorFlow Datasets."""

    def put(program):
        (tmp_path / "worker.py").write_text(WORKER + textwrap.dedent(program))
        monkeypatch.setattr(tfds, "WORKER", tmp_path / "worker.py")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
        return tmp_path / "cache"

    return put


def test_what_the_worker_sends_is_cached(worker, capsys):
    cache = worker("tell('progress', stage='preparing train', done=3, total=15)\nsend()\ntime.sleep(60)")
    data = load_dataset("mine", cache=cache)
    np.testing.assert_array_equal(data.x_train.ravel(), np.arange(240))
    np.testing.assert_array_equal(data.y_train, np.arange(15) % 3)
    assert data.classes == 3
    assert [file.name for file in cache.iterdir()] == ["mine.npz"]
    assert "mine: preparing train\n" in capsys.readouterr().err


STOPS = {
    "it never gets an answer": (
        "tell('connecting', host='there')\ntime.sleep(60)",
        r"from there, got no connection \(",
    ),
    "it hangs at the second": (
        "tell('connecting', host='a')\ntell('connecting', host='b')\ntell('connected', host='a')\ntime.sleep(60)",
        r"from b, got no connection",
    ),
    "it crashes": ("sys.exit('out of\\nluck')", r"got exit code 1, luck; put an npz file"),
    "it is killed": ("import os\nos.kill(os.getpid(), 9)", r"got exit code -9"),
    "it ends in a line": ("sys.stdout.buffer.write(b'{\"kind\":')", "got exit code 0"),
    "it ends in the arrays": ("send(0.5)", "got exit code 0"),
    "it sends wrong labels": ("ARRAYS['y_test'] -= 5\nsend()", "expected labels in 0 .."),
    "the disk is full": (
        "tell('error', error='disk', text='No space', names=[])",
        "No space: choose another folder with TFDS_DATA_DIR",
    ),
    "a package is missing": (
        "tell('error', error='package', text='cv2', names=[])",
        r'the package cv2 to prepare it, got none; pip install "autorank-jax\[tfds\]" brings what most datasets need',
    ),
    "the name is unknown": (
        "tell('error', error='unknown', text='', names=['minee'])",
        r"expected a known dataset or the file .*mine.npz, got 'mine'; .*did you mean minee",
    ),
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_worker_that_fails_is_one_line_and_leaves_nothing(stop, worker, monkeypatch):
    program, message = STOPS[stop]
    monkeypatch.setattr(tfds, "PATIENCE", 0.5)
    cache = worker(program)
    start = time.monotonic()
    with pytest.raises(DatasetError, match=message) as caught:
        load_dataset("mine", cache=cache)
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())


def test_an_unknown_name_with_a_folder_may_be_that_of_images(worker, tmp_path):
    cache = worker("tell('error', error='unknown', text='', names=[])")
    (tmp_path / "mine" / "images" / "train").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"or the file .*mine.npz, or folders train and test in .*/mine, got 'mine'"):
        fetch_dataset("mine", source=tmp_path / "mine", cache=cache)
    with pytest.raises(DatasetError, match=r"or the file .*mine.npz, got 'mine'"):
        fetch_dataset("mine", cache=cache)


def test_an_interrupt_stops_the_worker(worker):
    cache = worker("import os\ntell('progress', stage=str(os.getpid()), done=0, total=0)\ntime.sleep(60)")
    pids, start = [], time.monotonic()

    def interrupt(progress):
        if progress.stage.isdigit():
            pids.append(int(progress.stage))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_dataset("mine", cache=cache, on_progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert time.monotonic() - start < 20
    assert not cache.exists()


def test_no_usable_temporary_folder_is_one_line(worker, tmp_path, monkeypatch):
    cache = worker("send()")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(
        DatasetError, match=r"^dataset 'mine': .* No such file .*: choose another folder with TMPDIR$"
    ) as caught:
        load_dataset("mine", cache=cache)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_a_full_disk_is_one_line(worker, monkeypatch):
    def fail(file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = worker("send()")
    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(DatasetError, match=r"to write dataset 'mine' to .*No space left .*: choose another folder"):
        load_dataset("mine", cache=cache)
    assert not list(cache.iterdir())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ModuleNotFoundError("No module named 'cv2'", name="cv2"), "package"),
        (ImportError("cannot import name 'runtime_version' from 'google.protobuf'", name="google.protobuf"), "other"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (OSError(errno.EDQUOT, "over quota"), "disk"),
        (OSError("Not enough disk space. Needed: 3 GiB"), "disk"),
        (type("ResourceExhaustedError", (Exception,), {})("/data/mnist.tfrecord; No space left on device"), "disk"),
        (type("ResourceExhaustedError", (Exception,), {})("OOM when allocating tensor"), "other"),
        (type("NonMatchingChecksumError", (Exception,), {})("wrong checksum:\n* Expected: 1"), "checksum"),
        (AssertionError("Manual directory x does not exist or is empty."), "manual"),
        (ConnectionRefusedError(111, "Connection refused"), "network"),
        (type("DownloadError", (Exception,), {})("HTTP code: 404"), "network"),
        (tfds_worker.Unsuitable("images, got text"), "unsuitable"),
        (RuntimeError("a\nb"), "other"),
    ],
)
def test_errors_of_the_worker_are_told_apart(error, kind):
    try:
        raise ValueError("outer") from error
    except ValueError as outer:
        wrapped = outer
    assert tfds_worker.explain(error, "mine")["error"] == kind
    for found in (error, wrapped) if kind not in ("manual", "unsuitable") else ():
        told = tfds_worker.explain(found, "mine")
        assert told["error"] == kind
        assert "\n" not in told["text"]
        assert json.dumps(told)
        if kind == "disk":
            assert str(error) in told["text"]


def test_a_package_is_named_though_its_error_is_raised_again_without_its_name():
    again = ModuleNotFoundError("No module named 'cv2'\nFailed importing cv2.")
    again.__cause__ = ModuleNotFoundError("No module named 'cv2'", name="cv2")
    assert tfds_worker.explain(again, "mine")["text"] == "cv2"


def test_bar_on_a_terminal_and_in_a_file():
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    for stream in (terminal, file := io.StringIO()):
        with Bar("mine", stream) as bar:
            for done in (0, 1, 2):
                bar(Progress("reading", done, 2))
            bar(Progress("writing", 0, 0))
    assert file.getvalue() == "mine: reading\nmine: writing\n"
    lines = terminal.getvalue().split("\n")
    assert [len(line.split("\r")) for line in lines] == [4, 2, 1]
    assert "50 % of 2" in lines[0]


def test_command(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(datasets.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setitem(datasets.KNOWN, "cinic10", SMALL_CINIC)
    assert cli.main(["run", "--dataset", "cinic10"]) == 2
    assert "autorank-jax data fetch cinic10 --source FOLDER" in capsys.readouterr().err
    assert cli.main(["data", "fetch", "cinic10", "--source", str(tree)]) == 0
    assert "cinic10.npz is complete" in capsys.readouterr().out
    (tree / "train" / "cat" / "n0.png").write_text("no image")
    assert cli.main(["data", "fetch", "cinic10", "--source", str(tree)]) == 0
    assert cli.main(["data", "fetch", "cinic10", "--source", str(tree), "--overwrite"]) == 2
    assert "autorank-jax: dataset 'cinic10': expected an image at" in capsys.readouterr().err
    assert cli.main(["data", "fetch"]) == 2
    assert "expected NAME, got none (see autorank-jax data fetch --help)" in capsys.readouterr().err
    assert cli.main(["data", "list"]) == 0
    assert "built in" in capsys.readouterr().out
