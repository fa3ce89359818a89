"""Each kernel by itself, beside what one would write in PyTorch for it."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from triton_deq.ops.launch import MAX_BLOCK

from ..cases import Case, Setting, Variant, ours
from ..roofline import DTYPES, of_kernels
from ..timing import Call, graphed
from .step import GPU_SHAPES, HISTORY, SHAPES

GROUP = "kernels"
MEMORY = 10
RULE: dict[str, Any] = {
    "relative": True,
    "over_batch": False,
    "ridge": 1e-6,
    "relative_ridge": True,
    "last": False,
}
BROYDEN_RULE: dict[str, Any] = {"relative": True, "over_batch": False, "last": False}


def cases(setting: Setting) -> Iterator[Case]:
    dtypes = [torch.float32, torch.bfloat16] if setting.gpu else [torch.float32]
    for shape in (GPU_SHAPES if setting.gpu else SHAPES)[setting.scale]:
        for dtype in dtypes:
            name = DTYPES[dtype]
            for op, kernel, call, peers in (
                ("anderson_residual", f"[{name},m={HISTORY}]", _residual, {"torch": _residual_torch}),
                ("anderson_advance", f"[{name},m={HISTORY}]", _advance, {"torch": _advance_torch}),
                ("anderson_step", f"[{name},m={HISTORY}]", _step, {"torch": _step_torch}),
                ("broyden_residual", f"[{name},m={MEMORY}]", _broyden_residual, {"torch": _pairs_torch}),
                ("broyden_advance", f"[{name},m={MEMORY}]", _broyden_advance, {"torch": _update_torch}),
                ("probe", f"[{name},gaussian]", _probe, {"torch": _probe_torch}),
                ("squared_norm", f"[{name}]", _squared_norm, {"torch": _squared_norm_torch}),
            ):
                if op == "anderson_step" and shape[1] > MAX_BLOCK:
                    continue  # two launches, which have their own rows
                variants = _variants(setting, shape, dtype, call, peers)
                work = of_kernels([op + kernel], *shape)
                yield Case(GROUP, op, "forward", dtype, shape, tuple(variants), work=work)


def _variants(
    setting: Setting,
    shape: tuple[int, int],
    dtype: torch.dtype,
    call: Callable[..., Call],
    peers: dict[str, Callable[..., Call]],
) -> Iterator[Variant]:
    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=setting.device).to(dtype)

    for name, backend in ours(setting):
        yield Variant(name, partial(call, randn, *shape, backend), backend)
    for name, peer in peers.items():
        yield Variant(name, partial(peer, randn, *shape))
        if setting.compiled != "no":
            prepare = partial(_compiled, peer, randn, *shape)
            yield Variant(f"{name} compiled", prepare, "inductor", compiles=True)
    if setting.gpu:
        prepare = partial(_graphed, setting, call, randn, *shape)
        yield Variant("triton-deq graph", prepare, "cuda graph")


def _compiled(peer: Callable[..., Call], *arguments: Any) -> Call:
    return torch.compile(peer(*arguments))


def _graphed(setting: Setting, call: Callable[..., Call], *arguments: Any) -> Call:
    return graphed(call(*arguments, "triton"), setting.watch)


def _full_state(randn: Callable[..., Tensor], batch: int, entries: int, backend: str) -> tuple[Any, int]:
    """An Anderson state whose history is full, and the step it is at."""
    from triton_deq.ops.anderson import anderson_advance, anderson_residual, anderson_start

    state = anderson_start(randn(batch, entries), HISTORY, 0.0, HISTORY + 2, backend)
    for step in range(HISTORY):
        anderson_residual(state, randn(batch, entries), step, 1.0, backend)
        anderson_advance(state, step, **RULE, backend=backend)
    return state, HISTORY


def _residual(randn, batch: int, entries: int, backend: str) -> Call:
    from triton_deq.ops.anderson import anderson_residual

    state, step = _full_state(randn, batch, entries, backend)
    fx = randn(batch, entries)
    return lambda: anderson_residual(state, fx, step, 1.0, backend)


def _residual_torch(randn, batch: int, entries: int) -> Call:
    x, fx = randn(batch, entries), randn(batch, entries)
    residuals, iterates = randn(HISTORY, batch, entries), randn(HISTORY, batch, entries)

    def call() -> tuple[Tensor, Tensor]:
        residuals[0] = fx - x
        iterates[0] = fx
        return torch.einsum("bn,mbn->bm", residuals[0], residuals), fx.square().sum(1)

    return call


def _advance(randn, batch: int, entries: int, backend: str) -> Call:
    """Each call finds a residual that is better than the best so far, so it copies x to `best`."""
    from triton_deq.ops.anderson import anderson_advance, anderson_residual
    from triton_deq.reference.record import BEST

    state, step = _full_state(randn, batch, entries, backend)
    state.record.best.fill_(torch.inf)
    anderson_residual(state, randn(batch, entries), step, 1.0, backend)
    best = state.record.data[BEST] if backend == "reference" else state.before[BEST]

    def call() -> None:
        if backend == "reference":  # it keeps its best in the record at once
            best.fill_(torch.inf)
        anderson_advance(state, step, **RULE, backend=backend)

    return call


def _advance_torch(randn, batch: int, entries: int) -> Call:
    x, iterates = randn(batch, entries), randn(HISTORY, batch, entries)
    best = torch.empty_like(x)
    gram = randn(HISTORY, batch, entries).float().transpose(0, 1)
    gram = torch.bmm(gram, gram.mT)
    ones = gram.new_ones(batch, HISTORY, 1)
    lowest = gram.new_full((batch,), torch.inf)

    def call() -> Tensor:
        improved = gram[:, 0, 0] < lowest
        best.copy_(torch.where(improved[:, None], x, best))
        weights = torch.linalg.solve_ex(gram, ones)[0]
        weights = weights / weights.sum(1, keepdim=True)
        x.copy_(torch.einsum("bm,mbn->bn", weights[..., 0].to(x.dtype), iterates))
        return improved.any()

    return call


def _step(randn, batch: int, entries: int, backend: str) -> Call:
    """Step after step with another value of f: of one value alone the residual would shrink to nothing."""
    from triton_deq.ops.anderson import anderson_step

    state, step = _full_state(randn, batch, entries, backend)
    values = [randn(batch, entries) for _ in range(HISTORY)]
    steps = count(step)

    def call() -> None:
        if backend == "reference":  # every call improves on the best, which costs it least
            state.record.best.fill_(torch.inf)
        now = next(steps)
        anderson_step(state, values[now % HISTORY], now, mixing=1.0, **RULE, backend=backend)

    return call


def _step_torch(randn, batch: int, entries: int) -> Call:
    residual, advance = _residual_torch(randn, batch, entries), _advance_torch(randn, batch, entries)
    return lambda: (residual(), advance())


def _full_broyden(randn: Callable[..., Tensor], batch: int, entries: int, backend: str) -> tuple[Any, int]:
    """A Broyden state whose memory is full, and the step it is at."""
    from triton_deq.ops.broyden import broyden_advance, broyden_residual, broyden_start

    state = broyden_start(randn(batch, entries), MEMORY, 0.0, MEMORY + 3, backend)
    for step in range(MEMORY + 1):
        broyden_residual(state, randn(batch, entries), step, backend)
        broyden_advance(state, step, **BROYDEN_RULE, backend=backend)
    return state, MEMORY + 1


def _broyden_residual(randn, batch: int, entries: int, backend: str) -> Call:
    """The state's pairs lose their meaning from call to call, not their size."""
    from triton_deq.ops.broyden import broyden_residual

    state, step = _full_broyden(randn, batch, entries, backend)
    fx = randn(batch, entries)
    return lambda: broyden_residual(state, fx, step, backend)


def _pairs_torch(randn, batch: int, entries: int) -> Call:
    x, fx = randn(batch, entries), randn(batch, entries)
    moves, changes = randn(MEMORY + 1, batch, entries), randn(MEMORY + 1, batch, entries)

    def call() -> tuple[Tensor, ...]:
        move, change = x - moves[0], fx - changes[0]
        moves[0], changes[0], moves[1], changes[1] = move, change, x, fx
        right = torch.stack((fx - x, move - change))
        return (
            torch.einsum("mbn,kbn->bkm", moves, right),
            torch.einsum("mbn,bn->bm", changes, move),
            move.square().sum(1),
            fx.square().sum(1),
            right[0].square().sum(1),
        )

    return call


def _broyden_advance(randn, batch: int, entries: int, backend: str) -> Call:
    """Each call finds a residual that is better than the best so far, so it copies x to `best`."""
    from triton_deq.ops.broyden import broyden_advance, broyden_residual
    from triton_deq.reference.record import BEST

    state, step = _full_broyden(randn, batch, entries, backend)
    state.record.best.fill_(torch.inf)
    broyden_residual(state, randn(batch, entries), step, backend)
    best = state.record.data[BEST] if backend == "reference" else state.before[BEST]

    def call() -> None:
        if backend == "reference":  # it keeps its best in the record at once
            best.fill_(torch.inf)
        broyden_advance(state, step, **BROYDEN_RULE, backend=backend)

    return call


def _update_torch(randn, batch: int, entries: int) -> Call:
    x, fx, changes = randn(batch, entries), randn(batch, entries), randn(MEMORY, batch, entries)
    best = torch.empty_like(x)
    matrix, right = randn(batch, MEMORY, MEMORY).float(), randn(batch, MEMORY, 1).float()
    lowest = right.new_full((batch,), torch.inf)

    def call() -> Tensor:
        improved = right[:, 0, 0] < lowest
        best.copy_(torch.where(improved[:, None], x, best))
        coefficients = torch.linalg.solve_ex(matrix, right)[0][..., 0].to(x.dtype)
        x.copy_(fx + torch.einsum("bm,mbn->bn", coefficients, changes))
        return improved.any()

    return call


def _probe(randn, batch: int, entries: int, backend: str) -> Call:
    from triton_deq.ops.jacobian import probe

    like = randn(batch, entries)
    seed = torch.tensor([7], device=like.device)
    return lambda: probe(like, seed, 0, "gaussian", backend)


def _probe_torch(randn, batch: int, entries: int) -> Call:
    like = randn(batch, entries)
    return lambda: torch.randn_like(like)


def _squared_norm(randn, batch: int, entries: int, backend: str) -> Call:
    from triton_deq.ops.jacobian import squared_norm

    value = randn(batch, entries)
    return lambda: squared_norm(value, backend)


def _squared_norm_torch(randn, batch: int, entries: int) -> Call:
    value = randn(batch, entries)
    return lambda: value.float().square().sum(1)
