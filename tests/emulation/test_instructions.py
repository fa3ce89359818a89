"""PTX written by hand, against whole numbers of Python and PyTorch's arithmetic. No compiler takes part."""

import math
import struct

import pytest
import torch

from tests.emulation.ptx import run
from triton_deq.emulation import Fault

WORD = 1 << 32


def computed(instruction, kinds, *operands):
    """What one instruction gives in 32 lanes. kinds: of the result and of each operand."""
    sizes = [int(kind[1:]) // 8 for kind in kinds]
    prefix = {2: "%rs", 4: "%r", 8: "%rd"}
    names = [f"{prefix[size]}{10 + k}" for k, size in enumerate(sizes)]
    dtypes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    result = torch.zeros(32, dtype=dtypes[sizes[0]])
    lines = []
    for k, size in enumerate(sizes):
        lines.append(f"mad.wide.u32 %rd{k}, %r0, {size}, %rd{100 + k};")
    for k, size in list(enumerate(sizes))[1:]:
        lines.append(f"ld.global.b{8 * size} {{ {names[k]} }}, [ %rd{k} + 0 ];")
    lines.append(f"{instruction} {', '.join(names)};")
    lines.append(f"st.global.b{8 * sizes[0]} [ %rd0 + 0 ], {{ {names[0]} }};")
    run("\n".join(lines), result, *(operand.contiguous() for operand in operands))
    return result


def whole(count=32, bits=32):
    """Random whole numbers of all sizes, with the extremes."""
    draw = torch.randint(-(1 << 62), 1 << 62, (count,)) >> torch.randint(0, 60, (count,))
    draw[:4] = torch.tensor([0, -1, (1 << bits - 1) - 1, -(1 << bits - 1)])
    return draw.to(torch.int32 if bits == 32 else torch.int64)[torch.randperm(count)]


def wrapped(value, bits):
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def towards_zero(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


SIGNED = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": towards_zero,
    "rem": lambda a, b: a - towards_zero(a, b) * b,
}


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", SIGNED)
def test_signed_numbers(name, bits):
    a, b = whole(bits=bits), whole(bits=bits)
    b[b == 0] = 3
    found = computed(f"{name}.s{bits}", [f"s{bits}"] * 3, a, b)
    wanted = [wrapped(SIGNED[name](x, y), bits) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert found.tolist() == wanted


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("letter", ["s", "u"])
def test_the_upper_half_of_a_product(letter, bits):
    a, b = whole(bits=bits), whole(bits=bits)
    found = computed(f"mul.hi.{letter}{bits}", [f"s{bits}"] * 3, a, b)
    mask = (1 << bits) - 1 if letter == "u" else -1
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    assert found.tolist() == [wrapped((x & mask) * (y & mask) >> bits, bits) for x, y in pairs]


def test_wide_products():
    a, b, c = whole(), whole(), whole(bits=64)
    triples = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    found = computed("mad.wide.s32", ["s64", "s32", "s32", "s64"], a, b, c)
    assert found.tolist() == [wrapped(x * y + z, 64) for x, y, z in triples]
    found = computed("mul.wide.u32", ["s64", "s32", "s32"], a, b)
    assert found.tolist() == [wrapped(x % WORD * (y % WORD), 64) for x, y, _ in triples]


def test_shifts_by_more_than_there_is():
    a, by = whole(), torch.arange(32, dtype=torch.int32) * 2
    pairs = list(zip(a.tolist(), by.tolist(), strict=True))
    assert computed("shl.b32", ["b32"] * 3, a, by).tolist() == [wrapped(x << n, 32) for x, n in pairs]
    assert computed("shr.u32", ["b32"] * 3, a, by).tolist() == [wrapped(x % WORD >> n, 32) for x, n in pairs]
    assert computed("shr.s32", ["b32"] * 3, a, by).tolist() == [x >> n for x, n in pairs]


def test_bits_and_bytes_of_numbers():
    a = whole()
    fields = [f"{x % WORD:032b}" for x in a.tolist()]
    found = _field("bfe.u32 %r11, %r10, 3, 5", a)
    assert found.tolist() == [int(field[24:29], 2) for field in fields]
    found = _field("bfe.s32 %r11, %r10, 3, 5", a)
    assert found.tolist() == [wrapped(int(field[24:29], 2), 5) for field in fields]
    assert _field("popc.b32 %r11, %r10", a).tolist() == [field.count("1") for field in fields]
    found = _field("prmt.b32 %r11, %r10, 0, 0xB012U", a)
    for x, y in zip(a.tolist(), found.tolist(), strict=True):
        low, middle, high, top = struct.pack("<i", x)
        assert struct.pack("<i", y) == bytes([high, middle, low, 255 * (top >> 7)])


def _field(instruction, a):
    result = torch.zeros_like(a)
    run(
        f"""mad.wide.u32 %rd0, %r0, 4, %rd100;
        mad.wide.u32 %rd1, %r0, 4, %rd101;
        ld.global.b32 {{ %r10 }}, [ %rd1 + 0 ];
        {instruction};
        st.global.b32 [ %rd0 + 0 ], {{ %r11 }};""",
        result,
        a,
    )
    return result


FLOATING = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div.rn": torch.div,
    "max": torch.fmax,
    "min": torch.fmin,
    "max.NaN": torch.maximum,
}


def numbers(dtype):
    values = torch.randn(32, dtype=dtype) * 10 ** torch.randint(-6, 6, (32,))
    values[:6] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0])
    return values[torch.randperm(32)].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FLOATING)
def test_floating_numbers(name, dtype):
    bits = 8 * dtype.itemsize
    a, b = numbers(dtype), numbers(dtype)
    found = computed(f"{name}.f{bits}", [f"f{bits}"] * 3, a, b).view(dtype)
    torch.testing.assert_close(found, FLOATING[name](a, b), rtol=0, atol=0, equal_nan=True)


def test_a_product_and_a_sum_are_rounded_once():
    a = torch.full((32,), 1 + 2**-12)
    found = computed("fma.rn.f32", ["f32"] * 4, a, a, -a * a).view(torch.float32)
    assert (found == 2**-24).all()  # what the product loses when it is rounded


@pytest.mark.parametrize(
    ("compare", "wanted"),
    [
        ("lt", False),
        ("ltu", True),
        ("eq", False),
        ("ne", False),
        ("neu", True),
        ("num", False),
        ("nan", True),
    ],
)
def test_comparisons_with_nan(compare, wanted):
    result = torch.zeros(32, dtype=torch.int32)
    run(
        f"""mad.wide.u32 %rd0, %r0, 4, %rd100;
        setp.{compare}.f32 %p1, 0f7FC00000, 0f3F800000;
        selp.b32 %r1, 1, 0, %p1;
        st.global.b32 [ %rd0 + 0 ], {{ %r1 }};""",
        result,
    )
    assert (result == int(wanted)).all()


def test_rounding_to_fewer_bits():
    a = numbers(torch.float32)
    a[10:14] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.3895e38])
    found = computed("cvt.rn.bf16.f32", ["b16", "f32"], a).view(torch.bfloat16)
    torch.testing.assert_close(found, a.bfloat16(), rtol=0, atol=0, equal_nan=True)
    found = computed("cvt.rn.f16.f32", ["b16", "f32"], a).view(torch.float16)
    torch.testing.assert_close(found, a.half(), rtol=0, atol=0, equal_nan=True)
    both = computed("cvt.rn.bf16x2.f32", ["b32", "f32", "f32"], a, -a).view(torch.bfloat16).view(32, 2)
    torch.testing.assert_close(both[:, 1], a.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(both[:, 0], -a.bfloat16(), rtol=0, atol=0, equal_nan=True)
    ties = torch.full((32,), 1 + 2**-11)
    assert (computed("cvt.rna.tf32.f32", ["b32", "f32"], ties).view(torch.float32) == 1 + 2**-10).all()


@pytest.mark.parametrize(
    ("a", "b", "added", "wanted"),
    [
        (37 / 32, 7 / 8, 0.0, 260 / 256),
        (37 / 32, 7 / 8, -(2.0**-30), 258 / 256),
        (29 / 16, 9 / 16, 0.0, 260 / 256),
        (29 / 16, 9 / 16, 2.0**-30, 262 / 256),
    ],
)
def test_bfloat16_is_rounded_once(a, b, added, wanted):
    """The products lie between two numbers. What is added decides, and is lost to float32."""
    given = (torch.full((32,), each).bfloat16() for each in (a, b, added))
    found = computed("fma.rn.bf16", ["b16"] * 4, *given).view(torch.bfloat16)
    assert (found == wanted).all()


def test_whole_numbers_from_floating_ones():
    a = torch.tensor([1.9, -1.9, 3e9, -3e9, math.nan, math.inf, 1.5, 2.5] * 4)
    found = computed("cvt.rzi.s32.f32", ["s32", "f32"], a)
    assert found[:8].tolist() == [1, -1, 2**31 - 1, -(2**31), 0, 2**31 - 1, 1, 2]
    nearest = computed("cvt.rni.f32.f32", ["f32", "f32"], a).view(torch.float32)
    assert nearest[[0, 1, 6, 7]].tolist() == [2, -2, 2, 2]


# ------------------------------------------------------------------------------------------ lanes and warps


def test_lanes_take_their_own_ways_and_meet_again():
    """Each goes round as often as its number says, then all shuffle."""
    result = torch.zeros(64, dtype=torch.int32)
    run(
        """mad.wide.u32 %rd0, %r0, 4, %rd100;
        mov.b32 %r1, 0;
        mov.b32 %r2, 0;
        and.b32 %r9, %r0, 31;
        setp.eq.b32 %p1, %r9, 0;
        @%p1 bra $L_done;
$L_loop:
        add.s32 %r1, %r1, 1;
        add.s32 %r2, %r2, %r1;
        setp.lt.s32 %p2, %r1, %r9;
        @%p2 bra $L_loop;
$L_done:
        shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
        st.global.b32 [ %rd0 + 0 ], { %r3 };""",
        result,
        warps=2,
    )
    lanes = (torch.arange(64) % 32) ^ 1
    assert torch.equal(result, (lanes * (lanes + 1) // 2).int())


def test_one_of_several_ways():
    result = torch.zeros(32, dtype=torch.int32)
    run(
        """mad.wide.u32 %rd0, %r0, 4, %rd100;
        rem.s32 %r1, %r0, 3;
$L_table: .branchtargets
        $L_zero,
        $L_one, $L_two;
        brx.idx %r1, $L_table;
$L_zero:
        mov.b32 %r2, 10;
        bra.uni $L_end;
$L_one:
        mov.b32 %r2, 11;
        bra.uni $L_end;
$L_two:
        mov.b32 %r2, 12;
$L_end:
        st.global.b32 [ %rd0 + 0 ], { %r2 };""",
        result,
    )
    assert torch.equal(result, (10 + torch.arange(32) % 3).int())


def test_programs_and_warps_add_to_one_number():
    total, seen = torch.zeros(2, dtype=torch.int32), torch.zeros(6 * 64, dtype=torch.int32)
    run(
        """mov.u32 %r1, %ctaid.x;
        mov.u32 %r2, %ctaid.y;
        mov.u32 %r3, %nctaid.x;
        mad.lo.s32 %r4, %r2, %r3, %r1;
        mad.lo.s32 %r5, %r4, 64, %r0;
        mad.wide.u32 %rd1, %r5, 4, %rd101;
        setp.lt.u32 %p1, %r0, 40;
        mov.b32 %r6, -1;
        @%p1 atom.global.gpu.relaxed.add.u32 %r6, [ %rd100 + 0 ], 2;
        @%p1 red.global.gpu.relaxed.add.u32 [ %rd100 + 4 ], %r2;
        st.global.b32 [ %rd1 + 0 ], { %r6 };""",
        total,
        seen,
        warps=2,
        grid=(3, 2, 1),
    )
    assert total.tolist() == [2 * 40 * 6, 40 * 3]
    assert sorted(seen[seen >= 0].tolist()) == list(range(0, 480, 2))
    assert (seen < 0).sum() == 6 * 24


@pytest.mark.parametrize(("name", "wanted"), [("add", 496), ("max", 31), ("min", 0), ("and", 0)])
def test_sums_of_a_warp(name, wanted):
    result = torch.zeros(64, dtype=torch.int32)
    run(
        f"""mad.wide.u32 %rd0, %r0, 4, %rd100;
        and.b32 %r1, %r0, 31;
        redux.sync.{name}.{"b32" if name == "and" else "s32"} %r2, %r1, -1;
        st.global.b32 [ %rd0 + 0 ], {{ %r2 }};""",
        result,
        warps=2,
    )
    assert (result == wanted).all()


EXCHANGE = """mad.wide.u32 %rd0, %r0, 4, %rd100;
        shl.b32 %r1, %r0, 2;
        xor.b32 %r2, %r1, 128;
        st.shared.b32 [ %r1 + 0 ], {{ %r0 }};
        {barrier}
        ld.shared.b32 %r3, [ %r2 + 0 ];
        st.global.b32 [ %rd0 + 0 ], {{ %r3 }};"""


def exchanged(barrier, seed):
    """What each of two warps finds that the other has written to shared memory."""
    result = torch.zeros(64, dtype=torch.int32)
    run(EXCHANGE.format(barrier=barrier), result, warps=2, seed=seed)
    return result.tolist()


def test_what_depends_on_the_order_of_warps_differs_from_seed_to_seed():
    right = [number ^ 32 for number in range(64)]
    assert all(exchanged("bar.sync 0;", seed) == right for seed in range(8))
    found = [exchanged("", seed) for seed in range(8)]
    assert right in found
    assert any(-1 in each for each in found)  # what was not there yet
    assert all(exchanged("", seed) == each for seed, each in enumerate(found))


def test_a_copy_is_there_when_it_was_waited_for_and_before_it_may_be():
    source = torch.arange(1, 129, dtype=torch.int32)

    def copied(wait, seed):
        result = torch.zeros(128, dtype=torch.int32)
        run(
            f"""mad.wide.u32 %rd0, %r0, 16, %rd100;
            mad.wide.u32 %rd1, %r0, 16, %rd101;
            shl.b32 %r1, %r0, 4;
            setp.lt.u32 %p1, %r0, 30;
            selp.b32 %r2, 16, 0, %p1;
            cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
            cp.async.commit_group;
            cp.async.wait_group {wait};
            ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r1];
            st.global.v4.b32 [ %rd0 + 0 ], {{ %r3, %r4, %r5, %r6 }};""",
            result,
            source,
            shared=512,
            seed=seed,
        )
        return result

    wanted = torch.cat([source[:120], torch.zeros(8, dtype=torch.int32)])  # zeros for what reads nothing
    assert all(torch.equal(copied(0, seed), wanted) for seed in range(6))
    early = [torch.equal(copied(1, seed), wanted) for seed in range(6)]
    assert any(early)
    assert not all(early)


# ------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 { %r1 }, [ %rd100 + 128 ];", "outside of every tensor.*shared memory, at 0x"),
        ("st.global.b32 [ %rd100 + -4 ], { %r0 };", "outside of every tensor"),
        ("ld.global.v2.b32 { %r1, %r2 }, [ %rd100 + 4 ];", "no multiple of its 8 bytes"),
        ("mov.b32 %r1, 256;\nst.shared.b32 [ %r1 + 0 ], { %r0 };", "outside of every tensor"),
        (
            "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $L_end;\nbar.sync 0;\n$L_end:",
            "have ended without coming to it",
        ),
        (
            "setp.lt.u32 %p1, %r0, 7;\n@%p1 bra $L_end;\nbar.sync 0;\n$L_end:\nadd.s32 %r0, %r0, 1;",
            "lanes .7, 8",
        ),
        (
            "setp.lt.u32 %p1, %r0, 7;\n@%p1 bra $L_end;\nshfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;\n$L_end:",
            "shfl.sync.*alone",
        ),
    ],
)
def test_what_a_gpu_would_not_forgive(body, message):
    with pytest.raises(Fault, match=message):
        run(body, torch.zeros(32, dtype=torch.int32), warps=2)


def test_lanes_that_are_masked_may_point_anywhere():
    result = torch.zeros(20, dtype=torch.int32)
    run(
        """mad.wide.u32 %rd0, %r0, 4, %rd100;
        setp.lt.u32 %p1, %r0, 20;
        mov.b32 %r1, 5;
        @%p1 ld.global.b32 { %r1 }, [ %rd0 + 0 ];
        add.s32 %r1, %r1, 1;
        @%p1 st.global.b32 [ %rd0 + 0 ], { %r1 };""",
        result,
    )
    assert (result == 1).all()


@pytest.mark.parametrize(
    "body",
    [
        "tanh.approx.f32 %r1, %r0;",
        "bar.sync 1, 64;",
        "atom.global.max.u32 %r1, [ %rd100 + 0 ], %r0;",
        "ld.local.b32 %r1, [%rd100];",
        "?",
    ],
)
def test_an_instruction_that_is_not_known_is_named(body):
    with pytest.raises(NotImplementedError) as caught:
        run(body, torch.zeros(32, dtype=torch.int32))
    assert body.rstrip(";") in str(caught.value)
