"""States of several tensors, and complex ones: one real tensor for the solvers, seen as it is by f."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..backend import transformed
from ..checks import as_state, check_state
from .solution import NotConverged, Solution

State = Any
"""A tensor `[B, ...]`, real or complex, or a tuple, list or dict of such."""
Map = Callable[[Any], Any]
"""From a state to a state of the same structure, where a list is as good as a tuple."""
Path = tuple[Any, ...]
"""The keys and indices that lead to a tensor of a state."""
REAL = "real and imaginary"
"""The last key to the numbers of a complex tensor."""


class Packing:
    """How the tensors `[B, ...]` of a tuple, list or dict lie beside each other in one real `[B, N]`."""

    def __init__(self, name: str, state: Any):
        leaves = _leaves(state)
        parts = list(leaves.values())
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            kinds = ", ".join(type(part).__name__ for part in parts) or "nothing"
            raise TypeError(
                f"{name} must be a tensor or a tuple, list or dict of tensors, got {type(state).__name__} of "
                f"{kinds}: pass floating tensors [B, ...]"
            )
        for place, part in enumerate(parts):
            check_state(name if isinstance(state, Tensor) else f"tensor {place} of {name}", part)
            if _told(part) != _told(parts[0]):
                raise ValueError(
                    f"tensor {place} of {name} has {_told(part)}, and the first has {_told(parts[0])}: a "
                    "state needs one number of samples, one dtype and one device"
                )
        self._kind = tree_flatten(state)[1]
        self._shapes = _shapes(leaves)
        self._aligned = all(path[-1:] == (REAL,) for path in self._shapes)
        self._sizes = [shape.numel() for shape in self._shapes.values()]

    def pack(self, state: Any, name: str = "f(z)") -> Tensor:
        """`[B, N]`, of a state of the same structure."""
        return torch.cat(self._rows(state, name), dim=1)

    def pack_into(self, state: Any, out: Tensor) -> None:
        """The same, left in `out`."""
        rows = self._rows(state, "f(z)")
        if any(each.dtype != out.dtype or len(each) != len(out) for each in rows):
            out.copy_(as_state(torch.cat(rows, dim=1), out))  # or an error that tells what is wrong
        else:
            torch.cat(rows, dim=1, out=out)

    def unpack(self, rows: Tensor) -> Any:
        """The state again, of views (complex numbers beside real ones are copied)."""
        parts = rows.split(self._sizes, dim=1)
        views = [
            self._seen(path, part.view(len(rows), *shape))
            for part, (path, shape) in zip(parts, self._shapes.items(), strict=True)
        ]
        return tree_unflatten(views, self._kind)

    def _seen(self, path: Path, part: Tensor) -> Tensor:
        if path[-1:] != (REAL,):
            return part
        if self._aligned:
            return torch.view_as_complex(part)
        return torch.complex(*part.unbind(-1))  # beside real numbers a pair may begin anywhere

    def _rows(self, state: Any, name: str) -> list[Tensor]:
        leaves = _leaves(state)
        shapes = _shapes(leaves)
        if shapes != self._shapes:
            raise ValueError(
                f"{name} is a {type(state).__name__} of shapes {_listed(shapes)} beside the samples, and the "
                f"state has {_listed(self._shapes)}: a fixed point needs one structure; check f, or z0"
            )
        parts = [leaves[path] for path in self._shapes]
        return [part.flatten(1) if part.dim() > 1 else part[:, None] for part in parts]

    def solution(self, solution: Solution) -> Solution:
        """With a value like the state. It stays the object that a backward pass reports to."""
        value = self.unpack(solution.value)
        if transformed():
            return replace(solution, value=value)
        object.__setattr__(solution, "value", value)
        return solution

    @contextmanager
    def in_errors(self) -> Iterator[None]:
        """See that what `throw=True` raises has its value like the state, too."""
        try:
            yield
        except NotConverged as error:
            self.solution(error.solution)
            raise


class Packed:
    """f, from rows to rows."""

    def __init__(self, f: Any, packing: Packing):
        self.f = f
        self.packing = packing

    def __call__(self, z: Tensor) -> Tensor:
        return self.packing.pack(self.f(self.packing.unpack(z)))

    def write(self, z: Tensor, out: Tensor) -> None:
        """f(z) into the solver's history, which saves a copy."""
        self.packing.pack_into(self.f(self.packing.unpack(z)), out)

    @property
    def select(self) -> Any:
        select = getattr(self.f, "select", None)
        return None if select is None else lambda samples: Packed(select(samples), self.packing)

    @property
    def module(self) -> Any:
        """With `inputs` and `given`, what a graph cache asks."""
        return self.f.module

    @property
    def inputs(self) -> Any:
        return self.f.inputs

    def given(self, inputs: Any) -> "Packed":
        return Packed(self.f.given(inputs), self.packing)


def packed(name: str, f: Map, z: State) -> tuple[Any, Any, Packing | None]:
    """f and z as a solver takes them, and how to see the answer; of one real tensor as they are, and None."""
    if not (z.is_complex() if isinstance(z, Tensor) else isinstance(z, tuple | list | dict)):
        return f, z, None
    packing = Packing(name, z)
    return Packed(f, packing), packing.pack(z, name), packing


def unpacked_errors(packing: Packing | None, throw: bool) -> AbstractContextManager[None]:
    return nullcontext() if packing is None or not throw else packing.in_errors()


def _told(part: Tensor) -> str:
    return f"{len(part)} samples of {part.dtype} on {part.device}"


def _leaves(state: Any) -> dict[Path, Any]:
    """What a state is made of, each under its keys: `(h, c)` and `[h, c]` are the same, and in any order."""
    parts: Iterable[tuple[Any, Any]]
    if isinstance(state, dict):
        parts = state.items()
    elif isinstance(state, tuple | list):
        parts = enumerate(state)
    elif isinstance(state, Tensor) and state.is_complex() and state.dim() > 0:
        return {(REAL,): torch.view_as_real(state.resolve_conj())}
    else:
        return {(): state}
    return {(key, *path): leaf for key, part in parts for path, leaf in _leaves(part).items()}


def _shapes(leaves: dict[Path, Any]) -> dict[Path, Any]:
    """Those of tensors beside the samples, else what there is instead."""
    return {
        path: leaf.shape[1:] if isinstance(leaf, Tensor) and leaf.dim() > 0 else type(leaf).__name__
        for path, leaf in leaves.items()
    }


def _listed(shapes: dict[Path, Any]) -> str:
    named = []
    for path, each in shapes.items():
        shape = str(tuple(each)) if isinstance(each, torch.Size) else each
        named.append(f"{'.'.join(map(str, path))}: {shape}" if path else shape)
    return f"[{', '.join(named)}]"
