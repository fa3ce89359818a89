"""NVIDIA's machine code as instructions, each with the control codes in its encoding.

Triton has a disassembler for people, `compiled.asm["sass"]`. It leaves out what lies beyond 64 KiB, where
addresses get a fifth digit, and names labels instead of addresses.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction, as it has been since Volta.

    name: with its modifiers, such as `LDG.E.128`. operands: as text. predicate: such as `@!P0`, or empty.
    waits: for which of six scoreboards it waits, a bit each. read, write: the scoreboard that it sets free
        when its operands have been read and when its result has arrived, or None.
    stall: after how many clocks the next one may issue.
    """

    address: int
    predicate: str
    name: str
    operands: str
    waits: int = 0
    read: int | None = None
    write: int | None = None
    stall: int = 1

    @property
    def kind(self) -> str:
        """Its name without modifiers."""
        return self.name.partition(".")[0]

    def __str__(self) -> str:
        read, write = ("-" if each is None else each for each in (self.read, self.write))
        text = " ".join(filter(None, (self.predicate, self.name, self.operands)))
        return f"{self.address:05x}  {self.waits:06b}:{read}:{write}:{self.stall:02}  {text}"


_LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?P<predicate>@\S+)?\s*(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x(?P<control>[0-9a-f]{16}) \*/"
)
SCOREBOARDS = 6


def disassemble(cubin: bytes) -> list[Instruction]:
    """Every instruction of a kernel, by the `cuobjdump` of Triton's wheel.

    Raises:
        RuntimeError: there is no cuobjdump.
        subprocess.CalledProcessError: it cannot read that.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory(prefix="triton-deq-") as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-sass", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return parse(text)


def parse(text: str) -> list[Instruction]:
    """The instructions in what cuobjdump prints of one kernel."""
    return [
        Instruction(
            int(found["address"], 16),
            found["predicate"] or "",
            found["name"],
            found["operands"],
            *_control(int(found["control"], 16)),
        )
        for found in _LINE.finditer(text)
    ]


def _control(word: int) -> tuple[int, int | None, int | None, int]:
    """waits, read, write and stall from the upper half of an encoding; 7 stands for no scoreboard."""
    read, write = (word >> 49 & 7, word >> 46 & 7)
    return (
        word >> 52 & (1 << SCOREBOARDS) - 1,
        read if read < SCOREBOARDS else None,
        write if write < SCOREBOARDS else None,
        word >> 41 & 15,
    )


def listing(code: Iterable[Instruction]) -> str:
    """A line each: address, the scoreboards waited for and set free, clocks to the next, and what it does."""
    return "".join(f"{each}\n" for each in code)
