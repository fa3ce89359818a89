"""Compile one kernel for a GPU that need not be there, and hold what comes out to its budget."""

import contextlib
import importlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ops.launch import right_stages
from .reading import (
    Access,
    accesses,
    amd_resources,
    at_lines,
    lines_of,
    matrix_instructions,
    nvidia_resources,
    unfenced_copies,
    unset_registers,
)
from .sass import disassemble, listing
from .targets import TARGETS, Target, occupancy
from .waits import CodePath, follow


@dataclass(frozen=True)
class Job:
    """One compilation, in words that another process understands.

    entry: its index in the catalog; configuration: the index among those of an autotuned kernel.
    """

    catalog: str
    entry: int
    configuration: int
    target: str
    asm: str | None = None
    waits: bool = False


@dataclass
class Row:
    """What `inspect` reports of one kernel, configuration and target.

    spilled, stack: bytes a thread; shared: bytes a program; code: bytes; seconds: of the compiler, from an
    empty cache, as Triton's own timer has it.
    occupancy: share of the resident warps that the target could have; limited_by: what binds it.
    loads, stores: bytes of an instruction → how many such instructions, of a thread. The contiguous ones
    are those that touch the entry's contiguous arguments.
    path: what a warp waits for, if that was asked for, and the target is NVIDIA's.
    broken: the budgets that do not hold. error: the compiler's message; then nothing else is known.
    """

    op: str
    kernel: str
    target: str
    registers: int = 0
    spilled: int = 0
    stack: int = 0
    shared: int = 0
    occupancy: float = 0.0
    limited_by: str = ""
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    contiguous_loads: dict[int, int] = field(default_factory=dict)
    contiguous_stores: dict[int, int] = field(default_factory=dict)
    matrix_instructions: int = 0
    code: int = 0
    seconds: float = 0.0
    path: CodePath | None = None
    broken: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and not self.broken


class AbsentGPU:
    """All that Triton asks of a driver before a launch: which GPU it is to compile for."""

    def __init__(self, target: Target):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> Any:
        return self.target.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: Any) -> int:
        return 0


def configurations(kernel: Any) -> list[tuple[str, dict[str, Any]]]:
    """The configurations of an autotuned kernel, as (label, constants and options); else one, empty."""
    from triton.runtime.autotuner import Autotuner

    if not isinstance(kernel, Autotuner):
        return [("", {})]
    return [
        (",".join(f"{name}={value}" for name, value in constants.items()), constants)
        for constants in (config.all_kwargs() for config in kernel.configs)
    ]


def name_of(job: Job) -> tuple[str, str]:
    """The op and the row's name."""
    entry = _entry(job)
    label, _ = configurations(entry.kernel)[job.configuration]
    return entry.op, f"{entry.name}/{label}" if label else entry.name


def compile_job(job: Job) -> Row:
    """Compile and read. A kernel that does not compile is a row as well."""
    op, name = name_of(job)
    row = Row(op, name, job.target)
    try:
        _compile(_entry(job), job, row)
    except Exception as error:  # Triton's compilers raise many kinds
        row.error = f"{type(error).__name__}: {error}".strip()
    return row


def _entry(job: Job) -> Any:
    return importlib.import_module(job.catalog).ENTRIES[job.entry]


def _compile(entry: Any, job: Job, row: Row) -> None:
    target = TARGETS[job.target]
    with _listening() as (report, times):
        compiled = _warm_up(entry, job.configuration, target)
    row.seconds = sum(times)
    cuda = target.backend == "cuda"
    assembly = compiled.asm["ptx" if cuda else "amdgcn"]
    descriptors = "wgmma" in assembly  # which it makes in uniform registers
    wanted = cuda and (descriptors or job.waits or job.asm is not None)
    code = disassemble(compiled.asm["cubin"]) if wanted else []
    if job.asm is not None:
        stem = Path(job.asm) / f"{_file_name(row.kernel)}.{target.name}"
        Path(f"{stem}.{'ptx' if cuda else 'amdgcn'}").write_text(assembly)
        if cuda:
            Path(f"{stem}.sass").write_text(listing(code))

    if cuda:
        resources = nvidia_resources(report.getvalue(), compiled.asm["cubin"])
    else:
        resources = amd_resources(assembly)
    row.registers, row.spilled = resources.registers, resources.spilled
    row.stack, row.code = resources.stack, resources.code
    row.shared = compiled.metadata.shared
    row.occupancy, row.limited_by = occupancy(target, compiled.metadata.num_warps, row.registers, row.shared)
    row.matrix_instructions = matrix_instructions(assembly)

    found = accesses(assembly)
    row.loads, row.stores = _widths(found, "load"), _widths(found, "store")
    function = _python_function(entry.kernel)
    lines = lines_of(function, entry.contiguous)
    bulk = at_lines(found, lines)
    row.contiguous_loads, row.contiguous_stores = _widths(bulk, "load"), _widths(bulk, "store")
    row.broken = list(broken_budgets(entry.budget, row, target))
    lost = {kind for kind, *_ in lines} - {access.kind for access in bulk}
    row.broken += [f"no instruction was found for the contiguous {kind}s" for kind in sorted(lost)]
    if unfenced_copies(assembly):
        row.broken.append("tensor cores read asynchronous copies without a fence.proxy.async")
    if job.waits and cuda:
        row.path = follow(code)
    if descriptors:
        unset = unset_registers(code)
        row.broken += [f"the assembler lets it read {name}, which nothing has written" for name in unset]


def _warm_up(entry: Any, configuration: int, target: Target) -> Any:
    """Let Triton compile as for a launch with the entry's arguments: it infers what it would there."""
    import triton.language as tl
    from triton.runtime import driver
    from triton.runtime.jit import MockTensor

    dtypes = {name: tl.dtype(name) for name in tl.dtype.SINT_TYPES + tl.dtype.UINT_TYPES + tl.dtype.FP_TYPES}
    dtypes.update({f"i{bits}": tl.dtype(f"int{bits}") for bits in (8, 16, 32, 64)})

    def argument(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(argument, value))
        return MockTensor(dtypes[value.dtype]) if hasattr(value, "dtype") else value

    arguments = {name: argument(value) for name, value in entry.arguments.items()}
    _, constants = configurations(entry.kernel)[configuration]
    kernel = entry.kernel if not constants else entry.kernel.fn
    driver.set_active(AbsentGPU(target))
    options = dict(entry.options)
    if target.backend == "cuda":
        options |= right_stages(int(target.arch) // 10, options.get("num_warps", 4))
    else:
        options.pop("maxnreg", None)  # an option of NVIDIA's compiler
        if options.get("num_warps", 0) > 8:
            options["num_warps"] = 8  # `most_warps` of triton_deq/ops/launch.py
    return kernel.warmup(grid=(1,), **{**arguments, **options, **constants})


@contextlib.contextmanager
def _listening() -> Iterator[tuple[io.StringIO, list[float]]]:
    """What ptxas reports and how many seconds Triton's compiler took, while the context lasts."""
    from triton import knobs

    times: list[float] = []

    def listen(**event: Any) -> None:
        times.append(event["times"].total / 1e6)

    knobs.compilation.listener = listen
    knobs.nvidia.dump_ptxas_log = True
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        yield report, times


def _python_function(kernel: Any) -> Any:
    """What stands under triton.autotune, triton.heuristics and triton.jit."""
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return kernel


def _widths(found: list[Access], kind: str) -> dict[int, int]:
    widths = sorted(access.bytes for access in found if access.kind == kind)
    return {width: widths.count(width) for width in dict.fromkeys(widths)}


def broken_budgets(budget: Any, row: Row, target: Target) -> Iterator[str]:
    """One sentence for each budget that the row does not keep."""
    if row.spilled > budget.spilled:
        yield f"spills {row.spilled} bytes a thread (budget {budget.spilled})"
    share = 2 if budget.few and target.warp_size == 64 else 1
    for kind, widths, least in (
        ("load", row.contiguous_loads, budget.load // share),
        ("store", row.contiguous_stores, budget.store // share),
    ):
        if widths and min(widths) < least:
            yield f"{widths[min(widths)]} contiguous {kind}s of {min(widths)} bytes (budget {least})"
    if budget.tensor_cores and not row.matrix_instructions:
        yield "no matrix instruction, although there is a dot"
    if row.shared > target.shared_limit:
        yield f"{row.shared} bytes of shared memory ({target.name} has {target.shared_limit} a program)"


def _file_name(kernel: str) -> str:
    return re.sub(r"[^\w=.-]+", "_", kernel).strip("_")
