"""The worker, with a TensorFlow Datasets that takes any archive for the published one: run by `test_tfds.py`.

Archives made of the arrays hold what the published ones hold, but are compressed otherwise.
"""

import runpy
from pathlib import Path
from unittest import mock

from tensorflow_datasets.core.download import checksums

import autorank_jax

WORKER = Path(autorank_jax.__file__).parent / "datasets" / "tfds_worker.py"

with mock.patch.object(checksums.UrlInfo, "__eq__", return_value=True):
    runpy.run_path(str(WORKER), run_name="__main__")
