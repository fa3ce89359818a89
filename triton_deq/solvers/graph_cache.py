"""Graphs that are used again in later solves, and how they are kept from reading what is stale."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..weight_caches import without_caches
from . import graph
from .graph import Replays
from .graph_keys import Look, look, of_leaf, of_mode, of_tensor


class GraphCache:
    """Graphs that outlive their solve, for an f that says which tensors it reads.

    Such an f has `inputs`, any nesting of tensors that change from solve to solve, `given(inputs)`, the same
    function of others, and `module`, whose parameters and buffers are all else it reads. It may have
    `prepare()`, which makes of its inputs what its evaluations read. Inputs are copied into the tensors that
    were captured. A graph is used again only if shapes, dtypes and layouts of state and inputs are the same,
    and so are the addresses of parameters and buffers, every flag, number, name or function that is an
    attribute of a submodule, autocast and the numeric settings. Where f was seen to read anything else, its
    graphs last for one solve.

    What comes before and after a solve can be replayed as well (`call`).
    """

    def __init__(self, most: int = 8):
        self._most = most
        self._entries: dict[Any, Cached] = {}
        self._calls: dict[Any, Call] = {}
        self._looked: dict[int, Look] | None = None

    def find(self, f: Any, x: Tensor, settings: Any) -> "Cached":
        """The entry for a solve by f from x, its inputs up to date."""
        leaves, spec = tree_flatten(f.inputs)
        stays = [id(leaf) if self._lasts(leaf) else None for leaf in leaves]
        given = (str(spec), settings, of_tensor(x), *map(of_leaf, leaves), *stays)
        key = (given, of_mode(x.device), self._look(f.module).key)
        entry = self._entries.get(key)
        if entry is None:
            copies = [leaf if place else _copied(leaf) for place, leaf in zip(stays, leaves, strict=True)]
            entry = Cached(f.given(tree_unflatten(copies, spec)), copies)
        else:
            _renew(entry.inputs, leaves)
        entry.prepare(x.device)
        self._keep(self._entries, key, entry)
        return entry

    def call(self, function: Callable[..., Any], modules: Sequence[nn.Module | None], *inputs: Any) -> Any:
        """`function(*inputs)`, from a graph where it can be; without gradients.

        What it returns lies where the next call leaves its own, and `find` does not copy what lies there.

        function: reads the inputs, any nesting of tensors and settings, and the modules, and nothing else.
        """
        there = [module for module in modules if module is not None]
        leaves, spec = tree_flatten(inputs)
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        looks = [self._look(module) for module in there]
        if not (graph.captures(device) and all(each.repeatable for each in looks)):
            return function(*inputs)
        given = (function, str(spec), *map(of_leaf, leaves))
        key = (given, of_mode(device), *(each.key for each in looks))
        call = self._calls.get(key)
        if call is None:
            call = Call.of(function, there, leaves, spec, device)
        elif call.replay is not None:
            _renew(call.inputs, leaves)
        self._keep(self._calls, key, call)
        if call.replay is None:
            return function(*inputs)
        call.replay()
        return call.value

    @contextmanager
    def looking_once(self) -> Iterator[None]:
        """While entered, no module changes: what a graph depends on of it is looked up once."""
        self._looked = {}
        try:
            yield
        finally:
            self._looked = None

    def _look(self, module: nn.Module) -> Look:
        looked = {} if self._looked is None else self._looked
        if id(module) not in looked:
            looked[id(module)] = look(module)
        return looked[id(module)]

    def _lasts(self, leaf: Any) -> bool:
        """Whether a call leaves it where it is. It may be a parameter: nothing else may be copied there."""
        return any(id(leaf) in call.lasting for call in self._calls.values())

    def _keep(self, kept: dict[Any, Any], key: Any, entry: Any) -> None:
        """As the newest; the oldest go."""
        kept.pop(key, None)
        kept[key] = entry
        while len(kept) > self._most:
            del kept[next(iter(kept))]

    def forget(self, entry: "Cached") -> None:
        """This entry may not be used again."""
        self._entries = {key: kept for key, kept in self._entries.items() if kept is not entry}

    def __deepcopy__(self, memo: Any) -> "GraphCache":
        return GraphCache(self._most)  # a copied model has other parameters

    def __reduce__(self) -> Any:
        return GraphCache, (self._most,)


@dataclass
class Cached:
    """f of tensors that stay where they are, the state and the graphs that go with it.

    reads: what f was seen to read, until a first solve has come to its end and it is judged.
    """

    f: Any
    inputs: list[Any]
    state: Any = None
    replays: Replays | None = None
    reads: "Reads | None" = field(default_factory=lambda: Reads())
    prelude: Callable[[], None] | None = None

    def prepare(self, device: torch.device) -> None:
        """What evaluations read of the inputs, from a graph that leaves it where they found it before."""
        if not hasattr(self.f, "prepare"):
            return
        if self.prelude is None:
            with self.reads or nullcontext(), without_caches():
                self.f.prepare()  # what is compiled or loaded at first may not be captured
                with suppress(RuntimeError):  # what waits for the device serves one solve
                    self.prelude = graph.capture(self.f.prepare, device)
        if self.prelude is not None:
            self.prelude()

    def watched(self, z: Tensor) -> Tensor:
        """f(z); notes what f reads."""
        with self.reads or nullcontext(), without_caches():
            return self.f(z)

    def knows_all(self) -> bool:
        """Whether all that f was seen to read is the state, an input, a parameter or a buffer."""
        if self.reads is None:  # it was, else this would have been forgotten
            return True
        known = self.reads.only([self.state.x, self.state.other, *self.inputs], [self.f.module])
        self.reads = None  # which has kept all that f made
        return known and (self.prelude is not None or not hasattr(self.f, "prepare"))


@dataclass
class Call:
    """A function of tensors that stay where they are, and whose value stays where it is.

    replay: leaves the value there; None where the function cannot be captured, or reads something else.
    lasting: the ids of the value's tensors, which live as long as this does.
    """

    inputs: list[Any]
    value: Any = None
    replay: Callable[[], None] | None = None
    lasting: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls, function: Any, modules: Sequence[nn.Module], leaves: list[Any], spec: Any, device: torch.device
    ) -> "Call":
        call = cls([_copied(leaf) for leaf in leaves])

        def evaluate() -> None:
            call.value = function(*tree_unflatten(call.inputs, spec))

        with Reads() as reads, without_caches():
            evaluate()  # what is compiled or loaded at first may not be captured
        if reads.only(call.inputs, modules):
            with suppress(RuntimeError):  # a function that waits for the device works as it is
                call.replay = graph.capture(evaluate, device)
        if call.replay is None:
            return cls([])
        call.lasting = frozenset(id(leaf) for leaf in tree_leaves(call.value) if isinstance(leaf, Tensor))
        return call


class Reads(TorchDispatchMode):
    """While entered: the storages that operators read and that none of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.foreign: set[int] = set()
        self._made: dict[int, Tensor] = {}  # kept, so that no address is used twice

    def only(self, tensors: Sequence[Any], modules: Sequence[nn.Module]) -> bool:
        """Whether nothing was read but these tensors, and parameters and buffers of these modules."""
        held = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        known = {_address(tensor) for tensor in (*tensors, *held) if isinstance(tensor, Tensor)}
        return self.foreign <= known

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


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


@torch.no_grad()
def _renew(copies: Sequence[Any], leaves: Sequence[Any]) -> None:
    """By one operator for all tensors of a dtype: an injection may hold every weight of a cell."""
    alike = defaultdict(list)
    for copy, leaf in zip(copies, leaves, strict=True):
        if isinstance(copy, Tensor) and copy is not leaf:
            alike[copy.dtype].append((copy, leaf))
    for pairs in alike.values():
        torch._foreach_copy_([copy for copy, _ in pairs], [leaf for _, leaf in pairs])
