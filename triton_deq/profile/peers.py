"""The models that a DEQ is held against: ResNets as others wrote them, and a stacked Transformer-XL."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..models import CONFIGURATIONS, LanguageModelConfiguration, TransformerXL
from .plan import Refusal, sentence

RESNETS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
"""By name, the bottleneck blocks of each stage (He et al., arXiv 1512.03385, table 1)."""

SMALL = 64
"""Images up to this many pixels get the stem for CIFAR; 224×224 ones the ImageNet stem."""


def resnet(name: str, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, str]:
    """The network for images of this shape `(C, H, W)`, and a sentence about it.

    Raises:
        Refusal: neither torchvision nor transformers can be imported.
    """
    channels, *pixels = shape
    small = max(pixels) <= SMALL
    reasons = []
    for build in (_torchvision, _transformers):
        try:
            model, source = build(name, channels, classes, small)
        except Exception as error:  # not only ImportError: torchvision beside another build of PyTorch
            reasons.append(sentence(error))
            continue
        stem = "CIFAR's usual stem (3×3, stride 1, no max-pooling)" if small else "its own stem"
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the faster one
        return model, f"{name} of {source} with {stem}, channels-last, {classes} classes"
    raise Refusal(
        f"--against {name} needs torchvision or transformers ({'; '.join(reasons)}): "
        "pip install 'triton-deq[profile]', or give --against none"
    )


def _torchvision(name: str, channels: int, classes: int, small: bool) -> tuple[nn.Module, str]:
    import torchvision

    model: Any = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    if small:
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    return model, f"torchvision {torchvision.__version__}"


def _transformers(name: str, channels: int, classes: int, small: bool) -> tuple[nn.Module, str]:
    import transformers

    settings: Any = transformers.ResNetConfig
    configuration = settings(
        num_channels=channels, depths=list(RESNETS[name]), layer_type="bottleneck", num_labels=classes
    )
    model: Any = transformers.ResNetForImageClassification(configuration)
    if small:
        stem = model.resnet.embedder
        stem.embedder.convolution = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        stem.pooler = nn.Identity()
    return model, f"transformers {transformers.__version__}"


def transformer_xl(name: str, configuration: LanguageModelConfiguration) -> tuple[nn.Module, str]:
    """The stack beside the DEQ of this configuration: the paper's beside the paper's, else of its cell."""
    paper = CONFIGURATIONS["wikitext103-transformer-xl"]
    if name.startswith("wikitext103"):
        return TransformerXL(paper), f"the paper's Transformer-XL of {paper.layers} layers"
    layers = 4
    stacked = replace(configuration, layers=layers, weight_norm=False, penalty=0.0)
    return TransformerXL(stacked), f"Transformer-XL: {layers} layers of the DEQ's cell, each with its weights"
