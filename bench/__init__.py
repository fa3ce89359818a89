"""Benchmarks of triton-deq and its peers; run from a checkout as `python -m bench run | report | gpu`.

Nothing needs to be installed: where `triton_deq.kernels` is not, the checkout's `kernels/` takes the name.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""


def _provide_kernels() -> None:
    """Give `kernels/` the name under which an installation has it."""
    if importlib.util.find_spec("triton_deq.kernels") is not None:
        return
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "triton_deq.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


_provide_kernels()

# Read when PyTorch is first imported. A waiting OpenMP thread that spins takes a core from the thread that it
# waits for: on a machine with other work, calls of microseconds then take whole slices of the scheduler.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
