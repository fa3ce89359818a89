"""What every launch has in common: the device, the compiler's options, the cut of a row into parts."""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend as backends
from .. import emulation
from ..backend import transformed
from .interpreted import spared

PROGRAMS = 2048
"""Enough programs to fill a large GPU several times; more would only repeat each sample's small solve."""
WORTHWHILE_BLOCKS = 16
"""So many blocks of a state take a program longer than the small solve that it begins with."""
MAX_PARTS = 256
MAX_BLOCK = 2048
SHARING = 4
"""How many maps share a launch at most: its code grows with each of them."""
FEW_WARPS = 8
"""Of a program that leaves room for others on its multiprocessor."""


_known: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...], Any]] = {}
"""By what Triton compiles a kernel anew for: the compiled kernel, what it takes after `launch`'s args, and
the kernel that it was made of, whose id must stay its own."""


Again = Callable[[], None]
"""Launches a kernel once more with the arguments that it had, at the addresses that they had."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> Again:
    """Run `kernel[grid]` on the device of the first tensor among `args`, the kernel's first parameters.

    Tensors and numbers may stand in tuples, as Triton has them.

    Triton's own way to a kernel that it has compiled takes longer than a dozen of PyTorch's operators, and a
    step of a solver is two launches: so a kernel is remembered here, and the next time launched directly.

    `enable_fp_fusion` is said here for all kernels: Triton's default for it changes between versions.
    """
    device = next(tensors_of(args)).device
    if device.type != "cuda":
        again = partial(_run_on_cpu, kernel, grid, args, constants)
        again()
        return again
    with _on(device.index):
        bound = _launch_known(kernel, grid, device.index, args, constants)
    return partial(_repeat, device.index, bound)


def tensors_of(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among a launch's arguments, in their order."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from tensors_of(arg)


class Part(NamedTuple):
    """One map's part of a launch that serves several.

    Attributes:
        operands: what the kernel gets for it; the first is a tensor, by whose size maps are ordered.
        constants: what it gets for it at compile time.
        programs, warps: how many programs it takes, of a map for each sample; how many warps are best for it.
        result: what comes of it.
    """

    operands: tuple[Any, ...]
    constants: tuple[Any, ...]
    programs: int
    warps: int
    result: Any


def shared(
    parts: Sequence[Part], samples: int | None = None, most: int = SHARING
) -> Iterator[tuple[tuple[int], tuple[Any, ...], dict[str, Any]]]:
    """The launches for all parts, at most so many in each: grid, arguments and constants.

    The largest first and those of about one size together, so that few wait for one that is much larger. And
    programs of more than `FEW_WARPS` by themselves: they fill a multiprocessor, on which several others fit.

    samples: how many each part is of, an argument of the kernel; None where a part has none. It is a number
    by itself since Triton compiles anew for other numbers in a tuple, whatever `do_not_specialize` says.
    """
    ordered = sorted(parts, key=lambda part: -part.operands[0].numel())
    many = [part for part in ordered if part.warps > FEW_WARPS]
    few = [part for part in ordered if part.warps <= FEW_WARPS]
    for chosen in [kind[start : start + most] for kind in (many, few) for start in range(0, len(kind), most)]:
        programs = tuple(part.programs for part in chosen)
        constants = {
            "PROGRAMS": programs,
            "CONSTANTS": tuple(part.constants for part in chosen),
            "num_warps": max(part.warps for part in chosen),
        }
        operands = tuple(part.operands for part in chosen)
        if samples is None:
            yield (sum(programs),), (operands,), constants
        else:
            yield (samples * sum(programs),), (operands, samples), constants


def launch_at(
    place: Hashable, alike: tuple[Hashable, ...], launched: dict[Any, Any], make: Callable[[], Again]
) -> None:
    """Launch by `make`, or as the last time at this place if all was `alike`.

    A solver comes round to the same launches: all that it keeps lies where it lay. So `alike` holds whatever
    else may differ, f's value by its address, and putting arguments together anew is spared, which takes the
    host several times as long as an operator.
    """
    last = launched.get(place)
    if last is not None and last[0] == alike:
        last[1]()
    else:
        launched[place] = alike, make()


def launch_anew(
    place: Hashable, alike: tuple[Hashable, ...], launched: dict[Any, Any], make: Callable[[], Again]
) -> None:
    """What `launch_at` does, without its memory: for who stands in for `launch`, to note what is launched."""
    make()


def _run_on_cpu(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """Interpreted, or as compiled for a GPU and emulated."""
    if backends.emulation_seed():
        emulation.prepare(kernel)
    with spared() if backends.interpreting() else nullcontext():
        kernel[grid](*args, **constants, enable_fp_fusion=True)


def _repeat(device: int, bound: Again) -> None:
    with _on(device):
        bound()


def _on(device: int) -> AbstractContextManager[Any]:
    return nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)


def _launch_known(
    kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], constants: dict[str, Any]
) -> Again:
    """Launch the compiled kernel that is known for these arguments, or have Triton find or compile it."""
    key, values = _told_apart(args)
    known = (id(kernel), device, *key, *constants, *constants.values())
    found = _known.get(known)
    if found is not None:
        compiled, rest, _ = found
        again = partial(compiled[(*grid, 1, 1)], *values, *rest)
        again()
        return again
    options = constants | right_stages(_capability(device), constants.get("num_warps", 4))
    compiled = kernel[grid](*args, **options, enable_fp_fusion=True)
    rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
    _known[known] = compiled, rest, kernel
    return partial(compiled[(*grid, 1, 1)], *values, *rest)


def right_stages(capability: int, warps: int) -> dict[str, int]:
    """The option without which Triton's compiler makes wrong products for a GPU of this major capability.

    Tensor cores of sm_100 and its like read shared memory in a proxy of their own, and before 3.7.1 Triton
    has no fence between a loop's asynchronous copies and such reads: on a B200 products were seen to differ
    from run to run (pytorch/pytorch#181248, triton-lang/triton#10537). In one stage there are no such copies.
    Those of sm_90 should need that fence as well, and gave no wrong result: they keep their stages. Fewer
    than four warps use older instructions, of which none of this is true.
    """
    import triton

    fenced = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3]) >= (3, 7, 1)
    return {"num_stages": 1} if capability in (10, 11) and warps >= 4 and not fenced else {}


@cache
def _capability(device: int) -> int:
    """The major one; 0 of what is not NVIDIA's."""
    if torch.version.hip or not torch.cuda.is_available():
        return 0
    return torch.cuda.get_device_capability(device)[0]


def _told_apart(args: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """What of the arguments a compiled kernel depends on, or more than that; and they as it takes them.

    Triton compiles for the dtype of a tensor and whether it lies at 16 bytes, for whether an integer is 1 or
    a multiple of 16 and how many bits it needs, and for nothing in a bool or a float.
    """
    key: list[Any] = []
    values: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            pointer = arg.data_ptr()
            usual = arg.is_cuda and not pointer & 15
            key.append(arg.dtype if usual else (arg.dtype, pointer & 15, arg.is_cuda))
            arg = pointer
        elif isinstance(arg, bool):
            key.append(bool)
        elif isinstance(arg, int):
            aligned = arg & 15 == 0
            key.append("1" if arg == 1 else (arg.bit_length(), aligned) if arg >> 31 else aligned)
        elif isinstance(arg, tuple):
            inside, arg = _told_apart(arg)
            key.append(tuple(inside))
            arg = tuple(arg)
        else:
            key.append(type(arg))
        values.append(arg)
    return key, values


def kernels_serve(tensor: Tensor, backend: str, *others: Tensor | None, autocast: bool = False) -> bool:
    """Whether the kernels can compute something differentiable of these tensors here, and should.

    Inside torch.compile and in transforms the ordinary operators know what to do; under autocast too, unless
    the op computes in the dtype it is given whatever autocast says.
    """
    if torch.compiler.is_compiling() or backends.choose(tensor, backend)[0] == "reference":
        return False
    kind = (tensor.dtype, tensor.device)
    alike = all(other is None or (other.dtype, other.device) == kind for other in others)
    cast = torch.is_autocast_enabled(tensor.device.type) and not autocast
    return alike and tensor.numel() > 0 and not (transformed() or cast)


@dataclass(frozen=True)
class Partition:
    """A row of N entries cut into `parts` of `chunk` entries, each read in blocks of `block`.

    It depends on the shape alone, so that the order of every sum does too.
    """

    parts: int
    chunk: int
    block: int


def in_few_waves(x: Tensor, most: int, resident: int, programs: int = PROGRAMS) -> Partition:
    """Cut rows x as `partition` does, but no finer than is of use where each program begins with a long wait.

    One wave of programs, `resident` on each multiprocessor, does that once for all; a large state is shared
    out further, until a program has so few blocks left that its beginning would count.
    """
    batch, entries = x.shape
    blocks = batch * -(-entries // most)
    wave = resident * processors(x.device)
    return partition(batch, entries, most, max(wave, min(programs, blocks // WORTHWHILE_BLOCKS)))


_multiprocessors: int | None = None


@contextmanager
def cut_for(multiprocessors: int | None) -> Iterator[None]:
    """While entered, work is cut as for a GPU of so many; None: for the device's.

    Of one, each program has as much as it would have of a large problem on others: so checks reach that.
    """
    global _multiprocessors  # not a context variable, as a backward pass has a thread of its own
    before, _multiprocessors = _multiprocessors, multiprocessors
    try:
        yield
    finally:
        _multiprocessors = before


def processors(device: torch.device) -> int:
    """How many multiprocessors work is cut for: those of a GPU; elsewhere as many as a large one has."""
    return _multiprocessors or _processors_of(device)


@cache
def _processors_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=1024)
def partition(batch: int, entries: int, most: int = MAX_BLOCK, programs: int = PROGRAMS) -> Partition:
    """Cut rows `[batch, entries]` into blocks of at most `most`, about so many programs sharing the work."""
    block = min(next_power_of_2(entries), most)
    blocks = -(-entries // block)
    wanted = min(max(programs // max(batch, 1), 1), MAX_PARTS, blocks)
    chunk = -(-blocks // wanted) * block
    return Partition(parts=-(-entries // chunk), chunk=chunk, block=block)


def cycle_length(slots: int) -> int:
    """After how many steps a step's arguments are the same again: a multiple of the ring's slots, at least 4.

    A CUDA graph holds that many, and the host looks as rarely.
    """
    return slots * -(-4 // slots)


def at_most(registers: int) -> dict[str, int]:
    """The option for so many registers a thread, which NVIDIA's compiler has."""
    return {} if torch.version.hip else {"maxnreg": registers}


def most_warps() -> int:
    """A program's warps at most. AMD's have twice as many threads."""
    return 8 if torch.version.hip else 16


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def wide_dtype(dtype: torch.dtype) -> Any:
    """The Triton dtype of sums over entries of `dtype`: float64 for float64, else float32."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype) -> dict[str, Any]:
    """The constants that say how entries are multiplied and added."""
    import triton.language as tl

    # The interpreter's arithmetic in bfloat16 is wrong; numbers of that kind are exact in float32.
    operand = torch.float32 if dtype == torch.bfloat16 and backends.interpreting() else dtype
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}
    return {
        "TF32": dtype == torch.float32 and allows_tf32(),
        "OPERAND": names.get(operand, tl.float32),
        "WIDE": wide_dtype(dtype),
    }


def allows_tf32() -> bool:
    """Whether products of float32 may round their operands.

    PyTorch has an old switch for it, `allow_tf32`, and a newer one. After either was set the newer one can be
    asked, and after the newer one the old one raises.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def laid(x: Tensor) -> Tensor:
    """A map `[B, C, H, W]` with each sample dense and channels-last, `[H, W, C]`: itself if it can be."""
    if x.is_contiguous(memory_format=torch.channels_last):  # the usual case, before the look at each stride
        return x
    _, channels, _, width = x.shape
    wanted = (1, width * channels, channels)
    if all(
        size == 1 or own == wish for size, own, wish in zip(x.shape[1:], x.stride()[1:], wanted, strict=True)
    ):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def channels_of(x: Tensor) -> tuple[Tensor, int]:
    """A map as `laid` gives it, or channels of such a map, and how many others lie between its pixels."""
    _, channels, height, width = x.shape
    pixel = x.stride(3)
    inside = x.stride(1) == 1 and channels > 1 and width > 1 and pixel > channels
    if inside and (height == 1 or x.stride(2) == width * pixel):
        return x, pixel - channels
    return laid(x), 0


def sample_stride(x: Tensor) -> int:
    """How far apart the samples of such a map begin; of a single one it means nothing."""
    return x.stride(0) if x.shape[0] > 1 else x.numel()


def fresh(like: Tensor) -> Tensor:
    """A dense channels-last map of like's shape and dtype."""
    return torch.empty_like(like, memory_format=torch.channels_last)
