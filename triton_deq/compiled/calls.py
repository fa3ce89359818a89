"""How Python calls what Numba has compiled: with one address, on PyTorch's own threads.

Python calls one C function for each task and dtype with the address of a `Call`, which says where the buffers
are and what is to be done. Large tasks are dealt out to PyTorch's threads, by the OpenMP library that it has
loaded: those keep spinning between PyTorch's operators, and threads of a second pool would wait for them.

Numba keeps compiled functions on disk until the file of the function changes, whatever becomes of what it
calls: so each other file of this folder has all that it compiles, but for `array` and `share`. Who changes
those removes the folder's __pycache__.
"""

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar

import llvmlite.binding
import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from .. import openmp

DTYPES = torch.float32, torch.float64


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Numba's version of a function: compiled at its first call, read from disk in the next process."""
    return _kept(numba.njit, function, {"nogil": True, "error_model": "numpy", **options})


def vectorised(function: Callable[..., Any]) -> Any:
    """`compiled`, with sums in an order that suits a CPU's vectors; NaN and infinity keep their meaning."""
    return compiled(function, fastmath={"reassoc", "contract", "nsz"})


def _kept(decorator: Callable[..., Any], function: Callable[..., Any], options: dict[str, Any]) -> Any:
    """The decorated function, kept on disk unless there is no folder for that."""
    try:
        return decorator(cache=True, **options)(function)
    except RuntimeError:
        return decorator(**options)(function)


class Call(ctypes.Structure):
    """What compiled code is told.

    Its fields are those that `fields` makes. functions: what takes the address of such a call, for each of
    `DTYPES`.
    """

    functions: ClassVar[tuple[Callable[..., None], ...]]

    def run_on(self, dtype: torch.dtype, threads: int) -> None:
        """Run the function for this dtype, on so many threads (field `threads`) if there are as many."""
        self.threads = threads
        function, address = _entry(type(self), dtype)
        if threads == 1:
            function(ctypes.addressof(self))
        else:
            openmp.LIBRARY.GOMP_parallel(address, ctypes.addressof(self), threads, 0)


def fields(whole: str, reals: str) -> list[tuple[str, Any]]:
    """Fields for addresses and whole numbers, and for real numbers."""
    return [
        ("threads", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in whole.split()),
        *((name, ctypes.c_double) for name in reals.split()),
    ]


@cache
def _entry(kind: type[Call], dtype: torch.dtype) -> tuple[Callable[[int], None], int]:
    """What is called with the address of a call, and its own address."""
    function = kind.functions[DTYPES.index(dtype)]
    signature = types.void(types.CPointer(numba.from_dtype(np.dtype(kind))))
    entry = _kept(partial(numba.cfunc, signature), function, {})
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry.address), entry.address


# What compiled code calls OpenMP by; without one it never does, but each must have a value.
_nobody = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
for name in ("omp_get_thread_num", "omp_get_num_threads"):
    address = ctypes.cast(getattr(openmp.LIBRARY, name, _nobody), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(f"triton_deq_{name}", address)
_thread = types.ExternalFunction("triton_deq_omp_get_thread_num", types.intc())
_threads = types.ExternalFunction("triton_deq_omp_get_num_threads", types.intc())


@intrinsic
def _pointer(_, address):
    """The address as one that Numba reads from."""

    def generate(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(types.voidptr))

    return types.voidptr(address), generate


@compiled
def array(address, shape, dtype):
    """What lies at an address, dense."""
    return numba.carray(_pointer(address), shape, dtype)


@compiled
def share(threads, pieces):
    """This thread's number, its first piece of the work, and the one after its last."""
    if threads == 1:
        return 0, 0, pieces
    # There may be fewer threads than asked for.
    thread, threads = np.int64(_thread()), np.int64(_threads())
    return thread, thread * pieces // threads, (thread + 1) * pieces // threads
