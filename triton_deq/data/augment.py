"""What is done to a batch of images before a model sees it: random shifts and flips, and normalisation."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..checks import check_count, check_number


@dataclass(frozen=True)
class Augmentation:
    """`(images − mean) / std`, in training after a random shift and flip of each image.

    Images are floating and used as they are, or uint8 and divided by 255 first.

    Attributes:
        mean, std: of each channel, of images in [0, 1].
        pad: an image is padded with so many rows and columns of zeros on each side, before it is normalised,
            and cut to its size at a place drawn for it. 0: not shifted.
        flip: half of the images, drawn at random, are mirrored left to right.

    Raises:
        TypeError, ValueError: a field that cannot be.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int = 0
    flip: bool = False

    def __post_init__(self):
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                f"mean={self.mean} and std={self.std} must have one number for each channel: give as many of "
                "one as of the other"
            )
        for std in self.std:
            check_number("std", std, 0, open_low=True)
        check_count("pad", self.pad, least=0)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Images for training, floating `[B, C, H, W]`.

        Args:
            images: uint8 or floating `[B, C, H, W]`, on any device.
            generator: on the CPU; a generator in the same state gives the same images.
        """
        batch, _, height, width = images.shape
        # Drawn also where they are not used: the same draws whatever the other one is.
        corner = torch.randint(2 * self.pad + 1, (2, batch, 1), generator=generator)
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        if self.pad:
            images = functional.pad(images, [self.pad] * 4)
        if self.pad or self.flip:
            rows = torch.arange(height) + corner[0]
            columns = torch.arange(width).expand(batch, width)
            if self.flip:
                columns = torch.where(mirrored, width - 1 - columns, columns)
            columns = columns + corner[1]
            rows, columns = rows.to(images.device), columns.to(images.device)
            place = torch.arange(batch, device=images.device)[:, None, None]
            images = images.movedim(1, 3)[place, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
        return self.normalise(images)

    def normalise(self, images: Tensor) -> Tensor:
        """Images for validation, floating `[B, C, H, W]`.

        Raises:
            ValueError: another number of channels.
        """
        if images.shape[1] != len(self.mean):
            raise ValueError(
                f"images have {images.shape[1]} channels, and mean={self.mean} is for {len(self.mean)}: give "
                "one number for each channel"
            )
        if not images.is_floating_point():
            images = images.to(torch.get_default_dtype()) / 255
        mean, std = (images.new_tensor(numbers).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return (images - mean) / std


DIGITS = Augmentation(mean=(0.306,), std=(0.376,), pad=1)
"""Shifts by a pixel; a mirrored digit is none."""

CIFAR10 = Augmentation(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), pad=4, flip=True)

IMAGENET = Augmentation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""`ImageFolder` crops and flips while it decodes."""
