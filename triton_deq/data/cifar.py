"""CIFAR-10 (Krizhevsky, 2009) from its official Python batches."""

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .split import Split

FOLDER = "cifar-10-batches-py"

CHECKSUMS = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3c5",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""MD5 of each official file."""

TEST = "test_batch"

# What builds an array in a pickle, of NumPy 1 and 2. The batches need nothing else.
_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def cifar10(folder: str | Path, checksums: Mapping[str, str] | None = CHECKSUMS) -> Split:
    """The 50,000 images of the five data batches to train on; the 10,000 of the test batch validate.

    Images are uint8 `[n, 3, 32, 32]`, labels int64 `[n]`. The files are pickles, which are read without
    running code: a batch may hold arrays, strings, numbers, lists and dicts, and nothing else.

    Args:
        folder: with `data_batch_1` … `data_batch_5` and `test_batch`, or the one that has it as
            `cifar-10-batches-py`; nothing is downloaded.
        checksums: the MD5 of each file; None: not compared.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or another one than it should be.
    """
    place = Path(folder)
    if (place / FOLDER).is_dir():
        place = place / FOLDER
    for name in CHECKSUMS:
        if not (place / name).is_file():
            raise FileNotFoundError(
                f"there is no file {place / name}: unpack cifar-10-python.tar.gz and give its {FOLDER}, "
                f"which has {', '.join(CHECKSUMS)}"
            )
    held = {name: _read(place / name, None if checksums is None else checksums[name]) for name in CHECKSUMS}
    train = [held[name] for name in CHECKSUMS if name != TEST]
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    return Split(images, labels, *held[TEST])


def _read(path: Path, checksum: str | None) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch."""
    content = path.read_bytes()
    if checksum is not None:
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != checksum:
            raise ValueError(
                f"{path} has the MD5 {found} and {len(content):,} bytes, and the official file has "
                f"{checksum}: it is damaged or another one; unpack cifar-10-python.tar.gz anew"
            )
    try:
        batch = _Arrays(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # what a damaged pickle raises is not documented
        raise ValueError(
            f"{path} is not a batch of CIFAR-10 ({error}): unpack cifar-10-python.tar.gz anew"
        ) from error
    return _tensors(path, batch)


class _Arrays(pickle.Unpickler):
    """Reads arrays and plain Python; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a batch has no need of")
        return _ALLOWED[module, name]


def _tensors(path: Path, batch: Any) -> tuple[Tensor, Tensor]:
    """The two that a batch is to have, of the right kind and shape."""
    data, labels = (
        (batch.get(name) for name in ("data", "labels")) if isinstance(batch, dict) else (None, None)
    )
    remedy = "unpack cifar-10-python.tar.gz anew"
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path} has data {found}, not uint8 (n, 3072): {remedy}")
    if not isinstance(labels, list) or len(labels) != len(data):
        found = f"{len(labels)} labels" if isinstance(labels, list) else f"labels {type(labels).__name__}"
        raise ValueError(f"{path} has {found}, not a list of {len(data)}, one for each image: {remedy}")
    wrong = next((label for label in labels if type(label) is not int or not 0 <= label < 10), None)
    if wrong is not None:
        raise ValueError(f"{path} has the label {wrong!r}, and labels run from 0 to 9: {remedy}")
    images = torch.from_numpy(data.reshape(-1, 3, 32, 32).copy())
    return images, torch.tensor(labels, dtype=torch.int64)
