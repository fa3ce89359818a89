"""The kernels of the negative log-likelihood in the catalog."""

from math import gcd
from typing import Any

from .. import cross_entropy as kernels
from .entry import BYTES, Budget, Entry, Pointer, name_of
from .mlp import precision_of


def _entry(kernel: str, dtype: str, rows: int, classes: int, padding: int = 0) -> Entry:
    """Logits [rows, classes + padding]."""
    width, vjp = classes + padding, kernel.endswith("vjp")
    of_block = width if vjp else classes
    block = max(128, min(1 << (of_block - 1).bit_length(), 4096))
    state, wide = Pointer(dtype), Pointer("fp64" if dtype == "fp64" else "fp32")
    align = gcd(16 // BYTES[dtype], width)
    values: dict[str, Any] = {
        "logits_ptr": state,
        "targets_ptr": Pointer("i64"),
        **({"levels_ptr": wide, "vector_ptr": wide, "out_ptr": state} if vjp else {}),
        **({} if vjp else {"out_ptr": wide, "levels_ptr": wide}),
        "N": classes,
        "WIDTH": width,
        "rows": rows,
        **({"parts": -(-width // block)} if vjp else {}),
        "WIDE": precision_of(dtype)["WIDE"],
        "BLOCK": block,
        "ALIGN": align,
    }
    bytes_at_once = min(16, align * BYTES[dtype])
    return Entry(
        op="cross_entropy",
        name=name_of(kernel, dtype, f"{rows}x{width}"),
        kernel=getattr(kernels, f"{kernel}_kernel"),
        shape=(rows, width),
        arguments=values,
        contiguous=("logits_ptr", "out_ptr") if vjp else ("logits_ptr",),
        traffic=lambda entry, batch, size: (2 if vjp else 1) * batch * size * BYTES[entry.dtype],
        work=lambda entry, batch, size: {"fp64" if entry.dtype == "fp64" else "fp32": 6 * batch * size},
        budget=Budget(load=bytes_at_once, store=bytes_at_once),
        options={"num_warps": max(1, min(8, block // 512)), "enable_fp_fusion": True},
    )


ENTRIES = tuple(
    _entry(kernel, *sizes)
    for kernel in ("cross_entropy", "cross_entropy_vjp")
    for sizes in (("bf16", 2100, 20003, 5), ("fp32", 2100, 20003, 5), ("fp16", 40, 67735), ("fp64", 8, 500))
)
