"""A program of its own: prepare a dataset with TensorFlow Datasets and send it through standard output.

`tfds.py` starts it, so that TensorFlow stays out of the process in which JAX runs, and so that it can be stopped. It
knows nothing of this package. Standard output carries one JSON object a line; the line of kind "arrays" names the
arrays `x_train, y_train, x_test, y_test`, whose bytes follow. It ends when standard input is closed: with its parent.
"""

import contextlib
import difflib
import errno
import json
import os
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

CONNECT_SECONDS, READ_SECONDS = 5.0, 30.0
BATCH = 500
NETWORK = {"RequestException", "URLError", "DownloadError", "TimeoutError", "ConnectionError", "gaierror"}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_SPACE_TEXTS = ("No space left", "Not enough disk space", "Disk quota exceeded")  # TensorFlow raises no OSError

Tell = Callable[..., None]  # tell("progress", stage=..., done=..., total=...)


class Unsuitable(Exception):  # noqa: N818  it is an answer
    """What makes a dataset unfit: its kind, and what was expected and got."""


def main(name: str, source: str) -> None:
    """Prepare a dataset and send it, or say why not."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what others print goes to standard error
    lock = threading.Lock()

    def tell(kind: str, **content: Any) -> None:
        with lock:
            out.write(json.dumps({"kind": kind, **content}).encode() + b"\n")
            out.flush()

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        arrays, classes = prepare(name, source or None, tell)
    except Exception as error:
        tell("error", **explain(error, name))
        return
    tell("arrays", arrays={key: [str(x.dtype), x.shape] for key, x in arrays.items()}, classes=classes)
    for array in arrays.values():
        out.write(array.tobytes())
    out.write(b"end\n")
    out.flush()


def prepare(name: str, source: str | None, tell: Tell) -> tuple[dict[str, np.ndarray], int]:
    """Prepare a dataset in the data folder of TensorFlow Datasets, if it is not there, and read it.

    Args:
        name: in the catalogue.
        source: folder of downloaded archives, which are then not downloaded.
        tell: takes reports.

    Returns:
        The arrays by name, images without an axis of one colour; the number of classes.
    """
    _report_bars(tell)
    import tensorflow_datasets as tfds  # noqa: PLC0415  optional

    root = os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets"))
    downloads = os.path.join(root, "downloads")
    builder = tfds.builder(name, data_dir=root)
    image, label, classes = _features(tfds, builder)
    with _bounded_waiting(tell):
        builder.download_and_prepare(
            download_dir=downloads,
            download_config=tfds.download.DownloadConfig(
                manual_dir=source,
                # archives of the same name would overwrite each other's contents
                extract_dir=os.path.join(downloads, "extracted", name),
            ),
        )
    arrays = {}
    for part, split in _splits(builder).items():
        total = builder.info.splits[split].num_examples
        batches = tfds.as_numpy(builder.as_dataset(split=split, batch_size=BATCH, shuffle_files=False))
        images, labels = [], []
        for batch in batches:
            images.append(batch[image])
            labels.append(batch[label])
            tell("progress", stage=f"converting {part}", done=sum(map(len, labels)), total=total)
        x = np.concatenate(images)
        arrays[f"x_{part}"] = x[..., 0] if x.ndim == 4 and x.shape[-1] == 1 else x
        arrays[f"y_{part}"] = np.concatenate(labels).astype(np.int32)
    return arrays, classes


def _features(tfds: Any, builder: Any) -> tuple[str, str, int]:
    """Return the names of image and label, and the number of classes, of a dataset of labelled images of one size."""
    features, keys = builder.info.features, builder.info.supervised_keys
    flat = isinstance(keys, tuple) and len(keys) == 2 and all(isinstance(key, str) and key in features for key in keys)
    image, label = (features[key] for key in keys) if flat else (None, None)
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        got = ", ".join(f"{key}: {type(value).__name__}" for key, value in features.items())
        raise Unsuitable(f"images with one label each, got {got}")
    if None in image.shape or np.dtype(image.np_dtype) != np.uint8:
        raise Unsuitable(f"images of one size as uint8, got {np.dtype(image.np_dtype)} of shape {tuple(image.shape)}")
    return *keys, label.num_classes


def _splits(builder: Any) -> dict[str, str]:
    """Return the splits to train and to test with; validation examples serve where there is no test split."""
    splits = set(builder.info.splits)
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise Unsuitable(f"the splits train and test, got {', '.join(sorted(splits)) or 'none'}")
    return {"train": "train", "test": test}


def _report_bars(tell: Tell) -> None:
    """Make the progress bars of TensorFlow Datasets, not yet imported, report to the parent in place of drawing."""
    import tqdm.auto  # noqa: PLC0415  optional

    class Reporting(tqdm.auto.tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            silent = open(os.devnull, "w")  # noqa: SIM115  the bar keeps it
            super().__init__(*args, **{**options, "file": silent, "mininterval": 0.2})

        def display(self, *_: Any, **__: Any) -> None:
            stage = {"Dl Size...": "downloading (MiB)"}.get(self.desc.removesuffix(": "), "")
            if " examples" in self.desc:
                stage = self.desc.split("...")[0].replace("Generating", "preparing").removesuffix(" examples")
            if stage:
                tell("progress", stage=stage, done=int(self.n), total=int(self.total or 0))

    tqdm.auto.tqdm = Reporting


@contextlib.contextmanager
def _bounded_waiting(tell: Tell) -> Iterator[None]:
    """Give up connections that do not answer, where TensorFlow Datasets would try again for minutes."""
    import requests  # noqa: PLC0415  optional

    send = requests.adapters.HTTPAdapter.send

    def limited(self: Any, request: Any, **options: Any) -> Any:
        host = urllib.parse.urlsplit(request.url).hostname
        self.max_retries = type(self.max_retries)(total=1, connect=0, backoff_factor=0.5)
        tell("connecting", host=host)
        response = send(self, request, **{**options, "timeout": (CONNECT_SECONDS, READ_SECONDS)})
        tell("connected", host=host)
        return response

    with mock.patch.object(requests.adapters.HTTPAdapter, "send", limited):
        yield


def explain(error: BaseException, name: str) -> dict[str, Any]:
    """Return which kind of mistake an exception is, and its text in one line."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    classes = {kind.__name__ for one in chain for kind in type(one).__mro__}
    missing = next((one.name for one in chain if isinstance(one, ModuleNotFoundError) and one.name), None)
    text, full = _line(error), next(filter(_is_full, chain), None)
    kinds = {
        "unsuitable": "Unsuitable" in classes,
        "unknown": "DatasetNotFoundError" in classes,
        "package": "ModuleNotFoundError" in classes,
        "disk": full is not None,
        "checksum": "NonMatchingChecksumError" in classes,
        "manual": "Manual directory" in text,
        "network": bool(classes & NETWORK),
    }
    kind = next((kind for kind, holds in kinds.items() if holds), "other")
    texts = {
        "unsuitable": str(error),
        "package": missing or text,
        "disk": _line(full or error),
        "network": " ".join(str(chain[-1]).split()),
    }
    return {"error": kind, "text": texts.get(kind, text), "names": _similar(name) if kind == "unknown" else []}


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _is_full(error: BaseException) -> bool:
    """Return whether an exception says that there is no room on the disk."""
    says = any(text in str(error) for text in NO_SPACE_TEXTS)
    return says or (isinstance(error, OSError) and error.errno in NO_SPACE)


def _similar(name: str) -> list[str]:
    import tensorflow_datasets as tfds  # noqa: PLC0415  optional

    return difflib.get_close_matches(name, tfds.list_builders(with_community_datasets=False), n=3)


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
