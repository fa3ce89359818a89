"""`inspect --waits`: NVIDIA's machine code as instructions, and one warp followed along it."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton_deq import inspection
from triton_deq.inspection.reading import unset_registers
from triton_deq.inspection.sass import Instruction, listing, parse
from triton_deq.inspection.waits import BARRIER, LATENCIES, OTHERS, follow

LOAD = LATENCIES["LDG"]


def code(*lines: str) -> list[Instruction]:
    """`name operands | waits write stall`, where waits and write are scoreboards or `-`."""
    found = []
    for i, line in enumerate(lines):
        text, _, control = line.partition("|")
        waits, write, stall = (control.split() or ["-", "-", "1"])[:3]
        words = text.split()
        predicate = words.pop(0) if words[0].startswith("@") else ""
        found.append(
            Instruction(
                16 * i,
                predicate,
                words[0],
                " ".join(words[1:]),
                waits=0 if waits == "-" else sum(1 << int(board) for board in waits.split(",")),
                write=None if write == "-" else int(write),
                stall=int(stall),
            )
        )
    return found


# ------------------------------------------------------------------------------------------- following a warp


def test_loads_that_are_on_their_way_together_are_waited_for_once():
    path = follow(
        code(
            "LDG.E R2, [R4] | - 0 1",
            "LDG.E R3, [R6] | - 1 1",
            "FADD R2, R2, 1 | 0 - 4",
            "FADD R3, R3, 1 | 1 - 4",
            "EXIT | - - 5",
        )
    )
    # The first is there at 700, the second at 701, when the first addition has hidden it.
    assert (path.whole.clocks, path.whole.memory, path.whole.instructions) == (LOAD + 4 + 4 + 5, 1, 5)
    assert path.loops == ()


def test_a_load_behind_a_barrier_is_waited_for_by_itself():
    path = follow(
        code(
            "LDG.E R2, [R4] | - 0 1",
            "SHFL.BFLY R3, R2 | 0 1 1",
            "BAR.SYNC 0x0 | 1 - 1",
            "LDG.E R5, [R6] | - 0 1",
            "FADD R5, R5, R3 | 0 - 4",
            "EXIT | - - 1",
        )
    )
    expected = LOAD + LATENCIES["SHFL"] + BARRIER + 1 + LOAD + 4 + 1
    assert path.whole.clocks == expected
    assert (path.whole.memory, path.whole.barriers, path.whole.shuffles) == (2, 1, 1)


def test_waits_are_a_mask_of_all_scoreboards():
    """Numbers of several boards at once, and of a kind that has no latency of its own."""
    path = follow(code("S2R R0, SR_TID.X | - 1 1", "LDG.E R2, [R4] | - 3 1", "IADD3 R2 | 1,3 - 2", "EXIT"))
    assert path.whole.clocks == 1 + LOAD + 2 + 1
    path = follow(code("S2R R0, SR_TID.X | - 4 1", "LDG.E R2, [R4] | - 5 1", "IADD3 R2 | 4 - 2", "EXIT"))
    assert (path.whole.clocks, path.whole.memory) == (OTHERS + 2 + 1, 0)


def test_operands_that_are_read_late_are_waited_for():
    store = Instruction(0, "", "STG.E", "[R4], R2", read=2, stall=1)
    after = Instruction(16, "", "MOV", "R2, R3", waits=1 << 2, stall=1)
    assert follow([store, after, Instruction(32, "", "EXIT", "")]).whole.clocks == 12 + 1 + 1


def test_loops_are_turns_and_predicated_exits_are_none():
    path = follow(
        code(
            "@P0 EXIT | - - 1",
            "MOV R1, RZ | - - 2",
            "FADD R2, R2, R1 | - - 4",
            "LDG.E R3, [R4] | - 0 1",
            "FADD R2, R2, R3 | 0 - 4",
            "@P1 BRA 0x30 | - - 5",
            "@!P2 BRA 0x10 | - - 5",
            "@P3 BRA 0xa0 | - - 5",
            "EXIT | - - 1",
            "BRA 0x90",
            "RET.REL.NODEC R4 0x0",
        )
    )
    inner, outer = path.loops
    assert (inner.instructions, inner.clocks, inner.memory) == (3, LOAD + 4 + 5, 1)
    assert outer.instructions == 6
    assert path.whole.instructions == 9


def test_a_kernel_may_have_exits_with_a_predicate_alone():
    path = follow(code("@P0 EXIT | - - 2", "MOV R1, RZ | - - 3", "@P1 EXIT | - - 4", "BRA 0x0", "RET"))
    assert (path.whole.instructions, path.whole.clocks) == (3, 9)
    assert path.loops == ()


# ----------------------------------------------------------------------------------- reading the machine code


def test_control_codes_are_read_from_the_encoding():
    text = """
        Function : toy
    .headerflags    @"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;      /* 0x0000000402048981 */
                                                                         /* 0x002ea2000c1e1d00 */
        /*10000*/                  EXIT ;                                /* 0x000000000000794d */
                                                                         /* 0x030fea0003800000 */
    """
    first, load, end = parse(text)
    assert (first.address, first.name, first.operands, first.predicate) == (0, "LDC", "R1, c[0x0][0x28]", "")
    assert (first.waits, first.read, first.write, first.stall) == (0, None, None, 1)
    assert (load.predicate, load.kind, load.name) == ("@!P0", "LDG", "LDG.E.128")
    assert (load.waits, load.read, load.write, load.stall) == (0b10, None, 2, 1)
    assert (end.address, end.name, end.operands, end.stall) == (0x10000, "EXIT", "", 5)
    assert end.waits == 0b110000
    assert "000010:-:2:01  @!P0 LDG.E.128 R4" in listing([load])


COMPILED = '''
"""Kernels compiled in this process, for a GPU that need not be there; the findings as JSON."""
import json
import triton
import triton.language as tl
from triton_deq.inspection import compiling
from triton_deq.inspection.reading import code_size, unset_registers
from triton_deq.inspection.sass import disassemble
from triton_deq.inspection.targets import TARGETS
from triton_deq.inspection.waits import follow
from triton_deq.kernels.catalog import ENTRIES, Budget, Entry, Pointer


@triton.jit
def early_kernel(x_ptr, y_ptr, N: tl.constexpr):
    columns = tl.arange(0, N)
    x = tl.load(x_ptr + columns)
    y = tl.load(y_ptr + columns)
    tl.store(y_ptr + columns, y * tl.sum(x, axis=0))


@triton.jit
def late_kernel(x_ptr, y_ptr, N: tl.constexpr):
    columns = tl.arange(0, N)
    total = tl.sum(tl.load(x_ptr + columns), axis=0)
    tl.store(y_ptr + columns, tl.load(y_ptr + columns) * total)


def compiled(entry):
    return compiling._warm_up(entry, 0, TARGETS["sm_90"])


def toy(kernel):
    pointers = {"x_ptr": Pointer("fp32"), "y_ptr": Pointer("fp32")}
    return Entry("toy", "toy", kernel, (1, 512), {**pointers, "N": 512}, (), None, None, Budget(), {})


def shipped(name):
    return next(entry for entry in ENTRIES if entry.name == name)


found = {}
for name, kernel in (("early", early_kernel), ("late", late_kernel)):
    toys = compiled(toy(kernel))
    code = disassemble(toys.asm["cubin"])
    whole = follow(code).whole
    found[name] = [whole.memory, whole.barriers]
# Triton's own disassembler, which writes the scoreboards waited for as one decimal number.
found["ours"] = [
    [each.waits, each.read, each.write, each.stall, f"{each.predicate} {each.name} {each.operands}".split()]
    for each in code
]
found["triton"] = toys.asm["sass"]
long = compiled(shipped("broyden_advance[fp32,m=50,every pair]"))
found["long"] = [16 * len(disassemble(long.asm["cubin"])), code_size(long.asm["cubin"])]

product = compiled(shipped("feedforward[bf16,paper]"))
assert "wgmma" in product.asm["ptx"]
code = disassemble(product.asm["cubin"])
found["unset"] = unset_registers(code)
sums = [i for i, each in enumerate(code) if each.kind in ("UIADD3", "ULEA")]
found["lost"] = [len(unset_registers(code[:i] + code[i + 1 :])) for i in sums]
print(json.dumps(found))
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    script = tmp_path_factory.mktemp("waits") / "compiled.py"  # a file: Triton reads a kernel's source
    script.write_text(COMPILED)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_compilers_leave_a_load_behind_the_barrier_that_it_stands_behind(found):
    (early, barriers), (late, same) = found["early"], found["late"]
    assert barriers == same > 0
    assert (early, late) == (1, 2)


def test_a_kernel_reads_as_tritons_disassembler_reads_it(found):
    lines = [line.split("\t") for line in found["triton"].splitlines() if "\t" in line]
    assert len(lines) == len(found["ours"]) > 20
    for (control, text), (waits, read, write, stall, words) in zip(lines, found["ours"], strict=True):
        expected = control.split(":")
        assert expected[0] == ("--" if not waits else f"{waits:02d}")
        assert expected[1] == ("-" if read is None else str(read))
        assert expected[2] == ("-" if write is None else str(write))
        assert expected[4] == f"{stall:x}"
        if "BRA" not in text:
            assert text.rstrip(";").split() == words


def test_code_beyond_64_kib_is_read_as_well(found):
    read, size = found["long"]
    assert read == size > 1 << 16


def test_what_the_assembler_drops_is_missed_in_real_code(found):
    assert found["unset"] == []
    assert found["lost"]
    assert max(found["lost"]) > 0


def test_uniform_registers_that_nothing_has_written():
    """As ptxas 12.8 left them before a matrix product, and as 12.9 has them."""
    lost = code(
        "UMOV UR8, 0x400",
        "UIADD3 UR9, UR8, 0x2000, URZ",
        "UIADD3 UR15, UP0, UR8, 0x20, URZ",
        "UIADD3.X UR18, UR18, -0x3ffffff0, URZ, UP0, !UPT",
        "@P0 LDG.E.128 R32, desc[UR8][R32.64]",
        "HGMMA.64x16x16.F32.BF16 R120, R28, gdesc[UR4].tnspB, R120",
    )
    assert unset_registers(lost) == ["UR18"]
    whole = code(
        "ULDC.64 UR4, c[0x0][0x268]",
        "R2UR UR8, R3",
        "UIADD3 UR46, UP1, UR8, 0x20, URZ",
        "UIADD3.X UR47, UR5, -0x3ffffff0, URZ, UP1, !UPT",
        "UIADD3.64 UR50, UR46, 0x20, URZ",
        "@UP0 UMOV UR52, UR51",
    )
    assert unset_registers(whole) == []


# ------------------------------------------------------------------------------------------------ the command


def inspect(*arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "triton_deq", "inspect", *arguments]
    return subprocess.run(line, capture_output=True, text=True)


def test_the_command_tells_what_a_warp_waits_for(tmp_path: Path):
    file = tmp_path / "rows.json"
    chosen = ("--kernel", "anderson_advance[fp32,m=6]", "--target", "sm_90", "--target", "gfx942")
    done = inspect("--waits", *chosen, "--json", str(file))
    assert done.returncode == 0, done.stderr
    nvidia, amd = json.loads(file.read_text())
    assert amd["path"] is None
    whole, loops = nvidia["path"]["whole"], nvidia["path"]["loops"]
    table = done.stdout.partition("one warp alone")[2]
    assert table.count("anderson_advance[fp32,m=6]") == 1
    assert f" {whole['instructions']} " in table
    assert f"{loops[0]['clocks']} ({loops[0]['memory']}, {loops[0]['barriers']})" in table
    # Loads that the decision takes, those that it says to make, those of a best iterate that has to move, and
    # no more; one sum has two barriers, or one, and that move has one. Some compilers make two waits of one.
    assert whole["memory"] <= 5
    assert 2 <= whole["barriers"] <= 3


def test_without_nvidias_code_it_says_so(capsys):
    parser = argparse.ArgumentParser()
    inspection.add_arguments(parser)
    assert inspection.run(parser.parse_args(["--waits", "--target", "gfx942"])) == 2
    message = capsys.readouterr().err
    assert "--waits" in message
    assert "gfx942" in message
