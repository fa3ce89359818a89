"""Launches in Triton's interpreter, in half of the time that it takes by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched_once() -> Iterator[None]:
    """While entered, the interpreter patches `triton.language` once and not in every call of a function.

    For a launch it puts its own functions in the place of the language's. It does so again whenever a kernel
    calls a function, where all that is found is its own and what is put there is the same: that took half of
    a launch, or more. What the first call puts there stays until the launch ends, as it does anyway.
    """
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # another Triton, which may not need it
        yield
        return
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
