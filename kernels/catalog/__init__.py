"""Every kernel with the arguments it ships with: what `triton-deq inspect` compiles and holds to a budget.

An entry holds the arguments of one real launch, not a signature: Triton itself infers types, alignment and
divisibility from them, as it does at a launch. tests/test_inspection.py runs the ops at the same shapes and
compares, so that the two cannot part. A kernel under `triton.autotune` needs one entry as well: all its
configurations are compiled.
"""

from collections.abc import Mapping

from . import (
    anderson,
    attention,
    broyden,
    cross_entropy,
    feedforward,
    fusion,
    groupnorm,
    jacobian,
    mlp,
    norm,
    weightnorm,
)
from .entry import BYTES, Budget, Entry, Pointer

__all__ = ["BYTES", "ENTRIES", "STEPS", "Budget", "Entry", "Pointer"]

ENTRIES: tuple[Entry, ...] = (
    *anderson.ENTRIES,
    *attention.ENTRIES,
    *broyden.ENTRIES,
    *cross_entropy.ENTRIES,
    *feedforward.ENTRIES,
    *fusion.ENTRIES,
    *groupnorm.ENTRIES,
    *jacobian.ENTRIES,
    *mlp.ENTRIES,
    *norm.ENTRIES,
    *weightnorm.ENTRIES,
)

STEPS: Mapping[str, tuple[str, ...]] = {
    f"{solver} step [{dtype},m={history}]": tuple(
        f"{op}_{part}[{dtype},m={history}]" for part in ("residual", "advance")
    )
    for solver, op, dtype, history in (
        ("Anderson", "anderson", "fp32", 6),
        ("Anderson", "anderson", "bf16", 6),
        ("Anderson", "anderson", "fp64", 6),
        ("Picard", "anderson", "fp32", 1),
        ("Broyden", "broyden", "fp32", 10),
        ("Broyden", "broyden", "bf16", 10),
    )
} | {"Anderson step, one launch [fp32,m=6]": ("anderson_step[fp32,m=6]",)}
"""What a solver launches in one step, beside f."""
