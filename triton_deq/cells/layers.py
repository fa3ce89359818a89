"""What cells ask of the layers they are made of."""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm, weight_norm

from ..ops.launch import kernels_serve
from ..ops.weightnorm import Weight, weightnorm_each
from ..precision import autocast_dtype


def does_as(kind: type[nn.Module], layer: nn.Module) -> bool:
    """Whether calling the layer is this kind's own forward and nothing more."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
    return type(layer).forward is kind.forward and not (hooked or layer._backward_pre_hooks)


def weights_of(
    layers: Sequence[Any], dtype: torch.dtype | None, like: Tensor, least: Sequence[tuple[int, int]] = ()
) -> list[Tensor]:
    """The layers' weights as the products of a solve take them, normalised and cast in shared launches.

    dtype: that of autocast, or None for their own. like: what goes into the layers. least: how many rows and
    columns each has to have, with zeros behind; where no kernel serves, the weights are as they are.
    """
    if not kernels_serve(like, "auto", autocast=True):
        return [layer.weight if dtype is None else layer.weight.to(dtype) for layer in layers]
    parts = [_parts_of(layer) for layer in layers]
    least = least or [(0, 0)] * len(parts)
    weights = [Weight(v, g, *size) for (v, g), size in zip(parts, least, strict=True)]
    differ = [_differs(each, dtype) for each in weights]
    made = iter(weightnorm_each(list(compress(weights, differ)), dtype))
    return [
        next(made) if each_differs else each.v for each, each_differs in zip(weights, differ, strict=True)
    ]


def called_narrow(module: nn.Module, like: Tensor, *given: Any) -> Any:
    """What a module makes of `given`, without gradients.

    The weights that autocast would cast one by one are cast in shared launches. like: on their device.
    """
    dtype = autocast_dtype(like.device)
    if dtype is None or not kernels_serve(like, "auto", autocast=True):
        return module(*given)
    wide = {
        name: parameter
        for name, parameter in module.named_parameters()
        if isinstance(module.get_submodule(name.rpartition(".")[0]), nn.Conv2d | nn.Linear)
    }
    narrow = weightnorm_each([Weight(each.detach()) for each in wide.values()], dtype)
    return functional_call(module, dict(zip(wide, narrow, strict=True)), given)


def _parts_of(layer: Any) -> tuple[Tensor, Tensor | None]:
    """v and g of a weight that is normalised as here or by torch; else the weight as it is, and None."""
    if parametrize.is_parametrized(layer, "weight"):
        held = layer.parametrizations.weight
        kind = held[0] if len(held) == 1 else None
        if type(kind) is KernelNorm or (type(kind) is _WeightNorm and kind.dim == 0):
            return held.original1, held.original0
    return layer.weight, None


def _differs(weight: Weight, dtype: torch.dtype | None) -> bool:
    v, g, rows, columns = weight
    wider = v.dim() == 2 and (rows > v.shape[0] or columns > v.shape[1])
    return g is not None or wider or dtype not in (None, v.dtype)


def normalise_weight(linear: nn.Linear) -> None:
    """Weight normalisation of a linear layer by torch's parametrization, in a layer that can be pickled."""
    weight_norm(linear)
    _make_picklable(linear)


def normalise_kernels(conv: nn.Conv2d) -> None:
    """Weight normalisation of a convolution, `w = g v / ‖v‖` for each output channel.

    As torch.nn.utils.parametrizations.weight_norm, with parameters of the same names and shapes. But that
    copies a channels-last weight into PyTorch's default order, and the convolution copies it back.
    """
    parametrize.register_parametrization(conv, "weight", KernelNorm())
    _make_picklable(conv)


class KernelNorm(nn.Module):
    """`(g, v) ↦ g v / ‖v‖` in the order in which v lies in memory, which is channels-last."""

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        lying = (0, 2, 3, 1)
        return torch._weight_norm(v.permute(lying), g.permute(lying), 0).permute(0, 3, 1, 2)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        g = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
        return g, weight


def _make_picklable(layer: nn.Module) -> None:
    """Let a layer with a normalised weight be pickled, which PyTorch refuses: it has made a class for it."""
    kind = type(layer).__bases__[0]
    renewed = {"_modules", "_load_state_dict_pre_hooks"}

    def reduce(self: Any, protocol: int) -> Any:
        if [*self.parametrizations] != ["weight"] or len(self.parametrizations.weight) != 1:
            return nn.Module.__reduce_ex__(self, protocol)  # somebody added another: PyTorch says no
        attributes = {name: value for name, value in vars(self).items() if name not in renewed}
        return _restored, (kind, attributes, dict(self._modules))

    type(layer).__reduce_ex__ = reduce  # type: ignore[assignment, method-assign]


def _restored(kind: type[nn.Module], attributes: dict, modules: dict) -> nn.Module:
    """The layer again: made anew with the same parametrization, and given what it had."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    vars(layer).update(attributes)
    normalised = modules["parametrizations"]["weight"]
    g, v = normalised.original0, normalised.original1
    layer.register_parameter("weight", nn.Parameter(v.detach().clone()))
    normalise_kernels(layer) if isinstance(layer, nn.Conv2d) else normalise_weight(layer)  # type: ignore[arg-type]
    layer.parametrizations.weight.original0 = g  # type: ignore[union-attr]
    layer.parametrizations.weight.original1 = v  # type: ignore[union-attr]
    return layer
