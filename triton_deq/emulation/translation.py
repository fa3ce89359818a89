"""PTX instructions as lines of Python on the arrays of `Warp`.

Of each instruction the text is kept for messages. In a line, `w` is the warp, `R` its registers, `X` those
that the instruction may write, and `K` constants.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arithmetic import DTYPES, FLOATS, SIGNED

END = 1 << 30
"""The chunk behind a kernel's last."""

_ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_ROUNDED = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}
_FORMULAS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "abs": "np.abs({0})",
    "fma": "fma({0}, {1}, {2})",
    "div": "{0} / {1}",
    "min": "np.fmin({0}, {1})",
    "max": "np.fmax({0}, {1})",
    "min.NaN": "np.minimum({0}, {1})",
    "max.NaN": "np.maximum({0}, {1})",
    "sqrt": "np.sqrt({0})",
    "rsqrt": "1 / np.sqrt({0})",
    "rcp": "1 / {0}",
    "ex2": "np.exp2({0})",
    "lg2": "np.log2({0})",
}
_WHOLE_FORMULAS = _FORMULAS | {
    "mad": "{0} * {1} + {2}",
    "div": "divide({0}, {1})",
    "rem": "remainder({0}, {1})",
}
_SEEN = ("bra", "brx", "ret", "bar", "ld", "st", "ldmatrix", "stmatrix", "atom", "red", "cp", "wgmma")
"""Instructions behind which another warp, or other lanes, may go on."""
_LOGIC = {"and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}"}


@dataclass(frozen=True)
class Instruction:
    """`@guard head.parts operands`. kind: the last of the parts that is one."""

    text: str
    guard: str | None
    head: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Instruction":
        match = re.match(r"(?:@(!?)%(p\d+)\s+)?([a-z]\w*)((?:[.:]+\w+)*)\s*(.*)$", text, re.S)
        if match is None:
            raise NotImplementedError(f"PTX that is no instruction: {text}")
        negated, predicate, head, parts, operands = match.groups()
        guard = f"{'~' * bool(negated)}R[{predicate!r}]" if predicate else None
        listed = re.split(r",(?![^{\[]*[}\]])", operands) if operands else ()
        return cls(
            text, guard, head, tuple(re.split("[.:]+", parts)[1:]), tuple(each.strip() for each in listed)
        )

    @property
    def kinds(self) -> list[str]:
        return [part for part in self.parts if part in DTYPES]

    @property
    def kind(self) -> str:
        return self.kinds[-1]

    @property
    def vector(self) -> int:
        return next((int(part[1]) for part in self.parts if re.fullmatch(r"v\d", part)), 1)


class Translator:
    """Lines of Python for one instruction after another; a method `on_x` for those that begin with x.

    constants: what lines call `K[i]`. tables: the labels of `brx.idx`. A branch's label stands in its line as
    `LABEL(name)` until it is known which chunk that is.
    """

    def __init__(self, tables: dict[str, list[str]]):
        self.constants: list[Any] = []
        self._tables = tables

    def lines(self, text: str) -> tuple[list[str], bool]:
        """And whether a chunk ends with it."""
        instruction = Instruction.parse(text)
        head = instruction.head
        known = head in _LOGIC or head in _WHOLE_FORMULAS
        translate = getattr(self, f"on_{head}", self._arithmetic if known else None)
        if translate is None:
            raise NotImplementedError(f"the emulation does not know {text}")
        lines: list[str] = translate(instruction)
        if instruction.guard is not None and any(line.startswith("X[") for line in lines):
            lines = [f"X = w.writable({instruction.guard})", *lines, "X = w.writable()"]
        return lines, head in _SEEN and "param" not in instruction.parts

    # ------------------------------------------------------------------------------------------- operands

    def _constant(self, value: Any) -> str:
        self.constants.append(value)
        return f"K[{len(self.constants) - 1}]"

    def _read(self, operand: str, kind: str) -> str:
        """Source of an operand's value, of the kind's dtype; bfloat16 as its bits."""
        dtype = DTYPES[kind]
        if operand.startswith("%tid"):
            return "w.thread" if operand.endswith("x") else self._constant(np.uint32(0))
        for name, source in (("%ctaid", "w.program"), ("%nctaid", "w.grid")):
            if operand.startswith(name):
                return f"{source}[{'xyz'.index(operand[-1])}]"
        if operand.startswith("%") or operand == "tmp":
            narrower = dtype.kind != "b" and _size(operand) != dtype.itemsize
            cast = f".astype('u{dtype.itemsize}')" if narrower else ""
            view = "" if dtype.kind in "ub" else f".view({dtype.str!r})"
            return f"R[{operand.lstrip('%')!r}]{cast}{view}"
        if operand.startswith("global_smem"):
            return self._constant(dtype.type(int(operand.partition("+")[2] or 0)))
        if operand.startswith(("0f", "0d")):
            bits = np.array(int(operand[2:], 16), f"u{dtype.itemsize}")
            return self._constant(bits.view(dtype)[()])
        number = int(operand.rstrip("U"), 0)
        if kind == "pred":
            return self._constant(np.bool_(number != 0))
        held = np.array(number & ((1 << 8 * dtype.itemsize) - 1), f"u{dtype.itemsize}")
        return self._constant(held.view(dtype)[()])

    def _write(self, operand: str, source: str, kind: str) -> str:
        return f"X[{operand.lstrip('%')!r}] = bits_of({source}, 'u{DTYPES[kind].itemsize}')"

    def _address(self, operand: str, kind: str) -> str:
        """Of `[base + offset]`."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        source = self._read(base, kind)
        if offset:
            source += f" + {self._constant(np.array(int(offset)).astype(DTYPES[kind])[()])}"
        return source if base.startswith("%") else f"np.full(32, {source})"

    def _lanes(self, operand: str, kind: str) -> str:
        """Source of an operand's value in each lane."""
        source = self._read(operand, kind)
        return source if operand.startswith("%") else f"np.full(32, {source})"

    @staticmethod
    def _listed(operand: str) -> list[str]:
        return [each.strip() for each in operand.strip("{} ").split(",")]

    # ----------------------------------------------------------------------------------- the way through it

    def on_bra(self, i: Instruction) -> list[str]:
        return [f"w.branch(LABEL({i.operands[0]}), {i.guard})"]

    def on_brx(self, i: Instruction) -> list[str]:
        index = self._read(i.operands[0], "u32")
        table = self._tables[i.operands[1]]
        return [f"w.branch(LABEL({label}), {index} == {number})" for number, label in enumerate(table)]

    def on_ret(self, i: Instruction) -> list[str]:
        return [f"w.branch({END}, {i.guard})"]

    def on_bar(self, i: Instruction) -> list[str]:
        if i.parts[0] == "warp":
            return []
        if i.operands != ("0",):
            raise NotImplementedError(f"the emulation knows barriers of all warps only, not {i.text}")
        return [f"w.wait_at_barrier({i.text!r})"]

    # ----------------------------------------------------------------------------------------------- memory

    def on_ld(self, i: Instruction) -> list[str]:
        if "param" in i.parts:
            return self._parameter(i)
        space, kind = self._space(i)
        size, names = DTYPES[i.kind].itemsize, self._listed(i.operands[0])
        address = self._address(i.operands[1], kind)
        lines = [f"V = w.{space}.load({address}, {size}, {i.vector}, w.active({i.guard}), {i.text!r})"]
        return lines + [f"X[{name[1:]!r}] = V[{k}].astype('u{_size(name)}')" for k, name in enumerate(names)]

    @staticmethod
    def _space(i: Instruction) -> tuple[str, str]:
        """Which memory of a warp, and the kind of its addresses."""
        if "global" in i.parts:
            return "memory", "u64"
        if "shared" in i.parts:
            return "shared", "u32"
        raise NotImplementedError(f"the emulation knows global and shared memory only, not {i.text}")

    def _parameter(self, i: Instruction) -> list[str]:
        dtype, name = DTYPES[i.kind], i.operands[0]
        value = f"w.parameters[{i.operands[1].strip('[]')!r}].view({dtype.str!r})"
        wide = f"{dtype.kind}{_size(name)}"
        return [f"X[{name[1:]!r}] = np.full(32, {value}.astype({wide!r}).view('u{_size(name)}'))"]

    def on_st(self, i: Instruction) -> list[str]:
        space, kind = self._space(i)
        size = DTYPES[i.kind].itemsize
        values = ", ".join(self._lanes(each, f"b{8 * size}") for each in self._listed(i.operands[1]))
        address = self._address(i.operands[0], kind)
        return [f"w.{space}.store({address}, {size}, [{values}], w.active({i.guard}), {i.text!r})"]

    def on_cp(self, i: Instruction) -> list[str]:
        if "commit_group" in i.parts:
            return ["w.commit_copies()"]
        if "wait_group" in i.parts:
            return [f"w.wait_for_copies({int(i.operands[0])})"]
        target, source, size, *reads = i.operands
        count = self._lanes(reads[0] if reads else str(int(size, 0)), "u32")
        return [
            f"w.copy_later({self._address(target, 'u32')}, {self._address(source, 'u64')}, {int(size, 0)}, "
            f"{count}, {i.guard}, {i.text!r})"
        ]

    def on_ldmatrix(self, i: Instruction) -> list[str]:
        names = self._listed(i.operands[0])
        address = self._address(i.operands[1], "u32")
        lines = [f"V = w.load_matrices({address}, {len(names)}, {'trans' in i.parts}, {i.text!r})"]
        return lines + [self._write(name, f"V[{k}]", "b32") for k, name in enumerate(names)]

    def on_stmatrix(self, i: Instruction) -> list[str]:
        address = self._address(i.operands[0], "u32")
        values = ", ".join(self._lanes(name, "b32") for name in self._listed(i.operands[1]))
        return [f"w.store_matrices({address}, [{values}], {'trans' in i.parts}, {i.text!r})"]

    def on_fence(self, i: Instruction) -> list[str]:
        if i.parts[:3] != ("proxy", "async", "shared"):
            raise NotImplementedError(
                f"the emulation knows no fence but those of shared memory, not {i.text}"
            )
        return ["w.shared.fence()"]

    def on_atom(self, i: Instruction) -> list[str]:
        if i.parts[-2:] != ("add", "u32"):
            raise NotImplementedError(f"of atomic operations the emulation knows add.u32, not {i.text}")
        address, value = self._address(i.operands[1], "u64"), self._lanes(i.operands[2], "u32")
        source = f"w.add_to_memory({address}, {value}, {i.guard}, {i.text!r})"
        return [self._write(i.operands[0], source, "u32")]

    def on_red(self, i: Instruction) -> list[str]:
        """An atomic operation whose result nobody wants."""
        nowhere = Instruction(i.text, i.guard, "atom", i.parts, ("%r", *i.operands))
        return self.on_atom(nowhere)

    # ------------------------------------------------------------------------------------- lanes of a warp

    def on_shfl(self, i: Instruction) -> list[str]:
        if i.operands[3:] != ("31", "-1"):
            raise NotImplementedError(f"the emulation knows shuffles of whole warps only, not {i.text}")
        lane = self._read(i.operands[2], "s32")
        source = f"LANES ^ {lane}" if "bfly" in i.parts else f"{lane} & np.full(32, 31)"
        value = self._lanes(i.operands[1], "b32")
        return [self._write(i.operands[0], f"w.shuffled({value}, {source}, {i.text!r})", "b32")]

    def on_redux(self, i: Instruction) -> list[str]:
        function = {"add": "np.add", "max": "np.maximum", "min": "np.minimum", "and": "np.bitwise_and"}
        value = self._lanes(i.operands[1], i.kind)
        return [self._write(i.operands[0], f"w.reduced({value}, {function[i.parts[1]]}, {i.text!r})", i.kind)]

    def on_mma(self, i: Instruction) -> list[str]:
        shape = next(re.fullmatch(r"m(\d+)n8k(\d+)", part) for part in i.parts if part.startswith("m"))
        assert shape is not None
        kind = i.kinds[1] if "tf32" not in i.parts else "tf32"
        held = "u64" if kind == "f64" else "u32"
        if i.kinds[0] not in ("f32", "f64"):
            raise NotImplementedError(f"the emulation adds products up in float32 or float64, not {i.text}")
        d, *given = (self._listed(operand) for operand in i.operands)
        sources = ", ".join(f"[{', '.join(self._lanes(name, held) for name in names)}]" for names in given)
        lines = [f"V = multiply({kind!r}, {shape[1]}, {shape[2]}, {sources})"]
        return lines + [self._write(name, f"V[{k}]", held) for k, name in enumerate(d)]

    def on_wgmma(self, i: Instruction) -> list[str]:
        if i.parts[0] == "fence":
            return ["w.products.fence()"]
        if i.parts[0] == "commit_group":
            return ["w.products.commit()"]
        if i.parts[0] == "wait_group":
            return [f"w.products.wait({int(i.operands[0])})"]
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[3])
        assert shape is not None
        if i.parts[4] != "f32":
            raise NotImplementedError(f"the emulation adds products up in float32, not as {i.text}")
        d, a, b, adds, *scales = i.operands
        if scales[:2] != ["1", "1"]:
            raise NotImplementedError(f"the emulation does not negate A or B, as {i.text}")
        across = [each == "1" for each in scales[2:]]  # of A only where it has a descriptor
        along_k = tuple(not each for each in [False, False, *across][-2:])
        left = ", ".join(self._lanes(each, "u32" if a.startswith("{") else "u64") for each in self._listed(a))
        names = [each.lstrip("%") for each in self._listed(d)]
        return [
            f"w.together({i.text!r})",
            f"w.products.begin({i.parts[5]!r}, {int(shape[2])}, {names}, [{left}], {self._lanes(b, 'u64')}, "
            f"{self._lanes(adds, 'pred')}, {along_k}, {i.text!r})",
        ]

    # ------------------------------------------------------------------------------------------------ values

    def on_mov(self, i: Instruction) -> list[str]:
        target, source = i.operands
        half = {"b64": "b32", "b32": "b16"}.get(i.kind, i.kind)
        bits = 8 * DTYPES[half].itemsize
        if target.startswith("{"):
            value = self._read(source, i.kind)
            lower, upper = self._listed(target)
            cast = f".astype({DTYPES[half].str!r})"
            moved = f"({value} >> {self._constant(DTYPES[i.kind].type(bits))}){cast}"
            return [self._write(lower, f"{value}{cast}", half), self._write(upper, moved, half)]
        if source.startswith("{"):
            lower, upper = (
                f"{self._read(each, half)}.astype({DTYPES[i.kind].str!r})" for each in self._listed(source)
            )
            value = f"{lower} | {upper} << {self._constant(DTYPES[i.kind].type(bits))}"
            return [self._write(target, value, i.kind)]
        return [self._write(target, self._read(source, i.kind), i.kind)]

    def on_cvt(self, i: Instruction) -> list[str]:
        to, of, target = i.kinds[0], i.kinds[-1], i.operands[0]
        if to.endswith("x2"):
            upper, lower = (f"to_{to[:-2]}({self._read(each, of)})" for each in i.operands[1:])
            return [self._write(target, f"joined({lower}, {upper})", to)]
        value = self._read(i.operands[1], of)
        if "tf32" in i.parts:
            return [self._write(target, f"to_tf32({value})", "b32")]
        if of == "bf16":
            value, of = f"from_bf16({value})", "f32"
        if to == "bf16":
            return [self._write(target, f"to_bf16({value})", to)]
        if "ftz" in i.parts:
            value = f"flushed({value})"
        if "sat" in i.parts or (of in FLOATS and {"rz", "rm", "rp"} & set(i.parts)):
            raise NotImplementedError(f"the emulation rounds to the nearest, not as {i.text}")
        if of in FLOATS:
            for rounding in _ROUNDED.keys() & set(i.parts):
                value = f"{_ROUNDED[rounding]}({value})"
            if to not in FLOATS:
                return [self._write(target, f"to_integer({value}, {DTYPES[to].str!r})", to)]
        return [self._write(target, f"{value}.astype({DTYPES[to].str!r})", to)]

    def on_setp(self, i: Instruction) -> list[str]:
        compare, kind = i.parts[0], i.kind
        packs = kind in ("f16x2", "bf16x2", "bf16")
        a, b = (
            f"unpacked({self._read(each, kind)}, {kind!r})" if packs else self._read(each, kind)
            for each in i.operands[1:]
        )
        unordered = f"(np.isnan({a}) | np.isnan({b}))"
        if compare in ("num", "nan"):
            found = unordered if compare == "nan" else f"~{unordered}"
        elif kind not in FLOATS and not packs:
            found = f"({a} {_ORDERED[compare]} {b})"
        elif compare in _ORDERED:
            found = f"(({a} {_ORDERED[compare]} {b}) & ~{unordered})"
        else:
            found = f"(({a} {_ORDERED[compare.removesuffix('u')]} {b}) | {unordered})"
        targets = i.operands[0].split("|")
        each = [f"{found}[..., {k}]" for k in range(2)] if kind.endswith("x2") else [found]
        return [self._write(target, value, "pred") for target, value in zip(targets, each, strict=True)]

    def on_selp(self, i: Instruction) -> list[str]:
        a, b = (self._read(each, i.kind) for each in i.operands[1:3])
        return [
            self._write(i.operands[0], f"np.where({self._read(i.operands[3], 'pred')}, {a}, {b})", i.kind)
        ]

    def on_shl(self, i: Instruction) -> list[str]:
        function = "shift_left" if i.head == "shl" else "shift_right"
        value, by = self._read(i.operands[1], i.kind), self._read(i.operands[2], "u32")
        return [self._write(i.operands[0], f"{function}({value}, {by})", i.kind)]

    on_shr = on_shl

    def on_bfe(self, i: Instruction) -> list[str]:
        value = self._read(i.operands[1], i.kind.replace("s", "u"))
        position, length = (int(each) for each in i.operands[2:])
        return [
            self._write(i.operands[0], f"extract({value}, {position}, {length}, {i.kind in SIGNED})", i.kind)
        ]

    def on_prmt(self, i: Instruction) -> list[str]:
        given = ", ".join(self._read(each, "b32") for each in i.operands[1:4])
        return [self._write(i.operands[0], f"permuted_bytes({given})", "b32")]

    def on_popc(self, i: Instruction) -> list[str]:
        value = self._read(i.operands[1], i.kind)
        return [self._write(i.operands[0], f"np.bitwise_count({value}).astype('u4')", "b32")]

    def _arithmetic(self, i: Instruction) -> list[str]:
        target, kind = i.operands[0], i.kind
        if kind in ("f16", "bf16", "f16x2", "bf16x2"):
            given = [f"unpacked({self._read(each, kind)}, {kind!r})" for each in i.operands[1:]]
            formula = "{0} * {1} + {2}" if i.head == "fma" else _FORMULAS[i.head]
            return [self._write(target, f"packed({formula.format(*given)}, {kind!r})", kind)]
        given = [self._read(each, kind) for each in i.operands[1:]]
        if i.head in _LOGIC:
            return [self._write(target, _LOGIC[i.head].format(*given), kind)]
        if kind in FLOATS:
            return [self._write(target, self._floating(i, given), kind)]
        if "wide" in i.parts:
            wide = kind[0] + str(2 * int(kind[1:]))
            factors = [f"{each}.astype({DTYPES[wide].str!r})" for each in given[:2]]
            added = [f" + {self._read(each, wide)}" for each in i.operands[3:]]
            return [self._write(target, " * ".join(factors) + "".join(added), wide)]
        if "hi" in i.parts:
            return [self._write(target, f"upper_product({given[0]}, {given[1]})", kind)]
        return [self._write(target, _WHOLE_FORMULAS[i.head].format(*given), kind)]

    def _floating(self, i: Instruction, given: list[str]) -> str:
        flushes = "ftz" in i.parts and i.kind == "f32"
        formula = _FORMULAS[f"{i.head}.NaN" if "NaN" in i.parts else i.head]
        value = formula.format(*(f"flushed({each})" if flushes else each for each in given))
        if i.head == "rcp" and i.kind == "f64":
            return f"upper_word({value})"
        return f"flushed({value})" if flushes else value


def _size(register: str) -> int:
    """Bytes of a register, by its name."""
    return {"rs": 2, "rd": 8}.get(register[1:3], 4)
