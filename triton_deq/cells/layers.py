"""What cells ask of the layers they are made of."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def does_as(kind: type[nn.Module], layer: nn.Module) -> bool:
    """Whether calling the layer is this kind's own forward and nothing more."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return type(layer).forward is kind.forward and not (hooked or layer._backward_pre_hooks)


def normalise_kernels(conv: nn.Conv2d) -> None:
    """Weight normalisation of a convolution, `w = g v / ‖v‖` for each output channel.

    As torch.nn.utils.parametrizations.weight_norm, with parameters of the same names and shapes. But that
    copies a channels-last weight into PyTorch's default order, and the convolution copies it back.
    """
    parametrize.register_parametrization(conv, "weight", KernelNorm())


class KernelNorm(nn.Module):
    """`(g, v) ↦ g v / ‖v‖` in the order in which v lies in memory, which is channels-last."""

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        lying = (0, 2, 3, 1)
        return torch._weight_norm(v.permute(lying), g.permute(lying), 0).permute(0, 3, 1, 2)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        g = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
        return g, weight
