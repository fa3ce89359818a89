"""Transformer-XL's relative attention as an op, and its vector-Jacobian product.

The kernels never have a tensor of queries by keys in memory. Inside torch.compile, in the transforms of
torch.func and for tensors of several dtypes the ordinary operators run, which do. Under autocast the dtype is
that of the tensors, as products have made them.
"""

import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..backend import recorded
from ..reference import attention as reference
from ..reference.attention import Context, Weighted
from ..reference.record import accumulate_dtype
from .launch import PROGRAMS, at_most, kernels_serve, launch, next_power_of_2, precision

__all__ = [
    "Context",
    "Evaluated",
    "Weighted",
    "attention",
    "attention_evaluated",
    "attention_vjp",
    "spare_columns",
    "with_mask",
]


@dataclass(frozen=True)
class Evaluated:
    """An evaluated attention, with what its products would otherwise compute again.

    value: o `[B, T, H, d]`, differentiable. sums: `log Σ_j exp(S_ij)` `[B, H, T]`, in the accumulation dtype.
    """

    value: Tensor
    sums: Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, context: Context, backend: str = "auto") -> Tensor:
    """o `[B, T, H, d]`, as in the reference; differentiable to any order in every tensor but the seed.

    Args:
        q, k, v: `[B, T, H, d]`, floating; views of one buffer are read as they are.
        context: positions, biases, memory, window and dropout, of q's dtype and on its device.
        backend: "auto", "triton" or "reference".

    float32 products are summed of three TF32 products each, whose error is that of float32, or of one where
    `torch.backends.cuda.matmul.fp32_precision` is "tf32"; 16-bit ones add up in float32.
    """
    return attention_evaluated(q, k, v, context, backend).value


def attention_evaluated(
    q: Tensor, k: Tensor, v: Tensor, context: Context, backend: str = "auto"
) -> Evaluated | Weighted:
    """`attention`'s value, with what `attention_vjp` may be given so that it need not evaluate again.

    Ordinary operators keep the softmax `[B, H, T, M + T]`, the kernels a number for each of its rows.
    """
    _check(q, k, v, context)
    if not _served(q, k, v, context, backend):
        return reference.attention_evaluated(q, k, v, context)
    tensors = (q, k, v, *_parameters(context))
    if recorded(*tensors):
        return Evaluated(*AttentionFunction.apply(*tensors, context))
    return attention_fwd(q, k, v, context)


def attention_vjp(
    vector: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
    backend: str = "auto",
    evaluated: Evaluated | Weighted | None = None,
) -> Tensor:
    """The gradients of `⟨vector, attention(q, k, v)⟩` in q, k and v, `[B, T, 3, H, d]`; differentiable.

    One tensor, because one matrix product makes q, k and v, and takes their gradients.

    Args:
        vector: `[B, T, H, d]`, of q's dtype.
        q, k, v, context, backend: as in `attention`.
        evaluated: of `attention_evaluated` with the same arguments; by default, or where it lacks a graph
            that is needed, computed here.
    """
    _check(q, k, v, context)
    if vector.shape != q.shape:
        raise ValueError(
            f"vector has shape {tuple(vector.shape)}, q {tuple(q.shape)}: pass a vector shaped like the value"
        )
    if not _served(q, k, v, context, backend, vector):
        known = evaluated if isinstance(evaluated, Weighted) else None
        if known is not None and recorded(q, k, v, *_parameters(context)) and not known.value.requires_grad:
            known = None  # no gradient would find its way back from it
        return reference.attention_vjp(vector, q, k, v, context, known)
    given = evaluated if isinstance(evaluated, Evaluated) else None
    tensors = (vector, q, k, v, *_parameters(context))
    if recorded(*tensors):
        return AttentionVJPFunction.apply(*tensors, context, given)
    return states_gradients(vector, q, k, v, context, given)


def with_mask(context: Context, queries: tuple[int, int], backend: str = "auto") -> Context:
    """The context for many evaluations: where ordinary operators will serve, with its dropout mask made.

    queries: B and T.
    """
    tensors = _parameters(context)
    if context.dropout == 0 or kernels_serve(context.positions, backend, *tensors, autocast=True):
        return context
    batch, length = queries
    shape = torch.Size((batch, len(context.content_bias), length, length + context.memory))
    return context._replace(mask=reference.dropout_mask(context, shape))


def spare_columns(like: Tensor, depth: int, backend: str = "auto") -> int:
    """How many zeros behind each head's d entries let the kernels read its rows 16 bytes at a time.

    They change no product. 0 where ordinary operators will serve. like: a tensor of the dtype, on the device.
    """
    return -depth % (16 // like.element_size()) if kernels_serve(like, backend, autocast=True) else 0


# ------------------------------------------------------------------------------------------------ the checks


def _check(q: Tensor, k: Tensor, v: Tensor, context: Context) -> None:
    """Raise ValueError, or TypeError for a seed of another kind, for arguments that do not fit each other."""
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}: pass [B, T, H, d]")
    batch, queries, *head = q.shape
    _check_shape("k", k, q.shape, "q's shape")
    _check_shape("v", v, q.shape, "q's shape")
    _check_shape("context.content_bias", context.content_bias, head, "[H, d] of q")
    _check_shape("context.position_bias", context.position_bias, head, "[H, d] of q")
    keys, values = context.memory_keys, context.memory_values
    if (keys is None) != (values is None):
        missing = "memory_keys" if keys is None else "memory_values"
        raise ValueError(f"context.{missing} is None, its partner is not: pass both, or neither for M = 0")
    if keys is not None and values is not None:
        _check_shape("context.memory_keys", keys, (batch, context.memory, *head), "[B, M, H, d] as in q")
        _check_shape("context.memory_values", values, keys.shape, "the shape of memory_keys")
    positions, needed = context.positions, context.memory + queries
    if positions.dim() != 3 or positions.shape[1:] != q.shape[2:] or len(positions) < needed:
        raise ValueError(
            f"context.positions has shape {tuple(positions.shape)}: pass a row for each distance from 0 to "
            f"M + T − 1, [{needed} or more, {head[0]}, {head[1]}]"
        )
    if context.window is not None and context.window < 1:
        raise ValueError(
            f"context.window={context.window}: a query sees itself at least; pass 1 or more, or None"
        )
    if not 0 <= context.dropout < 1:
        raise ValueError(f"context.dropout={context.dropout}: pass a probability in [0, 1)")
    if context.dropout > 0 and context.seed is None:
        raise ValueError(
            f"context.dropout={context.dropout} without a seed: pass seed, an int64 tensor [1] on q's device"
        )
    seed = context.seed
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise TypeError(f"context.seed is {seed.dtype} {tuple(seed.shape)}: pass an int64 tensor [1]")


def _check_shape(name: str, tensor: Tensor, shape: Any, remedy: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: pass {tuple(shape)}, {remedy}")


def _served(
    q: Tensor, k: Tensor, v: Tensor, context: Context, backend: str, vector: Tensor | None = None
) -> bool:
    return kernels_serve(q, backend, k, v, *_parameters(context), vector, autocast=True)


def _parameters(context: Context) -> tuple[Tensor | None, ...]:
    """The tensors of a context that have gradients."""
    return (
        context.positions,
        context.content_bias,
        context.position_bias,
        context.memory_keys,
        context.memory_values,
    )


def _with_parameters(context: Context, tensors: tuple[Tensor | None, ...]) -> Context:
    names = ("positions", "content_bias", "position_bias", "memory_keys", "memory_values")
    values: dict[str, Any] = dict(zip(names, tensors, strict=True))
    return context._replace(**values)


# ---------------------------------------------------------------------------------------------- the launches


@dataclass(frozen=True)
class Tangents:
    """Of a derivative ȯ of o along (a, b, c) in (q, k, v), what the gradients of `⟨vector, ȯ⟩` need.

    a, b, c: `[B, T, H, d]`, contiguous. mean, balance: `[B, H, T]`, see `attention_jvp_kernel`.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    mean: Tensor
    balance: Tensor


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Evaluated:
    """The value and the sums by the kernel."""
    given = Given(q, k, v, context)
    value = torch.empty_like(q, memory_format=torch.contiguous_format)
    batch, queries, heads, _ = q.shape
    sums = q.new_empty(batch, heads, queries, dtype=accumulate_dtype(q.dtype))
    tiles = _tiles(q.dtype, queries, pipelined=True)
    launch(
        _kernels().attention_kernel,
        (batch * heads * -(-queries // tiles["BLOCK"]),),
        *given.rows,
        *given.constants,
        value,
        sums,
        *given.layouts,
        heads,
        queries,
        context.memory,
        given.window,
        MEMORY=context.memory > 0,
        **given.common,
        **tiles,
    )
    return Evaluated(value, sums)


_OF_STATES = (True, True, True, False, False, False, False, False)
"""Which gradients a vector-Jacobian product has: of q, k and v."""


def states_gradients(
    vector: Tensor, q: Tensor, k: Tensor, v: Tensor, context: Context, evaluated: Evaluated | None
) -> Tensor:
    """The gradients of `⟨vector, attention(q, k, v)⟩` in q, k and v `[B, T, 3, H, d]` by the kernels."""
    gradients = _places(q, q.shape[1], 3)
    attention_gradients(vector, q, k, v, context, evaluated, _OF_STATES, states=gradients)
    return gradients


def attention_gradients(
    vector: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: Context,
    evaluated: Evaluated | None,
    needed: tuple[bool, ...],
    tangents: Tangents | None = None,
    states: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients of `⟨vector, attention(q, k, v)⟩` by the kernels, those that are needed.

    In order: of q, k, v, positions, content_bias, position_bias, memory_keys, memory_values.
    With `tangents` those of `⟨vector, ȯ⟩`. states: where those of q, k and v shall be.
    """
    _, of_k, of_v, of_positions, of_content_bias, of_position_bias, *of_memory = needed
    found: list[Tensor | None] = [None] * len(needed)
    evaluated = attention_fwd(q, k, v, context) if evaluated is None else evaluated
    given = Given(q, k, v, context, vector)
    states = _places(q, q.shape[1], 3) if states is None else states
    found[:3] = states.unbind(2)
    # Its kernel comes first, because the others read what it leaves in delta.
    delta, biases = query_gradient(given, evaluated, states, of_content_bias or of_position_bias, tangents)
    if biases is not None:
        found[4], found[5] = biases[0].to(q.dtype), biases[1].to(q.dtype)
    if of_k or of_v:
        key_gradients(given, evaluated, delta, states, memory=False, tangents=tangents)
    if of_positions:
        found[3] = position_gradient(given, evaluated, delta, tangents)
    if any(of_memory):
        remembered = _places(q, context.memory, 2)
        found[6:] = remembered.unbind(2)
        if context.memory:
            key_gradients(given, evaluated, delta, remembered, memory=True, tangents=tangents)
    return [gradient if need else None for gradient, need in zip(found, needed, strict=True)]


def _places(q: Tensor, rows: int, count: int) -> Tensor:
    """For `count` gradients, `[B, rows, count, H, d]`: they lie as the cell has q, k and v."""
    batch, _, *head = q.shape
    return q.new_empty(batch, rows, count, *head)


class Given:
    """The tensors that every kernel reads, as it reads them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, context: Context, vector: Tensor | None = None):
        memory = context.memory > 0
        keys, values = (context.memory_keys, context.memory_values) if memory else (k, v)
        assert keys is not None
        assert values is not None
        self.shape, self.context = q.shape, context
        self.dtype, self.device = q.dtype, q.device
        self.window = min(context.window or q.shape[1] + context.memory, q.shape[1] + context.memory)
        tensors = [q, k, v, keys, values, context.positions[None]]
        placed = [_placed(each) for each in (tensors if vector is None else [vector, *tensors])]
        self.rows = tuple(rows for rows, _ in placed)
        self.layouts = tuple(layout for _, layout in placed)
        seed = q if context.seed is None else context.seed
        self.constants = (context.content_bias.contiguous(), context.position_bias.contiguous(), seed)
        width = 16 // q.element_size()
        # With d, because what the kernels write and the tangents have rows of H·d.
        align = math.gcd(width, q.shape[-1], *(entries for layout in self.layouts for entries in layout))
        self.common = {
            "DROPOUT": float(context.dropout),
            "SCALE": context.factor,
            "HEAD": (*parts_of(q.shape[-1]), q.shape[-1], align),
            **precision(q.dtype),
        }


def _placed(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor at a multiple of 16 bytes, as every compiled kernel has it, and the layout from there.

    The layout: the offset of the tensor's first entry and its strides but the last, which is 1.
    """
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    strides = [0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    if 0 < offset <= tensor.storage_offset():
        start = tensor.as_strided((1,), (1,), tensor.storage_offset() - offset)
        return start, (offset, *strides[:-1])
    return tensor, (0, *strides[:-1])


def parts_of(depth: int) -> tuple[int, int]:
    """The columns of a head as two powers of 2: 70 is 64 + 16, which spares a product 3 columns in 8."""
    whole = max(16, next_power_of_2(depth))
    rest = max(16, next_power_of_2(depth - whole // 2)) if depth > whole // 2 else whole
    return (whole // 2, rest) if rest < whole // 2 else (whole, 0)


def _tiles(dtype: torch.dtype, rows: int, *, second: bool = False, pipelined: bool = False) -> dict[str, int]:
    """The block size of a kernel and its warps, of 16 rows each: more would only do the same again.

    rows: of what a program takes a block of. second: of second derivatives, which hold more tiles. Larger
    blocks would spill more: in float32 each operand of a product is held as two. And blocks of 64 rows in 4
    warps would be multiplied by Hopper's wgmma, whose descriptors ptxas 12.8 gets wrong here: of a kernel
    with these parts of a head it lost half of one, and launches faulted (see `inspection.unset_registers`).
    The next block's rows are copied to shared memory meanwhile, which takes registers off the kernels as
    well. pipelined: also in float32, where the products with a gradient spill more for it and gain little.
    """
    narrow = dtype in (torch.float16, torch.bfloat16)
    block = max(16, min(32 if narrow and not second else 16, next_power_of_2(rows)))
    warps = 4 if dtype == torch.float64 else block // 16
    return {
        "BLOCK": block,
        "num_warps": warps,
        "num_stages": 2 if narrow or (pipelined and dtype == torch.float32) else 1,
        # Without a bound ptxas gives some of these as few as 64 registers, and spills 16 kB a thread.
        **(at_most(255) if second and dtype == torch.float32 else {}),
    }


def query_gradient(
    given: Given, evaluated: Evaluated, gradients: Tensor, biases: bool, tangents: Tangents | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradient in q, into the first of `gradients` `[B, T, 3, H, d]`.

    Returned: Δ `[B, H, T]`, and with `biases` the gradients in both `[2, H, d]`.
    """
    batch, queries, heads, depth = given.shape
    memory = given.context.memory
    tiles = _tiles(given.dtype, queries, second=tangents is not None)
    blocks = -(-queries // tiles["BLOCK"])
    delta = torch.empty_like(evaluated.sums)
    parts = delta.new_empty((2, batch * blocks, heads, depth) if biases else (1,))
    launch(
        _kernels().attention_query_vjp_kernel,
        (batch * heads * blocks,),
        *given.rows,
        *given.constants,
        evaluated.value,
        evaluated.sums,
        delta,
        *_tangents(tangents, evaluated),
        gradients,
        parts,
        *given.layouts,
        batch,
        heads,
        queries,
        memory,
        given.window,
        MEMORY=memory > 0,
        BIASES=biases,
        SECOND=tangents is not None,
        **given.common,
        **tiles,
    )
    return delta, parts.sum(1) if biases else None


def key_gradients(
    given: Given,
    evaluated: Evaluated,
    delta: Tensor,
    gradients: Tensor,
    memory: bool,
    tangents: Tangents | None = None,
) -> None:
    """The gradients in the current keys and values, or in those in memory.

    gradients: `[B, T or M, 3 or 2, H, d]`; the last two places are theirs.
    """
    batch, queries, heads, _ = given.shape
    context = given.context
    count = context.memory if memory else queries
    vector, q, *current, memory_keys, memory_values, positions = zip(given.rows, given.layouts, strict=True)
    keys_and_values = (memory_keys, memory_values) if memory else current
    tensors, layouts = zip(vector, q, *keys_and_values, positions, strict=True)
    tiles = _tiles(given.dtype, count, second=tangents is not None)
    lead = -count % tiles["BLOCK"] if memory else 0
    launch(
        _kernels().attention_key_vjp_kernel,
        (batch * heads * -(-(lead + count) // tiles["BLOCK"]),),
        *tensors,
        *given.constants,
        evaluated.sums,
        delta,
        *_tangents(tangents, evaluated),
        gradients,
        *layouts,
        heads,
        queries,
        context.memory,
        count,
        0 if memory else context.memory,
        lead,
        given.window,
        gradients.shape[2],
        SECOND=tangents is not None,
        **given.common,
        **tiles,
    )


def position_gradient(
    given: Given, evaluated: Evaluated, delta: Tensor, tangents: Tangents | None = None
) -> Tensor:
    """The gradient in all positions, also in those that no distance reaches."""
    batch, queries, heads, depth = given.shape
    distances = given.context.memory + queries
    tiles = _tiles(given.dtype, distances, second=tangents is not None)
    blocks = -(-distances // tiles["BLOCK"])
    parts = max(1, min(batch, PROGRAMS // (heads * blocks)))
    gradients = delta.new_empty(parts, distances, heads, depth)
    launch(
        _kernels().attention_position_vjp_kernel,
        (parts * heads * blocks,),
        *given.rows,
        *given.constants,
        evaluated.sums,
        delta,
        *_tangents(tangents, evaluated),
        gradients,
        *given.layouts,
        batch,
        heads,
        queries,
        given.context.memory,
        given.window,
        parts,
        MEMORY=given.context.memory > 0,
        SECOND=tangents is not None,
        **given.common,
        **tiles,
    )
    gradient = evaluated.value.new_zeros(given.context.positions.shape)
    gradient[:distances] = gradients.sum(0)
    return gradient


def derivative(
    given: Given, evaluated: Evaluated, a: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tangents]:
    """ȯ `[B, T, H, d]`, the derivative of o along (a, b, c) in (q, k, v), and what its gradients need."""
    batch, queries, heads, _ = given.shape
    memory = given.context.memory
    found = torch.empty_like(evaluated.value)
    mean, balance = torch.empty_like(evaluated.sums), torch.empty_like(evaluated.sums)
    tangents = Tangents(a.contiguous(), b.contiguous(), c.contiguous(), mean, balance)
    tiles = _tiles(given.dtype, queries, second=True, pipelined=True)
    launch(
        _kernels().attention_jvp_kernel,
        (batch * heads * -(-queries // tiles["BLOCK"]),),
        *given.rows,
        *given.constants,
        evaluated.value,
        evaluated.sums,
        tangents.a,
        tangents.b,
        tangents.c,
        found,
        mean,
        balance,
        *given.layouts,
        heads,
        queries,
        memory,
        given.window,
        MEMORY=memory > 0,
        **given.common,
        **tiles,
    )
    return found, tangents


def _tangents(tangents: Tangents | None, evaluated: Evaluated) -> tuple[Tensor, ...]:
    """As arguments of a kernel; without them it reads none."""
    if tangents is None:
        return (*(evaluated.value,) * 3, *(evaluated.sums,) * 2)
    return tangents.a, tangents.b, tangents.c, tangents.mean, tangents.balance


# ----------------------------------------------------------------------------------------------- the autograd


class AttentionFunction(torch.autograd.Function):
    """`(q, k, v, positions, content_bias, position_bias, memory_keys, memory_values) ↦ (o, sums)`."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        *parameters, context = others
        context = _with_parameters(context, tuple(parameters))
        evaluated = attention_fwd(q, k, v, context)
        ctx.save_for_backward(q, k, v, *parameters, context.seed, evaluated.value, evaluated.sums)
        ctx.mark_non_differentiable(evaluated.sums)
        ctx.set_materialize_grads(False)  # or the sums get a gradient of zeros
        ctx.options = _options(context)
        return evaluated.value, evaluated.sums

    @staticmethod
    def backward(ctx, grad: Tensor | None, _: None):
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        *tensors, seed, value, sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            return *_by_operators(reference.attention, grad, tensors, ctx.options, seed), None
        context = _context(tensors[3:], ctx.options, seed)
        needed = ctx.needs_input_grad[:-1]
        q, k, v = tensors[:3]
        return *attention_gradients(grad, q, k, v, context, Evaluated(value, sums), needed), None


class AttentionVJPFunction(torch.autograd.Function):
    """`(vector, q, k, v, positions, ..., memory_values) ↦` the gradients of `⟨vector, o⟩` in q, k and v.

    With the gradients a, b, c in those three, the function that backward differentiates is `⟨vector, ȯ⟩`, ȯ
    being the derivative of o along (a, b, c): its gradient in vector is ȯ itself.
    """

    @staticmethod
    def forward(ctx, vector: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any):
        *parameters, context, evaluated = others
        context = _with_parameters(context, tuple(parameters))
        evaluated = attention_fwd(q, k, v, context) if evaluated is None else evaluated
        value = evaluated.value.detach()
        ctx.save_for_backward(vector, q, k, v, *parameters, context.seed, value, evaluated.sums)
        ctx.options = _options(context)
        return states_gradients(vector, q, k, v, context, evaluated)

    @staticmethod
    def backward(ctx, grad: Tensor):
        *tensors, seed, value, sums = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            return *_by_operators(reference.attention_vjp, grad, tensors, ctx.options, seed), None, None
        vector, q, k, v, *parameters = tensors
        context, evaluated = _context(parameters, ctx.options, seed), Evaluated(value, sums)
        of_vector, tangents = derivative(Given(q, k, v, context, vector), evaluated, *grad.unbind(2))
        needed = ctx.needs_input_grad[1:-2]
        gradients: list[Tensor | None] = [None] * len(needed)
        if any(needed):
            gradients = attention_gradients(vector, q, k, v, context, evaluated, needed, tangents)
        return (of_vector if ctx.needs_input_grad[0] else None), *gradients, None, None


def _by_operators(
    function: Any, grad: Tensor, tensors: list[Tensor | None], options: dict[str, Any], seed: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients by ordinary operators, which can be differentiated again."""
    # Aliases have graph nodes of their own: where k depends on q, q's own gradient must not go by way of k.
    tensors = [None if each is None else each.view_as(each) for each in tensors]
    output = function(*tensors[:-5], _context(tensors[-5:], options, seed))
    leaves = [each for each in tensors if each is not None and each.requires_grad]
    if not leaves:
        return (None,) * len(tensors)
    gradients = torch.autograd.grad(output, leaves, grad, create_graph=True, allow_unused=True)
    found = iter(gradients)
    return tuple(next(found) if each is not None and each.requires_grad else None for each in tensors)


def _options(context: Context) -> dict[str, Any]:
    return {"window": context.window, "dropout": context.dropout, "scale": context.scale}


def _context(parameters: Any, options: dict[str, Any], seed: Tensor | None) -> Context:
    """The inverse of `_parameters` and `_options`."""
    positions, content_bias, position_bias, memory_keys, memory_values = parameters
    return Context(positions, content_bias, position_bias, memory_keys, memory_values, seed=seed, **options)


@cache
def _kernels() -> ModuleType:
    from ..kernels import attention as kernels

    return kernels
