"""What accesses cost: of one warp, by hand, and of kernels, in a process of its own."""

import pytest
import torch

from tests.emulation.ptx import run
from tests.emulation.test_launches import run as in_a_process
from triton_deq.emulation.traffic import Traffic


@pytest.mark.parametrize(
    ("stride", "width", "sectors", "least"),
    [(4, 4, 4, 4), (8, 4, 8, 4), (64, 8, 32, 8), (16, 16, 16, 16), (0, 4, 1, 1)],
)
def test_sectors_that_a_load_touches(stride, width, sectors, least):
    """Of 32 lanes, so many bytes apart."""
    traffic = Traffic()
    registers = ", ".join(f"%r{k}" for k in range(1, width // 4 + 1))
    vector = {4: "", 8: ".v2", 16: ".v4"}[width]
    run(
        f"""mad.wide.u32 %rd0, %r0, {stride}, %rd100;
        ld.global{vector}.b32 {{ {registers} }}, [ %rd0 + 0 ];""",
        aligned(1024),
        traffic=traffic,
    )
    assert (traffic.sectors, traffic.least_sectors) == (sectors, least)


@pytest.mark.parametrize(
    ("stride", "width", "turns", "least"),
    [
        (4, 4, 1, 1),
        (8, 4, 2, 1),
        (128, 4, 32, 1),
        (132, 4, 1, 1),
        (0, 4, 1, 1),
        (16, 16, 4, 4),
        (32, 8, 8, 2),
    ],
)
def test_turns_of_the_banks(stride, width, turns, least):
    traffic = Traffic()
    vector, registers = {4: ("", "%r0"), 8: (".v2", "%r0, %r0"), 16: (".v4", "%r0, %r0, %r0, %r0")}[width]
    run(
        f"mul.lo.u32 %r1, %r0, {stride};\nst.shared{vector}.b32 [ %r1 + 0 ], {{ {registers} }};",
        shared=4352,
        traffic=traffic,
    )
    assert (traffic.turns, traffic.least_turns) == (turns, least)


def test_rows_of_a_matrix_take_turns():
    """Eight rows of 16 bytes: one turn if they lie in all banks, eight if below each other in four."""
    for stride, turns in ((16, 1), (128, 8), (144, 1)):
        traffic = Traffic()
        run(
            f"""mul.lo.u32 %r1, %r0, {stride};
            stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {{%r0}};""",
            shared=32 * stride,
            traffic=traffic,
        )
        assert (traffic.turns, traffic.least_turns) == (turns, 1)


def aligned(count):
    """So many numbers of 32 bits, from a multiple of 32 bytes on."""
    whole = torch.zeros(count + 8, dtype=torch.int32)
    skipped = -whole.data_ptr() % 32 // 4
    return whole[skipped : skipped + count]


COUNTED = """
import torch, triton_deq as td
from triton_deq import emulation
from triton_deq.ops import groupnorm
from triton_deq.ops.launch import cut_for

def shares(traffic):
    for name, counted in traffic.items():
        print(name, counted.launches, counted.sectors / counted.least_sectors)

z0 = torch.zeros(2, 4096)
with emulation.counted() as traffic:
    td.solve(lambda z: z / 2 + 1, z0, td.Anderson(3), max_steps=4, tol=0, backend="triton")
shares(traffic)

x = torch.randn(2, 32, 16, 16).bfloat16().contiguous(memory_format=torch.channels_last)
for multiprocessors in (1, 132):
    with emulation.counted() as traffic, emulation.counted() as again, cut_for(multiprocessors):
        _, held = groupnorm.groupnorm_each([groupnorm.Map(x, 8, residual=x, relu=True)], "triton")[0]
        groupnorm.groupnorm_vjp_each([torch.randn_like(x)], [held], "triton")
    assert traffic == again
    shares(traffic)
"""


def test_what_kernels_touch(tmp_path):
    """Groups of four channels of 16 bits: a program of several reads what it needs, one of one four times."""
    (tmp_path / "counted.py").write_text(COUNTED)
    done = in_a_process(str(tmp_path / "counted.py"), TRITON_DEQ_EMULATE="1")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    found = [(name, int(launches), float(share)) for name, launches, share in rows]
    assert [(name, launches) for name, launches, _ in found] == [
        ("anderson_residual_kernel", 4),
        ("anderson_advance_kernel", 4),
        *[("groupnorm_kernel", 1), ("groupnorm_vjp_kernel", 1)] * 2,
    ]
    assert all(share < 1.15 for _, _, share in found[:4]), found
    assert all(share > 3.5 for _, _, share in found[4:]), found


PRODUCTS = """
import torch
from triton_deq import emulation
from triton_deq.ops.launch import cut_for
from triton_deq.verification import Case, check_feedforward

with emulation.counted() as traffic, cut_for(1):
    rows = list(check_feedforward(Case(torch.float32, (64, 96), torch.device("cpu"), 1)))
assert all(row.passed for row in rows), rows
for name, counted in traffic.items():
    print(name, counted.turns / counted.least_turns)
"""


@pytest.mark.parametrize("target", ["sm_90", "sm_80"])
def test_products_in_float32_meet_no_other_in_a_bank(target, tmp_path):
    """The matrix along its depth, and, in the gradient, along its columns."""
    (tmp_path / "products.py").write_text(PRODUCTS)
    done = in_a_process(
        str(tmp_path / "products.py"), TRITON_DEQ_EMULATE="1", TRITON_DEQ_EMULATE_TARGET=target
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found.keys() == {"feedforward_kernel", "feedforward_vjp_kernel"}
    assert all(float(share) < 1.1 for share in found.values()), found
