"""How the solve of one sample ended."""

from enum import IntEnum


class Status(IntEnum):
    """The end of one sample's solve, held as int8 in `Solution.status`.

    A sample that is still being solved carries MAX_STEPS: that is what it will have ended as
    if nothing better happens before the steps run out.
    """

    CONVERGED = 0
    MAX_STEPS = 1
    DIVERGED = 2
    NONFINITE = 3

    @property
    def remedy(self) -> str:
        """One sentence on what to do about it."""
        return _REMEDIES[self]


_REMEDIES = {
    Status.CONVERGED: "The residual reached the tolerance; nothing needs doing.",
    Status.MAX_STEPS: (
        "The residual was still above the tolerance when the steps ran out: raise max_steps or tol, "
        "lower the solver's mixing, or regularise the Jacobian (td.JacobianPenalty)."
    ),
    Status.DIVERGED: (
        "The residual outgrew the scale of the problem: f is not contractive near z0; lower the solver's "
        "mixing, start closer, or regularise the Jacobian (td.JacobianPenalty)."
    ),
    Status.NONFINITE: (
        "f returned NaN or infinity: check the input and the weights of that sample, or use a dtype with "
        "a wider range (bfloat16 or float32 instead of float16)."
    ),
}

RUNNING = Status.MAX_STEPS
"""The status of a sample that has not stopped yet."""
