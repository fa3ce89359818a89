"""What compute-sanitizer does on a GPU, in Triton's interpreter: no kernel touches what it was not given.

A read beyond a tensor whose value nobody uses is right in every result, and a fault on a GPU where nothing is
mapped behind the tensor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np

from triton_deq.ops.launch import tensors_of


class OutOfBounds(Exception):
    """An address outside every tensor of the launch."""


@contextmanager
def checked() -> Iterator[None]:
    """While entered, interpreted loads, stores and atomics may only touch the storages of the arguments."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    begins, ends = np.empty(0, np.uint64), np.empty(0, np.uint64)
    take_in, name = GridExecutor._init_args_hst, ""
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def taking_in(self, args, kwargs):
        nonlocal begins, ends, name
        found = take_in(self, args, kwargs)
        name = self.fn.__name__
        storages = [each.untyped_storage() for each in tensors_of(found[0])]
        extents = sorted({(each.data_ptr(), each.data_ptr() + each.nbytes()) for each in storages})
        begins, ends = np.array(extents, np.uint64).T
        return found

    def check(pointers, mask, what):
        at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.uint64)
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        place = np.searchsorted(begins, at, side="right") - 1
        bad = (place < 0) | (at + np.uint64(size) > ends[np.maximum(place, 0)])
        if bad.any():
            beyond = int(at[bad][0]) - int(ends[max(int(place[bad][0]), 0)])
            raise OutOfBounds(f"{name} {what} {beyond} bytes behind a tensor, {bad.sum()} lanes in all")

    def checking_load(self, pointers, mask, *rest, **options):
        check(pointers, mask, "reads")
        return load(self, pointers, mask, *rest, **options)

    def checking_store(self, pointers, value, mask, *rest, **options):
        check(pointers, mask, "writes")
        return store(self, pointers, value, mask, *rest, **options)

    with (
        mock.patch.object(GridExecutor, "_init_args_hst", taking_in),
        mock.patch.object(InterpreterBuilder, "create_masked_load", checking_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", checking_store),
    ):
        yield
