"""`python -m bench ledger`: what a whole step of a model launches, moves and waits for; it needs no GPU.

The step of the benchmark is run as on a GPU, under bfloat16 autocast, on tensors without data (PyTorch's
FakeTensor): shapes and dtypes are real, kernels are noted instead of launched. Counted are

- products: matrix products and convolutions, which are cuBLAS's and cuDNN's;
- kernels: this library's launches;
- the rest: what PyTorch does beside them, an operator a launch. A program that did it inside a neighbour
  would spare all of it, so its share is how far the step is from the least.

Bytes are those of each tensor that goes in or out, once. The least time of each is by the datasheets of
`triton_deq.inspection.roofline`: the longer of its bytes and its multiplications. The host's time is an
assumption (`LAUNCH` there); it is what CUDA graphs spare. Every solve takes all its steps. Which words fall
into which cluster of a softmax is data: each cluster gets as many.
"""

import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import triton_deq.backend
import triton_deq.ops.launch
from triton_deq.inspection.roofline import LAUNCH
from triton_deq.ops.launch import launch_anew, tensors_of
from triton_deq.timing import Call, Stopwatch

from . import environment as environments
from .cases import Setting
from .groups import images, language
from .roofline import DTYPES, Work, least_ms

KINDS = ("products", "kernels", "rest")
TOP = 12
"""How many lines of each step are shown."""


@dataclass
class Line:
    """All calls of one operator or kernel in a step."""

    kind: str
    name: str
    calls: int = 0
    traffic: int = 0
    least: float = 0.0

    def add(self, work: Work, device: str) -> None:
        self.calls += 1
        self.traffic += work.traffic
        self.least += least_ms(work, device) or 0.0


@dataclass
class Ledger:
    """What a step cost: lines by (kind, name), and by place in the source how often the host waited."""

    device: str
    lines: dict[tuple[str, str], Line] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, kind: str, name: str, work: Work) -> None:
        self.lines.setdefault((kind, name), Line(kind, name)).add(work, self.device)

    def total(self, kind: str) -> Line:
        of_kind = [line for line in self.lines.values() if line.kind == kind]
        return Line(
            kind,
            kind,
            sum(line.calls for line in of_kind),
            sum(line.traffic for line in of_kind),
            sum(line.least for line in of_kind),
        )


# ------------------------------------------------------------------------------------------- the counting


class _Operators(TorchDispatchMode):
    """Notes every operator, and answers those that would have to look at the data."""

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero"):
            self.ledger.waits[_place()] += 1
            return _some(args[0]) if name == "nonzero" else _answer(args[0])
        if name in ("index", "index_put_"):
            args = (args[0], [self._numbered(index) for index in args[1]], *args[2:])
        outputs = func(*args, **kwargs)
        views = any(
            out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns
        )
        gives = any(isinstance(each, Tensor) for each in tree_leaves(outputs))
        if gives and not views and func.namespace == "aten" and not name.startswith(_STILL):
            count = flop_registry.get(func.overloadpacket)
            kind = "rest" if count is None else "products"
            self.ledger.add(kind, name, _work_of_operator(func, count, args, kwargs, outputs))
        return outputs

    def _numbered(self, index: Tensor | None) -> Tensor | None:
        """A mask, for which the host has to wait, as the numbers of what it lets through."""
        if index is None or index.dtype != torch.bool:
            return index
        self.ledger.waits[_place()] += 1
        return _some(index)[:, 0]


def _answer(tensor: Tensor) -> bool | int | float:
    """What the host reads: samples that go on, ids of words, no NaN; a number between 0 and 1."""
    return {torch.bool: False, torch.int64: 1, torch.int32: 1}.get(tensor.dtype, 0.5)


def _some(mask: Tensor) -> Tensor:
    """In place of the entries that are not 0: a quarter."""
    return mask.new_empty((-(-mask.numel() // 4), mask.dim()), dtype=torch.int64)


_STILL = ("empty", "new_empty", "_unsafe_view")
"""Beginnings of the names of operators that move nothing, beside views."""

_PICKING = {"gather", "index", "index_select", "embedding"}
"""Operators that read as much as they write, whatever the size of what they pick from."""
_ADDING = {"scatter_add", "index_add", "index_put_"}
"""Operators that add their last tensor into another and touch nothing else of it, as autograd calls them."""


def _work_of_operator(func, count, args, kwargs, outputs) -> Work:
    name = func.overloadpacket.__name__
    written = [each for each in tree_leaves(outputs) if isinstance(each, Tensor)]
    given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if name in _PICKING:
        return Work(2 * sum(map(_bytes, written)), {})
    if name in _ADDING:
        return Work(3 * _bytes(given[-1]), {})
    # Only copies and `out=` do not read what they write into.
    overwritten = name == "copy_" or "out" in func._overloadname
    targets = {_key(each) for each in written} if overwritten else set()
    read = {_key(each): each for each in given if _key(each) not in targets}
    traffic = sum(map(_bytes, [*read.values(), *written]))
    if count is None:
        return Work(traffic, {})
    dtype = DTYPES[written[0].dtype]
    unit = f"tensor_{dtype}" if dtype in ("fp16", "bf16") else dtype
    return Work(traffic, {unit: count(*args, **kwargs, out_val=outputs)})


def _key(tensor: Tensor) -> tuple[Any, ...]:
    """The same for all views of the same entries."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def _bytes(tensor: Tensor) -> int:
    """Of the entries that lie in memory: what is repeated by a stride of 0 lies there once."""
    entries = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= size if stride != 0 else min(size, 1)
    return entries * tensor.element_size()


def _work_of_launch(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Work:
    """Each tensor once, but of a history what the catalog says; and the catalog's matrix products."""
    from triton_deq.kernels.catalog import ENTRIES, Pointer

    values = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
    tensors = {_key(each): each for each in tensors_of((*values.values(),))}
    entry = next(each for each in ENTRIES if each.kernel is kernel)
    moved = sum(map(_bytes, tensors.values())) + sum(map(_bytes, _in_place(values)))
    if entry.op not in _SOLVERS and not entry.budget.tensor_cores:
        return Work(moved, {})
    arguments = {
        name: Pointer(DTYPES.get(value.dtype, "i64")) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
    sized = replace(entry, arguments=arguments)
    state = values[entry.contiguous[0]]
    batch = values.get("B", len(state))
    sizes = (sized, batch, state.numel() // max(batch, 1))
    traffic = sized.traffic(*sizes) if entry.op in _SOLVERS else moved
    return Work(traffic, sized.work(*sizes) if entry.budget.tensor_cores else {})


def _in_place(values: dict[str, Any]) -> list[Tensor]:
    """The maps of a GroupNorm that take their own value: they are read and written."""
    return [operands[0] for operands in values.get("maps", ()) if operands[6] is operands[0]]


_SOLVERS = {"anderson", "broyden"}
"""Ops whose kernels get a whole history and write into one place of it."""


def _place() -> str:
    """The innermost line of this library, or of the benchmark, that is under way."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if "triton_deq/" in frame.filename or "bench/groups/" in frame.filename
    ]
    if not frames:
        return "elsewhere"
    folder, _, rest = frames[-1].filename.rpartition("triton_deq/")
    return f"{rest if folder else frames[-1].filename.rpartition('bench/')[2]}, {frames[-1].name}"


def _apply(
    module: torch.nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> torch.nn.Module:
    """`Module._apply`, whose way to exchange parameters tensors without data do not go."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                changed = change(parameter.detach())
                each._parameters[name] = torch.nn.Parameter(changed, parameter.requires_grad)
        for name, buffer in each._buffers.items():
            each._buffers[name] = None if buffer is None else change(buffer)
    return module


@contextmanager
def _traced(ledger: Ledger) -> Iterator[None]:
    """While entered, the kernels serve all tensors, and what happens goes into the ledger."""

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        ledger.add(
            "kernels", kernel.fn.__name__.removesuffix("_kernel"), _work_of_launch(kernel, args, constants)
        )

    def as_list(tensor: Tensor) -> Any:
        ledger.waits[_place()] += 1  # once, whatever the size
        return numpy.full(tensor.shape, _answer(tensor)).tolist()

    real, launch_at = triton_deq.ops.launch.launch, triton_deq.ops.launch.launch_at
    with ExitStack() as stack:
        for module in list(sys.modules.values()):
            if getattr(module, "launch", None) is real and module.__name__.startswith("triton_deq"):
                stack.enter_context(mock.patch.object(module, "launch", note))
            if getattr(module, "launch_at", None) is launch_at and module.__name__.startswith("triton_deq"):
                stack.enter_context(mock.patch.object(module, "launch_at", launch_anew))
        stack.enter_context(mock.patch.object(triton_deq.backend, "_obstacle", return_value=""))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", as_list))
        stack.enter_context(_Operators(ledger))
        yield


# ------------------------------------------------------------------------------------------- the steps


class _AsOnGPU(Setting):
    """The sizes and the autocast of a GPU, for tensors that have no data."""

    gpu = True


def _steps(scale: str) -> dict[str, Callable[[], Call]]:
    """By name, what prepares the call of one step."""
    device = torch.device("cpu")
    setting = _AsOnGPU(device, scale, 0, Stopwatch(device), "no")
    size = language.GPU_SIZES[scale]
    plain = language.configuration_of(size, setting)
    penalised = replace(plain, penalty=1.0, penalty_probability=1.0)
    lm = partial(language.step, setting)
    steps: dict[str, Callable[[], Call]] = {
        "deq-transformer inference": partial(lm, plain, size, "inference", "triton"),
        "deq-transformer training": partial(lm, plain, size, "training", "triton"),
        "deq-transformer training, bfloat16 state": partial(
            lm, plain, size, "training", "triton", state_dtype=torch.bfloat16
        ),
        "deq-transformer training penalised": partial(lm, penalised, size, "training", "triton"),
    }
    for each in images.GPU_SIZES[scale]:
        for mode in ("inference", "training"):
            step = partial(images.step, setting, each, mode, "triton", None)
            steps[f"{each.config} {mode}"] = step
            steps[f"{each.config} {mode}, bfloat16 state"] = partial(step, state_dtype=torch.bfloat16)
    return steps


def count(prepare: Callable[[], Call], device: str) -> Ledger:
    """The ledger of a step's second call: what a first one makes for good does not count."""
    ledger = Ledger(device)
    with FakeTensorMode(), _traced(ledger), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        call = prepare()
        call()
        ledger.lines.clear()
        ledger.waits.clear()
        call()
    return ledger


def main(chosen: list[str] | None, device: str, output: Path | None, scale: str = "full") -> int:
    """Print the ledgers of the steps whose names contain one of `chosen`; returns 2 if there is none."""
    steps = _steps(scale)
    names = [name for name in steps if not chosen or any(word in name for word in chosen)]
    if not names:
        print(
            f"no step is called {' or '.join(chosen or ())}: choose from {', '.join(steps)}", file=sys.stderr
        )
        return 2
    environment = environments.look(torch.device("cpu"))
    changed = " with changes" if environment.dirty else ""
    text = f"commit {environment.commit}{changed}, torch {environment.versions['torch']}\n\n"
    print(text, end="")
    for name in names:
        part = table(name, count(steps[name], device))
        print(part, flush=True)
        text += f"{part}\n"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    return 0


def table(name: str, ledger: Ledger) -> str:
    """Totals, the lines that take longest, and where the host waited."""
    totals = [ledger.total(kind) for kind in KINDS]
    least, traffic = sum(each.least for each in totals), sum(each.traffic for each in totals)
    calls = sum(each.calls for each in totals)
    lines = [f"{name} (least time on {ledger.device}: {least:.2f} ms)"]
    lines.append(f"  {'':<44} {'calls':>6} {'GB':>8} {'ms':>8}  share")

    def line(each: Line, title: str) -> str:
        share = each.least / least if least else 0.0
        return f"  {title:<44} {each.calls:>6} {each.traffic / 1e9:>8.3f} {each.least:>8.3f}  {share:5.1%}"

    lines += [line(each, each.name) for each in totals]
    lines.append(f"  {'all':<44} {calls:>6} {traffic / 1e9:>8.3f} {least:>8.3f}")
    worst = sorted(ledger.lines.values(), key=lambda each: -each.least)[:TOP]
    lines += ["", *(line(each, f"{each.kind}: {each.name}") for each in worst)]
    lines += [
        "",
        f"  the host needs {1e3 * LAUNCH * calls:.1f} ms for the calls at {1e6 * LAUNCH:.0f} µs each",
    ]
    lines += [f"  the host reads {sum(ledger.waits.values())} times what is computed:"]
    lines += [f"  {times:>6} x {place}" for place, times in ledger.waits.items()]
    return "\n".join(lines) + "\n"
