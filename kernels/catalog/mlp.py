"""The MLP cell's kernels in the catalog."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import mlp, mlp_probe, mlp_solve
from .entry import BYTES, Budget, Entry, Pointer, name_of, traded
from .products import precision_of, product_unit, tiles_of


def _mlp(
    dtype: str, batch: int, width: int, note: str = "", *, norm: bool = False, slopes: bool = False
) -> Entry:
    """A square layer; slopes: act′ and act″ are written too."""
    tiles, options = tiles_of(dtype, batch, width, width, whole=norm, paired=not slopes)
    pointers = ("z_ptr", "weight_ptr", "injection_ptr", "value_ptr")
    others = ("gain_ptr", "offset_ptr", "slope_ptr", "curvature_ptr")
    outputs = 3 if slopes else 1
    return Entry(
        op="mlp",
        name=name_of("mlp", dtype, width, note),
        kernel=mlp.mlp_kernel,
        shape=(batch, width),
        arguments={
            **dict.fromkeys((*pointers, *others), Pointer(dtype)),
            "B": batch,
            "N": width,
            "K": width,
            "ACTIVATION": "tanh",
            "SLOPE": slopes,
            "CURVATURE": slopes,
            "NORM": norm,
            "EPSILON": 1e-5 if norm else 0.0,
            **precision_of(dtype),
            **tiles,
        },
        contiguous=pointers,
        traffic=lambda entry, batch, width: ((2 + outputs) * batch + width) * width * BYTES[entry.dtype],
        work=_mlp_work,
        # With few rows a thread has few entries of z.
        budget=replace(_mlp_budget(dtype, width), load=BYTES[dtype]) if norm else _mlp_budget(dtype, width),
        options=options,
    )


def _mlp_vjp(dtype: str, batch: int, width: int, note: str = "") -> Entry:
    tiles, options = tiles_of(dtype, batch, width, width)
    pointers = ("vector_ptr", "slope_ptr", "weight_ptr", "shift_ptr", "out_ptr")
    return Entry(
        op="mlp",
        name=name_of("mlp_vjp", dtype, width, note),
        kernel=mlp.mlp_vjp_kernel,
        shape=(batch, width),
        arguments={
            **dict.fromkeys(pointers, Pointer(dtype)),
            "ROWS": batch,
            "B": batch,
            "N": width,
            "K": width,
            "SHIFT": True,
            **precision_of(dtype),
            **tiles,
        },
        contiguous=pointers,
        traffic=lambda entry, batch, width: (4 * batch + width) * width * BYTES[entry.dtype],
        work=_mlp_work,
        budget=_mlp_budget(dtype, width),
        options=options,
    )


def _mlp_probe(
    dtype: str, batch: int, width: int, note: str, *, probes: int = 1, gaussian: bool = True
) -> Entry:
    return _mlp_estimate(
        mlp_probe.mlp_probe_kernel,
        dtype,
        batch,
        width,
        note,
        ("z_ptr", "weight_ptr", "injection_ptr", "vectors_ptr", "curvature_ptr"),
        {"ACTIVATION": "tanh", "PROBES": probes, "GAUSSIAN": gaussian},
        lambda entry, batch, width: ((3 + probes) * batch + width) * width * BYTES[entry.dtype],
    )


def _mlp_probe_vjp(
    dtype: str, batch: int, width: int, note: str, *, probes: int = 1, gaussian: bool = True
) -> Entry:
    return _mlp_estimate(
        mlp_probe.mlp_probe_vjp_kernel,
        dtype,
        batch,
        width,
        note,
        ("products_ptr", "weight_ptr", "curvature_ptr", "out_ptr"),
        {"PROBES": probes, "GAUSSIAN": gaussian},
        lambda entry, batch, width: ((2 + probes) * batch + width) * width * BYTES[entry.dtype],
    )


def _mlp_estimate(
    kernel: Any,
    dtype: str,
    batch: int,
    width: int,
    note: str,
    pointers: tuple[str, ...],
    constants: dict[str, Any],
    traffic: Callable[[Entry, int, int], int],
) -> Entry:
    """The kernels of the fused estimate: a product with probes in its epilogue."""
    tiles, options = tiles_of(dtype, batch, width, width, most=64)
    options["num_warps"] = max(4, tiles["BLOCK_B"] * tiles["BLOCK_N"] // 512)
    probes = constants["PROBES"]
    name = kernel.__name__.removesuffix("_kernel")
    products = 1 if name == "mlp_probe" else probes
    return Entry(
        op="mlp",
        name=name_of(name, dtype, width, note),
        kernel=kernel,
        shape=(batch, width),
        arguments={
            **dict.fromkeys(pointers, Pointer(dtype)),
            "seed_ptr": Pointer("i64"),
            "B": batch,
            "N": width,
            "K": width,
            **constants,
            **precision_of(dtype),
            **tiles,
        },
        contiguous=pointers,
        traffic=traffic,
        work=lambda entry, batch, width: (
            {unit: products * count for unit, count in _mlp_work(entry, batch, width).items()}
            | {"int32": 25 * probes * batch * width}
        ),
        budget=_mlp_budget(dtype, width),
        options=options,
    )


def _mlp_solve(
    dtype: str,
    width: int,
    note: str = "",
    spilled: int = 0,
    *,
    history: int = 6,
    hidden: int = 0,
    norm: bool = False,
    adjoint: bool = False,
) -> Entry:
    """A whole solve of 1024 samples in at most 30 steps."""
    batch, block = 1024, 16 if dtype == "fp64" else 32
    wide, fp64 = Pointer("fp64" if dtype == "fp64" else "fp32"), Pointer("fp64")
    states = ("x_ptr", "best_ptr", "residuals_ptr", "iterates_ptr")
    given = ("first_ptr", "second_ptr", "shift_ptr", "slope_ptr", "gain_ptr", "offset_ptr", "normal_ptr")
    sums = ("gram_ptr", "weights_ptr", "record_ptr", "trace_ptr")
    return Entry(
        op="mlp",
        name=name_of("mlp_solve", dtype, width, note),
        kernel=mlp_solve.mlp_solve_kernel,
        shape=(batch, width),
        arguments={
            **dict.fromkeys((*states, *given, "scratch_ptr"), Pointer(dtype)),
            **dict.fromkeys(sums, fp64),
            "inverse_ptr": wide,
            "B": batch,
            "max_steps": 30,
            "ADJOINT": adjoint,
            "WIDTH": width,
            "HIDDEN": hidden,
            "ACTIVATION": "tanh",
            "NORM": norm,
            "EPSILON": 1e-5 if norm and not adjoint else 0.0,
            "HISTORY": history,
            "LANES": 1 << (history - 1).bit_length(),
            "MIXING": 1.0,
            "RELATIVE": True,
            "RIDGE": 1e-6,
            "RELATIVE_RIDGE": True,
            "TRACE": False,
            **precision_of(dtype),
            "SAMPLES": 16,
            "BLOCK": max(16, 1 << (width - 1).bit_length()),
            "BLOCK_K": block,
            "BLOCK_H": block,
        },
        contiguous=states,
        traffic=_mlp_solve_traffic,
        work=_mlp_solve_work,
        budget=replace(_mlp_budget(dtype, width), spilled=spilled),
        options={"num_warps": 4 if width <= 32 else 8, "enable_fp_fusion": True},
    )


def _mlp_solve_traffic(entry: Entry, batch: int, width: int) -> int:
    """Read z0, u and the matrices, write the result: histories stay in a program's cache."""
    inner = entry.arguments["HIDDEN"] or width
    matrices = width * inner * (2 if entry.arguments["HIDDEN"] else 1)
    return ((2 * width + inner) * batch + matrices) * BYTES[entry.dtype]


def _mlp_solve_work(entry: Entry, batch: int, width: int) -> dict[str, int]:
    """Each step: one or two products, and in float64 m sums and a 2 m³ elimination for each sample."""
    steps, history = entry.arguments["max_steps"], entry.arguments["HISTORY"]
    inner = entry.arguments["HIDDEN"] or width
    products = 2 * batch * width * inner * (2 if entry.arguments["HIDDEN"] else 1)
    work = {"fp64": steps * batch * (2 * history * width + 2 * history**3)}
    unit, times = product_unit(entry.dtype)
    work[unit] = work.get(unit, 0) + steps * times * products
    return work


def _mlp_work(entry: Entry, batch: int, width: int) -> dict[str, int]:
    unit, times = product_unit(entry.dtype)
    return {unit: times * 2 * batch * width * width}


def _mlp_budget(dtype: str, width: int) -> Budget:
    """Threads share a tile's columns such that each access moves 8 bytes at least, where rows are aligned."""
    access = 8 if width % 16 == 0 else BYTES[dtype]
    return Budget(load=access, store=access, tensor_cores=dtype != "fp64")


ENTRIES = (
    traded(_mlp("fp32", 1024, 1024), 20),
    traded(_mlp("bf16", 4096, 2048), 84),
    traded(_mlp("bf16", 1024, 1024)),
    _mlp("bf16", 4096, 2048, "slopes", slopes=True),
    traded(_mlp("fp32", 1024, 512, "slopes", slopes=True), 20),
    traded(_mlp("fp32", 1024, 256, "norm", norm=True), 12),
    _mlp("bf16", 1024, 512, "norm", norm=True),
    _mlp("fp16", 33, 1001, "odd D"),
    _mlp("fp64", 128, 256),
    traded(_mlp_vjp("fp32", 1024, 1024), 28),
    _mlp_vjp("bf16", 4096, 2048),
    _mlp_vjp("fp16", 33, 1001, "odd D"),
    traded(_mlp_probe("fp32", 1024, 1024, "gaussian"), 12),
    traded(_mlp_probe("bf16", 1024, 1024, "rademacher,M=2", probes=2, gaussian=False), 68),
    _mlp_probe_vjp("fp32", 1024, 1024, "gaussian"),
    traded(_mlp_probe_vjp("bf16", 1024, 1024, "rademacher,M=2", probes=2, gaussian=False), 204),
    _mlp_probe("fp32", 1, 64, "one sample"),
    _mlp_probe_vjp("fp32", 1, 64, "one sample"),
    _mlp_solve("fp32", 128, spilled=92),
    _mlp_solve("fp32", 128, "adjoint", 56, adjoint=True),
    _mlp_solve("fp32", 256, spilled=404),
    _mlp_solve("fp32", 256, "Picard", 16, history=1),
    _mlp_solve("bf16", 128),
    _mlp_solve("fp32", 128, "hidden,norm", 56, hidden=512, norm=True),
)
