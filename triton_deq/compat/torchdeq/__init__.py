"""TorchDEQ (0.1.0) on our solvers: its functions under its names, with its options and its numbers.

    import triton_deq.compat.torchdeq as compat

    compat.install()                                # and get_deq(f_solver="triton_anderson", ...)
    compat.install(replace=True)                    # or nothing else to change at all

Source of the interface: Geng & Kolter, "TorchDEQ: A Library for Deep Equilibrium Models" (arXiv 2310.18605).
In float64 the iterates are those of TorchDEQ; what differs is what goes wrong there:

- A sample that is not finite holds nobody up, and its best finite iterate comes back.
- Gram matrix and solve are in float32 or better, so bfloat16 and float16 states work; an empty batch too.
- Weights that would amplify rounding (that sum to more than 1e4) give way to a plain step of that sample.
- `indexing` gives a state for every index asked for: a solve that ended before it gives its result again.
  (TorchDEQ leaves them out, and `DEQIndexing` then pairs the states with the wrong gradients.)
- With fewer than three evaluations `anderson` returns the better of them, not x0.
- An option that does not exist is an error.
"""

from .installation import TESTED, install, uninstall
from .losses import jac_reg, power_method
from .solvers import anderson_solver, broyden_solver, fixed_point_iter

__all__ = [
    "TESTED",
    "anderson_solver",
    "broyden_solver",
    "fixed_point_iter",
    "install",
    "jac_reg",
    "power_method",
    "uninstall",
]
