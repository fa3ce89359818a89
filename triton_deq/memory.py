"""Peak memory of a call, beyond what was in use before it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages:
    """The storages that operators have returned and that are still referenced, in bytes.

    What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def add(self, outputs: Any) -> None:
        """Take in what an operator returned."""
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._live[reference.cdata] = (reference, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.storages = LiveStorages()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        self.storages.add(outputs)
        return outputs


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that `call` held at once: the allocator's figure on a GPU, on a CPU live storages.

    A CPU figure counts only what PyTorch operators return, their outputs into given tensors included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Watch() as watch:
        call()
    return watch.storages.peak
