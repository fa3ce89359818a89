"""Images in a folder for each class, decoded and cut when they are asked for."""

import math
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import check_choice, check_count

ENDINGS = (".jpeg", ".jpg", ".png", ".webp", ".bmp")
ON_ERROR = ("raise", "skip")

# Of the random resized crop of Szegedy et al. (arXiv 1409.4842): the area as a share of the image's, and the
# width by the height.
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
_ATTEMPTS = 10

# The short side of an image that validates is the crop's by this.
_CENTRE = 0.875


class BrokenImage(ValueError):
    """An image that cannot be decoded; the message names its file."""


class Key(NamedTuple):
    """An image, and the epoch that its crop is drawn for."""

    epoch: int
    image: int


class ImageFolder(Dataset):
    """`folder/CLASS/*.JPEG` (or png, webp, bmp) as uint8 `[3, size, size]` and the class's number.

    Classes are numbered by the order of their names. To train, a rectangle of 0.08 to 1 of the image's area
    and of a ratio from 3/4 to 4/3 is brought to the size, and mirrored half of the time; both are drawn from
    the seed, the epoch and the image's index alone. To validate, the short side is brought to size / 0.875,
    and the middle is cut out. Interpolation is bilinear, with antialiasing.

    Args:
        folder: of the classes' folders.
        size: height and width of what comes back.
        augmented: cut and mirror at random, as to train; else the middle.
        seed: of the random cuts.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no classes, or a class without images.
        ImportError: Pillow is not installed.
    """

    def __init__(self, folder: str | Path, size: int = 224, augmented: bool = False, seed: int = 0):
        check_count("size", size)
        check_count("seed", seed, least=0)
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "images are decoded by Pillow, which is not installed: pip install 'triton-deq[train]'"
            ) from error
        self.folder = Path(folder)
        self.size, self.augmented, self.seed = size, augmented, seed
        self.classes, self.files = _listing(self.folder)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = [numbers[name.split("/", 1)[0]] for name in self.files]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits of the files' names."""
        return sha256("\n".join(self.files).encode()).hexdigest()

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        """An image, of epoch 0 if the key is an index alone, and its label.

        Raises:
            BrokenImage: it cannot be decoded.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        path = self.folder / self.files[index]
        generator = np.random.default_rng((self.seed, epoch, index)) if self.augmented else None
        from PIL import Image

        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
            cut = _centre(image, self.size) if generator is None else _random(image, self.size, generator)
        except Exception as error:  # what a damaged file makes Pillow raise is not documented
            raise BrokenImage(f"{path} cannot be decoded ({error})") from error
        return torch.from_numpy(np.array(cut)).permute(2, 0, 1), self.labels[index]


class Loading(Dataset):
    """The same images, and for a broken one a sentence: a worker's exception would lose its shape."""

    def __init__(self, images: ImageFolder):
        self.images = images

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | str:
        try:
            return self.images[key]
        except BrokenImage as error:
            return str(error)


class Loaded(NamedTuple):
    """A batch: images uint8 `[b, 3, size, size]`, labels int64 `[b]`, and sentences about the broken ones."""

    images: Tensor
    labels: Tensor
    broken: list[str]


def collate(samples: Iterable[tuple[Tensor, int] | str]) -> Loaded:
    """Samples of `Loading` as a batch, in which the broken ones are missing."""
    whole, broken = [], []
    for sample in samples:
        if isinstance(sample, str):
            broken.append(sample)
        else:
            whole.append(sample)
    images = torch.stack([image for image, _ in whole]) if whole else torch.empty(0, dtype=torch.uint8)
    return Loaded(images, torch.tensor([label for _, label in whole], dtype=torch.int64), broken)


def check_on_error(on_error: str) -> None:
    check_choice("on_error", on_error, ON_ERROR)


def _listing(folder: Path) -> tuple[tuple[str, ...], list[str]]:
    """The classes, and every image as `CLASS/NAME`, both in the order of their names."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}: it was to have a folder of images for each class"
        )
    with os.scandir(folder) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise ValueError(f"{folder} has no folders: sort its images into one for each class")
    files: list[str] = []
    for name in classes:
        with os.scandir(folder / name) as entries:
            found = sorted(entry.name for entry in entries if entry.name.lower().endswith(ENDINGS))
        if not found:
            raise ValueError(
                f"{folder / name} has no images ({', '.join(ENDINGS)}): remove the folder, or copy it anew"
            )
        files.extend(f"{name}/{each}" for each in found)
    return tuple(classes), files


def _centre(image: Any, size: int) -> Any:
    """The middle of an image whose short side is brought to `size / 0.875`."""
    width, height = image.size
    short = round(size / _CENTRE)
    scale = short / min(width, height)
    width, height = max(short, int(width * scale)), max(short, int(height * scale))
    image = image.resize((width, height), _bilinear())
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _random(image: Any, size: int, generator: np.random.Generator) -> Any:
    """A random rectangle of an image, mirrored half of the time."""
    mirrored = generator.random() < 0.5
    left, top, width, height = _rectangle(image.width, image.height, generator)
    box = (left, top, left + width, top + height)
    image = image.resize((size, size), _bilinear(), box=box)
    if mirrored:
        from PIL.Image import Transpose

        image = image.transpose(Transpose.FLIP_LEFT_RIGHT)
    return image


def _rectangle(width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height; where ten draws do not fit, the largest one in the middle."""
    low, high = (math.log(bound) for bound in _RATIO)
    for _ in range(_ATTEMPTS):
        area = width * height * generator.uniform(*_AREA)
        ratio = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(generator.integers(width - w + 1))
            return left, int(generator.integers(height - h + 1)), w, h
    w = min(width, max(1, round(height * _RATIO[1])))
    h = min(height, max(1, round(width / _RATIO[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def _bilinear() -> Any:
    from PIL.Image import Resampling

    return Resampling.BILINEAR
