"""ImageNet, or any other images in a folder for each class, in batches that worker processes decode."""

import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from ..checks import check_count
from .augment import IMAGENET, Augmentation
from .batches import Batch, Batches, check_share
from .image_folders import BrokenImage, ImageFolder, Key, Loaded, Loading, check_on_error, collate


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Images in folders, as `ImageData`. Make it with `imagenet`.

    Attributes:
        name: for logs.
        folders: to train on, and to validate.
        augmentation: the normalisation, on the batch's device.
        workers: processes that decode; 0: this one.
        on_error: "raise" or "skip": what a broken image does.
    """

    name: str
    folders: tuple[ImageFolder, ImageFolder]
    augmentation: Augmentation
    workers: int
    on_error: str

    @property
    def classes(self) -> int:
        return len(self.folders[0].classes)

    @property
    def size(self) -> tuple[int, int]:
        return self.folders[0].size, self.folders[0].size

    @property
    def training(self) -> int:
        return len(self.folders[0])

    @property
    def validation(self) -> int:
        return len(self.folders[1])

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the files' names and the images' size."""
        parts = (self.augmentation, self.size, *(folder.fingerprint for folder in self.folders))
        return sha256(repr(parts).encode()).hexdigest()[:16]

    def train(
        self, batch: int, seed: int, device: torch.device | str, rank: int = 0, world: int = 1
    ) -> Batches:
        return _FolderBatches(self, batch, seed, device, rank, world)

    def valid(self, batch: int, device: torch.device | str, rank: int = 0, world: int = 1) -> Iterable[Batch]:
        check_share(batch, rank, world)
        return _Validation(self, batch // world, torch.device(device), rank, world)


def imagenet(
    folder: str | Path,
    size: int = 224,
    *,
    workers: int = 4,
    on_error: str = "raise",
    seed: int = 0,
) -> FolderImages:
    """`folder/train/CLASS/*.JPEG` to train on, and `folder/val/CLASS/*.JPEG` to validate.

    Args:
        folder: of both.
        size: height and width of the images that come out; how they are cut is told in `ImageFolder`.
        workers: processes that decode; 0: this one.
        on_error: of an image that cannot be decoded: "raise", or "skip", which leaves it out of its batch and
            warns once.
        seed: of the random cuts.

    Raises:
        FileNotFoundError, ValueError: a folder that is missing or empty; classes that differ.
        ImportError: Pillow is not installed.
    """
    check_count("workers", workers, least=0)
    check_on_error(on_error)
    place = Path(folder)
    for part in ("train", "val"):
        if not (place / part).is_dir():
            raise FileNotFoundError(
                f"there is no folder {place / part}: the layout is train/CLASS/*.JPEG and val/CLASS/*.JPEG"
            )
    train = ImageFolder(place / "train", size, augmented=True, seed=seed)
    valid = ImageFolder(place / "val", size)
    if train.classes != valid.classes:
        lacking = [
            f"{theirs.folder} lacks {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}"
            for ours, theirs in ((train, valid), (valid, train))
            if (missing := sorted(set(ours.classes) - set(theirs.classes)))
        ]
        raise ValueError(f"the classes differ: {'; '.join(lacking)}; give both the same folders")
    return FolderImages(place.resolve().name, (train, valid), IMAGENET, workers, on_error)


class _Reader:
    """What training and validation share: a loader of its own, and what becomes of broken images."""

    def __init__(self, data: FolderImages, device: torch.device):
        self._data, self._device = data, device
        self._told: set[str] = set()

    def loader(self, images: ImageFolder, order: Any) -> Iterator[Loaded]:
        workers = self._data.workers
        return iter(
            DataLoader(
                Loading(images),
                batch_sampler=order,
                num_workers=workers,
                collate_fn=collate,
                pin_memory=self._device.type == "cuda",
                worker_init_fn=_leave_signals,
                # Of its own, because the loader seeds its workers with a draw, and nobody else's may change.
                generator=torch.Generator(),
                prefetch_factor=4 if workers else None,
            )
        )

    def batch(self, loaded: Loaded) -> Batch | None:
        """The batch on its device, normalised; None where every image is broken."""
        for sentence in loaded.broken:
            if self._data.on_error == "raise":
                raise BrokenImage(f"{sentence}: replace it, or leave such images out with on_error='skip'")
            if sentence not in self._told:
                self._told.add(sentence)
                warnings.warn(f"{sentence}: it is left out", stacklevel=2)
        if not len(loaded.labels):
            return None
        images = self._data.augmentation.normalise(loaded.images.to(self._device, non_blocking=True))
        return images, loaded.labels.to(self._device, non_blocking=True)


class _FolderBatches(Batches):
    """Batches to train on. The workers are ahead; what has been taken is what counts."""

    def __init__(
        self, data: FolderImages, batch: int, seed: int, device: torch.device | str, rank: int, world: int
    ):
        super().__init__(len(data.folders[0]), batch, seed, rank, world)
        self._reader = _Reader(data, torch.device(device))
        self._images = data.folders[0]
        self._loaded: Iterator[Loaded] | None = None

    def _fetch(self, epoch: int, place: int) -> Batch:
        if self._loaded is None:
            self._loaded = self._reader.loader(self._images, _Onwards(self, epoch, place))
        for _ in range(len(self)):
            batch = self._reader.batch(next(self._loaded))
            if batch is not None:
                return batch
            self._epoch, self._position = self.following(self._epoch, self._position)
        raise BrokenImage(f"no image in {self._images.folder} can be decoded: copy it anew")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.close()

    def close(self) -> None:
        self._loaded = None  # its workers end with it


class _Onwards(Sampler):
    """The keys of every batch from a place on, without end."""

    def __init__(self, batches: Batches, epoch: int, place: int):
        self._batches, self._start = batches, (epoch, place)

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, place = self._start
        while True:
            yield [Key(epoch, index) for index in self._batches.samples(epoch, place).tolist()]
            epoch, place = self._batches.following(epoch, place)


@dataclass(frozen=True, eq=False)
class _Validation:
    """A rank's share of the images that validate, in their order."""

    data: FolderImages
    batch: int
    device: torch.device
    rank: int
    world: int

    def __iter__(self) -> Iterator[Batch]:
        images = self.data.folders[1]
        keys = [Key(0, index) for index in range(self.rank, len(images), self.world)]
        order = [keys[start : start + self.batch] for start in range(0, len(keys), self.batch)]
        reader = self._reader
        for loaded in reader.loader(images, order):
            batch = reader.batch(loaded)
            if batch is not None:
                yield batch

    @cached_property
    def _reader(self) -> _Reader:
        return _Reader(self.data, self.device)


def _leave_signals(worker: int) -> None:
    """A worker ends when its loader does: the terminal's SIGINT and SIGTERM's handler are the trainer's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
