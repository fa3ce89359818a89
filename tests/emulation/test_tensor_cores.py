"""`wgmma` on matrices that are laid out here by the tables of the PTX ISA, and without fences and waits."""

import pytest
import torch

from tests.emulation.ptx import run
from triton_deq.emulation import Fault

ROWS = 64
SWIZZLES = {16: 0, 32: 3, 64: 2, 128: 1}
"""Bytes that a swizzle spans, and its number in a descriptor."""
FENCE = "wgmma.fence.sync.aligned;"
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32}


def laid_out(matrix, span, along_k):
    """The bytes of `[rows, k]` in shared memory, and the two offsets of its descriptor.

    Eight rows of `span` bytes lie below each other; of such blocks those along the entries' direction follow
    each other, then those across. In a block the pieces of 16 bytes change places from row to row.
    """
    matrix = matrix if along_k else matrix.T
    size = matrix.element_size()
    across, along = matrix.shape[0] // 8, matrix.shape[1] * size // span
    blocks = matrix.contiguous().view(torch.uint8).reshape(across, 8, along, span // 16, 16)
    image = torch.empty(across, along, 8, span // 16, 16, dtype=torch.uint8)
    for row in range(8):
        for piece in range(span // 16):
            image[:, :, row, piece ^ row * span // 128] = blocks[:, row, :, piece]
    return image.flatten(), 8 * span, along * 8 * span


def descriptor(start, span, leading, stride):
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[span] << 62


def in_registers(left):
    """A, `[64, k]`, as each of 128 threads has it: `[registers, 128]`."""
    each = 4 // left.element_size()
    registers = torch.empty(2 * left.shape[1] // (4 * each), 128, each, dtype=left.dtype)
    for thread in range(128):
        row, member = 16 * (thread // 32) + thread % 32 // 4, thread % 4
        for number in range(len(registers)):
            column = each * (member + 4 * (number // 2))
            registers[number, thread] = left[row + 8 * (number % 2), column : column + each]
    return registers.view(torch.int32).squeeze(-1)


def from_registers(registers):
    """D, from `[n / 2, 128]`."""
    result = torch.empty(ROWS, 2 * len(registers))
    for thread in range(128):
        row, member = 16 * (thread // 32) + thread % 32 // 4, thread % 4
        for number in range(len(registers)):
            column = 8 * (number // 4) + 2 * member + number % 2
            result[row + 8 * (number % 4 // 2), column] = registers[number, thread]
    return result


def multiplied(
    a, b, span, *, kind="bf16", along_k=True, registers=False, adds=True, seed=1,
    proxy="fence.proxy.async.shared::cta;", fence=FENCE,
    before="", meanwhile="wgmma.wait_group.sync.aligned 0;", lane_offset=0,
):  # fmt: skip
    """`A Bᵀ + 1` by wgmma, a step of 32 bytes along k after another; b: `[n, k]`."""
    step = 32 // a.element_size()
    image_a, leading_a, stride_a = laid_out(a[:, :0] if registers else a, span, True)
    image_b, leading_b, stride_b = laid_out(b, span, along_k)
    image = torch.cat([image_a, image_b])
    image = torch.cat([image, torch.zeros(-len(image) % 512, dtype=torch.uint8)]).view(torch.int32)
    # Along rows a step of k lies 16 blocks' rows further.
    advance = (32 if along_k else step // 8 * stride_b) >> 4
    held = torch.cat([in_registers(part) for part in a.split(step, dim=1)])
    result = torch.zeros(len(b) // 2, 128)
    each = 4 * len(held) * step // a.shape[1]

    lines = ["mul.lo.u32 %r1, %r0, 4;", "mad.wide.u32 %rd0, %r0, 4, %rd100;", before]
    for target, source in ((1, 101), (2, 102)):
        lines.append(f"mad.wide.u32 %rd{target}, %r0, 4, %rd{source};")
    for at in range(0, 4 * len(image), 512):
        lines.append(f"ld.global.b32 {{ %r2 }}, [ %rd1 + {at} ];\nst.shared.b32 [ %r1 + {at} ], {{ %r2 }};")
    for number in range(len(held)):
        lines.append(f"ld.global.b32 {{ %r{200 + number} }}, [ %rd2 + {512 * number} ];")
    lines += [f"mov.b32 %r{400 + number}, 0f3F800000;" for number in range(len(result))]
    lines += ["bar.sync 0;", proxy, fence, "setp.eq.u32 %p1, %r0, %r0;"]
    lines += [f"mul.wide.u32 %rd9, %r0, {lane_offset};"]
    d = ", ".join(f"%r{400 + number}" for number in range(len(result)))
    for number in range(a.shape[1] // step):
        of_a = descriptor(0, span, leading_a, stride_a) + 2 * number
        of_b = descriptor(len(image_a), span, leading_b, stride_b) + advance * number
        lines.append(f"add.s64 %rd5, %rd9, {of_a};\nmov.b64 %rd6, {of_b};")
        left = ", ".join(f"%r{200 + each // 4 * number + k}" for k in range(each // 4))
        left = f"{{{left}}}" if registers else "%rd5"
        scales = ["%p1" if adds else "0", "1", "1"]
        if kind != "tf32":
            scales += ["0"] * (not registers) + [str(int(not along_k))]
        lines.append(
            f"wgmma.mma_async.sync.aligned.m64n{len(b)}k{step}.f32.{kind}.{kind} "
            f"{{{d}}}, {left}, %rd6, {', '.join(scales)};"
        )
    lines += ["wgmma.commit_group.sync.aligned;", meanwhile]
    for number in range(len(result)):
        lines.append(f"st.global.b32 [ %rd0 + {512 * number} ], {{ %r{400 + number} }};")
    run("\n".join(lines), result, image, held, warps=4, shared=4 * len(image), seed=seed)
    return from_registers(result)


def matrices(n, k, dtype=torch.bfloat16):
    """Of numbers that every dtype has, and whose products are exact."""
    return (torch.randint(-4, 5, (rows, k)).to(dtype) for rows in (ROWS, n))


@pytest.mark.parametrize("registers", [False, True], ids=["descriptor", "registers"])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("span", [32, 64, 128])
def test_products_of_matrices_along_k(span, kind, registers):
    a, b = matrices(24, span // DTYPES[kind].itemsize, DTYPES[kind])
    found = multiplied(a, b, span, kind=kind, registers=registers)
    assert torch.equal(found, a.float() @ b.float().T + 1)


def test_blocks_without_a_swizzle_follow_each_other_along_k():
    a, b = matrices(8, 16)
    assert torch.equal(multiplied(a, b, 16), a.float() @ b.float().T + 1)


@pytest.mark.parametrize(
    ("span", "n", "k", "registers"),
    [(32, 32, 16, False), (32, 32, 32, True), (64, 32, 32, True), (128, 128, 32, True)],
)
def test_products_of_matrices_along_n(span, n, k, registers):
    a, b = matrices(n, k)
    found = multiplied(a, b, span, along_k=False, registers=registers)
    assert torch.equal(found, a.float() @ b.float().T + 1)


def test_a_product_may_begin_from_nothing():
    a, b = matrices(8, 16)
    assert torch.equal(multiplied(a, b, 32, adds=False), a.float() @ b.float().T)


OVERWRITTEN = """
bar.sync 0;
mov.b32 %r3, 0;
st.shared.b32 [ %r1 + 0 ], { %r3 };
st.shared.b32 [ %r1 + 512 ], { %r3 };
st.shared.b32 [ %r1 + 1024 ], { %r3 };
st.shared.b32 [ %r1 + 1536 ], { %r3 };
fence.proxy.async.shared::cta;
"""


def test_a_product_reads_shared_memory_until_it_was_waited_for():
    a, b = matrices(8, 16)
    wanted = a.float() @ b.float().T + 1
    wait = "wgmma.wait_group.sync.aligned 0;"
    assert all(
        torch.equal(multiplied(a, b, 32, meanwhile=wait + OVERWRITTEN, seed=seed), wanted)
        for seed in range(4)
    )
    late = [
        torch.equal(multiplied(a, b, 32, meanwhile=OVERWRITTEN + wait, seed=seed), wanted)
        for seed in range(4)
    ]
    assert not all(late)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"proxy": ""}, "stored in shared memory, without a fence.proxy.async between"),
        ({"fence": ""}, "without a wgmma.fence behind the last use"),
        ({"meanwhile": ""}, "register %r400 is read before wgmma.wait_group"),
        ({"meanwhile": "wgmma.wait_group.sync.aligned 1;"}, "register %r400 is read before wgmma.wait_group"),
        (
            {"meanwhile": "mov.b32 %r400, 0;\nwgmma.wait_group.sync.aligned 0;"},
            "register %r400 is written before wgmma.wait_group",
        ),
        ({"lane_offset": 1}, "another descriptor in lane 1 than in the first"),
        (
            {"fence": f"{FENCE}\nsetp.lt.u32 %p2, %r0, 7;\n@%p2 bra $L_end;", "meanwhile": "$L_end:"},
            "wgmma.mma_async.*by lanes .7, 8.*alone",
        ),
    ],
)
def test_what_a_gpu_would_not_forgive(changed, message):
    a, b = matrices(8, 16)
    with pytest.raises(Fault, match=message):
        multiplied(a, b, 32, **changed)


def test_matrices_are_stored_as_they_are_loaded():
    """`stmatrix` and a plain load, plain stores and `ldmatrix`: a lane has a pair of a row of its group."""
    source = torch.randint(0, 1 << 15, (32, 8), dtype=torch.int16)
    for trans in ("", ".trans"):
        result = torch.zeros(32, 8, dtype=torch.int16)
        run(
            f"""mul.lo.u32 %r1, %r0, 16;
            mad.wide.u32 %rd0, %r0, 16, %rd100;
            mad.wide.u32 %rd1, %r0, 16, %rd101;
            ld.global.v4.b32 {{ %r4, %r5, %r6, %r7 }}, [ %rd1 + 0 ];
            st.shared.v4.b32 [%r1], {{%r4, %r5, %r6, %r7}};
            bar.sync 0;
            ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r8, %r9, %r10, %r11}}, [%r1];
            bar.sync 0;
            stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {{%r8, %r9, %r10, %r11}};
            bar.sync 0;
            ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r1];
            st.global.v4.b32 [ %rd0 + 0 ], {{ %r4, %r5, %r6, %r7 }};""",
            result,
            source,
            shared=512,
        )
        wanted = source.view(4, 8, 8).mT if trans else source.view(4, 8, 8)
        assert torch.equal(result.view(4, 8, 8), wanted)
