"""The OpenMP library that PyTorch has loaded, by which other code can run on PyTorch's threads.

Those keep spinning for a while after each operator of PyTorch, and threads of a second pool wait for them.
"""

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import torch


def _library() -> Any:
    """The library; None if PyTorch has none, or not where it is known."""
    name = {"linux": "libtorch_cpu.so", "darwin": "libtorch_cpu.dylib"}.get(sys.platform)
    if name is None or not torch.backends.openmp.is_available():
        return None
    try:  # a library's handle finds the names of those it was linked with
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        library.GOMP_parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        library.GOMP_parallel.restype = None
        library.omp_get_thread_num, library.omp_get_num_threads  # noqa: B018 - that they are there
    except (OSError, AttributeError):
        return None
    return library


LIBRARY = _library()
"""`GOMP_parallel(function, data, threads, 0)` calls the C function on each thread of a team, with data.

There may be fewer threads than asked for, which `omp_get_thread_num()` and `omp_get_num_threads()` tell.
"""

_PROCESS = os.getpid()


def threads_for(pieces: int) -> int:
    """How many of PyTorch's threads can share in so many pieces of work."""
    # A child of fork has the library's memory without its threads, and would wait for them.
    at_hand = torch.get_num_threads() if LIBRARY is not None and os.getpid() == _PROCESS else 1
    return min(at_hand, pieces)
