"""What cells ask of the layers they are made of."""

from torch import nn


def does_as(kind: type[nn.Module], layer: nn.Module) -> bool:
    """Whether calling the layer is this kind's own forward and nothing more."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return type(layer).forward is kind.forward and not (hooked or layer._backward_pre_hooks)
