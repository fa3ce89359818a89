"""Which implementation serves a tensor, and why.

`triton` are the kernels: on a GPU, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1) or as compiled
for a GPU, emulated (TRITON_DEQ_EMULATE=1).
`reference` is plain PyTorch and works everywhere. `numba` is the reference with what triton_deq/compiled has
compiled for a CPU: the solvers' own steps and GroupNorm.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .openmp import threads_for

BACKENDS = ("auto", "triton", "reference", "numba")

EMULATED = ("sm_90", "sm_80")
"""The GPUs that `triton_deq.emulation` can stand in for; the first one if none is asked for."""

_INSTALLED = importlib.util.find_spec("triton") is not None
"""Asked for at every op, where torch.compile could not trace the search."""

SMALL = 1 << 18
"""Up to how many entries of a state compiled code on one thread beats PyTorch on several."""

_ambient: ContextVar[str] = ContextVar("ambient", default="auto")


def ambient(requested: str) -> AbstractContextManager[None]:
    """While entered, "auto" means `requested`: so a cell inside a solve runs as the solve was asked to."""
    # torch.compile cannot trace a context variable, and takes the ordinary operators whatever is asked for.
    return nullcontext() if torch.compiler.is_compiling() else _ambient_is(requested)


@contextmanager
def _ambient_is(requested: str) -> Iterator[None]:
    token = _ambient.set(_ambient.get() if requested == "auto" else requested)
    try:
        yield
    finally:
        _ambient.reset(token)


def interpreting() -> bool:
    """True where Triton's interpreter was asked for, so that kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def emulation_seed() -> int:
    """The seed of `triton_deq.emulation`, where kernels run on CPU tensors as compiled; 0 where they do not.

    Raises:
        ValueError: TRITON_DEQ_EMULATE is not a number, or the interpreter was asked for as well.
    """
    given = os.environ.get("TRITON_DEQ_EMULATE", "0")
    if not given.isdecimal():
        raise ValueError(
            f"TRITON_DEQ_EMULATE is {given!r}: give a number, the seed of the order in which warps run, or 0 "
            "to emulate nothing"
        )
    if int(given) and interpreting():
        raise ValueError(
            f"TRITON_DEQ_EMULATE={given} runs kernels as compiled and TRITON_INTERPRET=1 as Python: set one "
            "of the two"
        )
    return int(given)


def emulation_target() -> str:
    """The GPU that kernels are compiled for where they are emulated, by TRITON_DEQ_EMULATE_TARGET.

    Raises:
        ValueError: one that cannot be emulated.
    """
    given = os.environ.get("TRITON_DEQ_EMULATE_TARGET", EMULATED[0])
    if given not in EMULATED:
        raise ValueError(
            f"TRITON_DEQ_EMULATE_TARGET is {given!r}: give one that can be emulated, {' or '.join(EMULATED)}"
        )
    return given


def choose(tensor: Tensor, requested: str = "auto") -> tuple[str, str]:
    """Return `(name, reason)`: the backend that serves `tensor`, "triton" or "reference".

    Args:
        tensor: any tensor of the computation; only its device counts.
        requested: "auto" takes Triton on a GPU tensor (and where kernels are interpreted or emulated), else
            the reference; "numba" the reference, of which it has compiled parts.

    Raises:
        ValueError: an unknown name, or "triton" where no kernel can run.
    """
    requested = _resolved(requested)
    if requested == "reference":
        return "reference", "asked for by name"
    if requested == "numba":
        return "reference", "asked for with the parts that Numba has compiled"

    obstacle = _obstacle(tensor)
    if requested == "triton":
        if obstacle:
            raise ValueError(
                f"backend='triton' cannot run here: {obstacle}. Use backend='auto' or 'reference', move the "
                "tensor to a GPU, or set TRITON_INTERPRET=1 before the first import to interpret the kernels"
            )
        return "triton", "asked for by name"
    if obstacle:
        return "reference", obstacle
    if tensor.device.type != "cpu":
        return "triton", "the tensor is on a GPU"
    return "triton", "interpreted kernels" if interpreting() else "emulated kernels"


def choose_step(z0: Tensor, requested: str = "auto") -> str:
    """What takes a solver's steps from z0: "triton" or "reference" as `choose` says, or "numba".

    "auto" takes Numba for the reference where that can serve, on a CPU in float32 or float64, and pays: where
    each of PyTorch's threads has a sample, and for states of at most `SMALL` entries.

    Raises:
        ValueError: as `choose`, or "numba" where it cannot serve.
    """
    name, _ = choose(z0, requested)
    if requested == "numba":
        obstacle = _numba_obstacle(z0)
        if obstacle:
            raise ValueError(
                f"backend='numba' cannot serve here: {obstacle}. Use backend='auto' or 'reference'"
            )
        return "numba"
    serves = name == "reference" and _resolved(requested) != "reference" and not _numba_obstacle(z0)
    return "numba" if serves and _numba_pays(z0) else name


def compiled_serves(requested: str, tensor: Tensor, *others: Tensor | None) -> bool:
    """Whether, where no kernel serves, what Numba has compiled in place of some operators can, and should.

    While a dispatch mode is entered, which is there to see PyTorch's operators, those run.
    """
    asked = _resolved(requested) != "reference" and not is_in_torch_dispatch_mode()
    if not asked or _numba_obstacle(tensor, (*_NUMBA, torch.bfloat16)):
        return False
    there = [tensor, *(other for other in others if other is not None)]
    return all(lies_at_its_address(each) and each.device.type == "cpu" for each in there)


def lies_at_its_address(tensor: Tensor) -> bool:
    """Whether a tensor's entries stand in memory from `data_ptr()` on: not so of a wrapper."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_neg()


def _resolved(requested: str) -> str:
    """What is asked for, all things considered."""
    if requested not in BACKENDS:
        raise ValueError(f"backend={requested!r} is unknown: choose one of {', '.join(map(repr, BACKENDS))}")
    if requested == "auto" and not torch.compiler.is_compiling():  # which cannot trace a context variable
        return _ambient.get()
    return requested


_NUMBA = torch.float32, torch.float64


def _numba_obstacle(tensor: Tensor, dtypes: tuple[torch.dtype, ...] = _NUMBA) -> str:
    """What keeps Numba's code, for these dtypes, from serving this tensor; empty if nothing does."""
    if tensor.device.type != "cpu":
        return f"the state is on {tensor.device.type!r}"
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"the state is a {type(tensor).__name__}, which NumPy cannot see"
    if tensor.dtype not in dtypes:
        return f"the state has dtype {tensor.dtype}, and it knows float32 and float64"
    return _numba_missing()


def _numba_pays(z0: Tensor) -> bool:
    return z0.numel() <= SMALL or threads_for(len(z0)) == torch.get_num_threads()


@cache
def _numba_missing() -> str:
    """Why Numba cannot be imported: it may be absent, or not know the NumPy that is installed."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return f"{error} (pip install triton-deq[cpu])"
    return ""


def kernels_can(tensor: Tensor) -> bool:
    """Whether kernels can run on this tensor at all, whatever was asked for."""
    return not _obstacle(tensor)


def _obstacle(tensor: Tensor) -> str:
    """What keeps the kernels from running on this tensor; empty if nothing does."""
    kind = tensor.device.type
    if kind == "cpu" and not (interpreting() or emulation_seed()):  # usual on a CPU: before the search below
        return "the tensor is on the CPU and TRITON_INTERPRET is not set"
    if kind not in ("cpu", "cuda"):  # ROCm devices carry the name "cuda" too
        return f"there are no kernels for a tensor on {kind!r}"
    return "" if _INSTALLED else "the package triton is not installed"


def transformed() -> bool:
    """Whether torch.compile or a transform (torch.func, forward AD) is at work, which sees into operators."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def pushed_forward() -> bool:
    """Whether the innermost transform is forward mode, so that what f returns may have tangents."""
    if torch._C._functorch.maybe_current_level() is None:
        return forward_ad._current_level >= 0
    return torch._C._functorch.peek_interpreter_stack().key() == torch._C._functorch.TransformType.Jvp


def recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def tracked(*tensors: Tensor | None) -> bool:
    """Whether a graph may be made of what is computed now, so that nothing may be written into a place.

    tensors: all that it is computed from, if that is known.
    """
    return transformed() or (recorded(*tensors) if len(tensors) else torch.is_grad_enabled())
