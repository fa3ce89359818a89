"""`triton-deq inspect`: every kernel that ships, compiled for GPUs that are not there."""

import argparse
import importlib
import inspect
import json
import os
import pkgutil
import re
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from triton_deq import inspection
from triton_deq.backend import interpreting
from triton_deq.inspection import compiling
from triton_deq.inspection.reading import (
    Access,
    accesses,
    amd_resources,
    at_lines,
    code_size,
    lines_of,
    matrix_instructions,
    nvidia_resources,
    unfenced_copies,
)
from triton_deq.inspection.targets import TARGETS, occupancy

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels

from triton_deq.kernels.catalog import ENTRIES, STEPS, Entry, Pointer  # noqa: E402

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
}


def command(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """The command as a user runs it, in a process of its own: this one may have interpreted kernels."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, "-m", "triton_deq", "inspect", *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True)


def run_here(*arguments: str) -> int:
    """The command in this process, for what compiles nothing."""
    parser = argparse.ArgumentParser()
    inspection.add_arguments(parser)
    return inspection.run(parser.parse_args(arguments))


# ------------------------------------------------------------------------------------- what the library ships

SHIPPED_TO = os.environ.get("INSPECT_TARGETS", "sm_90").split()
"""The targets that every entry is compiled for, and those that one entry of each kernel is, as `sm_80:one`;
.ci/run compiles for others with other versions of Triton."""


@pytest.fixture(scope="module", params=SHIPPED_TO)
def report(request, tmp_path_factory) -> tuple[subprocess.CompletedProcess, list[dict], list[str]]:
    """What the command says and writes for a target, and the names of the entries that it was asked for."""
    target, _, some = request.param.partition(":")
    file = tmp_path_factory.mktemp("inspect") / "rows.json"
    names, chosen = [entry.name for entry in ENTRIES], []
    if some:
        first = {entry.kernel: entry.name for entry in reversed(ENTRIES)}
        names = [name for name in names if name in first.values()]
        chosen = [option for name in names for option in ("--kernel", name)]
    done = command("--json", str(file), "--target", target, *chosen)
    assert file.exists(), done.stderr
    return done, json.loads(file.read_text()), [f"{name} {target}" for name in names]


def test_every_entry_compiles_for_every_target(report):
    _, rows, asked = report
    assert [f"{row['kernel']} {row['target']}" for row in rows] == asked
    assert not [f"{row['kernel']} {row['target']}: {row['error']}" for row in rows if row["error"]]
    for row in rows:
        assert 0 < row["occupancy"] <= 1, row
        assert min(row["registers"], row["code"], row["seconds"]) > 0, row


def test_every_entry_keeps_its_budget(report):
    done, rows, _ = report
    broken = [f"{row['kernel']} {row['target']}: {row['broken']}" for row in rows if row["broken"]]
    assert not broken, "\n".join(broken)
    assert done.returncode == 0, done.stdout
    assert f"{len(rows)} of {len(rows)} within their budgets" in done.stdout


def test_every_kernel_has_an_entry():
    package = importlib.import_module("triton_deq.kernels")
    modules = [
        importlib.import_module(f"{package.__name__}.{m.name}")
        for m in pkgutil.iter_modules(package.__path__)
    ]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels == {f"{entry.name.split('[')[0]}_kernel" for entry in ENTRIES}
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    assert {name for names in STEPS.values() for name in names} <= {entry.name for entry in ENTRIES}


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.arguments, self.constants = arguments, constants

        return launch


def call_op(entry: Entry, device: str) -> None:
    """Call the op that launches `entry`'s kernel as its name says."""
    from triton_deq.ops import anderson, broyden, jacobian, mlp, mlp_probe
    from triton_deq.reference.activations import ACTIVATIONS

    values = entry.arguments
    state_like = torch.zeros(entry.shape, dtype=DTYPES[entry.dtype], device=device)
    kernel = entry.name.split("[")[0]
    if kernel == "squared_norm":
        jacobian.squared_norm(state_like, "triton")
    elif kernel == "probe":
        distribution = "gaussian" if values["GAUSSIAN"] else "rademacher"
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        jacobian.probe(state_like, seed, values["index"], distribution, "triton")
    elif kernel == "mlp_solve":
        call_mlp_solve(entry, state_like)
    elif entry.op == "mlp":
        width, like = entry.shape[1], state_like
        weight = like.new_zeros(width, width)
        distribution = "gaussian" if values.get("GAUSSIAN") else "rademacher"
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        if kernel == "mlp_probe":
            tanh = ACTIVATIONS["tanh"]
            mlp_probe.mlp_probe_fwd(like, weight, like, seed, values["PROBES"], distribution, tanh)
        elif kernel == "mlp_probe_vjp":
            products = like.new_zeros(values["PROBES"], *like.shape)
            mlp_probe.mlp_probe_vjp_fwd(products, weight, like, seed, distribution)
        elif kernel == "mlp_vjp":
            mlp.mlp_vjp(like, like, weight, like, "triton")
        else:
            norm = mlp.Norm(weight[0], weight[0], values["EPSILON"]) if values["NORM"] else None
            extra = (torch.empty_like(like), torch.empty_like(like)) if values["SLOPE"] else (None, None)
            mlp.mlp_fwd(like, weight, like, ACTIVATIONS["tanh"], norm, None, *extra)
    elif entry.op == "feedforward":
        call_feedforward(entry, state_like)
    elif entry.op == "norm":
        call_norm(entry, state_like)
    elif entry.op == "groupnorm":
        call_groupnorm(entry, state_like)
    elif entry.op == "fusion":
        call_fusion(entry, state_like)
    elif entry.op == "cross_entropy":
        call_cross_entropy(entry, state_like)
    elif entry.op == "weightnorm":
        call_weightnorm(entry, state_like)
    elif entry.op == "attention":
        call_attention(entry, device)
    elif entry.op == "broyden":
        step = values["SLOTS"]
        state = broyden.broyden_start(state_like, step - 1, 1e-3, step + 2, "triton")
        if kernel == "broyden_residual":
            broyden.broyden_residual(state, state_like, step, "triton")
        else:
            rule = {"relative": values["RELATIVE"], "over_batch": values["OVER_BATCH"], "last": False}
            broyden.broyden_advance(state, step, **rule, backend="triton")
    elif kernel == "anderson_step":
        history = values["HISTORY"]
        state = anderson.anderson_start(state_like, history, 1e-3, history + 2, "triton")
        rule = {
            "mixing": values["MIXING"],
            "relative": values["RELATIVE"],
            "over_batch": False,
            "last": False,
        }
        rule |= {"ridge": values["RIDGE"], "relative_ridge": values["RELATIVE_RIDGE"]}
        anderson.anderson_step(state, state_like, history, **rule, backend="triton")
    else:
        history = values["HISTORY"]
        state = anderson.anderson_start(state_like, history, 1e-3, history + 2, "triton")
        if kernel == "anderson_residual":
            fx = anderson.anderson_landing(state, history) if values["LANDED"] else state_like
            anderson.anderson_residual(state, fx, history, values["MIXING"], "triton")
        else:
            anderson.anderson_advance(
                state,
                history,
                relative=values["RELATIVE"],
                over_batch=values["OVER_BATCH"],
                ridge=values["RIDGE"],
                relative_ridge=values["RELATIVE_RIDGE"],
                last=False,
                backend="triton",
            )


def call_feedforward(entry: Entry, rows: torch.Tensor) -> None:
    from triton_deq.ops import feedforward

    values, inner = entry.arguments, rows.new_empty(len(rows), entry.arguments["N"])
    if entry.name.startswith("feedforward_vjp"):
        feedforward.feedforward_vjp_fwd(rows, rows.new_zeros(rows.shape[1], values["N"]), inner)
        return
    s = rows.unflatten(0, (-1, values["per"]))
    weight, mask = rows.new_zeros(values["N"], rows.shape[1]), inner[: len(s)] if values["MASK"] else None
    feedforward.feedforward_fwd(s, weight, inner[0], mask)


def call_norm(entry: Entry, x: torch.Tensor) -> None:
    """Sequences of `per` rows, each with one row of the mask."""
    from triton_deq.ops import norm

    values, width = entry.arguments, entry.shape[1]
    x, gain = x.view(-1, values["per"], width), x.new_zeros(width)
    mask, inverse = torch.zeros_like(x[:, :1]), norm._fresh_inverse(x)
    if entry.name.startswith("norm_vjp") and values["MASK"] and not values["BEND"]:
        dtype = DTYPES[values["branch_out_ptr"].dtype]
        norm.norm_vjps(x, x, inverse, x.to(dtype), mask, dtype, "triton", addend=x)
    elif entry.name.startswith("norm_vjp") and values["ADDEND"]:
        norm.norm_vjp_plus(x.to(DTYPES[values["vector_ptr"].dtype]), x, inverse, x, "triton")
    elif entry.name.startswith("norm_vjp"):
        extra = (x, inverse, mask) if values["MASK"] else (None, None, None)
        norm.norm_vjp_fwd(x, x, inverse, gain, *extra)
    elif values["NORMAL_STRIDE"] != width:
        branch = x.to(DTYPES[values["branch_ptr"].dtype])
        rows = x.new_empty(*x.shape[:2], values["NORMAL_STRIDE"], dtype=DTYPES[values["normal_ptr"].dtype])
        norm.norm_value(x, branch, mask, backend="triton", also=rows[..., :width])
    elif values["NORMAL"]:
        norm.norm_fwd(x, x, mask, gain, gain, values["EPSILON"], None, x, inverse)
    else:
        branch = x.to(DTYPES[values["branch_ptr"].dtype])
        norm.norm_value(x, branch, mask, gain, gain, values["EPSILON"], "triton")


def call_groupnorm(entry: Entry, state: torch.Tensor) -> None:
    from triton_deq.ops import groupnorm
    from triton_deq.ops.groupnorm import Map
    from triton_deq.reference.groupnorm import Normalised

    def map_of(pixels: int, channels: int) -> torch.Tensor:
        return state.new_zeros(len(state), 1, pixels, channels).permute(0, 3, 1, 2)

    def held(x: torch.Tensor, groups: int, shift: bool, gain: bool, relu: bool) -> Normalised:
        numbers = state.new_zeros(len(state), groups, dtype=torch.promote_types(state.dtype, torch.float32))
        gains = state.new_zeros(x.shape[1]) if gain else None
        return Normalised(x, gains, None, x if shift else None, numbers, numbers, x if relu else None)

    kernel, values = entry.name.split("[")[0], entry.arguments
    if kernel == "groupnorm_second":
        x = map_of(values["P"], values["C"])
        flags = (values[name] for name in ("G", "SHIFT", "GAIN", "RELU"))
        groupnorm.groupnorm_second_fwd(x, x if values["BESIDE"] else None, x, held(x, *flags))
        return
    maps, products, outs = [], [], []
    for pixels, channels, groups, _, _, shift, gain, *flags in values["CONSTANTS"]:
        x = map_of(pixels, channels)
        if kernel == "groupnorm":
            more, relu, statistics, epsilon, *_, apart = flags
            gains = state.new_zeros(channels) if gain else None
            beside = (x if there else None for there in (shift, more))
            some = map_of(pixels, channels + apart)[:, :channels] if apart else x
            maps.append(Map(some, groups, gains, gains, None, *beside, relu, epsilon))
        else:
            relu, _, _, parameters, *_, apart = flags
            products.append((x, held(x, groups, shift, gain, relu)))
            outs.append(map_of(pixels, channels + apart)[:, :channels] if apart else None)
    if maps:
        groupnorm.groupnorm_fwd(maps, statistics)
    else:
        groupnorm.groupnorm_vjp_fwd(*zip(*products, strict=True), parameters, outs)


def call_fusion(entry: Entry, state: torch.Tensor) -> None:
    from triton_deq.ops import fusion

    def map_of(channels: int, height: int, width: int) -> torch.Tensor:
        return state.new_zeros(len(state), height, width, channels).permute(0, 3, 1, 2)

    values = entry.arguments
    if "pools" in values:
        maps, factors = [], []
        for (*_, height, width), (channels, factor, *_) in zip(
            values["pools"], values["CONSTANTS"], strict=True
        ):
            maps.append(map_of(channels, height, width))
            factors.append([factor])
        fusion.fusion_vjp_fwd(maps, maps, factors)
        return
    sums = []
    for (*_, height, width), (channels, *factors, relu, _, _, _) in zip(
        values["sums"], values["CONSTANTS"], strict=True
    ):
        terms = [map_of(channels, height // factor, width // factor) for factor in factors if factor]
        sums.append(fusion.Sum(map_of(channels, height, width), terms, relu))
    fusion.fusion_fwd(sums)


def call_cross_entropy(entry: Entry, logits: torch.Tensor) -> None:
    from triton_deq.ops import cross_entropy as op

    targets, classes = logits.new_zeros(len(logits), dtype=torch.int64), entry.arguments["N"]
    if entry.name.startswith("cross_entropy_vjp"):
        levels = logits.new_zeros(2, len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
        op.cross_entropy_vjp_fwd(logits, targets, levels, levels[0], classes)
    else:
        op.cross_entropy_fwd(logits, targets, classes)


def call_weightnorm(entry: Entry, like: torch.Tensor) -> None:
    from triton_deq.ops import weightnorm

    vjp, weights, outs = entry.name.startswith("weightnorm_vjp"), [], []
    for operands, (columns, more_columns, *_) in zip(
        entry.arguments["weights"], entry.arguments["CONSTANTS"], strict=True
    ):
        pointers = [each for each in operands if isinstance(each, Pointer)]
        rows, *more = [each for each in operands if not isinstance(each, Pointer)]
        size = (more or [rows])[0], more_columns
        v = torch.empty(rows, columns, dtype=like.dtype, device=like.device)
        weights.append(weightnorm.Weight(v, v[:, 0].contiguous(), *size))
        outs.append(torch.empty(size, dtype=DTYPES[pointers[2].dtype], device=like.device))
    if vjp:
        weightnorm.weightnorm_vjp_fwd(weights, outs)
    else:
        weightnorm.weightnorm_fwd(weights, outs[0].dtype)


def call_mlp_solve(entry: Entry, z0: torch.Tensor) -> None:
    from triton_deq.ops import mlp, mlp_solve
    from triton_deq.reference.activations import ACTIVATIONS

    values, (batch, width) = entry.arguments, entry.shape
    inner = values["HIDDEN"] or width
    weight, u = z0.new_zeros(inner, width), z0.new_zeros(batch, inner)
    output, gain = z0.new_zeros(width, inner) if values["HIDDEN"] else None, z0.new_zeros(width)
    if values["ADJOINT"]:
        cell = mlp_solve.Linearised(weight, output, u, None, None, None, z0)
    else:
        norm = mlp.Norm(gain, gain, values["EPSILON"]) if values["NORM"] else None
        cell = mlp_solve.Layer(weight, u, ACTIVATIONS[values["ACTIVATION"]], output, norm)
    rule = mlp_solve.Rule(values["HISTORY"], 1.0, 1e-6, True, 1e-3, values["max_steps"], True)
    mlp_solve.mlp_solve(z0, cell, rule)


def call_attention(entry: Entry, device: str) -> None:
    """q, k and v in one buffer, everything else by itself."""
    from triton_deq.ops import attention

    values, batch = entry.arguments, entry.shape[0]
    heads, depth, memory, queries = values["H"], values["HEAD"][2], values["M"], values["T"]
    draw = {"dtype": DTYPES[entry.dtype], "device": device}
    fused = torch.zeros(batch, queries, 3, heads, depth, **draw)
    q, k, v = fused.unbind(2)
    kept = [torch.zeros(batch, memory, heads, depth, **draw) if memory else None for _ in range(2)]
    positions, bias = torch.zeros(memory + queries, heads, depth, **draw), torch.zeros(heads, depth, **draw)
    seed = torch.zeros(1, dtype=torch.int64, device=device) if values["DROPOUT"] else None
    context = attention.Context(
        positions, bias, bias, *kept, values["window"], values["DROPOUT"], seed, scale=values["SCALE"]
    )
    sums = torch.zeros(
        batch, heads, queries, dtype=torch.promote_types(q.dtype, torch.float32), device=device
    )
    evaluated = attention.Evaluated(torch.zeros_like(q, memory_format=torch.contiguous_format), sums)
    given = attention.Given(q, k, v, context, evaluated.value)
    kernel, tangents = entry.name.split("[")[0], None
    if values.get("SECOND"):
        tangents = attention.Tangents(*(evaluated.value,) * 3, sums, sums)
    if kernel == "attention":
        attention.attention_fwd(q, k, v, context)
    elif kernel == "attention_query_vjp":
        attention.query_gradient(given, evaluated, fused, values["BIASES"], tangents)
    elif kernel == "attention_key_vjp":
        attention.key_gradients(given, evaluated, sums, fused, memory=False, tangents=tangents)
    elif kernel == "attention_position_vjp":
        attention.position_gradient(given, evaluated, sums, tangents)
    else:
        attention.derivative(given, evaluated, *(evaluated.value,) * 3)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_is_what_its_op_launches(entry: Entry, device: str, monkeypatch):
    name = f"{entry.name.split('[')[0]}_kernel"
    recorder = Recorder()
    monkeypatch.setattr(f"{entry.kernel.fn.__module__}.{name}", recorder)
    call_op(entry, device)

    names = list(inspect.signature(entry.kernel.fn).parameters)
    launched = {**dict(zip(names, recorder.arguments, strict=False)), **recorder.constants}
    options = {key: launched.pop(key) for key in entry.options}
    assert options == dict(entry.options)
    assert launched.keys() == entry.arguments.keys() == set(names)
    for key, value in entry.arguments.items():
        if key == "OPERAND" and entry.dtype == "bf16" and interpreting():
            value = type(value)("fp32")  # the interpreter's arithmetic in bfloat16 is wrong
        assert_alike(launched[key], value, key)


def assert_alike(launched, value, key: str) -> None:
    if isinstance(value, tuple):
        assert len(launched) == len(value), key
        for each, of_entry in zip(launched, value, strict=True):
            assert_alike(each, of_entry, key)
    elif isinstance(value, Pointer):
        assert launched.dtype == DTYPES[value.dtype], key
        assert launched.data_ptr() % 16 == 0, key
    else:
        assert (launched, type(launched)) == (value, type(value)), key


# ----------------------------------------------------------------------------------- what the command reports

TRIAL_CATALOG = '''
"""Entries that break a budget, do not compile, kill the compiler, or are autotuned."""
import os
import triton
import triton.language as tl
from triton_deq.kernels.catalog import Budget, Entry, Pointer


@triton.jit
def double_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    tl.store(x_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=inside), mask=inside)


@triton.jit
def wrong_kernel(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


class Deadly:
    fn = double_kernel.fn

    def warmup(self, **arguments):
        os.write(2, b"the compiler's last words")
        os._exit(134)


tuned_kernel = triton.autotune(
    [triton.Config({"BLOCK": 512}, num_warps=2), triton.Config({"BLOCK": 2048}, num_warps=4)], key=["n"]
)(double_kernel)


def entry(name, kernel, n=1 << 20, budget=Budget(), **constants):
    arguments = {"x_ptr": Pointer("fp32"), "n": n, **constants}
    return Entry("trial", name, kernel, (1, n), arguments, ("x_ptr",), None, None, budget, {})


ENTRIES = (
    entry("wrong", wrong_kernel, BLOCK=64),
    entry("deadly", Deadly(), BLOCK=512),
    entry("narrow", double_kernel, n=1001, BLOCK=512),
    entry("no dot", double_kernel, BLOCK=1024, budget=Budget(tensor_cores=True)),
    entry("tuned", tuned_kernel),
)
'''


STEPPING = [f"anderson_{part}[fp32,m=6]" for part in ("residual", "advance", "step")]
STEPPING.append("broyden_advance[fp32,m=10]")
RANDOM = ["attention[bf16]", "attention[bf16,dropout]", "mlp_probe[fp32,D=1024,gaussian]"]


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    """PTX for sm_90 of the entries above, by their names."""
    folder = tmp_path_factory.mktemp("assembly")
    names = [*STEPPING, *RANDOM]
    chosen = [option for name in names for option in ("--kernel", name)]
    done = command(*chosen, "--target", "sm_90", "--asm", str(folder))
    assert done.returncode == 0, done.stderr
    files = {re.sub(r"\W+", "_", file.name.split(".sm_90")[0]): file for file in folder.glob("*.ptx")}
    assert len(files) == len(names)
    return {name: files[re.sub(r"\W+", "_", name).strip("_")].read_text() for name in names}


def test_what_a_step_of_a_solver_reads_is_on_its_way_before_its_first_barrier(assembly):
    """No compiler moves a load above a barrier, so each one behind it would be waited for by itself.

    Behind it stand, at most, the loads of a program's next block and those that a step spares if it improves.
    """
    # Rows of a block before it, and behind: of a best iterate that has to move, two there.
    blocks = {"residual": (8, 0), "advance": (6, 8), "step": (14, 2)}
    for name in STEPPING:
        solver, part = name.split("[")[0].split("_")
        before, barrier, behind = assembly[name].partition("bar.sync")
        assert barrier
        found = tuple(text.count("ld.global.v4.b32") for text in (before, behind))
        rows = blocks[part] if solver == "anderson" else (11, 13)
        assert found == tuple(2 * count for count in rows), name
        if part != "residual":  # all warps have read a record when one of them renews it
            assert "ld.global.b64" not in behind
            assert "st.global.b64" not in before


def test_random_words_are_made_once_and_where_they_are_needed(assembly):
    """A thread takes four entries from a call of Philox, and no tile of them goes through shared memory."""
    plain, *drawing = RANDOM
    assert assembly[drawing[0]].count("bar.sync") == assembly[plain].count("bar.sync")
    for name in drawing:
        entry = next(each for each in ENTRIES if each.name == name)
        rows, columns = (
            entry.arguments.get(key, entry.arguments.get("BLOCK")) for key in ("BLOCK_B", "BLOCK_N")
        )
        calls = rows * columns // (32 * entry.options["num_warps"]) // 4
        # Ten rounds each, of which the first need no product; some compilers make both halves by themselves.
        assert 0 < assembly[name].count("-766435501") <= 2 * 10 * calls, name


RENEWING = {"anderson_advance": 6, "anderson_step": 6, "broyden_residual": 10, "broyden_advance": 10}
LAYOUTS = """
import re
from triton_deq.inspection.compiling import _warm_up
from triton_deq.inspection.targets import TARGETS
from triton_deq.kernels.catalog import ENTRIES

for entry in ENTRIES:
    if entry.name in NAMES:
        code = _warm_up(entry, 0, TARGETS["sm_90"]).asm["ttgir"]
        tile = rf"tensor<{entry.arguments['BLOCK']}x!tt.ptr<\\w+>, (#\\w+)>"
        kinds = ("load", "store")
        print(entry.name, *(sorted(set(re.findall(rf"tt\\.{kind} .*: {tile}", code))) for kind in kinds))
"""


def test_a_place_of_a_tile_is_the_same_threads_in_loads_and_stores():
    """So tests/memcheck.py takes it to be, where a step of a solver stores anew what it has loaded."""
    names = [f"{kernel}[{dtype},m={size}]" for kernel, size in RENEWING.items() for dtype in ("fp32", "bf16")]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = LAYOUTS.replace("NAMES", repr(names))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sorted(line.split(" ")[0] for line in lines) == sorted(names)
    for line in lines:
        assert re.fullmatch(r"\S+ \['(#\w+)'\] \['\1'\]", line), line


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> tuple[subprocess.CompletedProcess, dict[str, dict], Path]:
    folder = tmp_path_factory.mktemp("trial")
    (folder / "trial_catalog.py").write_text(TRIAL_CATALOG)
    asm = folder / "asm"
    done = command(
        *("--catalog", "trial_catalog", "--asm", str(asm), "--json", "-"),
        *("--target", "sm_80", "--target", "gfx942"),
        path=folder,
    )
    rows = json.loads(done.stdout)
    return done, {f"{row['kernel']} {row['target']}": row for row in rows}, asm


def test_a_kernel_that_does_not_compile_is_a_row_with_the_message(trial):
    done, rows, _ = trial
    for target in ("sm_80", "gfx942"):
        assert "CompilationError" in rows[f"wrong {target}"]["error"]
        assert not rows[f"wrong {target}"]["passed"]
    assert done.returncode == 1
    assert "CompilationError" in done.stderr


def test_a_compiler_that_dies_takes_only_its_own_row_along(trial):
    _, rows, _ = trial
    assert "the compiler's last words" in rows["deadly sm_80"]["error"]
    assert rows["narrow sm_80"]["error"] is None


def test_a_broken_budget_is_named(trial):
    _, rows, _ = trial
    assert rows["narrow sm_80"]["broken"] == [
        "4 contiguous loads of 4 bytes (budget 16)",
        "4 contiguous stores of 4 bytes (budget 16)",
    ]
    assert rows["no dot gfx942"]["broken"] == ["no matrix instruction, although there is a dot"]


def test_all_configurations_of_an_autotuned_kernel_are_rows(trial):
    _, rows, _ = trial
    tuned = {name: row for name, row in rows.items() if name.startswith("tuned/")}
    assert len(tuned) == 4
    assert all(row["passed"] for row in tuned.values())
    for block, loads in ((512, 2), (2048, 4)):
        (row,) = (
            row for name, row in tuned.items() if f"BLOCK={block}," in name and row["target"] == "sm_80"
        )
        assert row["contiguous_loads"] == {"16": loads}


def test_assembly_is_written_and_agrees_with_the_rows(trial):
    _, rows, asm = trial
    row = rows["no dot gfx942"]
    text = (asm / "no_dot.gfx942.amdgcn").read_text()
    assert "double_kernel" in (asm / "no_dot.sm_80.ptx").read_text()
    assert "EXIT" in (asm / "no_dot.sm_80.sass").read_text()
    waves = re.search(r"; Occupancy: (\d+)", text)  # LLVM's own estimate, in waves of the 8 a SIMD can hold
    assert waves is not None
    assert row["occupancy"] == int(waves[1]) / 8


def test_unknown_names_list_the_valid_ones(capsys):
    assert run_here("--kernel", "andersen") == 2
    message = capsys.readouterr().err
    assert "'andersen'" in message
    assert all(entry.name in message for entry in ENTRIES)
    for option, valid in (("--target", TARGETS), ("--roofline", inspection.roofline.DEVICES)):
        with pytest.raises(SystemExit):
            run_here(option, "voodoo2")
        message = capsys.readouterr().err
        assert all(name in message for name in valid)


def test_a_pattern_selects_by_part_or_by_wildcards(capsys):
    def chosen(*patterns):
        words = [word for pattern in patterns for word in ("--kernel", pattern)]
        assert run_here(*words, "--roofline", "h100", "--json", "-") == 0
        return {row["kernel"] for row in json.loads(capsys.readouterr().out)}

    assert chosen("norm[bf16]") == chosen("squared*bf16") == {"squared_norm[bf16]"}
    both = chosen("squared_norm", "probe")
    assert both == chosen("squared_norm") | chosen("probe") > chosen("probe")


def test_missing_tools_and_folders_are_one_sentence(capsys, monkeypatch, tmp_path):
    from triton.backends.nvidia import compiler

    from triton_deq.inspection import workers

    def missing(arch):
        raise RuntimeError("Cannot find ptxas")

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "get_ptxas", missing)
        assert run_here("--target", "sm_90") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "TRITON_PTXAS_PATH" in message

    def unwritable(prefix):
        raise PermissionError(13, "Permission denied", "/tmp")

    monkeypatch.setattr(workers, "TemporaryDirectory", unwritable)
    assert run_here("--target", "gfx942") == 2
    assert "TMPDIR" in capsys.readouterr().err

    (tmp_path / "file").write_text("")
    assert run_here("--asm", str(tmp_path / "file" / "below")) == 2
    assert "file" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_here("--json", str(tmp_path / "nowhere" / "rows.json"))
    assert "nowhere" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- the readers


def test_ptx_accesses():
    assembly = textwrap.dedent("""\
        .loc 1 10 4
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        .loc 2 20 4, function_name $L__info_string0, inlined_at 1 11 2
        ld.global.nc.L1::no_allocate.v2.b64 {%rd2, %rd3}, [%rd1];
        ld.global.v8.b32 {%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%rd1];
        // begin inline asm
        .loc 1 30 4
        mov.u16 %rs1, 0x0;
        .loc 1 31 4
        st.global.b16 [ %rd4 + 0 ], { %rs1 };
        // end inline asm
        .loc 1 40 4
        cp.async.cg.shared.global [ %r5 + 0 ], [ %rd5 + 0 ], 0x10, %r6;
        ld.shared.b64 %rd6, [%r7];
        st.shared.v4.b32 [%r7], {%r1, %r2, %r3, %r4};
        .file 1 "/somewhere/kernel.py"
        .file 2 "/somewhere/helper.py"
        """)
    assert [(a.kind, a.bytes, a.file, a.line) for a in accesses(assembly)] == [
        ("load", 16, "kernel.py", 10),
        ("load", 16, "helper.py", 20),
        ("load", 32, "helper.py", 20),
        ("store", 2, "kernel.py", 30),
        ("load", 16, "kernel.py", 40),
    ]


def test_amd_accesses():
    assembly = textwrap.dedent("""\
        .file 1 "/somewhere" "kernel.py"
        .loc 1 10 4 is_stmt 1 ; kernel.py:10:4
        buffer_load_dwordx4 v[10:13], v2, s[4:7], 0 offen
        global_load_ushort v1, v[2:3], off
        global_load_short_d16_hi v1, v[2:3], off
        global_load_dword v1, v[2:3], off
        s_load_dwordx16 s[0:15], s[0:1], 0x0
        ds_read_b128 v[0:3], v4
        .loc 1 11 4
        global_store_dwordx2 v1, v[2:3], s[10:11]
        buffer_store_byte v1, v2, s[0:3], 0 offen
        flat_load_b96 v[0:2], v[4:5]
        """)
    assert [(a.kind, a.bytes, a.line) for a in accesses(assembly)] == [
        ("load", 16, 10),
        ("load", 2, 10),
        ("load", 2, 10),
        ("load", 4, 10),
        ("store", 8, 11),
        ("store", 1, 11),
        ("load", 12, 11),
    ]


@pytest.mark.parametrize(
    "instruction",
    [
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};",
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1;",
        "@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r2, %p2;",
        "v_mfma_f32_32x32x8_bf16_1k v[0:15], v[16:17], v[18:19], v[0:15]",
        "v_smfmac_f32_16x16x32_f16 v[0:3], v[4:5], v[6:9], v10",
    ],
)
def test_matrix_instructions(instruction):
    assert matrix_instructions(f"{instruction}\n wgmma.fence.sync.aligned;\n v_fma_f32 v0, v1, v2, v3\n") == 1


@pytest.mark.parametrize(("target", "stages"), [("sm_100", 1), ("sm_90", 3)])
def test_an_entry_is_compiled_as_it_is_launched_where_the_fence_is_missing(target, stages, monkeypatch):
    given = {}

    class Kernel:
        @staticmethod
        def warmup(**arguments):
            given.update(arguments)

    entry = SimpleNamespace(kernel=Kernel, arguments={}, options={"num_warps": 4, "num_stages": 3})
    monkeypatch.setattr(triton, "__version__", "3.7.0")
    monkeypatch.setattr("triton.runtime.driver.set_active", lambda _: None)
    compiling._warm_up(entry, 0, TARGETS[target])
    assert given["num_stages"] == stages


@pytest.mark.parametrize(
    ("lines", "unfenced"),
    [
        (("cp.async.cg.shared.global [%r1], [%rd1], 16;", "tcgen05.mma.cta_group::1.kind::f16"), True),
        (("cp.async.ca.shared.global [%r1], [%rd1], 4;", "fence.proxy.async;", "tcgen05.mma"), False),
        (("st.shared.b32 [%r1], %r2;", "tcgen05.mma.cta_group::1.kind::f16"), False),
        (("cp.async.cg.shared.global [%r1], [%rd1], 16;", "mma.sync.aligned.m16n8k16"), False),
    ],
)
def test_copies_that_tensor_cores_read_without_a_fence(lines, unfenced):
    assert unfenced_copies("\n".join(lines)) == unfenced


def elf(*sections: tuple[int, int]) -> bytes:
    """A 64-bit ELF file of nothing but section headers: (flags, size) each."""
    header = bytearray(0x40)
    struct.pack_into("<Q", header, 0x28, 0x40)
    struct.pack_into("<HH", header, 0x3A, 0x40, len(sections))
    rows = (struct.pack("<IIQQQQ", 0, 0, flags, 0, 0, size).ljust(0x40, b"\0") for flags, size in sections)
    return bytes(header) + b"".join(rows)


def test_nvidia_resources():
    ptxas = textwrap.dedent("""\
        ptxas info    : Function properties for a_kernel
            40 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
        ptxas info    : Used 96 registers, used 1 barriers, 448 bytes cmem[0]
        """)
    cubin = elf((0x0, 999), (0x6, 4096), (0x100006, 128))
    assert code_size(cubin) == 4224
    found = nvidia_resources(ptxas, cubin)
    assert (found.registers, found.spilled, found.stack, found.code) == (96, 12, 40, 4224)
    with pytest.raises(ValueError, match="newer than this reader"):
        nvidia_resources("", cubin)


@pytest.mark.parametrize(("stack", "spilled"), [(0, 0), (64, 20)])
def test_amd_resources(stack, spilled):
    """Scalars that were spilled to lanes of a vector register take no memory."""
    found = amd_resources(
        f"; codeLenInByte = 3596\n .private_segment_fixed_size: {stack}\n .sgpr_count: 74\n"
        " .sgpr_spill_count: 2\n .vgpr_count:     54\n .vgpr_spill_count: 3\n"
    )
    assert (found.registers, found.spilled, found.stack, found.code) == (54, spilled, stack, 3596)


def test_loads_that_were_joined_count_where_no_others_are_found():
    joined, store = Access("load", 16, "kernel.py", 0), Access("store", 8, "kernel.py", 7)
    other = Access("load", 4, "kernel.py", 5)
    lines = {("load", "kernel.py", 3), ("store", "kernel.py", 7)}
    assert at_lines([joined, other, store], lines) == [store, joined]
    assert at_lines([joined, other, store], lines | {("load", "kernel.py", 5)}) == [other, store]


def test_contiguous_accesses_are_known_by_their_lines():
    def kernel(x_ptr, y_ptr, tl, row):
        x = tl.load(x_ptr + row)
        tl.load(y_ptr)
        tl.store(
            y_ptr + x,
            x,
        )

    first = kernel.__code__.co_firstlineno
    file = Path(__file__).name
    assert lines_of(kernel, ("x_ptr",)) == {("load", file, first + 1)}
    assert lines_of(kernel, ("y_ptr",)) == {("load", file, first + 2), ("store", file, first + 3)}


def test_lines_of_a_pointer_that_was_in_a_tuple():
    def kernel(x_ptr, y_ptr, z_ptr, tl):
        both = (x_ptr, y_ptr)
        first, second = both
        tl.load(first)
        product = y_ptr * 2
        tl.load(product)
        tl.store(z_ptr, second)

    line = kernel.__code__.co_firstlineno
    for pointer in ("x_ptr", "y_ptr"):  # which of both it was is not looked at
        assert lines_of(kernel, (pointer,)) == {("load", Path(__file__).name, line + 3)}


def test_lines_of_a_pointer_handed_to_a_device_function():
    """As `triton.jit` leaves it: an object that holds the Python function."""
    from triton_deq.kernels.anderson import anderson_step_kernel, take_in
    from triton_deq.kernels.mixing import load_slots

    lines = lines_of(anderson_step_kernel.fn, ("residuals_ptr",))
    assert {(kind, file) for kind, file, _ in lines} == {("load", "mixing.py"), ("store", "anderson.py")}
    for kind, called in (("load", load_slots.fn), ("store", take_in.fn)):
        source, first = inspect.getsourcelines(called)
        at = [line for found, _, line in lines if found == kind]
        assert at
        assert all(first < line < first + len(source) for line in at)


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "share", "limit"),
    [
        # 64 registers fill sm_80's 65536 with 1024 threads of its 2048; 32 do not bind.
        ("sm_80", 8, 64, 0, 32 / 64, "registers"),
        ("sm_80", 8, 32, 0, 1.0, "warps"),
        # cuda_occupancy.h: a quarter of the registers holds two warps at 200 registers and three at 168.
        ("sm_80", 2, 200, 0, 8 / 64, "registers"),
        ("sm_80", 2, 168, 0, 12 / 64, "registers"),
        # 32 programs at most: one warp each is half of the warps.
        ("sm_90", 1, 16, 0, 32 / 64, "programs"),
        # Hopper Tuning Guide: of 228 KiB each program takes 1 KiB beside what it asks for, at most 227.
        ("sm_90", 4, 32, 113 * 1024, 8 / 64, "shared"),
        ("sm_90", 4, 32, 227 * 1024, 4 / 64, "shared"),
        ("sm_100", 4, 32, 228 * 1024, 0.0, "shared"),
        # AMD lab notes, "Register pressure in AMD CDNA2 GPUs": waves a SIMD, of 8, at these registers.
        ("gfx942", 4, 64, 0, 8 / 8, "warps"),
        ("gfx942", 4, 72, 0, 7 / 8, "registers"),
        ("gfx942", 4, 80, 0, 6 / 8, "registers"),
        ("gfx942", 4, 128, 0, 4 / 8, "registers"),
        ("gfx942", 4, 129, 0, 3 / 8, "registers"),
        ("gfx942", 4, 512, 0, 1 / 8, "registers"),
    ],
)
def test_occupancy(target, warps, registers, shared, share, limit):
    assert occupancy(TARGETS[target], warps, registers, shared) == (share, limit)


# -------------------------------------------------------------------------------------------- the roofline


def test_the_roofline_is_traffic_over_bandwidth(capsys):
    assert run_here("--roofline", "h200", "--json", "-", "--launch-us", "5") == 0
    rows = json.loads(capsys.readouterr().out)
    of = {(row["kernel"], row["batch"], row["entries"]): row for row in rows}
    batch, entries, history = 64, 65536, 6
    states = batch * entries * 4

    residual = of["anderson_residual[fp32,m=6]", batch, entries]
    assert residual["traffic"] == pytest.approx((history + 3) * states, rel=1e-3)
    assert residual["binds"] == "bandwidth"
    assert residual["least"] == residual["traffic"] / 4.8e12

    step = of["Anderson step [fp32,m=6]", batch, entries]
    assert step["traffic"] == pytest.approx((2 * history + 4) * states, rel=1e-3)
    assert step["least"] == pytest.approx(step["traffic"] / 4.8e12 + 2 * 5e-6)
    small = of["Anderson step [fp32,m=6]", 8, 4096]
    assert small["binds"] == "launches"


@pytest.mark.parametrize("words", [["--waits"], ["--asm", "here"], ["--target", "sm_90"]], ids=" ".join)
def test_the_roofline_takes_no_option_of_the_compilers(words, capsys):
    assert run_here("--roofline", "h100", *words) == 2
    message = capsys.readouterr().err
    assert "--roofline" in message
    assert words[0] in message


def test_the_roofline_as_a_table(capsys):
    assert run_here("--roofline", "a100", "--kernel", "probe") == 0
    table = capsys.readouterr().out
    assert "2039 GB/s" in table
    assert table.count("probe[fp32,gaussian]") == len(inspection.roofline.SHAPES)
    assert "Anderson step" not in table
