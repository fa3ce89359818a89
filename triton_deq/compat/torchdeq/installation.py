"""Putting our functions where TorchDEQ looks for its own."""

import functools
import importlib.metadata
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ...backend import BACKENDS
from ...checks import check_choice
from .judging import Answer
from .losses import jac_reg, power_method
from .options import watch_options
from .solvers import anderson_solver, broyden_solver, fixed_point_iter

TESTED = ("0.1.0",)
"""Versions of TorchDEQ that this was held against."""

SOLVERS: dict[str, Callable[..., Answer]] = {
    "anderson": anderson_solver,
    "broyden": broyden_solver,
    "fixed_point_iter": fixed_point_iter,
}
LOSSES: dict[str, Callable[..., Any]] = {"jac_reg": jac_reg, "power_method": power_method}

_undo: list[Callable[[], Any]] = []


def install(
    *, replace: bool = False, losses: bool = False, strict: bool = True, backend: str = "auto"
) -> None:
    """Register our solvers with TorchDEQ; from then on `get_deq` reports the options that it would ignore.

    Called again, it first takes back what it did before.

    Args:
        replace: also put them in place of TorchDEQ's own "anderson", "broyden" and "fixed_point_iter".
            Without it they are called "triton_anderson", "triton_broyden" and "triton_fixed_point_iter". A
            DEQ that exists already keeps the solver it was built with.
        losses: also put `jac_reg` and `power_method` in place of TorchDEQ's, where its own modules look them
            up. A name that was imported from TorchDEQ before stays what it was.
        strict: what TorchDEQ would ignore is an error; else a warning.
        backend: of the solvers: "auto", "triton", "reference" or "numba"; see `triton_deq.solve`.

    Raises:
        ImportError: TorchDEQ is not installed, or with `strict` not of a version that was tested.
        ValueError: an unknown backend.
    """
    library = _tested_torchdeq(strict)
    check_choice("backend", backend, BACKENDS)
    uninstall()
    registry = library.solver._solvers
    for name, solver in SOLVERS.items():
        bound = functools.partial(solver, strict=strict, backend=backend)
        for key in [f"triton_{name}", *([name] if replace else [])]:
            _undo.append(functools.partial(_put_back, registry, key, registry.get(key)))
            library.solver.register_solver(key, bound)
    if losses:
        for module in (library, library.loss, library.loss.jacobian, library.core):
            for name in LOSSES.keys() & vars(module).keys():
                _set(module, name, LOSSES[name])
    watch_options(library, strict, _set)


def uninstall() -> None:
    """Leave TorchDEQ as it was before `install`."""
    while _undo:
        _undo.pop()()


def _put_back(registry: dict[str, Any], key: str, before: Any) -> None:
    if before is None:
        registry.pop(key, None)
    else:
        registry[key] = before


def _set(owner: Any, name: str, value: Any) -> None:
    _undo.append(functools.partial(setattr, owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _tested_torchdeq(strict: bool) -> ModuleType:
    tested = f"tested with TorchDEQ {', '.join(TESTED)}"
    try:
        import torchdeq
    except ImportError as error:
        raise ImportError(
            f"TorchDEQ is not installed: pip install torchdeq=={TESTED[-1]} (this module was {tested})"
        ) from error
    try:
        version = importlib.metadata.version("torchdeq")
    except importlib.metadata.PackageNotFoundError:
        version = "of no known version"
    if version not in TESTED:
        message = f"TorchDEQ {version} is installed, and this module was {tested}"
        if strict:
            raise ImportError(f"{message}: install that, or pass strict=False to go on with a warning")
        warnings.warn(message, stacklevel=3)
    return torchdeq
