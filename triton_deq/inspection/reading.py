"""What the compilers' output says: PTX and AMD assembly, ptxas' report, the size of a cubin's code."""

import ast
import inspect
import re
import struct
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sass import Instruction


@dataclass(frozen=True)
class Access:
    """One instruction that reads or writes global memory.

    kind: "load" or "store"; bytes: of one thread; file, line: of the source, "" and 0 where unknown.
    """

    kind: str
    bytes: int
    file: str
    line: int


@dataclass(frozen=True)
class Resources:
    """What a thread needs (registers, spilled and stack bytes), and the bytes of the kernel's code.

    Spilled values lie on the stack, but not all of the stack is spilled: arrays that are indexed at run
    time and calls need it too.
    """

    registers: int
    spilled: int
    stack: int
    code: int


_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', re.MULTILINE)
_LOC = re.compile(r"^\s*\.loc\s+(\d+)\s+(\d+)")
_PTX = re.compile(r"\b(ld|st)\.global((?:\.[\w:]+)*)\.[bsuf](\d+)\b")
_PTX_ASYNC = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S*\s*\[.*?\],\s*\[.*?\],\s*(0x[0-9a-fA-F]+|\d+)")
_AMD = re.compile(r"^\s*(?:global|buffer|flat)_(load|store)_(\w+)")
_AMD_BITS = {"byte": 8, "short": 16, "dword": 32}
_UNIFORM = re.compile(r"\bUR(\d+)\b")
_WRITES_UNIFORM = ("U", "R2UR", "S2UR", "LDCU", "VOTEU", "REDUX")
_PAIRS = re.compile(r"\.64|\.WIDE")
_MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_s?mfmac?_\w+)\b")


def accesses(assembly: str) -> list[Access]:
    """The global loads and stores of PTX or AMD assembly, each with the source line it came from."""
    files = {number: Path(name).name for number, name in _FILE.findall(assembly)}
    file, line, found = "", 0, []
    inline = pinned = False
    for text in assembly.splitlines():
        if match := _LOC.match(text):
            if not pinned:
                file, line = files.get(match[1], ""), int(match[2])
            # Some versions of LLVM count on from here, one source line for each line of inline assembly.
            pinned = inline
        elif "inline asm" in text:
            inline, pinned = "begin" in text, False
        elif access := _access(text):
            found.append(Access(*access, file, line))
    return found


def at_lines(found: list[Access], lines: set[tuple[str, str, int]]) -> list[Access]:
    """Those at these lines, which are as `lines_of` gives them.

    LLVM may join the loads of several lines into one clause, whose line is then 0. Where none of a kind is at
    its lines, it is those of line 0.
    """
    own = [access for access in found if (access.kind, access.file, access.line) in lines]
    missing = {kind for kind, *_ in lines} - {access.kind for access in own}
    return own + [access for access in found if access.kind in missing and access.line == 0]


def _access(text: str) -> tuple[str, int] | None:
    if match := _PTX.search(text):
        vector = re.search(r"\.v(\d)", match[2])
        bits = int(match[3]) * (int(vector[1]) if vector else 1)
        return ("load" if match[1] == "ld" else "store"), bits // 8
    if match := _PTX_ASYNC.search(text):
        return "load", int(match[1], 0)
    if match := _AMD.match(text):
        return match[1], _amd_bits(match[2]) // 8
    return None


def _amd_bits(suffix: str) -> int:
    """`dwordx4` and `b128` are 128 bits, `ushort` and `short_d16_hi` are 16."""
    if match := re.match(r"b(\d+)", suffix):
        return int(match[1])
    match = re.search(r"(byte|short|dword)(?:x(\d))?", suffix)
    return _AMD_BITS[match[1]] * int(match[2] or 1) if match else 0


def matrix_instructions(assembly: str) -> int:
    """How many instructions use the matrix units."""
    return len(_MATRIX.findall(assembly))


def unfenced_copies(ptx: str) -> bool:
    """Whether tensor cores of sm_100 read what asynchronous copies bring, and there is no fence at all."""
    return "tcgen05.mma" in ptx and "cp.async.c" in ptx and "fence.proxy.async" not in ptx


def unset_registers(code: Iterable[Instruction]) -> list[str]:
    """The uniform registers that an instruction reads and none before it has written, by address.

    An assembler that drops a copy leaves such a read behind: ptxas 12.8 was seen to make half a descriptor
    of shared memory out of whatever an earlier kernel had left there, and the matrix product behind it then
    faults on some launches and not on others. Which of its four registers a `gdesc[]` reads is not told.
    """
    written: set[int] = set()
    unset = []
    for name, operands in ((each.name, each.operands) for each in code):
        first, *others = operands.split(",")
        targets: list[int] = []
        if name.startswith(_WRITES_UNIFORM) and first.strip().startswith("UR"):
            begin = int(_UNIFORM.findall(first)[0])
            targets = list(range(begin, begin + (4 if "128" in name else 2 if _PAIRS.search(name) else 1)))
        else:
            others = [first, *others]
        for operand in others:
            read = [] if "gdesc[" in operand else [int(number) for number in _UNIFORM.findall(operand)]
            unset += [f"UR{number}" for number in read if number not in written]
        written.update(targets)
    return list(dict.fromkeys(unset))


def nvidia_resources(report: str, cubin: bytes) -> Resources:
    """From what `ptxas -v` prints, and the binary."""
    stack, stores, loads = _numbers(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    (registers,) = _numbers(r"Used (\d+) registers", report)
    return Resources(registers, max(stores, loads), stack, code_size(cubin))


def amd_resources(assembly: str) -> Resources:
    """From the metadata and comments at the end of AMD assembly.

    A spilled register has 4 bytes. Those that went to another register (scalars to a lane of a vector,
    vectors to an accumulator) are counted as well, but take no stack: only what took some is reported.
    """
    registers, spilled_vectors, spilled_scalars, stack = (
        _numbers(rf"\.{key}:\s*(\d+)", assembly)[0]
        for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    )
    (code,) = _numbers(r"codeLenInByte = (\d+)", assembly)
    return Resources(registers, min(4 * (spilled_vectors + spilled_scalars), stack), stack, code)


def _numbers(pattern: str, text: str) -> tuple[int, ...]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output has no {pattern!r}: this Triton is newer than this reader")
    return tuple(int(number) for number in match.groups())


def code_size(binary: bytes) -> int:
    """Bytes of instructions in a 64-bit little-endian ELF file: its executable sections."""
    (sections,) = struct.unpack_from("<Q", binary, 0x28)
    size, count = struct.unpack_from("<HH", binary, 0x3A)
    headers = (struct.unpack_from("<IIQQQQ", binary, sections + i * size) for i in range(count))
    executable = 0x4
    return sum(length for _, _, flags, _, _, length in headers if flags & executable)


def lines_of(function: Callable[..., Any], pointers: tuple[str, ...]) -> set[tuple[str, str, int]]:
    """("load" or "store", file, line) where `function` accesses one of these pointers with `tl`.

    Device functions that it hands one of them to are read too, by itself or in a tuple; what is unpacked in a
    call has there the name that it is looked for by.
    """
    lines, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    file = Path(function.__code__.co_filename).name
    known = _with_other_names(tree, pointers)
    found = {
        (kind, file, call.lineno + first - 1)
        for kind, call in _memory_calls(tree)
        if _names(call.args[0]) & known
    }
    for called, call in _device_calls(tree, function.__globals__):
        names = inspect.getfullargspec(called).args
        handed = [name for name, given in zip(names, call.args, strict=False) if _names(given) & known]
        if any(isinstance(given, ast.Starred) for given in call.args):
            handed = [name for name in names if name in pointers]
        if handed:
            found |= lines_of(called, tuple(handed))
    return found


def _with_other_names(tree: ast.AST, pointers: tuple[str, ...]) -> set[str]:
    """The pointers, the tuples that they are put in, and what is taken out of those."""
    known = set(pointers)
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    for node in sorted(assignments, key=lambda node: node.lineno):
        (target, *_), value = node.targets, node.value
        if ast.Tuple in (type(target), type(value)) and isinstance(value, ast.Name | ast.Tuple):
            known |= _names(target) if _names(value) & known else set()
    return known


def _device_calls(tree: ast.AST, known: dict[str, Any]) -> Iterator[tuple[Callable[..., Any], ast.Call]]:
    """Calls of functions under `triton.jit`, as the Python functions that they were."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if hasattr(known.get(name), "fn"):
                yield known[name].fn, node


def _memory_calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="load" | "store" as kind), args=[_, *_]):
                yield kind, node


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
