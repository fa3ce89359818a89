"""The feed-forward's kernels in the catalog."""

from .. import feedforward as kernels
from .entry import BYTES, Budget, Entry, Pointer, name_of, traded
from .products import precision_of, product_unit, tiles_of


def _entry(
    kernel: str,
    dtype: str,
    note: str,
    sequences: int,
    length: int,
    width: int,
    inner: int,
    masked: bool = False,
) -> Entry:
    """Sequences of `length` rows, each sequence with a row of the mask."""
    batch = sequences * length
    operands = ("s_ptr", "weight_ptr") if kernel == "feedforward" else ("vector_ptr", "matrix_ptr")
    others = ("bias_ptr", "inner_ptr") if kernel == "feedforward" else ("inner_ptr", "out_ptr")
    tiles, options = tiles_of(dtype, batch, inner, width, group=32, paired=True)
    align = tiles["ALIGN"] * BYTES[dtype]
    return Entry(
        op="feedforward",
        name=name_of(kernel, dtype, note),
        kernel=getattr(kernels, f"{kernel}_kernel"),
        shape=(batch, width),
        arguments={
            **dict.fromkeys((*operands, *others), Pointer(dtype)),
            "B": batch,
            "N": inner,
            "K": width,
            **(
                {"mask_ptr": Pointer(dtype), "per": length, "MASK": masked} if kernel == "feedforward" else {}
            ),
            **precision_of(dtype),
            **tiles,
        },
        contiguous=(*operands, *others[-1:]),
        traffic=_traffic,
        work=_work,
        budget=Budget(load=min(align, 8), store=min(align, 8), tensor_cores=dtype != "fp64"),
        options=options,
    )


def _traffic(entry: Entry, batch: int, width: int) -> int:
    """The rows, the matrix, and the hidden layer: written, and for the gradient read too."""
    inner, passes = entry.arguments["N"], 1 if entry.name.startswith("feedforward[") else 2
    mask = inner * batch // entry.arguments["per"] if entry.arguments.get("MASK") else 0
    return (batch * width + inner * width + passes * batch * inner + mask) * BYTES[entry.dtype]


def _work(entry: Entry, batch: int, width: int) -> dict[str, int]:
    unit, times = product_unit(entry.dtype)
    return {unit: times * 2 * batch * width * entry.arguments["N"]}


PAPER = (14, 150, 700, 48000)
"""Sequences, tokens, width and inner width of the DEQ-Transformer on WikiText-103, a GPU's share."""
WIDENED = (14, 150, 704, 48000)
"""The same with the zeros that the cell puts behind its rows in 16 bits, so that they lie at 16 bytes."""

ENTRIES = (
    traded(_entry("feedforward", "bf16", "paper", *WIDENED, masked=False), 68),
    traded(_entry("feedforward", "bf16", "paper,mask", *WIDENED, masked=True), 160),
    _entry("feedforward", "fp32", "paper,mask", *PAPER, masked=True),
    _entry("feedforward", "fp16", "odd D", 3, 11, 37, 101, masked=True),
    _entry("feedforward", "fp64", "small", 2, 16, 64, 256, masked=True),
    traded(_entry("feedforward_vjp", "bf16", "paper", *WIDENED), 156),
    _entry("feedforward_vjp", "fp32", "paper", *PAPER),
    _entry("feedforward_vjp", "fp16", "odd D", 3, 11, 37, 101),
)
