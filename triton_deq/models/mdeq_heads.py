"""What multiscale DEQs do with their equilibrium: classify an image, or its pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .image_configurations import MDEQConfiguration

EXPANSION = 4


class ClassifierHead(nn.Module):
    """Logits `[B, classes]` of the maps of all resolutions (arXiv 2006.08656, appendix)."""

    def __init__(self, configuration: MDEQConfiguration):
        super().__init__()
        widths = [EXPANSION * width for width in configuration.head]
        self.widen = nn.ModuleList(
            Bottleneck(channels, inner)
            for channels, inner in zip(configuration.channels, configuration.head, strict=True)
        )
        self.down = nn.ModuleList(
            _convolution(widths[i], widths[i + 1], 3, stride=2, bias=True) for i in range(len(widths) - 1)
        )
        self.final = _convolution(widths[-1], configuration.final, 1, bias=True)
        self.classify = nn.Linear(configuration.final, configuration.classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        first, *others = self.widen
        value = first(maps[0])
        for down, widen, each in zip(self.down, others, maps[1:], strict=True):
            value = widen(each) + down(value)
        pooled = self.final(value).mean((2, 3))
        return self.classify(pooled).to(torch.promote_types(pooled.dtype, torch.float32))


class Bottleneck(nn.Module):
    """A residual block of 1×1, 3×3 and 1×1 convolutions, to four times `inner` channels; plain BatchNorms."""

    def __init__(self, inputs: int, inner: int):
        super().__init__()
        outputs = EXPANSION * inner
        self.body = nn.Sequential(
            _convolution(inputs, inner, 1, affine=False),
            _convolution(inner, inner, 3, affine=False),
            _convolution(inner, outputs, 1, affine=False)[:-1],
        )
        shortcut = _convolution(inputs, outputs, 1)[:-1]
        self.shortcut = shortcut if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


class SegmenterHead(nn.Module):
    """Logits `[B, classes, h, w]` of the maps of all resolutions, brought to the highest of them."""

    def __init__(self, configuration: MDEQConfiguration):
        super().__init__()
        total = sum(configuration.channels)
        self.mix = _convolution(total, total, 1, bias=True, momentum=0.01)
        self.classify = nn.Conv2d(total, configuration.classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        raised = [
            functional.interpolate(each, size, mode="bilinear", align_corners=True) for each in maps[1:]
        ]
        logits = self.classify(self.mix(torch.cat([maps[0], *raised], dim=1)))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _convolution(
    inputs: int,
    outputs: int,
    size: int,
    *,
    stride: int = 1,
    bias: bool = False,
    affine: bool = True,
    momentum: float = 0.1,
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias),
        nn.BatchNorm2d(outputs, momentum=momentum, affine=affine),
        nn.ReLU(inplace=True),
    )
