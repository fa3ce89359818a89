"""The relative attention's kernels in the catalog."""

from math import gcd
from typing import Any

from .. import attention as kernels
from .entry import BYTES, Budget, Entry, Pointer, name_of
from .mlp import precision_of, product_unit

HEADS = 10


def _entry(
    kernel: str,
    dtype: str,
    note: str = "",
    spilled: int = 0,
    *,
    batch: int = 14,
    queries: int = 150,
    memory: int = 150,
    depth: int = 72,
    window: int | None = None,
    dropout: float = 0.0,
    constants: dict[str, Any] | None = None,
) -> Entry:
    """q, k and v are views of one buffer `[B, T, 3 H d]`, as the Transformer cell has them.

    By default the paper's cell on WikiText-103, a GPU's share of the batch; its heads of 70 end in two zeros,
    for loads of 16 bytes. spilled: the most that the compilers of the supported versions of Triton spill on
    any target; registers are what these kernels lack.
    """
    state, wide = Pointer(dtype), Pointer("fp64" if dtype == "fp64" else "fp32")
    row, size = HEADS * depth, BYTES[dtype]
    part = row * size % 16 // size
    fused = [
        (offset, 3 * row * queries, 3 * row, depth) for offset in (0, part, 2 * part * size % 16 // size)
    ]
    fused = [
        (offset, 0, *layout[2:]) if batch == 1 else layout for offset, layout in ((f[0], f) for f in fused)
    ]
    plain = (0, queries * row if batch > 1 else 0, row, depth)
    kept = (0, memory * row if batch > 1 else 0, row, depth) if memory else None
    positions = (0, 0, row, depth)
    memories = [kept or fused[1], kept or fused[2]]
    is_key = kernel == "attention_key_vjp"
    vjp = kernel != "attention"
    layouts = {
        **({"vector_layout": plain} if vjp else {}),
        "q_layout": fused[0],
        **(
            {"key_layout": fused[1], "value_layout": fused[2]}
            if is_key
            else {
                "k_layout": fused[1],
                "v_layout": fused[2],
                "memory_key_layout": memories[0],
                "memory_value_layout": memories[1],
            }
        ),
        "position_layout": positions,
    }
    align = gcd(
        16 // size, depth, *(number for layout in (*layouts.values(), *memories) for number in layout)
    )
    names = kernels_of(kernel)
    values: dict[str, Any] = {
        **{name: state for name in names if name.endswith("_ptr")},
        **dict.fromkeys(("sums_ptr", "delta_ptr", "bias_gradients_ptr", "mean_ptr", "balance_ptr"), wide),
        "gradients_ptr": wide if kernel == "attention_position_vjp" else state,
        "seed_ptr": Pointer("i64") if dropout else state,
        **layouts,
        "places": 3,
        "B": batch,
        "H": HEADS,
        "T": queries,
        "M": memory,
        "count": queries,
        "before": memory,
        "lead": 0,
        "window": min(window or memory + queries, memory + queries),
        "MEMORY": memory > 0,
        "DROPOUT": dropout,
        "SCALE": depth**-0.5,
        "HEAD": (*_parts(depth), depth, align),
        **precision_of(dtype),
        **_tiles(
            dtype,
            memory + queries if kernel == "attention_position_vjp" else queries,
            kernel == "attention_jvp" or (constants or {}).get("SECOND", False),
            kernel in ("attention", "attention_jvp"),
        ),
        **(constants or {}),
    }
    options = {key: values.pop(key) for key in ("num_warps", "num_stages", "maxnreg") if key in values}
    return Entry(
        op="attention",
        name=name_of(kernel, dtype, note),
        kernel=getattr(kernels, f"{kernel}_kernel"),
        shape=(batch, queries * row),
        arguments={name: values[name] for name in names},
        contiguous=("q_ptr",),
        traffic=_traffic,
        work=_work,
        budget=Budget(spilled, load=min(align * size, 8), store=size, tensor_cores=dtype != "fp64"),
        options={**options, "enable_fp_fusion": True},
    )


def kernels_of(kernel: str) -> list[str]:
    """The names of a kernel's arguments."""
    return list(getattr(kernels, f"{kernel}_kernel").arg_names)


def _traffic(entry: Entry, batch: int, entries: int) -> int:
    """Everything `[B, T, H, d]` and `[B, M, H, d]` once."""
    values = entry.arguments
    states, memories = {
        "attention": (4, 2),
        "attention_query_vjp": (6, 2),
        "attention_key_vjp": (6, 0),
        "attention_position_vjp": (4, 2),
        "attention_jvp": (9, 2),
    }[entry.name.split("[")[0]]
    states += 3 if values.get("SECOND") else 0
    memory = entries // values["T"] * values["M"]
    return batch * (states * entries + memories * memory) * BYTES[entry.dtype]


def _work(entry: Entry, batch: int, entries: int) -> dict[str, int]:
    """The products of pairs that see each other."""
    values, kernel = entry.arguments, entry.name.split("[")[0]
    queries, memory = values["T"], values["M"]
    products = {
        "attention": 3,
        "attention_query_vjp": 10 if values.get("SECOND") else 5,
        "attention_key_vjp": 10 if values.get("SECOND") else 5,
        "attention_position_vjp": 9 if values.get("SECOND") else 4,
        "attention_jvp": 7,
    }[kernel]
    pairs = queries * (queries + 1) // 2 + (0 if kernel == "attention_key_vjp" else queries * memory)
    unit, times = product_unit(entry.dtype)
    return {unit: times * 2 * products * batch * pairs * entries // queries}


def _parts(depth: int) -> tuple[int, int]:
    """As the op cuts a head's columns."""
    whole = max(16, 1 << (depth - 1).bit_length())
    rest = max(16, 1 << (depth - whole // 2 - 1).bit_length()) if depth > whole // 2 else whole
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


def _tiles(dtype: str, rows: int, second: bool, pipelined: bool) -> dict[str, int]:
    """As the op cuts a head into programs."""
    narrow = dtype in ("fp16", "bf16")
    block = max(16, min(32 if narrow and not second else 16, 1 << (rows - 1).bit_length()))
    warps = 4 if dtype == "fp64" else block // 16
    return {
        "BLOCK": block,
        "num_warps": warps,
        "num_stages": 2 if narrow or (pipelined and dtype == "fp32") else 1,
        **({"maxnreg": 255} if second and dtype == "fp32" else {}),
    }


_SMALL: dict[str, Any] = {"batch": 2, "queries": 20, "memory": 17, "depth": 16}
_ODD: dict[str, Any] = {"batch": 3, "queries": 37, "memory": 0, "depth": 35, "window": 20}
_BIASES = {"BIASES": True, "SECOND": False}
_PLAIN = {"BIASES": False, "SECOND": False}
_FIRST = {"SECOND": False}
_SECOND = {"SECOND": True}

ENTRIES = (
    _entry("attention", "bf16"),
    _entry("attention", "fp32", spilled=408),
    _entry("attention", "bf16", "dropout", dropout=0.01),
    _entry("attention", "fp16", "odd d", spilled=64, **_ODD),
    _entry("attention", "fp64", "small", **_SMALL),
    _entry("attention_query_vjp", "bf16", "dropout", dropout=0.01, constants=_PLAIN),
    _entry("attention_query_vjp", "fp32", spilled=1200, constants=_PLAIN),
    _entry("attention_query_vjp", "bf16", "second", spilled=160, constants=_BIASES | _SECOND),
    _entry("attention_query_vjp", "fp32", "second", spilled=4788, constants=_BIASES | _SECOND),
    _entry("attention_query_vjp", "fp64", "small", constants=_BIASES, **_SMALL),
    _entry("attention_key_vjp", "bf16", "dropout", spilled=676, dropout=0.01, constants=_FIRST),
    _entry("attention_key_vjp", "fp32", spilled=1908, constants=_FIRST),
    _entry("attention_key_vjp", "fp16", "odd d", spilled=320, constants=_FIRST, **_ODD),
    _entry("attention_key_vjp", "bf16", "second", spilled=496, constants=_SECOND),
    _entry("attention_key_vjp", "fp32", "second", spilled=7736, constants=_SECOND),
    _entry(
        "attention_position_vjp",
        "bf16",
        "dropout",
        spilled=872,
        dropout=0.01,
        constants={"parts": 14} | _FIRST,
    ),
    _entry("attention_position_vjp", "fp32", spilled=2324, constants={"parts": 10} | _FIRST),
    _entry("attention_jvp", "bf16", "dropout", dropout=0.01),
    _entry("attention_jvp", "fp32", spilled=2500),
    _entry("attention_jvp", "fp64", "small", **_SMALL),
)
