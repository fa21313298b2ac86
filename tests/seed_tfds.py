"""Write the archives of MNIST and Fashion-MNIST into the download cache of TensorFlow Datasets: run by `test_tfds.py`.

Arguments: the folder of TensorFlow Datasets, the folder with the arrays as npz files, the names.
"""

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import resource


def idx(array):
    """Return an array in the IDX format: a magic number, the lengths, the bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def main(root, arrays, names):
    for name in names:
        with np.load(Path(arrays) / f"{name}.npz") as stored:
            for url, info in tfds.builder(name, data_dir=root).url_infos.items():
                part = "test" if "t10k" in info.filename else "train"
                content = idx(stored[f"{'x' if 'images' in info.filename else 'y'}_{part}"])
                folder = Path(root) / "downloads" / name / resource.Resource(url=url).relative_download_dir
                file = folder / resource.get_dl_fname(url, info.checksum)
                folder.mkdir(parents=True, exist_ok=True)
                file.write_bytes(gzip.compress(content, 1))
                resource.write_info_file(
                    url=url, path=file, dataset_name=name, original_fname=info.filename, url_info=info
                )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
