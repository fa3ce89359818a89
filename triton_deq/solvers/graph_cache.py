"""Graphs that are used again in later solves, and how they are kept from reading what is stale."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .graph import Replays


class GraphCache:
    """Graphs that outlive their solve, for an f that says which tensors it reads.

    Such an f has `inputs`, any nesting of tensors that change from solve to solve, `given(inputs)`, the same
    function of others, and `module`, whose parameters and buffers are all else it reads. Inputs are copied
    into the tensors that were captured. A graph is used again only if shapes, dtypes and layouts of state
    and inputs are the same, and so are the addresses of parameters and buffers, every flag, number, name or
    function that is an attribute of a submodule, and the numeric settings. Where f was seen to read anything
    else, its graphs last for one solve.
    """

    def __init__(self, most: int = 8):
        self._most = most
        self._entries: dict[Any, Cached] = {}

    def find(self, f: Any, x: Tensor, settings: Any) -> "Cached":
        """The entry for a solve by f from x, its inputs up to date."""
        leaves, spec = tree_flatten(f.inputs)
        key = (str(spec), settings, _of_tensor(x), *map(_of_leaf, leaves), *_of_module(f.module))
        entry = self._entries.pop(key, None)
        if entry is None:
            copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            entry = Cached(f.given(tree_unflatten(copies, spec)), copies)
        else:
            for copy, leaf in zip(entry.inputs, leaves, strict=True):
                if isinstance(copy, Tensor):
                    copy.copy_(leaf.detach())
        self._entries[key] = entry  # as the newest
        while len(self._entries) > self._most:
            del self._entries[next(iter(self._entries))]
        return entry

    def forget(self, entry: "Cached") -> None:
        """This entry may not be used again."""
        self._entries = {key: kept for key, kept in self._entries.items() if kept is not entry}

    def __deepcopy__(self, memo: Any) -> "GraphCache":
        return GraphCache(self._most)  # a copied model has other parameters

    def __reduce__(self) -> Any:
        return GraphCache, (self._most,)


@dataclass
class Cached:
    """f of tensors that stay where they are, the state and the graphs that go with it."""

    f: Any
    inputs: list[Any]
    state: Any = None
    replays: Replays | None = None
    reads: "Reads" = field(default_factory=lambda: Reads())

    def watched(self, z: Tensor) -> Tensor:
        """f(z); notes what f reads."""
        with self.reads:
            return self.f(z)

    def knows_all(self) -> bool:
        """Whether all that f was seen to read is the state, an input, a parameter or a buffer."""
        module: nn.Module = self.f.module
        known = [self.state.x, *self.inputs, *module.parameters(), *module.buffers()]
        return self.reads.foreign <= {_address(tensor) for tensor in known if isinstance(tensor, Tensor)}


class Reads(TorchDispatchMode):
    """While entered: the storages that operators read and that none of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: set[int] = set()
        self._made: dict[int, Tensor] = {}  # kept, so that no address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and _address(tensor) not in self._made:
                self.foreign.add(_address(tensor))
        value = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and _address(tensor) not in self.foreign:
                self._made[_address(tensor)] = tensor
        return value


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _of_tensor(tensor: Tensor) -> Any:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def _of_leaf(leaf: Any) -> Any:
    return _of_tensor(leaf) if isinstance(leaf, Tensor) else leaf


def _is_setting(value: Any) -> bool:
    """Numbers, flags, names, functions, frozen records: what compares by value, or is never changed."""
    return isinstance(value, Hashable) and not isinstance(value, Tensor | nn.Module)


def _of_module(module: nn.Module) -> Iterator[Any]:
    """All that a captured evaluation depends on: where tensors lie, flags and numbers, autocast."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield tensor.data_ptr(), _of_tensor(tensor)
    for part in module.modules():
        yield type(part), *((name, value) for name, value in vars(part).items() if _is_setting(value))
    yield torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
