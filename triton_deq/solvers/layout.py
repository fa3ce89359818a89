"""How a loop sees a state, and how it asks f."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import as_state


class Layout:
    """Sees a state `[B, ...]` as rows `[B, N]` in the order in which it lies in memory.

    So a channels-last image stays channels-last, and neither f's input nor (if f keeps the layout) its
    output is ever copied.
    """

    def __init__(self, z: Tensor):
        strides = z.stride()  # torch.compile 2.14 does not follow a key that asks z
        inner = sorted(range(1, z.dim()), key=strides.__getitem__, reverse=True)
        self._order = [0, *inner]
        self._shape = [z.shape[dim] for dim in self._order]
        self._back = sorted(range(z.dim()), key=self._order.__getitem__)
        self._views: dict[Tensor, Tensor] = {}

    def rows(self, z: Tensor) -> Tensor:
        """`[B, N]`; a view where z has this layout already, or z itself."""
        if z.dim() == 2:
            return z
        return z.permute(self._order).reshape(z.shape[0], -1)

    def unrows(self, rows: Tensor) -> Tensor:
        """The state again, as a view; also of fewer samples."""
        if len(self._shape) == 2:
            return rows.view(rows.shape)
        return rows.view(-1, *self._shape[1:]).permute(self._back)

    def lasting(self, rows: Tensor) -> Tensor:
        """`unrows` of a buffer that every step looks at: making a view costs as much as an operator.

        A view of which f has asked a gradient holds that, and is not used again.
        """
        view = self._views.get(rows)
        if view is None or view.requires_grad:
            view = self._views[rows] = self.unrows(rows)
        return view


def evaluate(f: Callable[[Tensor], Tensor], z: Tensor, debug: bool) -> Tensor:
    """f(z), checked to look like z; with `debug`, z is checked to be what it was."""
    before = z.clone() if debug else None
    value = as_state(f(z), z)
    if before is not None and not torch.equal(before.nan_to_num(), z.nan_to_num()):
        raise RuntimeError(
            "f modified its argument z in place: it is the solver's own buffer; write out of place, or let f "
            "begin with z = z.clone()"
        )
    return value
