"""The authors' solvers (locuslab/deq, `lib/solvers.py`) from a checkout that LOCUSLAB_DEQ names.

Their repository is no package, so it cannot be installed. `torch.solve`, which their Anderson calls, is no
longer in PyTorch: here it gets what took its place, so that there is something to measure.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

VARIABLE = "LOCUSLAB_DEQ"


class _WithSolve:
    """The module torch with `solve` put back."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def solve(right: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.linalg.solve(matrix, right), None


def load() -> types.ModuleType:
    """`lib/solvers.py` as a module.

    Raises:
        RuntimeError: no checkout is named, or it has no such file.
    """
    folder = os.environ.get(VARIABLE)
    if folder is None:
        raise RuntimeError(f"set {VARIABLE} to a checkout of github.com/locuslab/deq")
    path = Path(folder) / "lib" / "solvers.py"
    if not path.is_file():
        raise RuntimeError(f"{VARIABLE}={folder} has no lib/solvers.py")
    spec = importlib.util.spec_from_file_location("locuslab_solvers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    colours = types.ModuleType("termcolor")  # used for warnings only
    colours.colored = lambda text, *_: text  # type: ignore[attr-defined]
    missing = sys.modules.setdefault("termcolor", colours) is colours
    try:
        spec.loader.exec_module(module)
    finally:
        if missing:
            del sys.modules["termcolor"]
    module.torch = _WithSolve()  # type: ignore[attr-defined]
    return module
