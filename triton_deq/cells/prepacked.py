"""Convolutions by oneDNN, on a CPU, with weights that it has laid out once and not at every call."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..backend import lies_at_its_address

LARGE = 1 << 17
"""From how many entries of a weight on oneDNN is faster than PyTorch's own convolution of a single map."""


class Prepacked:
    """The weights of a solve's convolutions, each laid out at its first product.

    PyTorch hands oneDNN a weight as it lies, and oneDNN lays it out anew at every call, which takes its time
    where channels are many and pixels few. A single small map PyTorch does not give to oneDNN at all.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __reduce__(self) -> tuple[type["Prepacked"], tuple[()]]:
        return Prepacked, ()  # a copy lays its own weights out

    def conv2d(self, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        """`functional.conv2d(x, weight, None, stride, padding)`, without gradients."""
        if not _pays(x, weight):
            return functional.conv2d(x, weight, None, stride, padding)
        # The weight is kept with it, so that no other can come to lie at its address.
        key = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if key not in self._known:
            packed = _ONEDNN._reorder_convolution_weight(weight, padding, stride, (1, 1), 1, x.shape)
            self._known[key] = weight, packed
        _, packed = self._known[key]
        return _ONEDNN._convolution_pointwise(x, packed, None, padding, stride, (1, 1), 1, "none", [], "")


def _pays(x: Tensor, weight: Tensor) -> bool:
    plain = lies_at_its_address(x) and lies_at_its_address(weight)
    kind = x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in _DTYPES
    if not (plain and kind and _AVAILABLE and torch.backends.mkldnn.enabled and x.numel()):
        return False
    return (len(x) > 1 or weight.numel() >= LARGE) and not is_in_torch_dispatch_mode()


_ONEDNN: Any = torch.ops.mkldnn
_AVAILABLE = torch.backends.mkldnn.is_available() and all(
    hasattr(_ONEDNN, name) for name in ("_reorder_convolution_weight", "_convolution_pointwise")
)
_DTYPES = {torch.float32}
if _AVAILABLE and _ONEDNN._is_mkldnn_bf16_supported():
    _DTYPES.add(torch.bfloat16)
