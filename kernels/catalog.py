"""Every kernel with the arguments it ships with: what `triton-deq inspect` compiles and holds to a budget.

An entry holds the arguments of one real launch, not a signature: Triton itself infers types, alignment and
divisibility from them, as it does at a launch. tests/test_inspection.py runs the ops at the same shapes and
compares, so that the two cannot part. A kernel under `triton.autotune` needs one entry as well: all its
configurations are compiled.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import triton.language as tl

from . import anderson, broyden, jacobian, mlp

BYTES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Pointer:
    """A tensor argument. Its address is a multiple of 16, as that of every tensor PyTorch allocates."""

    dtype: str


@dataclass(frozen=True)
class Budget:
    """What the compiled kernel may cost, on every target.

    spilled: most bytes a thread may spill.
    load, store: least bytes that each load and each store of a contiguous argument must move; 16 is the
        widest that every target has. Where rows start anywhere, or a thread has fewer entries, it is less.
    tensor_cores: whether there must be matrix instructions; for kernels with a `tl.dot`.

    Shared memory may always take all that the target lets a program have.
    """

    spilled: int = 0
    load: int = 16
    store: int = 16
    tensor_cores: bool = False


@dataclass(frozen=True)
class Entry:
    """One kernel in one configuration that ships.

    shape: (batch, entries per sample) of the state at that launch.
    arguments: by name; `Pointer`, int, or the value of a `tl.constexpr`.
    contiguous: the pointers whose entries are the bulk of the traffic, read and written in order.
    traffic: bytes that must go through memory, of (entry, batch, entries per sample).
    work: the least operations by unit ("fp32", "fp64", "int32", "tensor_bf16", ...), of the same.
    """

    op: str
    name: str
    kernel: Any
    shape: tuple[int, int]
    arguments: Mapping[str, Any]
    contiguous: tuple[str, ...]
    traffic: Callable[["Entry", int, int], int]
    work: Callable[["Entry", int, int], dict[str, int]]
    budget: Budget = Budget()
    options: Mapping[str, Any] = field(default_factory=lambda: {"enable_fp_fusion": True})

    @property
    def dtype(self) -> str:
        """The dtype of the state."""
        return self.arguments[self.contiguous[0]].dtype


@dataclass(frozen=True)
class Rows:
    """A state `[batch, entries]` and how the ops cut its rows into parts, chunks and blocks."""

    batch: int
    entries: int
    parts: int
    chunk: int
    block: int


MANY = Rows(64, 16384, parts=8, chunk=2048, block=2048)
SMALL = Rows(256, 1024, parts=1, chunk=1024, block=1024)
ONE_LARGE = Rows(1, 1 << 20, parts=256, chunk=4096, block=2048)
ODD = Rows(32, 1001, parts=1, chunk=1024, block=1024)
"""No row but the first starts at a multiple of 16 bytes."""


# --------------------------------------------------------------------------------------------- Anderson


def _residual(dtype: str, history: int, rows: Rows = MANY, note: str = "", *, landed: bool = False) -> Entry:
    """landed: f has left its value in the ring."""
    wide = "fp64" if dtype == "fp64" else "fp32"
    return Entry(
        op="anderson",
        name=_name("anderson_residual", dtype, history, note),
        kernel=anderson.anderson_residual_kernel,
        shape=(rows.batch, rows.entries),
        arguments={
            **{name: Pointer(dtype) for name in ("fx_ptr", "x_ptr", "residuals_ptr", "iterates_ptr")},
            "dots_ptr": Pointer("fp64"),
            **{name: Pointer("fp64") for name in ("record_ptr", "before_ptr")},
            **_sizes(rows),
            "slot": 0,
            "filled": history,
            "HISTORY": history,
            "LANES": _lanes(history),
            "BLOCK": rows.block,
            "MIXING": 1.0,
            "LANDED": landed,
            "WIDE": getattr(tl, wide.replace("fp", "float")),
        },
        contiguous=("fx_ptr", "x_ptr", "residuals_ptr", "iterates_ptr"),
        traffic=_residual_traffic,
        work=_residual_work,
        budget=_budget(dtype, rows),
    )


def _advance(
    dtype: str,
    history: int,
    rows: Rows = MANY,
    note: str = "",
    *,
    relative: bool = True,
    over_batch: bool = False,
    relative_ridge: bool = True,
) -> Entry:
    wide = "fp64" if dtype == "fp64" else "fp32"
    return Entry(
        op="anderson",
        name=_name("anderson_advance", dtype, history, note),
        kernel=anderson.anderson_advance_kernel,
        shape=(rows.batch, rows.entries),
        arguments={
            **{name: Pointer(dtype) for name in ("x_ptr", "best_ptr", "iterates_ptr")},
            "dots_ptr": Pointer("fp64"),
            **{name: Pointer("fp64") for name in ("gram_ptr", "record_ptr", "before_ptr")},
            "active_ptr": Pointer("i32"),
            **_sizes(rows),
            **_ticks(history, history),
            "slot": 0,
            "last": 0,
            "HISTORY": history,
            "LANES": _lanes(history),
            "PARTS": 1 << (rows.parts - 1).bit_length(),
            "BLOCK": rows.block,
            "RELATIVE": relative,
            "OVER_BATCH": over_batch,
            "RIDGE": 1e-6,
            "RELATIVE_RIDGE": relative_ridge,
            "WIDE": getattr(tl, wide.replace("fp", "float")),
        },
        contiguous=("x_ptr", "best_ptr", "iterates_ptr"),
        traffic=_advance_traffic,
        work=_advance_work,
        budget=_budget(dtype, rows),
    )


def _step(dtype: str, history: int, rows: Rows, note: str = "") -> Entry:
    """Both in one launch; rows that fit one block."""
    arguments = {**_advance(dtype, history, rows).arguments, **_residual(dtype, history, rows).arguments}
    of_two_launches = ("dots_ptr", "before_ptr", "parts", "chunk", "PARTS", "OVER_BATCH")
    return Entry(
        op="anderson",
        name=_name("anderson_step", dtype, history, note),
        kernel=anderson.anderson_step_kernel,
        shape=(rows.batch, rows.entries),
        arguments={name: value for name, value in arguments.items() if name not in of_two_launches},
        contiguous=("fx_ptr", "x_ptr", "best_ptr", "residuals_ptr", "iterates_ptr"),
        traffic=_step_traffic,
        work=lambda *of: _residual_work(*of) | _advance_work(*of) | {_unit(of[0]): _step_work(*of)},
        budget=_budget(dtype, rows),
    )


def _step_traffic(entry: Entry, batch: int, entries: int) -> int:
    """Read f(x), x, m − 1 older residuals and iterates; write a residual, an iterate, x and the best."""
    history = entry.arguments["HISTORY"]
    states = (2 * history + 4) * batch * entries * BYTES[entry.dtype]
    return states + batch * ((history * history + 2 * history) * 8 + 10 * 8)


def _step_work(entry: Entry, batch: int, entries: int) -> int:
    """Of the unit that does the sums: the two kernels' together."""
    unit = _unit(entry)
    return _residual_work(entry, batch, entries)[unit] + _advance_work(entry, batch, entries)[unit]


def _residual_traffic(entry: Entry, batch: int, entries: int) -> int:
    """Read f(x), x and the m − 1 older residuals; write a residual and an iterate, if that is not there; then
    the sums."""
    history, lanes = entry.arguments["HISTORY"], entry.arguments["LANES"]
    states = (history + 3 - entry.arguments["LANDED"]) * batch * entries * BYTES[entry.dtype]
    return states + batch * (lanes * BYTES[entry.arguments["dots_ptr"].dtype] + 4 * 8)


def _residual_work(entry: Entry, batch: int, entries: int) -> dict[str, int]:
    """Each entry: f − x, x + β (f − x), f², and m products."""
    return {_unit(entry): (5 + 2 * entry.arguments["HISTORY"]) * batch * entries}


def _advance_traffic(entry: Entry, batch: int, entries: int) -> int:
    """Read m iterates and write x; read x and write it to best, as a step that improves does; then the sums.

    The Gram matrix is read once and one row and column of it are written; so is the record.
    """
    history, lanes = entry.arguments["HISTORY"], entry.arguments["LANES"]
    states = (history + 3) * batch * entries * BYTES[entry.dtype]
    sums = lanes * BYTES[entry.arguments["dots_ptr"].dtype]
    return states + batch * (sums + (history * history + 2 * history) * 8 + 11 * 8)


def _advance_work(entry: Entry, batch: int, entries: int) -> dict[str, int]:
    """Each entry: m products; each sample: one m×m elimination in float64, about 2 m³."""
    history = entry.arguments["HISTORY"]
    work = {"fp64": 2 * history**3 * batch}
    work[_unit(entry)] = work.get(_unit(entry), 0) + 2 * history * batch * entries
    return work


# ---------------------------------------------------------------------------------------------- Broyden


def _in_blocks_of(block: int, parts: int, rows: Rows) -> Rows:
    """These rows cut as the Broyden ops do it, which take 4096 bytes of a state at a time."""
    return replace(rows, parts=parts, chunk=rows.entries // parts, block=block)


def _broyden(part: str, dtype: str, memory: int, rows: Rows = MANY, note: str = "") -> Entry:
    """part: "residual" or "advance". The step is the first with a full memory."""
    slots = memory + 1
    constants = {
        "SLOTS": slots,
        "LANES": _lanes(slots),
        "BLOCK": rows.block,
        "WIDE": tl.float64 if dtype == "fp64" else tl.float32,
    }
    fp64 = Pointer("fp64")
    if part == "residual":
        states = ("fx_ptr", "x_ptr", "moves_ptr", "changes_ptr")
        small = {"dots_ptr": fp64, "record_ptr": fp64, "before_ptr": fp64}
        sizes = {**_sizes(rows), "slot": 0, "newest": memory, "filled": slots, "LANDED": False}
    else:
        states = ("x_ptr", "best_ptr", "changes_ptr")
        small = dict.fromkeys(("dots_ptr", "matrix_ptr", "squares_ptr", "record_ptr", "before_ptr"), fp64)
        small["active_ptr"] = Pointer("i32")
        sizes = {**_sizes(rows), **_ticks(slots, slots), "slot": 0, "newest": memory, "last": 0}
        constants |= {"PARTS": 1 << (rows.parts - 1).bit_length(), "RELATIVE": True, "OVER_BATCH": False}
    return Entry(
        op="broyden",
        name=_name(f"broyden_{part}", dtype, memory, note),
        kernel=getattr(broyden, f"broyden_{part}_kernel"),
        shape=(rows.batch, rows.entries),
        arguments={**dict.fromkeys(states, Pointer(dtype)), **small, **sizes, **constants},
        contiguous=states,
        traffic=_broyden_residual_traffic if part == "residual" else _broyden_advance_traffic,
        work=_broyden_residual_work if part == "residual" else _broyden_advance_work,
        budget=_budget(dtype, rows),
    )


def _broyden_residual_traffic(entry: Entry, batch: int, entries: int) -> int:
    """Read f(x), x, the open slot's two and m − 1 older pairs; write the newest pair and the open slot."""
    slots, lanes = entry.arguments["SLOTS"], entry.arguments["LANES"]
    states = (4 + 2 * (slots - 2) + 4) * batch * entries * BYTES[entry.dtype]
    return states + batch * (3 * lanes * 8 + 4 * 8)


def _broyden_residual_work(entry: Entry, batch: int, entries: int) -> dict[str, int]:
    """Each entry: four differences, three squares, and three products with each pair, in float64."""
    return {"fp64": (4 + 6 + 6 * (entry.arguments["SLOTS"] - 1)) * batch * entries}


def _broyden_advance_traffic(entry: Entry, batch: int, entries: int) -> int:
    """Read m changes and f(x), write x; read x and write it to best, as a step that improves does.

    M is read once and one row and column of it are written; so is the record.
    """
    slots, lanes = entry.arguments["SLOTS"], entry.arguments["LANES"]
    states = (slots + 3) * batch * entries * BYTES[entry.dtype]
    return states + batch * (3 * lanes * 8 + (slots * slots + 3 * slots + 1) * 8 + 11 * 8)


def _broyden_advance_work(entry: Entry, batch: int, entries: int) -> dict[str, int]:
    """Each entry: m products; each sample: one elimination in float64, about 2 m³."""
    slots = entry.arguments["SLOTS"]
    work = {"fp64": 2 * slots**3 * batch}
    work[_unit(entry)] = work.get(_unit(entry), 0) + 2 * slots * batch * entries
    return work


# --------------------------------------------------------------------------------------------- Jacobian


def _probe(
    dtype: str, distribution: str, shape: tuple[int, int], note: str = "", budget: Budget | None = None
) -> Entry:
    total = shape[0] * shape[1]
    quarter = -(-total // 4)
    return Entry(
        op="jacobian",
        name=_name("probe", dtype, distribution, note),
        kernel=jacobian.probe_kernel,
        shape=shape,
        arguments={
            "out_ptr": Pointer(dtype),
            "seed_ptr": Pointer("i64"),
            "index": 0,
            "total": total,
            "quarter": quarter,
            "GAUSSIAN": distribution == "gaussian",
            "BLOCK": min(1 << (quarter - 1).bit_length(), 1024),
        },
        contiguous=("out_ptr",),
        traffic=lambda entry, batch, entries: batch * entries * BYTES[entry.dtype] + 8,
        work=_probe_work,
        budget=budget or Budget(),
    )


def _probe_work(entry: Entry, batch: int, entries: int) -> dict[str, int]:
    """Four entries: ten Philox rounds of ten integer operations; Box-Muller takes about 20 an entry."""
    floating = 20 if entry.arguments["GAUSSIAN"] else 2
    return {"int32": 25 * batch * entries, "fp32": floating * batch * entries}


def _squared_norm(dtype: str, rows: Rows = MANY, note: str = "") -> Entry:
    wide = "fp64" if dtype == "fp64" else "fp32"
    sizes = _sizes(rows)
    del sizes["B"]
    return Entry(
        op="jacobian",
        name=_name("squared_norm", dtype, note),
        kernel=jacobian.squared_norm_kernel,
        shape=(rows.batch, rows.entries),
        arguments={
            "rows_ptr": Pointer(dtype),
            "partial_ptr": Pointer(wide),
            **sizes,
            "BLOCK": rows.block,
            "WIDE": getattr(tl, wide.replace("fp", "float")),
        },
        contiguous=("rows_ptr",),
        traffic=lambda entry, batch, entries: batch * entries * BYTES[entry.dtype] + batch * BYTES[wide],
        work=lambda entry, batch, entries: {_unit(entry): 2 * batch * entries},
        budget=_budget(dtype, rows),
    )


# -------------------------------------------------------------------------------------------------- MLP


def _mlp(
    dtype: str, batch: int, width: int, note: str = "", *, norm: bool = False, slopes: bool = False
) -> Entry:
    """A square layer; slopes: act′ and act″ are written too."""
    tiles = _tiles(dtype, batch, width, norm)
    pointers = ("z_ptr", "weight_ptr", "injection_ptr", "value_ptr")
    others = ("gain_ptr", "offset_ptr", "slope_ptr", "curvature_ptr")
    outputs = 3 if slopes else 1
    return Entry(
        op="mlp",
        name=_name("mlp", dtype, width, note),
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
            **_precision(dtype),
            **{name: value for name, value in tiles.items() if name != "num_warps"},
        },
        contiguous=pointers,
        traffic=lambda entry, batch, width: ((2 + outputs) * batch + width) * width * BYTES[entry.dtype],
        work=_mlp_work,
        # With few rows a thread has few entries of z.
        budget=replace(_mlp_budget(dtype, width), load=BYTES[dtype]) if norm else _mlp_budget(dtype, width),
        options={"num_warps": tiles["num_warps"], "enable_fp_fusion": True},
    )


def _mlp_vjp(dtype: str, batch: int, width: int, note: str = "") -> Entry:
    tiles = _tiles(dtype, batch, width)
    pointers = ("vector_ptr", "slope_ptr", "weight_ptr", "shift_ptr", "out_ptr")
    return Entry(
        op="mlp",
        name=_name("mlp_vjp", dtype, width, note),
        kernel=mlp.mlp_vjp_kernel,
        shape=(batch, width),
        arguments={
            **dict.fromkeys(pointers, Pointer(dtype)),
            "ROWS": batch,
            "B": batch,
            "N": width,
            "K": width,
            "SHIFT": True,
            **_precision(dtype),
            **{name: value for name, value in tiles.items() if name != "num_warps"},
        },
        contiguous=pointers,
        traffic=lambda entry, batch, width: (4 * batch + width) * width * BYTES[entry.dtype],
        work=_mlp_work,
        budget=_mlp_budget(dtype, width),
        options={"num_warps": tiles["num_warps"], "enable_fp_fusion": True},
    )


def _mlp_probe(
    dtype: str, batch: int, width: int, note: str, *, probes: int = 1, gaussian: bool = True
) -> Entry:
    return _mlp_estimate(
        "mlp_probe",
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
        "mlp_probe_vjp",
        dtype,
        batch,
        width,
        note,
        ("products_ptr", "weight_ptr", "curvature_ptr", "out_ptr"),
        {"PROBES": probes, "GAUSSIAN": gaussian},
        lambda entry, batch, width: ((2 + probes) * batch + width) * width * BYTES[entry.dtype],
    )


def _mlp_estimate(
    kernel: str,
    dtype: str,
    batch: int,
    width: int,
    note: str,
    pointers: tuple[str, ...],
    constants: dict[str, Any],
    traffic: Callable[[Entry, int, int], int],
) -> Entry:
    """The kernels of the fused estimate: a product with probes in its epilogue."""
    tiles = _tiles(dtype, batch, width)
    probes = constants["PROBES"]
    products = 1 if kernel == "mlp_probe" else probes
    return Entry(
        op="mlp",
        name=_name(kernel, dtype, width, note),
        kernel=getattr(mlp, f"{kernel}_kernel"),
        shape=(batch, width),
        arguments={
            **dict.fromkeys(pointers, Pointer(dtype)),
            "seed_ptr": Pointer("i64"),
            "B": batch,
            "N": width,
            "K": width,
            "quarter": -(-batch * width // 4),
            **constants,
            **_precision(dtype),
            **{name: value for name, value in tiles.items() if name != "num_warps"},
        },
        contiguous=pointers,
        traffic=traffic,
        work=lambda entry, batch, width: (
            {unit: products * count for unit, count in _mlp_work(entry, batch, width).items()}
            | {"int32": 100 * probes * batch * width}
        ),
        budget=_mlp_budget(dtype, width),
        options={"num_warps": tiles["num_warps"], "enable_fp_fusion": True},
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
    given = ("first_ptr", "second_ptr", "shift_ptr", "slope_ptr", "gain_ptr", "offset_ptr", "scratch_ptr")
    sums = ("gram_ptr", "weights_ptr", "record_ptr", "trace_ptr")
    return Entry(
        op="mlp",
        name=_name("mlp_solve", dtype, width, note),
        kernel=mlp.mlp_solve_kernel,
        shape=(batch, width),
        arguments={
            **dict.fromkeys((*states, *given), Pointer(dtype)),
            **dict.fromkeys(sums, fp64),
            **dict.fromkeys(("normal_ptr", "inverse_ptr"), wide),
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
            **_precision(dtype),
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
    unit, times = _product_unit(entry.dtype)
    work[unit] = work.get(unit, 0) + steps * times * products
    return work


def _mlp_work(entry: Entry, batch: int, width: int) -> dict[str, int]:
    unit, times = _product_unit(entry.dtype)
    return {unit: times * 2 * batch * width * width}


def _product_unit(dtype: str) -> tuple[str, int]:
    """The unit that multiplies matrices, and how many of its products make one: three of TF32 for float32."""
    return {"fp32": ("tensor_tf32", 3), "fp64": ("fp64", 1)}.get(dtype, (f"tensor_{dtype}", 1))


def _mlp_budget(dtype: str, width: int) -> Budget:
    """Threads share a tile's columns such that each access moves 8 bytes at least, where rows are aligned."""
    access = 8 if width % 16 == 0 else BYTES[dtype]
    return Budget(load=access, store=access, tensor_cores=dtype != "fp64")


def _precision(dtype: str) -> dict[str, Any]:
    names = {"fp32": tl.float32, "fp64": tl.float64, "fp16": tl.float16, "bf16": tl.bfloat16}
    return {"TF32": False, "OPERAND": names[dtype], "WIDE": tl.float64 if dtype == "fp64" else tl.float32}


def _tiles(dtype: str, rows: int, columns: int, whole: bool = False) -> dict[str, int]:
    """As the ops cut a product into programs."""
    narrow = dtype in ("fp16", "bf16")
    most = 128 if narrow else 64
    if whole:
        block_b, block_n = 16, 1 << (columns - 1).bit_length()
    else:
        block_b, block_n = (min(max(16, 1 << (size - 1).bit_length()), most) for size in (rows, columns))
        if rows * columns < 132 * block_b * block_n:
            block_b, block_n = min(block_b, 32), min(block_n, 64)
    depth = 16 if whole or dtype == "fp64" else 64 if narrow else 32
    warps = 8 if block_b * block_n >= 8192 else 4
    return {"BLOCK_B": block_b, "BLOCK_N": block_n, "BLOCK_K": depth, "GROUP": 8, "num_warps": warps}


# ---------------------------------------------------------------------------------------------- helpers


def _name(kernel: str, dtype: str, *notes: object) -> str:
    words = [f"m={note}" if isinstance(note, int) else str(note) for note in notes if note]
    if kernel.startswith("mlp"):
        words = [word.replace("m=", "D=") for word in words]
    return f"{kernel}[{','.join([dtype, *words])}]"


def _sizes(rows: Rows) -> dict[str, int]:
    return {"B": rows.batch, "N": rows.entries, "parts": rows.parts, "chunk": rows.chunk}


def _ticks(slots: int, step: int) -> dict[str, int]:
    """As `cycle_length` in the ops has it: a multiple of the slots, at least 4."""
    cycle = slots * -(-4 // slots)
    return {"tick": step % cycle, "next_tick": (step + 1) % cycle}


def _lanes(history: int) -> int:
    """A power of 2 with room for the m dot products and ‖f‖²."""
    return 1 << history.bit_length()


def _budget(dtype: str, rows: Rows) -> Budget:
    """Rows of N entries are 16-byte aligned if N is a multiple of 16: that is what Triton asks."""
    width = 16 if rows.entries % 16 == 0 else BYTES[dtype]
    return Budget(load=width, store=width)


def _unit(entry: Entry) -> str:
    """The unit that does the sums: float32's, except for a float64 state."""
    return "fp64" if entry.dtype == "fp64" else "fp32"


def _traded(entry: Entry, spilled: int = 8) -> Entry:
    """Allow a few spilled registers, two by default.

    The ptxas of some versions of Triton (12.8 with 3.6.0, 12.9 with 3.9.0) spills some for a step of
    occupancy, with registers to spare: given a bound by `maxnreg`, even 168 where it would take 80, it
    spills none and takes about 13 more.
    """
    return replace(entry, budget=replace(entry.budget, spilled=spilled))


ENTRIES: tuple[Entry, ...] = (
    _residual("fp32", 6),
    _residual("bf16", 6),
    _traded(_residual("fp16", 5)),
    _residual("fp64", 6),
    _residual("fp32", 6, note="landed", landed=True),
    _residual("fp32", 1),
    _residual("fp32", 10, ONE_LARGE, "one sample"),
    _residual("bf16", 6, ODD, "odd N"),
    _advance("fp32", 6),
    _advance("bf16", 6),
    _advance("fp16", 5, relative=False, note="absolute"),
    _advance("fp64", 6),
    _advance("fp32", 1),
    _advance("fp32", 6, over_batch=True, note="over batch"),
    _advance("fp32", 10, ONE_LARGE, "one sample"),
    _traded(_advance("bf16", 6, ODD, "odd N,absolute ridge", relative_ridge=False)),
    _step("fp32", 6, SMALL),
    _step("bf16", 6, replace(SMALL, entries=2048, chunk=2048, block=2048)),
    _step("fp64", 5, SMALL),
    _traded(_step("bf16", 6, ODD, "odd N")),
    _broyden("residual", "fp32", 10, _in_blocks_of(1024, 16, MANY)),
    _broyden("residual", "bf16", 10, MANY),
    _traded(_broyden("residual", "fp64", 5, _in_blocks_of(512, 32, MANY)), 24),
    _broyden("residual", "bf16", 10, ODD, "odd N"),
    _traded(_broyden("advance", "fp32", 10, _in_blocks_of(1024, 16, MANY))),
    _broyden("advance", "bf16", 10, MANY),
    _traded(_broyden("advance", "fp64", 5, _in_blocks_of(512, 32, MANY))),
    _broyden("advance", "bf16", 10, ODD, "odd N"),
    _broyden("advance", "fp32", 10, _in_blocks_of(1024, 256, ONE_LARGE), "one sample"),
    _probe("fp32", "gaussian", (64, 16384)),
    # A wave of 64 threads leaves each of them 4 entries of a block of 1024: 8 bytes.
    _probe("bf16", "gaussian", (64, 16384), budget=Budget(store=8)),
    _probe("fp32", "rademacher", (64, 16384)),
    _probe("fp16", "rademacher", (33, 1001), "odd N", Budget(store=2)),
    _squared_norm("fp32"),
    _squared_norm("bf16"),
    _squared_norm("fp64"),
    _squared_norm("fp32", ODD, "odd N"),
    _mlp("fp32", 1024, 1024),
    _mlp("bf16", 4096, 2048),
    _mlp("fp32", 1024, 512, "slopes", slopes=True),
    _traded(_mlp("fp32", 1024, 512, "norm", norm=True)),
    _mlp("bf16", 1024, 512, "norm", norm=True),
    _mlp("fp16", 33, 1001, "odd D"),
    _mlp("fp64", 128, 256),
    _mlp_vjp("fp32", 1024, 1024),
    _mlp_vjp("bf16", 4096, 2048),
    _mlp_vjp("fp16", 33, 1001, "odd D"),
    _mlp_probe("fp32", 1024, 1024, "gaussian"),
    _mlp_probe("bf16", 1024, 1024, "rademacher,M=2", probes=2, gaussian=False),
    _mlp_probe_vjp("fp32", 1024, 1024, "gaussian"),
    _traded(_mlp_probe_vjp("bf16", 1024, 1024, "rademacher,M=2", probes=2, gaussian=False)),
    _mlp_probe("fp32", 1, 64, "one sample"),
    _mlp_probe_vjp("fp32", 1, 64, "one sample"),
    _mlp_solve("fp32", 128, spilled=76),
    _mlp_solve("fp32", 128, "adjoint", 56, adjoint=True),
    _mlp_solve("fp32", 256, spilled=272),
    _mlp_solve("fp32", 256, "Picard", history=1),
    _mlp_solve("bf16", 128),
    _mlp_solve("fp32", 128, "hidden,norm", 56, hidden=512, norm=True),
)

STEPS: Mapping[str, tuple[str, ...]] = {
    f"{solver} step [{dtype},m={history}]": tuple(
        f"{op}_{part}[{dtype},m={history}]" for part in ("residual", "advance")
    )
    for solver, op, dtype, history in (
        ("Anderson", "anderson", "fp32", 6),
        ("Anderson", "anderson", "bf16", 6),
        ("Anderson", "anderson", "fp64", 6),
        ("Picard", "anderson", "fp32", 1),
        ("Broyden", "broyden", "fp32", 10),
        ("Broyden", "broyden", "bf16", 10),
    )
} | {"Anderson step, one launch [fp32,m=6]": ("anderson_step[fp32,m=6]",)}
"""What a solver launches in one step, beside f."""
