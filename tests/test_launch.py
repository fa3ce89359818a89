"""Launches past Triton's own way to a compiled kernel, and what kernels touch."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import triton

from triton_deq.backend import interpreting
from triton_deq.ops import launch as launches
from triton_deq.ops import products
from triton_deq.ops.anderson import anderson_residual, anderson_start

interpreted = pytest.mark.skipif(not interpreting(), reason="it is about the interpreter")


class Kernel:
    """What `launch` asks of Triton: `kernel[grid](...)` compiles, `compiled[grid](...)` only launches."""

    arg_names = ("x", "n", "layout", "SCALE", "BLOCK")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_run(*args, **constants):
            self.compiled.append((grid, args, constants))
            return Compiled(self)

        return compile_and_run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launched.append((grid, *args))


def run(kernel, x, n=7, layout=(3, 32), block=8):
    constants = {"BLOCK": block, "SCALE": 0.5, "num_warps": 2}
    return launches._launch_known(kernel, (4,), 0, (x, n, layout), constants)


def test_a_known_kernel_gets_pointers_and_constants_in_its_order(monkeypatch):
    monkeypatch.setattr(launches, "_known", {})
    kernel, x, y = Kernel(), torch.zeros(64), torch.ones(64)
    run(kernel, x)
    run(kernel, y, n=9, layout=(5, 48))  # integers of the same kind
    assert len(kernel.compiled) == 1
    assert kernel.compiled[0][1][0] is x
    assert kernel.compiled[0][2]["enable_fp_fusion"]
    assert kernel.launched == [((4, 1, 1), y.data_ptr(), 9, (5, 48), 0.5, 8)]


@pytest.mark.parametrize(
    ("capability", "version", "warps", "stages"),
    [
        (10, "3.6.0", 4, 1),
        (10, "3.7.0", 8, 1),
        (11, "3.7.0+git1", 4, 1),
        (10, "3.6.0", 2, 3),
        (10, "3.7.1", 4, 3),
        (10, "3.10.0", 4, 3),
        (9, "3.6.0", 4, 3),
    ],
)
def test_copies_are_not_asynchronous_where_their_fence_is_missing(
    capability, version, warps, stages, monkeypatch
):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(launches, "_capability", lambda device: capability)
    monkeypatch.setattr(launches, "_known", {})
    kernel, x = Kernel(), torch.zeros(64)
    constants = {"BLOCK": 8, "SCALE": 0.5, "num_warps": warps, "num_stages": 3}
    launches._launch_known(kernel, (4,), 0, (x, 7, (3, 32)), constants)
    assert kernel.compiled[0][2]["num_stages"] == stages


def test_a_place_launches_again_what_is_alike(monkeypatch):
    """With the pointers that it had; anything that differs puts the arguments together anew."""
    monkeypatch.setattr(launches, "_known", {})
    kernel, x, y, launched = Kernel(), torch.zeros(64), torch.ones(64), {}
    made = []
    for place, tensor in (("a", x), ("a", x), ("a", y), ("b", y), ("a", y), ("b", y)):

        def make(tensor=tensor, place=place):
            made.append((place, tensor is y))
            return run(kernel, tensor)

        launches.launch_at(place, (tensor.data_ptr(),), launched, make)
    assert made == [("a", False), ("a", True), ("b", True)]
    assert [call[1] for call in kernel.launched] == [x.data_ptr(), *(y.data_ptr(),) * 4]


@interpreted
@pytest.mark.kernels
def test_the_interpreter_patches_the_language_once_a_launch(monkeypatch):
    """Its way is to do it in every call of a function; a kernel with many has the same result without."""
    import triton.language as tl
    from triton.runtime import interpreter

    patched, patch, load = [], interpreter._patch_lang, tl.load

    def counted(function):
        patched.append(function.__module__)
        return patch(function)

    def step():
        state = anderson_start(torch.arange(10.0).view(2, 5), 2, 1e-6, 3, "triton")
        patched.clear()
        anderson_residual(state, torch.cos(state.x), 0, 1.0, "triton")
        return state.dots

    monkeypatch.setattr(interpreter, "_patch_lang", counted)
    found = step()
    assert len(patched) == len(set(patched)) > 1  # the kernel's module and others
    assert tl.load is load
    monkeypatch.setattr(launches, "spared", nullcontext)
    assert torch.equal(step(), found)
    assert len(patched) > len(set(patched))


@interpreted
@pytest.mark.kernels
@pytest.mark.parametrize("debug", [False, True])
def test_the_interpreter_seeks_overflows_only_where_it_tells_of_them(debug, monkeypatch):
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    sought = []

    def counted(semantic, *args):
        sought.append(semantic.builder.options.sanitize_overflow)

    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", counted)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, debug=debug))
    state = anderson_start(torch.arange(10.0).view(2, 5), 2, 1e-6, 3, "triton")
    anderson_residual(state, torch.cos(state.x), 0, 1.0, "triton")
    assert set(sought) == {debug}
    assert builder.options.sanitize_overflow


@interpreted
@pytest.mark.kernels
def test_a_launch_that_fails_leaves_the_interpreter_as_it_was():
    from triton.runtime import interpreter

    class Failing:
        def __getitem__(self, grid):
            raise RuntimeError("no such grid")

    patch, options = interpreter._patch_lang, interpreter.interpreter_builder.options
    with pytest.raises(RuntimeError, match="no such grid"):
        launches.launch(Failing(), (1,), torch.zeros(1))
    assert interpreter._patch_lang is patch
    assert interpreter.interpreter_builder.options is options


@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.zeros(64, dtype=torch.bfloat16)},
        {"x": torch.zeros(64)[1:]},  # no longer at 16 bytes
        {"n": 1},
        {"n": 16},
        {"n": 1 << 40},
        {"layout": (3, 33)},
        {"layout": (1, 32)},
        {"block": 16},
    ],
    ids=str,
)
def test_what_triton_compiles_for_is_told_apart(change, monkeypatch):
    monkeypatch.setattr(launches, "_known", {})
    kernel = Kernel()
    run(kernel, torch.zeros(64))
    run(kernel, **{"x": torch.zeros(64), **change})
    assert len(kernel.compiled) == 2
    assert kernel.launched == []


def test_another_kernel_is_not_this_one(monkeypatch):
    monkeypatch.setattr(launches, "_known", {})
    kernels, x = (Kernel(), Kernel()), torch.zeros(64)
    for kernel in kernels:
        run(kernel, x)
    assert [len(kernel.compiled) for kernel in kernels] == [1, 1]


@pytest.mark.parametrize(
    ("switch", "value", "allowed"),
    [
        ("fp32_precision", "tf32", True),
        ("fp32_precision", "ieee", False),
        ("allow_tf32", True, True),
        ("allow_tf32", False, False),
    ],
)
def test_either_of_pytorchs_switches_for_tf32(switch, value, allowed):
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    setattr(products, switch, value)
    try:
        assert launches.precision(torch.float32)["TF32"] == allowed
        assert not launches.precision(torch.float64)["TF32"]
    finally:
        if switch == "allow_tf32":
            products.allow_tf32 = False
        products.fp32_precision = before


@pytest.mark.parametrize(
    ("shape", "programs", "cut"),
    [
        ((32, 16384), 4096, (8, 2048)),  # one wave: 396 programs on 132 multiprocessors
        ((500, 16384), 4096, (1, 16384)),
        ((32, 1 << 20), 4096, (64, 16384)),  # 16 blocks each
        ((32, 1 << 20), 1024, (32, 32768)),
        ((3, 100), 4096, (1, 128)),
    ],
    ids=str,
)
def test_one_wave_of_programs_or_programs_of_many_blocks(shape, programs, cut):
    found = launches.in_few_waves(torch.empty(shape, device="meta"), 1024, 3, programs)
    assert (found.parts, found.chunk) == cut
    assert found.block == min(1024, cut[1])


@pytest.mark.parametrize(
    ("shape", "dtype", "processors", "tile"),
    [
        ((2100, 48000), torch.bfloat16, 132, (128, 128)),
        ((2048, 1024), torch.bfloat16, 132, (128, 128)),  # 128 programs
        ((1024, 1024), torch.bfloat16, 132, (128, 64)),  # 64 of the largest would leave half of them idle
        ((1024, 1024), torch.bfloat16, 64, (128, 128)),
        ((512, 512), torch.bfloat16, 132, (32, 64)),
        ((512, 1024), torch.float16, 132, (64, 64)),
        ((16, 100000), torch.bfloat16, 132, (16, 128)),
        ((1024, 1024), torch.float32, 132, (64, 64)),
        ((256, 1024), torch.float32, 132, (32, 64)),
        ((3, 5), torch.float64, 132, (16, 16)),
    ],
    ids=str,
)
def test_a_product_is_cut_for_the_multiprocessors_that_there_are(shape, dtype, processors, tile, monkeypatch):
    monkeypatch.setattr(products, "processors", lambda device: processors)
    grid, constants = products.tiles(*shape, 64, torch.empty(0, dtype=dtype))
    assert (constants["BLOCK_B"], constants["BLOCK_N"]) == tile
    assert grid == (-(-shape[0] // tile[0]) * -(-shape[1] // tile[1]),)


@pytest.mark.parametrize("paired", [False, True])
def test_two_programs_of_the_largest_tile_shall_fit_a_multiprocessor(paired, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    options = {
        rows: products.tiles(rows, 48000, 704, torch.empty(0, dtype=torch.bfloat16), paired=paired)[1]
        for rows in (16, 2100)
    }
    assert options[2100].get("maxnreg") == (128 if paired else None)
    assert "maxnreg" not in options[16]
    monkeypatch.setattr(torch.version, "hip", "6.4")  # whose compiler has no such option
    like = torch.empty(0, dtype=torch.bfloat16)
    assert "maxnreg" not in products.tiles(2100, 48000, 704, like, paired=paired)[1]
