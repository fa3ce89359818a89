"""What a solve promises holds whoever takes its steps: also where Numba compiles them."""

import pytest


@pytest.fixture(params=["reference", "numba", pytest.param("triton", marks=pytest.mark.kernels)])
def backend(request, device) -> str:
    if request.param == "numba":
        pytest.importorskip("numba")
        if device != "cpu":
            pytest.skip("Numba compiles for the CPU alone")
    return request.param
