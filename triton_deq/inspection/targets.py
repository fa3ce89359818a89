"""The GPUs to compile for: the limits of one multiprocessor, and how many programs fit on it at a time.

Sources:
- sm_80, sm_90, sm_100: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability";
  granularities and the rule for registers: `cuda_occupancy.h` of the CUDA toolkit.
- gfx942: AMD Instinct MI300 CDNA3 Instruction Set Architecture guide, section 3, and LLVM's
  AMDGPUBaseInfo.cpp (512 vector registers a lane and SIMD in granules of 8, 8 waves a SIMD, at most 16
  barriers a compute unit, 64 KiB of LDS in granules of 512 bytes).
"""

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it, and one multiprocessor of it (a compute unit, in AMD's words).

    warps, programs: most that are resident at a time.
    registers: of 32 bits in the whole multiprocessor; a warp takes a multiple of `register_granule`.
    shared: bytes in the multiprocessor; a program takes a multiple of `shared_granule` and
        `shared_reserve` more, and may ask for `shared_limit` at most.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    warps: int
    programs: int
    registers: int
    register_granule: int
    shared: int
    shared_limit: int
    shared_granule: int
    shared_reserve: int
    schedulers: int = 4
    """Parts of the multiprocessor with a register file of their own."""


def _nvidia(arch: int, shared: int) -> Target:
    return Target(
        name=f"sm_{arch}",
        backend="cuda",
        arch=arch,
        warp_size=32,
        warps=64,
        programs=32,
        registers=64 * KIB,
        register_granule=256,
        shared=shared * KIB,
        shared_limit=(shared - 1) * KIB,
        shared_granule=128,
        shared_reserve=1 * KIB,
    )


_MI300 = Target(
    name="gfx942",
    backend="hip",
    arch="gfx942",
    warp_size=64,
    warps=32,
    programs=16,
    registers=4 * 512 * 64,
    register_granule=8 * 64,
    shared=64 * KIB,
    shared_limit=64 * KIB,
    shared_granule=512,
    shared_reserve=0,
)

TARGETS = {target.name: target for target in (_nvidia(80, 164), _nvidia(90, 228), _nvidia(100, 228), _MI300)}


def occupancy(target: Target, warps: int, registers: int, shared: int) -> tuple[float, str]:
    """The share of a multiprocessor's warps that can be resident, and what binds it.

    Args:
        warps: of one program.
        registers: 32-bit registers a thread.
        shared: bytes a program.

    Returns:
        From 0 (a program does not fit) to 1, and "warps", "programs", "registers" or "shared".
    """
    limits = {"warps": target.warps // warps, "programs": target.programs}
    per_warp = _round_up(max(registers, 1) * target.warp_size, target.register_granule)
    fitting = target.registers // target.schedulers // per_warp * target.schedulers
    limits["registers"] = fitting // warps
    if shared > target.shared_limit:
        limits["shared"] = 0
    elif shared + target.shared_reserve:
        per_program = _round_up(shared + target.shared_reserve, target.shared_granule)
        limits["shared"] = target.shared // per_program
    binding = min(limits, key=limits.__getitem__)
    return limits[binding] * warps / target.warps, binding


def _round_up(number: int, granule: int) -> int:
    return -(-number // granule) * granule
