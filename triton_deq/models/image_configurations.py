"""The named configurations of the multiscale DEQs on images."""

from dataclasses import dataclass, replace
from typing import Any

from ..checks import check_choice, check_count, check_number


@dataclass(frozen=True)
class MDEQConfiguration:
    """A multiscale DEQ with its stem and head.

    Attributes:
        channels, groups, expansion, dropout, weight_norm, post_affine, init_std: as in `MDEQCell`.
        classes: of images, or of pixels in a segmentation.
        image_channels, image_size: of what it is trained on; any other size that the resolutions divide
            serves as well.
        downsamplings: how often the stem halves the image, from 0 to 2.
        head: a quarter of each resolution's channels in the classifier's head; () for a segmentation.
        final: channels behind the head.
        unrolled: applications of the cell while pretraining.
        max_steps, tol, residual: of the forward solve.
        backward_max_steps, backward_tol: of the backward solve.
        penalty, penalty_probability, penalty_growth, penalty_interval, penalty_stop, pretraining_penalty: γ,
            p, and the rest, as in `JacobianPenalty`; γ = 0 for none.
        initialiser: weight of the loss of a learned start for the solve; 0 for none.

    Raises:
        TypeError, ValueError: a field that cannot be.
    """

    channels: tuple[int, ...]
    classes: int
    head: tuple[int, ...] = ()
    final: int = 2048
    groups: int = 8
    expansion: int = 5
    dropout: float = 0.0
    weight_norm: bool = True
    post_affine: bool = True
    init_std: float = 0.01
    image_channels: int = 3
    image_size: tuple[int, int] = (32, 32)
    downsamplings: int = 0
    unrolled: int = 5
    max_steps: int = 26
    tol: float = 1e-3
    residual: str = "relative"
    backward_max_steps: int = 27
    backward_tol: float = 1e-4
    penalty: float = 0.0
    penalty_probability: float = 0.1
    penalty_growth: float = 0.0
    penalty_interval: int = 1
    penalty_stop: int | None = None
    pretraining_penalty: float = 0.0
    initialiser: float = 0.0

    def __post_init__(self):
        for name in ("classes", "final", "image_channels", "unrolled", "max_steps", "backward_max_steps"):
            check_count(name, getattr(self, name))
        check_count("downsamplings", self.downsamplings, least=0)
        if self.downsamplings > 2:
            raise ValueError(
                f"downsamplings={self.downsamplings}: the stem has two convolutions; give 0 to 2"
            )
        if self.head and len(self.head) != len(self.channels):
            raise ValueError(
                f"head={self.head} has {len(self.head)} numbers, and channels={self.channels} has "
                f"{len(self.channels)} resolutions: give one for each"
            )
        check_choice("residual", self.residual, ("relative", "absolute"))
        for name in ("penalty", "pretraining_penalty", "initialiser"):
            check_number(name, getattr(self, name), 0)


# Sizes and recipes are those of the authors' released settings; arXiv 2106.14342, table 3 and appendix. Their
# convergence is measured relative to f(z) on CIFAR-10, and as an absolute residual on ImageNet; here the
# tolerance is relative throughout, as in the paper's text.
_CIFAR_TINY = MDEQConfiguration(
    channels=(24, 24),
    classes=10,
    head=(8, 16),
    final=200,
    dropout=0.25,
    post_affine=False,
    unrolled=10,
    max_steps=18,
    backward_max_steps=20,
)
_CIFAR_LARGE = replace(
    _CIFAR_TINY, channels=(32, 64, 128, 256), head=(14, 28, 56, 112), final=1680, dropout=0.3
)
_CIFAR_PENALTY: dict[str, Any] = {
    "penalty": 0.4,
    "penalty_probability": 0.02,
    "unrolled": 8,
    "max_steps": 8,
    "backward_max_steps": 7,
}
_IMAGENET_SMALL = MDEQConfiguration(
    channels=(32, 64, 128, 256),
    classes=1000,
    head=(24, 48, 96, 192),
    image_size=(224, 224),
    downsamplings=2,
)
_IMAGENET_LARGE = replace(_IMAGENET_SMALL, channels=(80, 160, 320, 640), head=(32, 64, 128, 256), unrolled=4)
_IMAGENET_XL = replace(_IMAGENET_LARGE, channels=(88, 176, 352, 704), expansion=6)
_IMAGENET_PENALTY: dict[str, Any] = {
    "penalty": 3.0,
    "penalty_probability": 0.08,
    "penalty_growth": 0.1,
    "penalty_interval": 50_000,
    "pretraining_penalty": 0.03,
    "post_affine": False,
    "max_steps": 14,
    "backward_max_steps": 14,
}
_CITYSCAPES = MDEQConfiguration(
    channels=(32, 64, 128, 256),
    classes=19,
    dropout=0.05,
    image_size=(512, 1024),
    downsamplings=2,
    unrolled=3,
    max_steps=27,
    backward_max_steps=30,
)

IMAGE_CONFIGURATIONS = {
    # For a machine without a GPU: minutes on two cores.
    "digits": MDEQConfiguration(
        channels=(16, 32),
        classes=10,
        head=(8, 16),
        final=64,
        groups=4,
        expansion=2,
        image_channels=1,
        image_size=(8, 8),
        unrolled=4,
        max_steps=6,
        backward_max_steps=6,
        penalty=0.5,
        penalty_probability=0.3,
    ),
    "cifar10-tiny": _CIFAR_TINY,
    "cifar10-tiny-jr": replace(_CIFAR_TINY, **_CIFAR_PENALTY),
    "cifar10-large": _CIFAR_LARGE,
    # The penalty ends with epoch 90 of 520 steps, 16,000 of which were pretraining.
    "cifar10-large-jr": replace(_CIFAR_LARGE, dropout=0.22, penalty_stop=30_800, **_CIFAR_PENALTY),
    "imagenet-small": _IMAGENET_SMALL,
    "imagenet-small-jr": replace(
        _IMAGENET_SMALL, **{**_IMAGENET_PENALTY, "penalty": 2.5}, head=(28, 56, 112, 224), dropout=0.02
    ),
    "imagenet-large": _IMAGENET_LARGE,
    "imagenet-large-jr": replace(_IMAGENET_LARGE, **_IMAGENET_PENALTY),
    "imagenet-xl": _IMAGENET_XL,
    "imagenet-xl-jr": replace(_IMAGENET_XL, **_IMAGENET_PENALTY),
    "cityscapes-small": _CITYSCAPES,
    "cityscapes-large": replace(_CITYSCAPES, channels=(80, 160, 320, 640), dropout=0.03),
    "cityscapes-xl": replace(_CITYSCAPES, channels=(88, 176, 352, 704), expansion=6, dropout=0.04),
}
"""By name: "digits" for the embedded images; -jr with the penalty; cityscapes for `MDEQSegmenter`.

The numbers of parameters are those of the authors' released settings: 0.16M, 11.1M, 16.8M (18.6M with the
penalty), 67.1M and 90.5M, where the paper says 10M, 18M (17M) and 63M.
"""


def find_image_configuration(name: str) -> MDEQConfiguration:
    """The configuration of this name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in IMAGE_CONFIGURATIONS:
        raise ValueError(f"config={name!r} is unknown: choose one of {', '.join(IMAGE_CONFIGURATIONS)}")
    return IMAGE_CONFIGURATIONS[name]
