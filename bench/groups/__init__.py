"""The groups of cases, by the name that `--group` takes. Each gives its cases for a setting."""

from collections.abc import Callable, Iterator

from ..cases import Case, Setting
from . import ceilings, compat, images, kernels, language, penalty, solve, step, training, transformer, tuning

GROUPS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "ceilings": ceilings.cases,
    "step": step.cases,
    "solve": solve.cases,
    "kernels": kernels.cases,
    "penalty": penalty.cases,
    "training": training.cases,
    "language": language.cases,
    "transformer": transformer.cases,
    "images": images.cases,
    "compat": compat.cases,
    "tuning": tuning.cases,
}
