"""What TorchDEQ's `get_deq` and its classes take without a word, and ignore."""

import argparse
import difflib
import functools
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from ..options import names_of, report

MISPLACED = {
    "stop_mode": "f_stop_mode or b_stop_mode",
    "max_iter": "f_max_iter or b_max_iter",
    "tol": "f_tol or b_tol",
    **dict.fromkeys(
        ("m", "lam", "LBFGS_thres", "ls", "return_final"), "solver_kwargs of the call deq(f, z0)"
    ),
}
"""Options of a solver, and where they have to be given instead."""

CLOSE = 0.8
"""How alike a name is to an option that it is probably meant to be."""

_checked: ContextVar[bool] = ContextVar("checked", default=False)


def watch_options(library: ModuleType, strict: bool, put: Callable[[Any, str, Any], None]) -> None:
    """Let `get_deq` and the constructors of TorchDEQ's classes report what they would ignore.

    put: `(owner, name, value)`, which sets an attribute for as long as our functions are installed.
    """
    core = library.core
    get_deq, constructor = core.get_deq, core.DEQBase.__init__

    @functools.wraps(get_deq)
    def checked_get_deq(args: Any = None, **options: Any) -> Any:
        known = _known(library)
        _report([name for name in options if name not in known], known, strict)
        _report(_meant(core.DEQConfig(args).config, known), known, strict=False)
        token = _checked.set(True)
        try:
            return get_deq(args, **options)
        finally:
            _checked.reset(token)

    @functools.wraps(constructor)
    def checked_constructor(self: Any, args: Any = None, *positional: Any, **options: Any) -> None:
        known = _known(library)
        if not _checked.get():
            _report(_meant(core.DEQConfig(args).config, known), known, strict=False)
        _report([name for name in options if name not in known], known, strict)
        constructor(self, args, *positional, **options)

    for module in (library, core):
        put(module, "get_deq", checked_get_deq)
    put(core.DEQBase, "__init__", checked_constructor)


def _known(library: ModuleType) -> set[str]:
    """Every option of TorchDEQ's command line and of the classes that are registered now."""
    parser = argparse.ArgumentParser(add_help=False)
    library.add_deq_args(parser)
    known = {action.dest for action in parser._actions}
    for owner in {base for deq in library.core._core.values() for base in deq.__mro__}:
        if issubclass(owner, library.core.DEQBase):
            known |= set(names_of(owner.__init__))
    return known - {"self", "args", "kwargs"}


def _meant(config: Iterable[str], known: set[str]) -> list[str]:
    """The names in a parsed command line that look meant for TorchDEQ; it may hold much else."""
    return [
        name
        for name in config
        if name not in known
        and (name in MISPLACED or difflib.get_close_matches(name, known, n=1, cutoff=CLOSE))
    ]


def _report(unknown: list[str], known: set[str], strict: bool) -> None:
    if unknown:
        placed = [f"{name}: give it as {MISPLACED[name]}" for name in unknown if name in MISPLACED]
        report("TorchDEQ ignores", unknown, sorted(known), strict, "; ".join(placed))
