"""Every launch of these tests is watched where it is interpreted."""

from collections.abc import Iterator

import pytest

from tests.memcheck import checked
from triton_deq.backend import interpreting
from triton_deq.ops import products
from triton_deq.ops.launch import cut_for


@pytest.fixture(autouse=True)
def _watched(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("kernels") is None or not interpreting():
        yield
        return
    with checked():
        yield


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Products as on a GPU of one multiprocessor, which few programs keep busy: the tiles that are chosen."""
    chosen: list[tuple[int, int]] = []
    choose = products._tile

    def watched(*arguments: int) -> tuple[int, int]:
        chosen.append(choose(*arguments))
        return chosen[-1]

    monkeypatch.setattr(products, "_tile", watched)
    with cut_for(1):
        yield chosen
