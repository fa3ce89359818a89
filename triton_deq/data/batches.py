"""Shuffled batches of a data set, epoch after epoch, from any place on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count
from .augment import Augmentation
from .split import Split

Batch = tuple[Tensor, Tensor]
"""Images, floating `[B, C, H, W]`, and labels, int64 `[B]`."""


class ImageData(Protocol):
    """Labelled images, as a task asks for them.

    Attributes:
        name: for logs.
        classes: labels are 0 … classes − 1.
        size: height and width, as the model sees them.
        fingerprint: two runs with the same one read the same data.
        training, validation: how many images train and validate.
    """

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> int: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def training(self) -> int: ...
    @property
    def validation(self) -> int: ...

    def train(
        self, batch: int, seed: int, device: torch.device | str, rank: int = 0, world: int = 1
    ) -> "Batches":
        """Augmented batches to train on."""

    def valid(self, batch: int, device: torch.device | str, rank: int = 0, world: int = 1) -> Iterable[Batch]:
        """This rank's share of the images that validate, at each iteration anew; the last batch is smaller
        where `batch / world` does not divide them."""


def generator_for(*numbers: int) -> torch.Generator:
    """A generator on the CPU, seeded by all of these numbers."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))


class Batches:
    """Which samples are in each batch.

    An epoch is a permutation of all samples, drawn from the seed and the epoch's number, in batches; the
    samples that are left at its end are not used. Nothing else is drawn from, so that the place is all there
    is to remember.

    Args:
        count: samples.
        batch: samples of all ranks together.
        seed: of the permutations.
        rank, world: of data-parallel training: this one takes `batch / world` successive samples of each.

    Raises:
        TypeError, ValueError: an argument that cannot be, or fewer samples than a batch has.
    """

    def __init__(self, count: int, batch: int, seed: int = 0, rank: int = 0, world: int = 1):
        check_count("batch", batch)
        check_count("seed", seed, least=0)
        check_share(batch, rank, world)
        if batch > count:
            raise ValueError(f"batch={batch} is more than the {count} images to train on: lower it")
        self._count, self._batch, self._seed, self._rank = count, batch, seed, rank
        self._share = slice(rank * batch // world, (rank + 1) * batch // world)
        self._position = self._epoch = 0
        self._permutation: tuple[int, Tensor] | None = None  # of that epoch

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._count // self._batch

    @property
    def position(self) -> int:
        """Batches that this epoch has given."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epochs that have ended."""
        return self._epoch

    def take(self) -> Batch:
        """The next batch; the first of the next epoch after the last."""
        epoch, place = self._epoch, self._position
        self._epoch, self._position = self.following(epoch, place)
        return self._fetch(epoch, place)

    def following(self, epoch: int, place: int) -> tuple[int, int]:
        """The epoch and the place in it that come after these."""
        return (epoch, place + 1) if place + 1 < len(self) else (epoch + 1, 0)

    def samples(self, epoch: int, place: int) -> Tensor:
        """Which ones make this rank's batch at a place of an epoch, int64 `[batch / world]`."""
        if self._permutation is None or self._permutation[0] != epoch:
            generator = generator_for(self._seed, epoch)
            self._permutation = epoch, torch.randperm(self._count, generator=generator)
        whole = self._permutation[1][place * self._batch : (place + 1) * self._batch]
        return whole[self._share]

    def _draws(self, epoch: int, place: int) -> torch.Generator:
        """What a batch's augmentation is drawn from."""
        return generator_for(self._seed, epoch, place, self._rank)

    def _fetch(self, epoch: int, place: int) -> Batch:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position, "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one of the same data and batch was.

        Raises:
            ValueError: a position that this one never comes to.
        """
        if not 0 <= state["position"] < len(self):
            raise ValueError(
                f"position={state['position']} is none of these {len(self)} batches': the state is of other "
                "data or another batch"
            )
        self._position, self._epoch = state["position"], state["epoch"]

    def close(self) -> None:
        """End the processes that prepare batches, if there are any; `take` starts them anew."""


def check_share(batch: int, rank: int, world: int) -> None:
    """`world` ranks can share a batch, and this is one of them."""
    check_count("world", world)
    check_count("rank", rank, least=0)
    if rank >= world:
        raise ValueError(f"rank={rank} is outside [0, {world - 1}]: there are world={world} ranks")
    if batch % world:
        raise ValueError(f"batch={batch} cannot be shared by world={world} ranks: pick a multiple of it")


@dataclass(frozen=True, eq=False)
class TensorImages:
    """Images that fit into memory, as `ImageData`.

    Attributes:
        name: for logs.
        split: images uint8 or floating `[n, C, H, W]`, labels int64 `[n]`.
        augmentation: of the images to train on, with the normalisation of all.
        classes: labels are 0 … classes − 1.
    """

    name: str
    split: Split
    augmentation: Augmentation
    classes: int

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.split.x.shape[2:]
        return height, width

    @property
    def training(self) -> int:
        return len(self.split.x)

    @property
    def validation(self) -> int:
        return len(self.split.valid_x)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the labels, the images' shapes and the augmentation."""
        digest = sha256(repr((self.augmentation, *(tuple(each.shape) for each in self.split))).encode())
        for labels in (self.split.y, self.split.valid_y):
            digest.update(labels.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def train(
        self, batch: int, seed: int, device: torch.device | str, rank: int = 0, world: int = 1
    ) -> Batches:
        return _TensorBatches(self, batch, seed, device, rank, world)

    def valid(self, batch: int, device: torch.device | str, rank: int = 0, world: int = 1) -> Iterable[Batch]:
        check_share(batch, rank, world)
        images, labels = (each[rank::world].to(device) for each in (self.split.valid_x, self.split.valid_y))
        return _Validation(images, labels, self.augmentation, batch // world)


class _TensorBatches(Batches):
    """Augmented batches of images that are on the device."""

    def __init__(
        self, data: TensorImages, batch: int, seed: int, device: torch.device | str, rank: int, world: int
    ):
        super().__init__(len(data.split.x), batch, seed, rank, world)
        self._images, self._labels = data.split.x.to(device), data.split.y.to(device)
        self._augmentation = data.augmentation

    def _fetch(self, epoch: int, place: int) -> Batch:
        samples = self.samples(epoch, place).to(self._labels.device)
        images = self._augmentation(self._images[samples], self._draws(epoch, place))
        return images, self._labels[samples]


@dataclass(frozen=True, eq=False)
class _Validation:
    """Normalised batches of images that are on the device, in their order."""

    images: Tensor
    labels: Tensor
    augmentation: Augmentation
    batch: int

    def __iter__(self) -> Iterator[Batch]:
        for images, labels in zip(self.images.split(self.batch), self.labels.split(self.batch), strict=True):
            yield self.augmentation.normalise(images), labels
