"""What PyTorch keeps of a cell's weights while a context is open.

`torch.nn.utils.parametrize.cached()` keeps a weight as its parametrization first made it, and autocast keeps
the weights that it has cast. Both are the process's, and know nothing of solves and captures.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.nn.utils import parametrize

P = ParamSpec("P")
R = TypeVar("R")


def kept_apart() -> AbstractContextManager[None]:
    """While entered, `parametrize.cached` keeps what is made here only until the end.

    A solve makes weights without gradients. If they were kept, the evaluation with gradients after it would
    find them, and what they were made of would get none.
    """
    return _kept_apart() if parametrize._cache_enabled else nullcontext()


@contextmanager
def _kept_apart() -> Iterator[None]:
    before = parametrize._cache
    parametrize._cache = dict(before)
    try:
        yield
    finally:
        parametrize._cache = before


def as_solve(function: Callable[P, R]) -> Callable[P, R]:
    """The function run without gradients, and with the weights that it makes kept apart."""

    @wraps(function)
    def solve(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), kept_apart():
            return function(*args, **kwargs)

    return solve


@contextmanager
def without_caches() -> Iterator[None]:
    """While entered, a weight is cast by autocast and made by its parametrization wherever it is read.

    Else a capture may read what is kept from before, of a weight as it was then, and in memory that is given
    back at the end of the context.
    """
    before = torch.is_autocast_cache_enabled(), parametrize._cache_enabled
    torch.set_autocast_cache_enabled(False)
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before[0])
        parametrize._cache_enabled = before[1]
