"""Launches in Triton's interpreter, in a fraction of the time that they take by themselves."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any


@contextmanager
def spared() -> Iterator[None]:
    """While entered, the interpreter leaves out what it does in vain, as far as this Triton does it."""
    from triton.runtime import interpreter

    with ExitStack() as stack:
        if hasattr(interpreter, "_patch_lang"):
            stack.enter_context(_patched_once(interpreter))
        builder = getattr(interpreter, "interpreter_builder", None)
        options = getattr(builder, "options", None)
        if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
            stack.enter_context(_overflows_not_sought(builder))
        yield


@contextmanager
def _patched_once(interpreter: Any) -> Iterator[None]:
    """It patches `triton.language` once and not in every call of a function.

    For a launch it puts its own functions in the place of the language's. It does so again whenever a kernel
    calls a function, where all that is found is its own and what is put there is the same: that took half of
    a launch, or more. What the first call puts there stays until the launch ends, as it does anyway.
    """
    patch = interpreter._patch_lang
    scopes: dict[int, Any] = {}

    def once(function: Any) -> Any:
        module = id(function.__globals__)  # says by which names the language is seen
        if module not in scopes:
            scopes[module] = patch(function)
        return scopes[module]

    interpreter._patch_lang = once
    try:
        yield
    finally:
        interpreter._patch_lang = patch


@contextmanager
def _overflows_not_sought(builder: Any) -> Iterator[None]:
    """It does not look for overflows of whole numbers.

    It takes each sum and product of them once more in int64 and compares, for an assertion; and then asserts
    nothing, since it does so in `debug` only. That took half of what was left, or more.
    """
    options = builder.options
    builder.options = replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.options = options
