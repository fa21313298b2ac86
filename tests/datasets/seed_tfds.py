"""Write the archives of real datasets for TensorFlow Datasets, out of their arrays: run by `test_tfds.py`.

Arguments: the folder of TensorFlow Datasets, the folder with the arrays as npz files, the name, and a folder for the
archives under their own names; without that, they go into the download cache, as if they had been downloaded.
"""

import gzip
import io
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import resource


def idx(array):
    """Return an array in the IDX format, compressed: a magic number, the lengths, the bytes."""
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes(), 1)


def cifar(arrays):
    """Return the archive of CIFAR-10: for every image its label, then its colours one after the other."""
    buffer = io.BytesIO()
    labels = "airplane automobile bird cat deer dog frog horse ship truck".replace(" ", "\n")
    files = {"batches.meta.txt": labels.encode()}
    for part, names in (("train", [f"data_batch_{n}.bin" for n in range(1, 6)]), ("test", ["test_batch.bin"])):
        pixels = arrays[f"x_{part}"].transpose(0, 3, 1, 2).reshape(len(arrays[f"x_{part}"]), -1)
        rows = np.concatenate([arrays[f"y_{part}"][:, None].astype(np.uint8), pixels], axis=1)
        files |= {name: chunk.tobytes() for name, chunk in zip(names, np.split(rows, len(names)), strict=True)}
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def content_of(filename, arrays):
    """Return the content of an archive by its published name."""
    if "cifar" in filename:
        return cifar(arrays)
    return idx(arrays[f"{'x' if 'images' in filename else 'y'}_{'test' if 't10k' in filename else 'train'}"])


def main(root, stored, name, folder=None):
    arrays = dict(np.load(Path(stored) / f"{name}.npz"))
    for url, info in tfds.builder(name, data_dir=root).url_infos.items():
        if name == "cifar10" and "cifar-10-binary" not in url:
            continue
        if folder:
            file = Path(folder) / info.filename
        else:
            cached = Path(root) / "downloads" / name / resource.Resource(url=url).relative_download_dir
            file = cached / resource.get_dl_fname(url, info.checksum)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content_of(info.filename, arrays))
        if not folder:
            resource.write_info_file(url=url, path=file, dataset_name=name, original_fname=info.filename, url_info=info)


if __name__ == "__main__":
    main(*sys.argv[1:])
