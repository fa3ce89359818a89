"""What an entry of the catalog is, and what the entries of all ops share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

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
    few: whether a block has so few entries that the 64 lanes of an AMD GPU's warps move half as much each.
    tensor_cores: whether there must be matrix instructions; for kernels with a `tl.dot`.

    Shared memory may always take all that the target lets a program have.
    """

    spilled: int = 0
    load: int = 16
    store: int = 16
    few: bool = False
    tensor_cores: bool = False


@dataclass(frozen=True)
class Entry:
    """One kernel in one configuration that ships.

    shape: (batch, entries per sample) of the state at that launch.
    arguments: by name; `Pointer`, int, or the value of a `tl.constexpr`; tuples of them where the kernel has.
    contiguous: the pointers whose entries are the bulk of the traffic, read and written in order; of a tuple
        by the name that they have where it is unpacked, the state's being its first.
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
        state: Any = self.arguments.get(self.contiguous[0]) or next(iter(self.arguments.values()))
        while isinstance(state, tuple):
            state = state[0]
        return state.dtype


@dataclass(frozen=True)
class Rows:
    """A state `[batch, entries]` and how the ops cut its rows into parts, chunks and blocks."""

    batch: int
    entries: int
    parts: int
    chunk: int
    block: int


PLACES = ("x_ptr", "other_ptr", "next_ptr", "best_ptr")
"""What a step reads and writes of the iterates."""
MANY = Rows(64, 16384, parts=8, chunk=2048, block=2048)
SMALL = Rows(256, 1024, parts=1, chunk=1024, block=1024)
ONE_LARGE = Rows(1, 1 << 20, parts=256, chunk=4096, block=2048)
ODD = Rows(32, 1001, parts=1, chunk=1024, block=1024)
"""No row but the first starts at a multiple of 16 bytes."""


def in_few_waves(rows: Rows, resident: int) -> Rows:
    """In chunks for as many programs as 132 multiprocessors hold, or of 16 blocks, as the ops have them."""
    blocks = -(-rows.entries // rows.block)
    parts = max(resident * 132, rows.batch * blocks // 16) // rows.batch
    return replace(rows, chunk=-(-blocks // min(parts, 256, blocks)) * rows.block)


def name_of(kernel: str, dtype: str, *notes: object) -> str:
    words = [f"m={note}" if isinstance(note, int) else str(note) for note in notes if note]
    if kernel.startswith(("mlp", "norm")):
        words = [word.replace("m=", "D=") for word in words]
    return f"{kernel}[{','.join([dtype, *words])}]"


def sizes_of(rows: Rows) -> dict[str, int]:
    return {"B": rows.batch, "N": rows.entries, "parts": rows.parts, "chunk": rows.chunk}


def ticks_of(slots: int, step: int) -> dict[str, int]:
    """As `cycle_length` in the ops has it: a multiple of the slots, at least 4."""
    cycle = slots * -(-4 // slots)
    return {"tick": step % cycle, "next_tick": (step + 1) % cycle}


def lanes_of(history: int) -> int:
    """A power of 2 with room for the m dot products and ‖f‖²."""
    return 1 << history.bit_length()


def budget_of(dtype: str, rows: Rows) -> Budget:
    """Rows of N entries are 16-byte aligned if N is a multiple of 16: that is what Triton asks."""
    width = 16 if rows.entries % 16 == 0 else BYTES[dtype]
    return Budget(load=width, store=width)


def of_few(entry: Entry) -> Entry:
    """Its blocks have so few entries that more lanes to share them load less each."""
    return replace(entry, budget=replace(entry.budget, few=True))


def unit_of(entry: Entry) -> str:
    """The unit that does the sums: float32's, except for a float64 state."""
    return "fp64" if entry.dtype == "fp64" else "fp32"


def traded(entry: Entry, spilled: int = 8) -> Entry:
    """Allow a few spilled registers, two by default.

    The ptxas of some versions of Triton (12.8 with 3.6.0, 12.9 with 3.8.0 and 3.9.0) spills some for a step
    of occupancy, with registers to spare: given a bound by `maxnreg`, even 168 where it would take 80, it
    spills none and takes about 13 more. And the code that Triton 3.8.0 makes of products in float32 lacks a
    few at 255. Products in 16 bits whose programs come in pairs spill none on sm_90, up to 160 on others.
    """
    return replace(entry, budget=replace(entry.budget, spilled=spilled))
