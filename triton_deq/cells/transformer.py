"""The Transformer cell: relative attention and feed-forward, with the input injected into q, k and v."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backend import tracked
from ..checks import check_count, check_number
from ..ops.attention import (
    Context,
    Evaluated,
    Weighted,
    attention_evaluated,
    attention_vjp,
    spare_columns,
    with_mask,
)
from ..ops.feedforward import feedforward_branch, feedforward_vjp
from ..ops.norm import norm, norm_value, norm_vjp_plus, norm_vjps
from ..precision import autocast_dtype
from .layers import does_as, normalise_weight, weights_of

Heads = tuple[Tensor, Tensor, Tensor]
"""q, k and v, `[B, T, H, d]` each."""


class Memory(NamedTuple):
    """What a segment leaves to the next, without gradients: all that keys and values are made of.

    Attributes:
        value: `[B, M, D]`, the fixed points of the last M tokens.
        injection: `[B, M, 2·H·d]`, what was injected into their keys and values; None in a cell without.
    """

    value: Tensor
    injection: Tensor | None


class Weights(NamedTuple):
    """The matrices of a solve: weight normalisation and autocast's casts are done once for all steps.

    Where kernels serve, zeros may widen D, too: of rows that lie at 16 bytes a GPU's library multiplies
    matrices more than twice as fast as of rows of 700 16-bit entries.
    """

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    out_bias: Tensor
    down_bias: Tensor


class Masks(NamedTuple):
    """Variational dropout (Gal & Ghahramani, arXiv 1506.02142): one mask for all tokens and steps.

    Each is 0 or 1/(1 − p): attention and output `[B, 1, D]`, inner `[B, 1, inner]`. pulled is
    output/(1 − p): what a gradient passes on its way back to the inner layer.
    """

    attention: Tensor
    inner: Tensor
    output: Tensor
    pulled: Tensor


class TransformerInjection(NamedTuple):
    """u, all that does not depend on z. Where kernels serve, zeros may widen each head's d.

    Attributes:
        qkv: `[B, T, 3·H·d]`, added to q, k and v; None in a cell without injection.
        context: what the attention reads beside q, k and v.
        weights: the matrices.
        masks: of the dropout, or None.
        shape: of z.
        room: `[B, T, ≥ D]`, zeros behind D; where no gradient is recorded, rows that a product takes wider
            than they are pass through it. None where D is wide enough.
    """

    qkv: Tensor | None
    context: Context
    weights: Weights
    masks: Masks | None
    shape: tuple[int, int, int]
    room: Tensor | None = None


class TransformerCell(nn.Module):
    """A Transformer-XL layer as a DEQ's f: relative attention with memory, then feed-forward.

    With `A(n) = attention(n W_qkv + U x + b) W_out + b_out` and `F(s) = relu(s W_up + b_up) W_down + b_down`:
    `s = LN(z + m ⊙ A(z))`, `z⁺ = LN(s + m ⊙ F(s))`; or with `pre_norm` `s = LN(z + m ⊙ A(LN(z)))` and
    `z⁺ = s + m ⊙ F(s)`. As in the authors' code the norms have no gain or offset, and the residual of the
    feed-forward starts at the normalised s (arXiv 1909.01377, section 4.1; arXiv 2106.14342, section 5.2).

    Args:
        width: D, even.
        heads: H.
        inner: width of the feed-forward.
        head_width: d; by default D / H.
        pre_norm: where the norms stand.
        dropout: probability of the variational masks m, in [0, 1), while training: behind A, behind F, behind
            the relu, and one for the position encodings.
        attention_dropout: probability for entries of the attention's softmax, also fixed for a whole solve.
        window: how many tokens back a query sees, itself included; None for all.
        weight_norm: `w = g v / ‖v‖` for every matrix of f (torch's parametrization).
        injected: False leaves `U x + b` out, for a stack of cells with weights of their own.
        init_std: matrices and biases of the attention start from N(0, init_std²), other biases at 0.
        device, dtype: of the parameters, as in PyTorch's modules.

    Shapes: z `[B, T, D]`. `inject(x)` takes the embedded tokens `[B, T, D]`, or `(tokens, memory)` with the
    `Memory` of the segment before, or None. The samples of a batch are its sequences.

    The cell knows its vector-Jacobian product in closed form (`vjp`), so a backward solve needs no autograd
    engine, and the Jacobian penalty no double backward.

    Raises:
        TypeError, ValueError: an argument outside its range; tokens, z or a memory of another width or batch;
            a layer that was replaced or has a hook: the cell reads weights and does not call its layers.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        head_width: int | None = None,
        *,
        pre_norm: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        window: int | None = None,
        weight_norm: bool = False,
        injected: bool = True,
        init_std: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_count("width", width)
        check_count("heads", heads)
        check_count("inner", inner)
        if width % 2:
            raise ValueError(f"width={width} must be even: half of a position's encoding are sines")
        if head_width is None:
            if width % heads:
                raise ValueError(
                    f"width={width} cannot be cut into heads={heads}: give head_width, or a width that "
                    f"is a multiple of {heads}"
                )
            head_width = width // heads
        check_count("head_width", head_width)
        for name, probability in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            check_number(name, probability, 0, 1)
            if probability == 1:
                raise ValueError(f"{name}={probability!r} drops everything: pick a number in [0, 1)")
        if window is not None:
            check_count("window", window)
        check_number("init_std", init_std, 0)
        self.width, self.heads, self.head_width = width, heads, head_width
        self.pre_norm = pre_norm
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.window = window

        across = heads * head_width
        kind: Any = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(width, 3 * across, bias=False, **kind)
        self.positions = nn.Linear(width, across, bias=False, **kind)
        self.content_bias = nn.Parameter(torch.empty(heads, head_width, **kind))
        self.position_bias = nn.Parameter(torch.empty(heads, head_width, **kind))
        self.out = nn.Linear(across, width, **kind)
        self.up = nn.Linear(width, inner, **kind)
        self.down = nn.Linear(inner, width, **kind)
        self.injection = nn.Linear(width, 3 * across, **kind) if injected else None
        self.reset_parameters(init_std)
        if weight_norm:
            for layer in (self.qkv, self.positions, self.out, self.up, self.down):
                normalise_weight(layer)

    def reset_parameters(self, init_std: float) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, 0, init_std)

    # ------------------------------------------------------------------------------- once a solve

    def inject(self, x: Any) -> TransformerInjection:
        """u from the embedded tokens `[B, T, D]`, or from `(tokens, memory)`."""
        tokens, memory = x if isinstance(x, tuple) else (x, None)
        self._check(tokens, memory)
        dtype = autocast_dtype(tokens.device) or self.content_bias.dtype
        like = tokens.new_empty(1, dtype=dtype)
        spare, behind = (spare_columns(like, columns) for columns in (self.head_width, self.width))
        weights = self._weights(like, self.width + behind, spare)
        batch, length, _ = tokens.shape
        room = tokens.new_zeros(batch, length, self.width + behind, dtype=dtype) if behind else None
        keys, values = self._of_memory(memory, weights, spare)
        reach = length + (0 if keys is None else keys.shape[1])
        context = Context(
            _with_zeros(self._positions(reach, tokens.device).to(dtype), -1, spare),
            _with_zeros(self.content_bias.to(dtype), -1, spare),
            _with_zeros(self.position_bias.to(dtype), -1, spare),
            keys,
            values,
            self.window,
            self.attention_dropout if self._drops_attention else 0.0,
            torch.randint(2**63 - 1, (1,), device=tokens.device) if self._drops_attention else None,
            scale=self.head_width**-0.5,
        )
        context = with_mask(context, (batch, length))
        qkv = None if self.injection is None else self._wider(self.injection(tokens), -1, spare)
        shape = (batch, length, self.width)
        return TransformerInjection(qkv, context, weights, self._masks(tokens), shape, room)

    def memory(self, value: Tensor, u: TransformerInjection, before: Memory | None, length: int) -> Memory:
        """The last `length` tokens of the memory before and of this segment's fixed points."""
        injection = None
        if u.qkv is not None:
            keys_and_values = u.qkv.unflatten(-1, (3, self.heads, -1))[..., 1:, :, : self.head_width]
            injection = keys_and_values.flatten(-3)
        if before is not None:
            value = torch.cat([before.value, value], dim=1)
            if injection is not None and before.injection is not None:
                injection = torch.cat([before.injection.to(injection.dtype), injection], dim=1)
        kept = max(value.shape[1] - length, 0)
        return Memory(value[:, kept:].detach(), None if injection is None else injection[:, kept:].detach())

    def initial_state(self, u: TransformerInjection) -> Tensor:
        """Zeros, `[B, T, D]`."""
        return self.content_bias.new_zeros(u.shape)

    def select(self, u: TransformerInjection, samples: Tensor) -> TransformerInjection:
        """u for these samples of the batch alone."""
        if u.context.dropout:
            raise ValueError(
                f"attention_dropout={u.context.dropout} draws by a sample's place in the batch, which "
                "compact changes: leave compact out while training, or set attention_dropout=0"
            )
        keys, values = u.context.memory_keys, u.context.memory_values
        context = u.context._replace(
            memory_keys=None if keys is None else keys[samples],
            memory_values=None if values is None else values[samples],
        )
        masks = None if u.masks is None else Masks(*(mask[samples] for mask in u.masks))
        qkv = None if u.qkv is None else u.qkv[samples]
        room = None if u.room is None else u.room[: len(samples)]
        return u._replace(
            qkv=qkv, context=context, masks=masks, shape=(len(samples), *u.shape[1:]), room=room
        )

    def _weights(self, like: Tensor, width: int, spare: int) -> Weights:
        """The matrices as the products take them: autocast would cast them anew at every step.

        like: of the products' dtype. width: D with the zeros behind it; spare: zeros behind each head's d.
        """
        for name in ("qkv", "out", "up", "down", "positions"):
            if not does_as(nn.Linear, getattr(self, name)):
                raise TypeError(
                    f"the layer {name!r} of the cell was replaced or has a hook, and the cell reads its "
                    "weight without calling it: change the weight by torch.nn.utils.parametrize instead"
                )
        layers, least = (
            (self.qkv, self.out, self.up, self.down),
            ((0, width), (width, 0), (0, width), (width, 0)),
        )
        qkv, out, up, down = weights_of(layers, like.dtype, like, least)
        out_bias, down_bias = (
            _with_zeros(layer.bias.to(like.dtype), -1, width - self.width) for layer in (self.out, self.down)
        )
        return Weights(
            self._wider(qkv, -2, spare), self._wider(out, -1, spare), up, down, out_bias, down_bias
        )

    def _wider(self, rows: Tensor, dim: int, spare: int) -> Tensor:
        """With zeros behind each of the heads that lie along `dim`, which counts from the last: −1."""
        heads = rows.unflatten(dim, (-1, self.head_width))
        return _with_zeros(heads, dim, spare).flatten(dim - 1, dim)

    def _of_memory(
        self, memory: Memory | None, weights: Weights, spare: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values `[B, M, H, d]` of the memory, which are the same in every step."""
        if memory is None or memory.value.shape[1] == 0:
            return None, None
        value = norm(memory.value)[0] if self.pre_norm else memory.value
        value = _with_zeros(value, -1, weights.qkv.shape[-1] - self.width)
        made = functional.linear(value, weights.qkv[len(weights.qkv) // 3 :])
        if memory.injection is not None:
            made = made + self._wider(memory.injection, -1, spare).to(made.dtype)
        keys, values = made.unflatten(-1, (2, self.heads, -1)).unbind(2)
        return keys, values

    def _positions(self, reach: int, device: torch.device) -> Tensor:
        """The keys `[reach, H, d]` of the distances 0, 1, …: sines and cosines through a matrix."""
        distance = torch.arange(reach, device=device, dtype=torch.float32)
        even = torch.arange(0, self.width, 2, device=device, dtype=torch.float32)
        angle = distance[:, None] * 10000.0 ** (-even / self.width)
        encoding = torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.content_bias.dtype)
        if self.training and self.dropout:
            encoding = encoding * _mask((1, self.width), self.dropout, encoding)
        return functional.linear(encoding, self.positions.weight).unflatten(-1, (self.heads, self.head_width))

    @property
    def _drops_attention(self) -> bool:
        return self.training and self.attention_dropout > 0

    def _masks(self, tokens: Tensor) -> Masks | None:
        if not (self.training and self.dropout):
            return None
        widths = (self.width, self.up.out_features, self.width)
        like = self.content_bias
        attention, inner, output = (
            _mask((tokens.shape[0], 1, width), self.dropout, like) for width in widths
        )
        return Masks(attention, inner, output, pulled=output / (1 - self.dropout))

    # ------------------------------------------------------------------------------- every step

    def forward(self, z: Tensor, u: TransformerInjection) -> Tensor:
        """The next state `[B, T, D]` from z and `u = inject(x)`."""
        return self._evaluate(z, u, norm_value)[0]

    def write(self, z: Tensor, u: TransformerInjection, out: Tensor) -> None:
        """The next state into `out`; without gradients."""
        if does_as(TransformerCell, self):
            self._evaluate(z, u, norm_value, out)
        else:
            out.copy_(self.forward(z, u))

    @property
    def vjp(self) -> Callable[[Tensor, Any], tuple[Tensor, Callable[[Tensor], Tensor]]] | None:
        """`(z, u) ↦ (value, ε ↦ εᵀJ)` for ε `[..., B, T, D]`, or None in a subclass with its own forward."""
        return self._vjp if does_as(TransformerCell, self) else None

    def _vjp(self, z: Tensor, u: TransformerInjection) -> tuple[Tensor, "Pullback"]:
        kept: list[tuple[Tensor, Tensor]] = []

        def keeping(*given: Any, out: None = None, dtype: torch.dtype | None = None) -> Tensor:
            value, *rest = norm(*given)
            kept.append((rest[0], rest[1]))
            return value if dtype is None else value.to(dtype)

        value, evaluation = self._evaluate(z, u, keeping)
        first = kept.pop(0) if self.pre_norm else None
        middle, *last = kept
        return value, Pullback(u, *evaluation, first, middle, last[0] if last else None, z.dtype)

    def _evaluate(
        self, z: Tensor, u: TransformerInjection, normed: Callable[..., Tensor], out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Heads, Evaluated | Weighted, Tensor]]:
        """The value; and q, k and v, the evaluated attention, and what is behind the relu.

        normed: a LayerNorm of a residual sum.
        """
        if z.shape != u.shape:
            raise ValueError(f"z has shape {tuple(z.shape)}, and this u is for {u.shape}: give z that shape")
        masks = (None, None, None) if u.masks is None else u.masks[:3]
        place = _place(u) if normed is norm_value else None
        n = z
        if self.pre_norm:
            n = normed(z, dtype=u.weights.qkv.dtype) if place is None else normed(z, out=place)
        heads = self._heads(_taken(n, u, n is place), u)
        attended = attention_evaluated(*heads, u.context)
        mixed = attended.value.flatten(2)
        branch = functional.linear(mixed, u.weights.out, u.weights.out_bias)[..., : self.width]
        s = normed(z, branch, masks[0]) if place is None else normed(z, branch, masks[0], also=place)

        taken, up, down = _taken(s, u, place is not None), u.weights.up, u.weights.down
        branch, inner = feedforward_branch(
            taken, up, self.up.bias, down, u.weights.down_bias, masks[1], kept=1 / (1 - self.dropout)
        )
        branch = branch[..., : self.width]
        if not self.pre_norm:
            return normed(s, branch, masks[2], out=out), (heads, attended, inner)
        value = (
            torch.add(s, branch, out=out) if masks[2] is None else torch.addcmul(s, branch, masks[2], out=out)
        )
        return value.to(s.dtype), (heads, attended, inner)

    def _heads(self, n: Tensor, u: TransformerInjection) -> Heads:
        """q, k and v `[B, T, H, d]`, views of one product; n as products take it."""
        if u.qkv is None:
            product = functional.linear(n, u.weights.qkv)
        else:
            product = torch.addmm(u.qkv.flatten(0, 1), n.flatten(0, 1), u.weights.qkv.t())
        width = product.shape[-1] // (3 * self.heads)  # of a head, zeros behind it included
        q, k, v = product.view(*n.shape[:2], 3, self.heads, width).unbind(2)
        return q, k, v

    def _check(self, tokens: Any, memory: Any) -> None:
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or tokens.shape[-1] != self.width:
            given = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"x is {given}: give the embedded tokens as a tensor [B, T, {self.width}]")
        if memory is None:
            return
        if not isinstance(memory, Memory):
            raise TypeError(f"memory is a {type(memory).__name__}: give the cell's Memory, or None")
        if memory.value.dim() != 3 or memory.value.shape[::2] != tokens.shape[::2]:
            raise ValueError(
                f"memory.value has shape {tuple(memory.value.shape)}: it must be [{len(tokens)}, M, "
                f"{self.width}] for tokens of shape {tuple(tokens.shape)}"
            )
        wanted = (
            None if self.injection is None else (*memory.value.shape[:2], 2 * self.heads * self.head_width)
        )
        found = None if memory.injection is None else tuple(memory.injection.shape)
        if found != wanted:
            raise ValueError(f"memory.injection has shape {found}: this cell needs {wanted}")

    def extra_repr(self) -> str:
        place = "pre" if self.pre_norm else "post"
        return f"{self.heads} heads of {self.head_width}, {place}-norm, window={self.window}"


def _with_zeros(tensor: Tensor, dim: int, count: int) -> Tensor:
    return functional.pad(tensor, (0, 0) * (-1 - dim) + (0, count)) if count else tensor


def _place(u: TransformerInjection) -> Tensor | None:
    """Where rows `[B, T, D]` may be left for the product that takes them next, if they need zeros behind."""
    if u.room is None or tracked():  # who records a gradient may keep rows
        return None
    return u.room[..., : u.shape[-1]]


def _taken(rows: Tensor, u: TransformerInjection, there: bool = False) -> Tensor:
    """Rows `[B, T, D]` as products take them: in their dtype, and with the zeros that its matrices have.

    there: they have been left in `_place(u)`.
    """
    if u.room is None:
        return rows.to(u.weights.qkv.dtype)
    if there:
        return u.room
    place = _place(u)
    if place is None:
        return _with_zeros(rows.to(u.room.dtype), -1, u.room.shape[-1] - rows.shape[-1])
    place.copy_(rows)
    return u.room


def _mask(shape: tuple[int, ...], probability: float, like: Tensor) -> Tensor:
    """0 with the probability, else 1 / (1 − probability)."""
    kept = torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - probability)
    return kept / (1 - probability)


@dataclass(frozen=True, eq=False)  # torch.compile hashes what it calls, before it has fields
class Pullback:
    """`ε ↦ εᵀJ` of a `TransformerCell` at a state, `[..., B, T, D]`; differentiable.

    evaluated: the attention. inner: behind the relu. first, middle, last: the norms' `(n, 1/σ)`, None where
    there is no such norm.
    """

    u: TransformerInjection
    heads: Heads
    evaluated: Evaluated | Weighted
    inner: Tensor
    first: tuple[Tensor, Tensor] | None
    middle: tuple[Tensor, Tensor]
    last: tuple[Tensor, Tensor] | None
    dtype: torch.dtype

    def __call__(self, vector: Tensor) -> Tensor:
        if vector.dim() == 3:
            return self.product(vector)
        return torch.stack([self.product(each) for each in vector.flatten(0, -4)]).view(vector.shape)

    def plus(self, shift: Tensor) -> "Adjoint":
        """`x ↦ xJ + g`."""
        return Adjoint(self, shift)

    def product(self, vector: Tensor, shift: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """`vJ`, plus the shift if given, `[B, T, D]`; left in `out` if given, without gradients."""
        weights, masks, place = self.u.weights, self.u.masks, _place(self.u)
        pulled, dropped = (None, None) if masks is None else (masks.pulled, masks.attention)
        if self.last is None:
            at_s, of_branch = vector, _masked(vector, pulled, weights.down.dtype, place)
        else:
            at_s, of_branch = norm_vjps(
                vector, *self.last, mask=pulled, dtype=weights.down.dtype, branch_out=place
            )
        of_inner = feedforward_vjp(_taken(of_branch, self.u, of_branch is place), weights.down, self.inner)
        more = _times(of_inner, weights.up)[..., : vector.shape[-1]]

        # Of the two terms the first may have gaps between its rows.
        at_z, of_branch = norm_vjps(
            more, *self.middle, at_s, dropped, weights.out.dtype, branch_out=place, addend=shift
        )
        of_branch = _taken(of_branch, self.u, of_branch is place)
        of_mixed = _times(of_branch, weights.out).view(self.heads[0].shape)
        of_heads = attention_vjp(of_mixed, *self.heads, self.u.context, evaluated=self.evaluated)
        of_n = _times(of_heads.flatten(2), weights.qkv)[..., : vector.shape[-1]]
        if self.first is not None:
            return norm_vjp_plus(of_n, *self.first, at_z, out=out)
        return (at_z + of_n).to(self.dtype) if out is None else torch.add(at_z, of_n, out=out)


@dataclass(frozen=True, eq=False)
class Adjoint:
    """`x ↦ xJ + g`, the map of a backward solve, which can leave its value in the solver's ring."""

    pullback: Pullback
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.pullback.product(x, self.shift)

    def write(self, x: Tensor, out: Tensor) -> None:
        self.pullback.product(x, self.shift, out)


def _masked(vector: Tensor, mask: Tensor | None, dtype: torch.dtype, place: Tensor | None) -> Tensor:
    """`m ⊙ v` in dtype, in one pass where no gradient is recorded, and there in the place if there is one."""
    if mask is None or tracked():
        return (vector if mask is None else vector * mask).to(dtype)
    place = vector.new_empty(vector.shape, dtype=dtype) if place is None else place
    return torch.mul(vector, mask, out=place)


def _times(vector: Tensor, weight: Tensor) -> Tensor:
    """In the weight's dtype: a forward under autocast has a backward that is not."""
    return vector.to(weight.dtype) @ weight
