"""Each kernel by itself, beside what one would write in PyTorch for it."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from triton_deq.ops.anderson import anderson_fits
from triton_deq.timing import Call, graphed

from ..cases import Case, Setting, Variant, ours
from ..roofline import DTYPES, Work, of_kernels
from . import maps
from .step import HISTORY, SHAPES

GROUP = "kernels"
MEMORY = 10
LAYERS: dict[str, dict[str, list[tuple[int, int]]]] = {
    "tiny": {width: [(2, 16)] for width in ("wide", "narrow", "rows", "states", "weights", "words")},
    "quick": {
        "wide": [(128, 512)],
        "narrow": [(128, 128)],
        "rows": [(300, 700)],
        "states": [(300, 700)],
        "weights": [(160, 288)],
        "words": [(64, 2003)],
    },
    "full": {
        "wide": [(128, 1024)],
        "narrow": [(128, 128)],
        "rows": [(2100, 700)],
        "states": [(2100, 700)],
        "weights": [(1280, 2304)],
        "words": [(2100, 20003)],
    },
}
STATES = {"tiny": SHAPES["tiny"], "quick": [(32, 16384)], "full": [(32, 16384), (32, 1048576)]}
GPU_LAYERS: dict[str, dict[str, list[tuple[int, int]]]] = {
    "tiny": LAYERS["tiny"],
    "quick": {
        "wide": [(4096, 2048)],
        "narrow": [(1024, 128)],
        "rows": [(2100, 700)],
        "states": [(2100, 704)],
        "weights": [(1280, 2304)],
        "words": [(2100, 20003)],
    },
    "full": {
        "wide": [(1024, 1024), (4096, 2048)],
        "narrow": [(1024, 64), (1024, 128), (1024, 256)],
        "rows": [(2100, 700), (16384, 1024)],
        "states": [(2100, 704)],
        "weights": [(1280, 2304), (48000, 700), (700, 48000)],
        "words": [(2100, 20003), (2100, 160000)],
    },
}
"""(batch, width) of a layer, of a cell whose whole solve is one launch, of a LayerNorm's rows, and of the
states that a feed-forward takes: the paper's Transformer is 700 wide, on 14 sequences of 150, its products
on a GPU are 704. And rows and columns of weights: of a multiscale block's, and of the Transformer's. And its
tokens and words: those of the softmax's head, and of a cluster."""
ATTENTIONS: dict[str, list[tuple[int, int]]] = {"tiny": [(1, 4)], "quick": [(2, 64)], "full": [(4, 150)]}
GPU_ATTENTIONS: dict[str, list[tuple[int, int]]] = {
    "tiny": ATTENTIONS["tiny"],
    "quick": [(14, 150)],
    "full": [(14, 150), (14, 512)],
}
"""(batch, queries); as many keys in memory, 10 heads of 70, as in the paper's model for WikiText-103."""
ATTENTION = (
    "attention",
    "attention_query_vjp",
    "attention_key_vjp",
    "attention_position_vjp",
    "attention_jvp",
)
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
    for shape in (STATES if setting.gpu else SHAPES)[setting.scale]:
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
                state = torch.empty(shape, dtype=dtype, device="meta")
                if op == "anderson_step" and not anderson_fits(state, HISTORY):
                    continue  # two launches, which have their own rows
                on_cpu = _steps_on_cpu(dtype) if op.startswith(("anderson", "broyden")) else "reference"
                variants = _variants(setting, shape, dtype, call, peers, on_cpu=on_cpu)
                work = of_kernels([op + kernel], *shape)
                yield Case(GROUP, op, "forward", dtype, shape, tuple(variants), work=work)

    layers: tuple[tuple[str, str, Callable[..., Call], Callable[..., Call]], ...] = (
        ("mlp", "wide", _mlp, _mlp_torch),
        ("mlp_vjp", "wide", _mlp_vjp, _mlp_vjp_torch),
        ("mlp_probe", "wide", _mlp_probe, _mlp_probe_torch),
        ("mlp_probe_vjp", "wide", _mlp_probe_vjp, _mlp_probe_vjp_torch),
        ("mlp_solve", "narrow", _mlp_solve, _mlp_solve_torch),
        ("norm", "rows", _norm, _norm_torch),
        ("norm_vjp", "rows", _norm_vjp, _norm_vjp_torch),
        ("feedforward", "states", _feedforward, _feedforward_torch),
        ("feedforward_vjp", "states", _feedforward_vjp, _feedforward_vjp_torch),
        ("weightnorm", "weights", _weightnorm, _weightnorm_torch),
        ("weightnorm_vjp", "weights", _weightnorm_vjp, _weightnorm_vjp_torch),
        ("cross_entropy", "words", _cross_entropy, _cross_entropy_torch),
        ("cross_entropy_vjp", "words", _cross_entropy_vjp, _cross_entropy_vjp_torch),
    )
    for kernel, width, make, peer in layers:
        for shape in (GPU_LAYERS if setting.gpu else LAYERS)[setting.scale][width]:
            for dtype in dtypes:
                # What goes through the autograd engine is neither compiled nor captured.
                single = kernel not in ("mlp_solve", "weightnorm_vjp", "cross_entropy_vjp")
                variants = _variants(setting, shape, dtype, make, {"torch": peer}, single=single)
                # A norm reads two tensors and writes one.
                traffic = 3 * shape[0] * shape[1] * dtype.itemsize
                work = Work(traffic, {}) if kernel in ("norm", "norm_vjp") else None
                if width == "weights":
                    wide = dtype.itemsize * (1 if kernel == "weightnorm" else 2)
                    work = Work(shape[0] * shape[1] * (wide + 2), {})
                if width == "words":
                    passes = 1 if kernel == "cross_entropy" else 2
                    work = Work(passes * shape[0] * shape[1] * dtype.itemsize, {})
                yield Case(GROUP, kernel, "forward", dtype, shape, tuple(variants), work=work)

    between = (
        ("groupnorm", maps.groupnorm, maps.groupnorm_torch),
        ("groupnorm_each", maps.groupnorm_each, maps.groupnorm_each_torch),
        ("groupnorm_vjp", maps.groupnorm_vjp, maps.groupnorm_vjp_torch),
        ("groupnorm_second", maps.groupnorm_second, maps.groupnorm_second_torch),
        ("fusion", maps.fusion, maps.fusion_torch),
        ("fusion_vjp", maps.fusion_vjp, maps.fusion_vjp_torch),
    )
    for kernel, make, peer in between:
        for size in (maps.GPU_SIZES if setting.gpu else maps.SIZES)[setting.scale]:
            for dtype in dtypes:
                # What goes through the autograd engine is neither compiled nor captured.
                single = kernel in ("groupnorm", "groupnorm_each", "fusion", "fusion_vjp")
                variants = _variants(
                    setting, size, dtype, make, {"torch": peer}, single=single, on_cpu="auto"
                )
                work = maps.work(kernel, size, dtype)
                yield Case(GROUP, kernel, "forward", dtype, size, tuple(variants), work=work)

    for kernel in ATTENTION:
        make, peer = partial(_attention, kernel), partial(_attention_torch, kernel)
        for shape in (GPU_ATTENTIONS if setting.gpu else ATTENTIONS)[setting.scale]:
            for dtype in dtypes:
                variants = _variants(
                    setting, shape, dtype, make, {"torch": peer}, single=kernel == "attention"
                )
                yield Case(GROUP, kernel, "forward", dtype, shape, tuple(variants))


def _variants(
    setting: Setting,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    call: Callable[..., Call],
    peers: dict[str, Callable[..., Call]],
    single: bool = True,
    on_cpu: str = "reference",
) -> Iterator[Variant]:
    """single: one op, not a whole solve, whose loop a compiler would unroll and which reads the device."""

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=setting.device).to(dtype)

    for name, backend in ours(setting, on_cpu):
        yield Variant(name, partial(call, randn, *shape, backend), backend)
    for name, peer in peers.items():
        yield Variant(name, partial(peer, randn, *shape))
        if setting.compiled != "no" and single:
            prepare = partial(_compiled, peer, randn, *shape)
            yield Variant(f"{name} compiled", prepare, "inductor", compiles=True)
    if setting.gpu and single:
        prepare = partial(_graphed, setting, call, randn, *shape)
        yield Variant("triton-deq graph", prepare, "cuda graph")


def _steps_on_cpu(dtype: torch.dtype) -> str:
    """What takes a solver's steps there: compiled code or the reference."""
    from triton_deq.backend import choose_step

    return "numba" if choose_step(torch.empty(1, 1, dtype=dtype)) == "numba" else "reference"


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
    best = state.record.data[BEST] if backend != "triton" else state.before[BEST]

    def call() -> None:
        if backend != "triton":  # these keep their best in the record at once
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
        if backend != "triton":  # every call improves on the best, which costs it least
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
    best = state.record.data[BEST] if backend != "triton" else state.before[BEST]

    def call() -> None:
        if backend != "triton":  # these keep their best in the record at once
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


def _mlp(randn, batch: int, width: int, backend: str) -> Call:
    from triton_deq.ops.mlp import mlp
    from triton_deq.reference.activations import ACTIVATIONS

    z, weight, u = randn(batch, width), randn(width, width), randn(batch, width)
    return lambda: mlp(z, weight, u, ACTIVATIONS["tanh"], backend=backend)


def _mlp_torch(randn, batch: int, width: int) -> Call:
    z, weight, u = randn(batch, width), randn(width, width), randn(batch, width)
    return lambda: torch.tanh(torch.nn.functional.linear(z, weight) + u)


def _mlp_vjp(randn, batch: int, width: int, backend: str) -> Call:
    from triton_deq.ops.mlp import mlp_vjp

    vector, slope, shift = randn(batch, width), randn(batch, width), randn(batch, width)
    weight = randn(width, width)
    return lambda: mlp_vjp(vector, slope, weight, shift, backend)


def _mlp_vjp_torch(randn, batch: int, width: int) -> Call:
    vector, slope, shift = randn(batch, width), randn(batch, width), randn(batch, width)
    weight = randn(width, width)
    return lambda: torch.addmm(shift, vector * slope, weight)


def _layer(randn, batch: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    return randn(batch, width), randn(width, width), randn(batch, width)


def _mlp_probe(randn, batch: int, width: int, backend: str) -> Call:
    """The vectors ε ⊙ act′(a) and act″(a); the reference is what the cell's closed form does."""
    from triton_deq.ops.jacobian import probe
    from triton_deq.ops.mlp_probe import mlp_probe_fwd
    from triton_deq.reference.activations import ACTIVATIONS
    from triton_deq.reference.mlp import mlp_and_slope

    z, weight, u = _layer(randn, batch, width)
    seed, tanh = torch.tensor([7], device=z.device), ACTIVATIONS["tanh"]
    if backend == "reference":
        return lambda: probe(u, seed, 0, "gaussian", backend) * mlp_and_slope(z, weight, u, tanh)[1]
    return lambda: mlp_probe_fwd(z, weight, u, seed, 1, "gaussian", tanh)


def _mlp_probe_torch(randn, batch: int, width: int) -> Call:
    z, weight, u = _layer(randn, batch, width)

    def call() -> tuple[Tensor, Tensor]:
        value = torch.tanh(torch.nn.functional.linear(z, weight) + u)
        slope = 1 - value.square()
        return torch.randn_like(u) * slope, -2 * value * slope

    return call


def _mlp_probe_vjp(randn, batch: int, width: int, backend: str) -> Call:
    from triton_deq.ops.jacobian import probe
    from triton_deq.ops.mlp_probe import mlp_probe_vjp_fwd

    products, weight, curvature = _layer(randn, batch, width)
    seed = torch.tensor([7], device=products.device)
    if backend == "reference":
        return lambda: curvature * probe(curvature, seed, 0, "gaussian", backend) * (products @ weight.mT)
    return lambda: mlp_probe_vjp_fwd(products[None], weight, curvature, seed, "gaussian")


def _mlp_probe_vjp_torch(randn, batch: int, width: int) -> Call:
    """With a probe that has been kept."""
    products, weight, curvature = _layer(randn, batch, width)
    vector = randn(batch, width)
    return lambda: curvature * vector * (products @ weight.mT)


def _mlp_solve(randn, batch: int, width: int, backend: str) -> Call:
    """30 steps of Anderson(6), as many as there are: tol=0."""
    import triton_deq as td

    x = randn(batch, 1)
    deq = td.DEQ(_contraction(randn, width), td.Anderson(6), tol=0, max_steps=30, backend=backend).eval()
    return torch.no_grad()(lambda: deq(x).value)


def _mlp_solve_torch(randn, batch: int, width: int) -> Call:
    """The textbook's loop."""
    from ..peers.textbook import graphable_anderson

    cell = _contraction(randn, width)
    u = randn(batch, width)
    return torch.no_grad()(
        lambda: graphable_anderson(
            lambda z: torch.tanh(z @ cell.state.weight.mT + u), torch.zeros_like(u), 30
        )
    )


def _norm(randn, batch: int, width: int, backend: str) -> Call:
    """The value alone, as in a forward solve, with a masked branch."""
    from triton_deq.ops.norm import norm_value

    x, branch, mask = randn(batch, width), randn(batch, width), randn(1, width)
    gain, offset = randn(width), randn(width)
    return lambda: norm_value(x, branch, mask, gain, offset, backend=backend)


def _norm_torch(randn, batch: int, width: int) -> Call:
    x, branch, mask = randn(batch, width), randn(batch, width), randn(1, width)
    gain, offset = randn(width), randn(width)
    return lambda: torch.nn.functional.layer_norm(torch.addcmul(x, branch, mask), (width,), gain, offset)


def _weightnorm(randn, rows: int, columns: int, backend: str) -> Call:
    """In bfloat16, as autocast's products take it."""
    from triton_deq.ops.weightnorm import Weight, weightnorm_each

    weight = Weight(randn(rows, columns), randn(rows, 1))
    return lambda: weightnorm_each([weight], torch.bfloat16, backend)


def _weightnorm_torch(randn, rows: int, columns: int) -> Call:
    v, g = randn(rows, columns), randn(rows, 1)
    return lambda: torch._weight_norm(v, g, 0).bfloat16()


def _weightnorm_vjp(randn, rows: int, columns: int, backend: str) -> Call:
    """Through the autograd engine, of a value that is kept with its graph."""
    from triton_deq.ops.weightnorm import Weight, weightnorm_each

    leaves = [randn(rows, columns).requires_grad_(), randn(rows, 1).requires_grad_()]
    (value,) = weightnorm_each([Weight(*leaves)], torch.bfloat16, backend)
    vector = torch.randn_like(value)
    return lambda: torch.autograd.grad(value, leaves, vector, retain_graph=True)


def _weightnorm_vjp_torch(randn, rows: int, columns: int) -> Call:
    v, g = randn(rows, columns).requires_grad_(), randn(rows, 1).requires_grad_()
    value = torch._weight_norm(v, g, 0).bfloat16()
    vector = torch.randn_like(value)
    return lambda: torch.autograd.grad(value, (v, g), vector, retain_graph=True)


def _words(randn, rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits whose rows are of a multiple of 16 bytes, and targets."""
    logits = randn(rows, -(-classes // 8) * 8)
    return logits, torch.randint(classes, (rows,), device=logits.device)


def _cross_entropy(randn, rows: int, classes: int, backend: str) -> Call:
    from triton_deq.ops.cross_entropy import cross_entropy

    logits, targets = _words(randn, rows, classes)
    return lambda: cross_entropy(logits, targets, classes, backend)


def _cross_entropy_torch(randn, rows: int, classes: int) -> Call:
    """As torch's adaptive softmax takes it, of logits in float32."""
    logits, targets = _words(randn, rows, classes)
    return lambda: functional.cross_entropy(logits[:, :classes].float(), targets, reduction="none")


def _cross_entropy_vjp(randn, rows: int, classes: int, backend: str) -> Call:
    """Through the autograd engine, of a value that is kept with its graph."""
    from triton_deq.ops.cross_entropy import cross_entropy

    logits, targets = _words(randn, rows, classes)
    value = cross_entropy(logits.requires_grad_(), targets, classes, backend)
    vector = torch.ones_like(value)
    return lambda: torch.autograd.grad(value, logits, vector, retain_graph=True)


def _cross_entropy_vjp_torch(randn, rows: int, classes: int) -> Call:
    logits, targets = _words(randn, rows, classes)
    wide = logits.requires_grad_()[:, :classes].float()
    value = functional.cross_entropy(wide, targets, reduction="none")
    vector = torch.ones_like(value)
    return lambda: torch.autograd.grad(value, logits, vector, retain_graph=True)


def _norm_vjp(randn, batch: int, width: int, backend: str) -> Call:
    from triton_deq.ops.norm import norm, norm_vjp

    x, vector, gain = randn(batch, width), randn(batch, width), randn(width)
    _, normal, inverse = norm(x, gain=gain, offset=gain, backend=backend)
    return lambda: norm_vjp(vector, normal, inverse, gain, backend)


def _norm_vjp_torch(randn, batch: int, width: int) -> Call:
    """The operator that the autograd engine calls."""
    x, vector, gain = randn(batch, width), randn(batch, width), randn(width)
    _, mean, inverse = torch.ops.aten.native_layer_norm(x, [width], gain, gain, 1e-5)
    backward = torch.ops.aten.native_layer_norm_backward
    only_x = [True, False, False]
    return lambda: backward(vector, x, [width], mean, inverse, gain, gain, only_x)[0]


SPREAD = 68
"""How many times as wide as its state the paper's Transformer's hidden layer is, about: 48000 to 700."""


def _hidden(randn, batch: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One sequence, a matrix into the hidden layer, a bias, a mask."""
    inner = SPREAD * width
    return randn(1, batch, width), randn(inner, width), randn(inner), randn(1, 1, inner).relu()


def _feedforward(randn, batch: int, width: int, backend: str) -> Call:
    from triton_deq.ops.feedforward import feedforward

    s, weight, bias, mask = _hidden(randn, batch, width)
    return lambda: feedforward(s, weight, bias, mask, backend)


def _feedforward_torch(randn, batch: int, width: int) -> Call:
    """The library's matrix product, and a pass over its result each for the mask and for the relu."""
    s, weight, bias, mask = _hidden(randn, batch, width)
    return lambda: (torch.nn.functional.linear(s, weight, bias) * mask).relu()


def _feedforward_vjp(randn, batch: int, width: int, backend: str) -> Call:
    from triton_deq.ops.feedforward import feedforward_vjp

    vector, weight, _, _ = _hidden(randn, batch, width)
    matrix, inner = weight.mT.contiguous(), randn(1, batch, len(weight)).relu()
    return lambda: feedforward_vjp(vector, matrix, inner, backend)


def _feedforward_vjp_torch(randn, batch: int, width: int) -> Call:
    vector, weight, _, mask = _hidden(randn, batch, width)
    matrix, inner = weight.mT.contiguous(), randn(1, batch, len(weight)).relu()
    return lambda: torch.where(inner > 0, vector @ matrix * mask, 0)


def _contraction(randn, width: int) -> Any:
    import triton_deq as td

    like = randn(1, 1)
    cell = td.MLPCell(width, 1).to(like.device, like.dtype)
    with torch.no_grad():
        cell.state.weight.copy_(randn(width, width) / (2 * width**0.5))
    return cell


HEADS, DEPTH = 10, 70


def _attention_tensors(randn, batch: int, queries: int, depth: int) -> tuple[Tensor, Tensor, Tensor, Any]:
    from triton_deq.ops.attention import Context

    q, k, v = randn(batch, queries, 3, HEADS, depth).unbind(2)
    positions, biases = randn(2 * queries, HEADS, depth), (randn(HEADS, depth), randn(HEADS, depth))
    memory = randn(batch, queries, HEADS, depth), randn(batch, queries, HEADS, depth)
    return q, k, v, Context(positions, *biases, *memory)


def _attention(kernel: str, randn, batch: int, queries: int, backend: str) -> Call:
    """One kernel by itself; the reference's gradient goes back through its graph."""
    from triton_deq.ops import attention as op
    from triton_deq.reference.attention import attention as reference

    spare = op.spare_columns(randn(1), DEPTH, backend)  # as the cell has them
    q, k, v, context = _attention_tensors(randn, batch, queries, DEPTH + spare)
    if kernel == "attention":
        return lambda: op.attention(q, k, v, context, backend)
    vector = torch.randn_like(q)
    if backend == "reference":
        return _backward(kernel, reference, vector, q, k, v, context)
    evaluated = op.attention_fwd(q, k, v, context)
    given = op.Given(q, k, v, context, vector)
    gradients = torch.stack((q, k, v), dim=2)
    delta, _ = op.query_gradient(given, evaluated, gradients, biases=False)
    calls: dict[str, Call] = {
        "attention_query_vjp": lambda: op.query_gradient(given, evaluated, gradients, biases=False),
        "attention_key_vjp": lambda: op.key_gradients(given, evaluated, delta, gradients, memory=False),
        "attention_position_vjp": lambda: op.position_gradient(given, evaluated, delta),
        "attention_jvp": lambda: op.derivative(given, evaluated, vector, vector, vector)[0],
    }
    return calls[kernel]


def _attention_torch(kernel: str, randn, batch: int, queries: int) -> Call:
    """As Transformer-XL's authors wrote it: two matrix products, and a shift by padding."""
    q, k, v, context = _attention_tensors(randn, batch, queries, DEPTH)
    if kernel == "attention":
        return lambda: _padded_attention(q, k, v, context)
    return _backward(kernel, _padded_attention, torch.randn_like(q), q, k, v, context)


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
    keys, values = torch.cat([context.memory_keys, k], 1), torch.cat([context.memory_values, v], 1)
    batch, queries, heads, depth = q.shape
    content = torch.einsum("bihd,bjhd->bhij", q + context.content_bias, keys)
    position = torch.einsum("bihd,nhd->bhin", q + context.position_bias, context.positions.flip(0))
    padded = torch.nn.functional.pad(position, (1, 0)).view(batch, heads, -1, queries)
    scores = content + padded[:, :, 1:].reshape(content.shape)
    hidden = torch.ones(content.shape[2:], dtype=torch.bool, device=q.device).triu(
        1 + keys.shape[1] - queries
    )
    weights = torch.softmax((scores * depth**-0.5).masked_fill(hidden, -torch.inf), dim=-1)
    return torch.einsum("bhij,bjhd->bihd", weights, values)


def _backward(
    kernel: str,
    function: Callable[..., Tensor],
    vector: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Any,
) -> Call:
    """The gradient in what the kernel of this name gives it for, of a value that is kept with its graph.

    A derivative along a direction goes twice back: it is that of the gradients in their vector.
    """
    if kernel == "attention_jvp":
        states = [each.detach().requires_grad_() for each in (q, k, v)]
        given = vector.clone().requires_grad_()
        gradients = torch.autograd.grad(function(*states, context), states, given, create_graph=True)
        directions = (vector,) * 3
        return lambda: torch.autograd.grad(gradients, given, directions, retain_graph=True)
    leaves = {
        "attention_query_vjp": (q,),
        "attention_key_vjp": (k, v),
        "attention_position_vjp": (context.positions,),
    }[kernel]
    for leaf in leaves:
        leaf.requires_grad_()
    value = function(q, k, v, context)
    return lambda: torch.autograd.grad(value, leaves, vector, retain_graph=True)


CALLS: dict[str, Callable[..., Call]] = {
    "anderson_residual": _residual,
    "anderson_advance": _advance,
    "anderson_step": _step,
    "broyden_residual": _broyden_residual,
    "broyden_advance": _broyden_advance,
    "mlp": _mlp,
    "mlp_vjp": _mlp_vjp,
    "norm": _norm,
    "norm_vjp": _norm_vjp,
    "feedforward": _feedforward,
    "feedforward_vjp": _feedforward_vjp,
    **{name: partial(_attention, name) for name in ATTENTION},
    "groupnorm": maps.groupnorm,
    "groupnorm_each": maps.groupnorm_each,
    "groupnorm_vjp": maps.groupnorm_vjp,
    "fusion": maps.fusion,
    "fusion_vjp": maps.fusion_vjp,
    "weightnorm": _weightnorm,
}
"""Our side of those whose launch parameters are tuned: of a drawing function, a shape and a backend."""
