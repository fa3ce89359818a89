"""Every launch of these tests is watched where it is interpreted."""

from collections.abc import Iterator

import pytest

from tests.memcheck import checked
from triton_deq.backend import interpreting


@pytest.fixture(autouse=True)
def _watched(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("kernels") is None or not interpreting():
        yield
        return
    with checked():
        yield
