"""Kernels run on a GPU where there is one, else in Triton's interpreter, which reads this at its import.

With TRITON_DEQ_EMULATE=1, or another seed, they run as they are compiled for a GPU, emulated.
"""

import os

import pytest
import torch

if int(os.environ.get("TRITON_DEQ_EMULATE", "0")):
    from triton_deq import emulation

    emulation.install()  # also for the tests' own kernels
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if "PYTEST_XDIST_WORKER" in os.environ:  # other workers use the other cores, and threads that wait cost both
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.kernels)])
def backend(request) -> str:
    """Both implementations, for what has to hold whichever serves."""
    return request.param
