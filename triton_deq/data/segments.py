"""A stream of ids cut into rows and segments, as a model with a memory reads it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count


class Segments:
    """`batch` texts side by side, read from left to right in segments of `length` tokens.

    The stream `ids [n]` is cut into `batch` rows of `m = ⌊(n − 1) / batch⌋` successive tokens. Segment k is
    `(tokens, targets)`, both int64 `[B, T]`: of each row the tokens from `k · length` on, and for each of
    them the token that follows. The last segment of an epoch is shorter where `length` does not divide m; the
    fewer than `batch` tokens behind the last row are left out. Rows go on from segment to segment, so that a
    memory may be carried along; a new epoch begins a new text.

    Args:
        ids: one-dimensional integers, in memory or mapped from a file, of which a segment is read at a time.
        batch: rows of all ranks together.
        length: tokens of a segment, at most m.
        device: where segments go.
        rank, world: of data-parallel training: this one takes `batch / world` successive rows.

    Raises:
        TypeError, ValueError: an argument that cannot be, or a text too short for the others.
    """

    def __init__(
        self,
        ids: np.ndarray,
        batch: int,
        length: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
    ):
        for name, value, least in (("batch", batch, 1), ("length", length, 1), ("world", world, 1)):
            check_count(name, value, least)
        check_count("rank", rank, least=0)
        if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise TypeError("ids must be a one-dimensional NumPy array of integers, as Corpus.train is")
        if rank >= world:
            raise ValueError(f"rank={rank} is outside [0, {world - 1}]: there are world={world} ranks")
        if batch % world:
            raise ValueError(f"batch={batch} cannot be shared by world={world} ranks: pick a multiple of it")
        self._row = (len(ids) - 1) // batch
        if self._row < length:
            raise ValueError(
                f"length={length} does not fit: {len(ids)} tokens in batch={batch} rows leave "
                f"{max(self._row, 0)} tokens a row; lower length or batch"
            )
        self._ids = ids
        self._length = length
        self._device = torch.device(device)
        share = batch // world
        self._starts = [row * self._row for row in range(rank * share, (rank + 1) * share)]
        self._position = 0
        self._epoch = 0

    def __len__(self) -> int:
        """Segments of an epoch."""
        return -(-self._row // self._length)

    @property
    def position(self) -> int:
        """Tokens of each row that this epoch has given; 0 where a new text begins."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epochs that have ended."""
        return self._epoch

    def take(self) -> tuple[Tensor, Tensor]:
        """The next segment; the first of the next epoch after the last."""
        start = self._position
        stop = min(start + self._length, self._row)
        rows = np.stack([self._ids[first + start : first + stop + 1] for first in self._starts])
        self._position = stop
        if stop == self._row:
            self._position, self._epoch = 0, self._epoch + 1
        segment = torch.from_numpy(rows.astype(np.int64))
        return segment[:, :-1].to(self._device), segment[:, 1:].to(self._device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is left of this epoch."""
        epoch = self._epoch
        while self._epoch == epoch:
            yield self.take()

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position, "epoch": self._epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one of the same text, batch and length was.

        Raises:
            ValueError: a position that this one never comes to.
        """
        position = state["position"]
        if not 0 <= position < self._row or position % self._length:
            raise ValueError(
                f"position={position} is none of these segments' (length {self._length}, {self._row} tokens "
                "a row): the state is of another text, batch or length"
            )
        self._position, self._epoch = position, state["epoch"]
