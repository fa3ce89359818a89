"""Options that a function does not have: an error that lists the ones it has, or a warning."""

import difflib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

OURS = {"strict", "backend"}


def names_of(function: Callable[..., Any]) -> list[str]:
    """The options that `function` names, those of ours last."""
    named = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    return sorted(named, key=OURS.__contains__)


def refuse_unknown(
    function: Callable[..., Any],
    unknown: Mapping[str, Any],
    strict: bool,
    siblings: Collection[Callable[..., Any]] = (),
) -> None:
    """Raise TypeError for options that the original would swallow; without `strict`, warn.

    siblings: functions that a program chooses from by name, and hands one set of options to whichever it is:
    an option of theirs is a warning at most.
    """
    if not unknown:
        return  # as in almost every solve, and the names of options take longer to find than a step
    theirs = {name for sibling in siblings for name in names_of(sibling)}
    for names, refused in ((unknown.keys() & theirs, False), (unknown.keys() - theirs, strict)):
        if names:
            report(f"{function.__name__}() has no option", sorted(names), names_of(function), refused)


def report(
    beginning: str, unknown: Iterable[str], known: Iterable[str], strict: bool, remedy: str = ""
) -> None:
    """Say which names are unknown, which are near, and which there are: an error, or a warning."""
    known = list(known)
    said = []
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1)
        said.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    message = f"{beginning} {', '.join(said)}. {remedy + '. ' if remedy else ''}It has: {', '.join(known)}"
    if strict:
        raise TypeError(f"{message}. strict=False turns this into a warning")
    warnings.warn(f"{message}. It is ignored", stacklevel=4)
