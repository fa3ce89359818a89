"""Multiscale DEQs on images: a stem, the equilibrium of one cell on several resolutions, and a head."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backend import transformed
from ..cells.layers import called_narrow
from ..cells.mdeq import MDEQCell
from ..cells.mdeq_layers import MDEQInjection, Scale, for_products, pack, unpack
from ..deq import DEQ, Injected
from ..implicit import ImplicitGradient
from ..jacobian import JacobianPenalty, spectral_radius
from ..precision import autocast_dtype
from ..solvers import Solution, Solver
from ..solvers.graph_cache import GraphCache
from ..solvers.graph_keys import repeatable
from ..trees import register
from .image_configurations import MDEQConfiguration
from .mdeq_heads import ClassifierHead, SegmenterHead


@dataclass(frozen=True)
class MDEQOutput:
    """What a multiscale DEQ gives for a batch of images.

    Attributes:
        logits: `[B, classes]`, or `[B, classes, h, w]` of a segmentation at its highest resolution.
        state: z* `[B, N]`, packed; a start for the solve of images that are alike.
        solution: how the solve went; None while pretraining.
        penalty: a scalar to add to the loss.
        initial: the learned initialiser's loss, a scalar to add; 0 without one.
    """

    logits: Tensor
    state: Tensor
    solution: Solution | None
    penalty: Tensor
    initial: Tensor


register(MDEQOutput)


class MDEQ(nn.Module):
    """What both models share: from images to the equilibrium (Bai et al., arXiv 2006.08656, section 3).

    Args:
        configuration: all numbers of the model.
        solver, graph, compact: of the forward solve, as in `DEQ`. In evaluation, without gradients, `graph`
            replays all else of the model, too.

    Attributes:
        pretraining: True for the first part of training: `unrolled` applications of the cell from zero,
            without a solve.
    """

    def __init__(
        self,
        configuration: MDEQConfiguration,
        *,
        solver: Solver | None = None,
        graph: bool = False,
        compact: float | None = None,
        state_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.configuration = configuration
        self.pretraining = False
        self.stem = Stem(configuration)
        self.deq = DEQ(
            MDEQCell(
                configuration.channels,
                configuration.groups,
                configuration.expansion,
                dropout=configuration.dropout,
                weight_norm=configuration.weight_norm,
                post_affine=configuration.post_affine,
                init_std=configuration.init_std,
            ),
            solver,
            tol=configuration.tol,
            max_steps=configuration.max_steps,
            residual=configuration.residual,
            graph=graph,
            compact=compact,
            gradient=ImplicitGradient(
                tol=configuration.backward_tol, max_steps=configuration.backward_max_steps
            ),
            penalty=_penalty(configuration),
            state_dtype=state_dtype,
        )
        self.initialiser = Initialiser(configuration) if configuration.initialiser else None
        self.head = self._head(configuration)
        _start(self.stem, configuration.init_std)
        _start(self.head, configuration.init_std)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _head(self, configuration: MDEQConfiguration) -> nn.Module:
        raise NotImplementedError

    @property
    def cell(self) -> MDEQCell:
        cell = self.deq.cell
        assert isinstance(cell, MDEQCell)
        return cell

    @property
    def penalty(self) -> JacobianPenalty | None:
        return self.deq.penalty

    def forward(self, images: Tensor, z0: Tensor | None = None) -> MDEQOutput:
        """One batch.

        Args:
            images: floating `[B, image_channels, H, W]`; H and W are multiples of 2 to the power of all
                halvings, the stem's and the cell's.
            z0: where the solve starts, `[B, N]`, as of `MDEQOutput.state` for images that are alike; by
                default the initialiser's word, or zeros.

        Raises:
            TypeError, ValueError: images or a z0 that cannot be.
        """
        images = self._checked(images)
        if self._replayed and not self.pretraining:
            return self._replay(images, z0)
        features = self.stem(images)
        initial = features.new_zeros(())
        if self.pretraining:
            u = self.cell.inject(features)
            z = self.cell.initial_state(u)
            for _ in range(self.configuration.unrolled):
                z = self.cell(z, u)
            logits = self.head(self.cell.maps(z, u))
            return MDEQOutput(logits, z.detach(), None, self._pretraining_penalty(z, u), initial)
        guess = None if self.initialiser is None else self.initialiser(features.detach())
        out = self.deq(features, guess.detach() if z0 is None and guess is not None else z0)
        if guess is not None and self.training:
            initial = self.configuration.initialiser * relative_error(guess, out.solution.value)
        logits = self.head(self.cell.maps(out.value, out.injection))
        return MDEQOutput(logits, out.value.detach(), out.solution, out.penalty, initial)

    @property
    def _replayed(self) -> bool:
        """Whether what is before and after the solve may come from graphs, too."""
        if transformed() or torch.is_grad_enabled():
            return False
        return bool(self.deq.graph) and repeatable(self.deq)

    def _replay(self, images: Tensor, z0: Tensor | None) -> MDEQOutput:
        """The same without gradients, where all that the host does is to look whether the solve is done."""
        graphs = self.deq.graph
        assert isinstance(graphs, GraphCache)
        with graphs.looking_once():
            u, guess = graphs.call(self._before, (self.stem, self.initialiser, self.cell), images)
            out = self.deq.from_injection(u, guess if z0 is None else z0)
            logits = graphs.call(self._after, (self.head,), out.value, u.scales)
        return MDEQOutput(logits.clone(), out.value, out.solution, out.penalty, out.value.new_zeros(()))

    def _before(self, images: Tensor) -> tuple[MDEQInjection, Tensor | None]:
        features = called_narrow(self.stem, images, images)
        guess = None if self.initialiser is None else called_narrow(self.initialiser, images, features)
        return self.cell.inject(features), guess

    def _after(self, z: Tensor, scales: Sequence[Scale]) -> Tensor:
        maps = for_products(unpack(z, scales), autocast_dtype(z.device) or z.dtype)
        return called_narrow(self.head, z, maps)

    @torch.no_grad()
    def spectral_radius(self, images: Tensor, steps: int = 150) -> Tensor:
        """`max |λ(J)|` at the equilibrium of each image, `[B]`; see `td.spectral_radius`."""
        out = self.deq(self.stem(self._checked(images)))
        return spectral_radius(Injected(self.cell, out.injection), out.value, steps)

    def _pretraining_penalty(self, z: Tensor, u: MDEQInjection) -> Tensor:
        if self.penalty is None or not self.configuration.pretraining_penalty or not self.training:
            return z.new_zeros(())
        return self.penalty(Injected(self.cell, u), z.detach())

    def _checked(self, images: Any) -> Tensor:
        channels = self.configuration.image_channels
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != channels:
            given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images is {given}: give images [B, {channels}, H, W]")
        if not images.is_floating_point():
            raise TypeError(f"images has dtype {images.dtype}: convert and normalise it, e.g. images / 255")
        step = 2 ** (self.configuration.downsamplings + len(self.configuration.channels) - 1)
        if any(size == 0 or size % step for size in images.shape[2:]):
            raise ValueError(
                f"images are {images.shape[2]}×{images.shape[3]}, and this model halves them until "
                f"{len(self.configuration.channels)} resolutions are there: give height and width as "
                f"multiples of {step}"
            )
        return images.contiguous(memory_format=torch.channels_last)


class MDEQClassifier(MDEQ):
    """Images to classes, `logits [B, classes]`.

    The head widens each resolution to four times `head` channels, adds them up from the highest to the lowest
    through convolutions of stride 2, and averages over what is left.

    Raises:
        TypeError, ValueError: a configuration that cannot be.
    """

    def _head(self, configuration: MDEQConfiguration) -> nn.Module:
        if not configuration.head:
            raise ValueError("head=() is for a segmentation: give a number of channels for each resolution")
        return ClassifierHead(configuration)


class MDEQSegmenter(MDEQ):
    """Images to classes of pixels, `logits [B, classes, h, w]` at the highest resolution of the equilibrium.

    The head brings all resolutions to the highest one bilinearly. `segmentation_loss` compares with labels at
    the image's own size.

    Raises:
        TypeError, ValueError: a configuration that cannot be.
    """

    def _head(self, configuration: MDEQConfiguration) -> nn.Module:
        if configuration.head:
            raise ValueError(f"head={configuration.head} is for a classifier: leave it out")
        return SegmenterHead(configuration)


class Stem(nn.Sequential):
    """From images to the features that are injected: 3×3, 3×3 and 1×1 convolutions, BatchNorm, relu."""

    def __init__(self, configuration: MDEQConfiguration):
        width, halvings = configuration.channels[0], configuration.downsamplings
        parts = [
            (configuration.image_channels, 3, 2 if halvings >= 1 else 1),
            (width, 3, 2 if halvings >= 2 else 1),
        ]
        if halvings or len(configuration.channels) > 2:
            parts.append((width, 1, 1))
        layers: list[nn.Module] = []
        for inputs, size, stride in parts:
            layers += [
                nn.Conv2d(inputs, width, size, stride, size // 2, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class Initialiser(nn.Module):
    """A start for the solve from the features alone, as in Bai, Koltun & Kolter, "Neural Deep Equilibrium
    Solvers" (ICLR 2022): for each resolution pooled features, a 3×3 convolution within channels, a 1×1 one
    across them, and a GroupNorm, because the cell ends in one. It starts at zero, where a solve would.
    """

    def __init__(self, configuration: MDEQConfiguration):
        super().__init__()
        width = configuration.channels[0]
        self.maps: Any = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, channels, 1, bias=False),
                nn.GroupNorm(max(configuration.groups // 2, 1), channels),
            )
            for channels in configuration.channels
        )
        for layers in self.maps:
            nn.init.zeros_(layers[-1].weight)  # type: ignore[index]

    def forward(self, features: Tensor) -> Tensor:
        """`[B, N]` from `[B, C_0, H, W]`."""
        pooled = (
            functional.avg_pool2d(features, 2**place) if place else features
            for place in range(len(self.maps))
        )
        return pack([layers(each) for layers, each in zip(self.maps, pooled, strict=True)])


def relative_error(guess: Tensor, value: Tensor) -> Tensor:
    """The mean over samples of `‖guess − value‖² / ‖value‖²`; the value is a constant."""
    value = value.detach()
    distance = (guess.float() - value.float()).square().sum(1)
    return (distance / value.float().square().sum(1).clamp_min(1e-12)).mean()


def segmentation_loss(
    logits: Tensor, labels: Tensor, ignore: int = 255, class_weights: Tensor | None = None
) -> Tensor:
    """The mean cross-entropy of all labelled pixels; logits are brought to the labels' size bilinearly.

    Args:
        logits: `[B, classes, h, w]`. labels: int64 `[B, H, W]`; `ignore` marks pixels without a label.
        class_weights: `[classes]`, or None.

    Raises:
        ValueError: labels of another batch, or no images.
    """
    if labels.dim() != 3 or labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, logits has {tuple(logits.shape)}: give labels "
            f"[{logits.shape[0]}, H, W]"
        )
    if logits.shape[2:] != labels.shape[1:]:
        logits = functional.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=True)
    return functional.cross_entropy(logits, labels, class_weights, ignore_index=ignore)


def without_penalty(configuration: MDEQConfiguration) -> MDEQConfiguration:
    """The same without Jacobian regularisation."""
    return replace(configuration, penalty=0.0, pretraining_penalty=0.0)


def _penalty(configuration: MDEQConfiguration) -> JacobianPenalty | None:
    if configuration.penalty == 0:
        return None
    return JacobianPenalty(
        configuration.penalty,
        configuration.penalty_probability,
        growth=configuration.penalty_growth,
        growth_interval=configuration.penalty_interval,
        stop_after=configuration.penalty_stop,
        pretraining_weight=configuration.pretraining_penalty,
    )


def _start(part: nn.Module, std: float) -> None:
    """Convolutions start from N(0, std²), their biases too."""
    for layer in part.modules():
        if isinstance(layer, nn.Conv2d):
            for parameter in layer.parameters():
                nn.init.normal_(parameter, 0, std)
