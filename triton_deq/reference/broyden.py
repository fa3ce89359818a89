"""Good Broyden with a bounded memory in PyTorch, and the state that the kernels share.

With `g = f(x) − x` and the last m pairs `s_j = x_{j+1} − x_j`, `φ_j = f(x_{j+1}) − f(x_j)`, Broyden's
updates of the Jacobian of g from −I, oldest pair first, amount to

    x⁺ = f(x) + Σ c_j φ_j,   M c = Sᵀ g,   M_ij = s_i · s_j [i not newer than j] − s_i · φ_j

which is the compact representation of Byrd, Nocedal & Schnabel, "Representations of quasi-Newton matrices
and their use in limited memory methods", Math. Programming 63 (1994), theorem 6.1, inverted by the
Sherman-Morrison-Woodbury formula. In the form `J⁻¹ ≈ −I + U Vᵀ` of Broyden's method: U = −Φ M⁻¹, V = S.
So nothing of the size of a state is updated but the newest pair, and M gains one row and one column.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .anderson import LEAST_SQUARE, WEIGHT_LIMIT
from .buffers import fresh
from .record import Record, accumulate_dtype
from .rows import SAFE, assign, block_size, blocks, keep_best, regular, runs, unsafe


@dataclass
class BroydenState:
    """Everything a solve keeps, for B samples of N entries, m pairs in m + 1 slots.

    Step k closes the pair in slot (k − 1) mod (m + 1) and opens one in slot k mod (m + 1): an open slot
    holds x and f(x) themselves, until the next step subtracts them.

    x: `[B, N]`, the iterate that f is evaluated at. The reference lets x and best change roles.
    best, other, turned: as in `AndersonState`.
    moves, changes: `[m + 1, B, N]` rings of `s_j` and `φ_j`.
    matrix: `[B, m + 1, m + 1]` float64, M by slots; a step renews one row and column. On the host in the
        reference; so is `squares`.
    squares: `[B, m + 1]` float64, `‖s_j‖²`.
    dots: sums of the present step over slots i, p being the newest pair: row 0 `s_i · g`, row 1
        `s_i · (s_p − φ_p)`, row 2 `s_p · φ_i`; in column m + 1 `‖g‖²`, `‖f‖²` and `‖s_p‖²`.
        Kernels: float64 `[B, P, 3, ≥ m + 2]`, partial sums. Reference: `[B, 1, 3, m + 2]` float64.
    record, before, active, launched: as in `AndersonState`.
    spare: `[b, 2, N]`, g and s_p − φ_p of a block of samples, in the accumulation dtype (reference only).
    sums: `broyden_sums` of this step, once it was asked for (reference only).
    """

    x: Tensor
    best: Tensor
    moves: Tensor
    changes: Tensor
    matrix: Tensor
    squares: Tensor
    dots: Tensor
    record: Record
    before: Tensor
    active: Tensor
    spare: Tensor
    other: Tensor
    turned: bool = False
    sums: tuple[NDArray[np.float64], bool] | None = None
    launched: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def slots(self) -> int:
        return self.moves.shape[0]

    @cached_property
    def landings(self) -> tuple[Tensor, ...]:
        """`[B, N]`, each slot of the changes: where f may leave its value."""
        return self.changes.unbind()


def slots_for(memory: int, max_steps: int) -> int:
    """m + 1, m being as many pairs as `max_steps` evaluations of f can use."""
    return max(min(memory, max_steps - 1), 1) + 1


def broyden_start(x: Tensor, memory: int, tol: float, max_steps: int) -> BroydenState:
    """The state before the first step from `x` `[B, N]`, contiguous, which becomes the state's own."""
    batch, entries = x.shape
    slots = slots_for(memory, max_steps)
    wide = accumulate_dtype(x.dtype)
    moves, changes = fresh((2, slots, batch, entries), wide, x.device)
    return BroydenState(
        x=x,
        best=x.clone(),
        moves=moves,
        changes=changes,
        matrix=torch.zeros((batch, slots, slots), dtype=torch.float64, device="cpu"),
        squares=torch.zeros((batch, slots), dtype=torch.float64, device="cpu"),
        dots=x.new_zeros((batch, 1, 3, slots + 1), dtype=torch.float64),
        record=Record(batch, tol, torch.device("cpu")),
        before=torch.empty(0, dtype=torch.float64, device=x.device),
        active=torch.empty(0, dtype=torch.int32, device=x.device),
        spare=x.new_empty((block_size(batch, entries), 2, entries), dtype=wide),
        other=x.new_empty((0, entries)),
    )


def broyden_residual(state: BroydenState, fx: Tensor, step: int) -> None:
    """Close the newest pair, open the next, and write the sums of this step into `dots`.

    fx: `[B, N]`, f at `state.x`. Pairs of samples that have stopped stay as they are.
    """
    state.sums = None
    running = state.record.running
    for rows in blocks(running, len(state.spare)):
        _residual_of(state, fx, step, rows, running[rows])


def _residual_of(state: BroydenState, fx: Tensor, step: int, rows: slice, running: NDArray[np.bool_]) -> None:
    """`broyden_residual` for a block of samples."""
    wide, slots = state.moves.dtype, state.slots
    slot, newest, filled = step % slots, (step - 1) % slots, min(step + 1, slots)
    x, fx, dots = state.x[rows].to(wide), fx[rows].to(wide), state.dots[rows, 0]
    moves, changes, spare = state.moves[:, rows], state.changes[:, rows], state.spare[: len(x)]
    residual, curvature = spare.unbind(1)

    torch.sub(fx, x, out=residual)
    dots[:, 0, slots] = torch.linalg.vector_norm(residual, dim=1)
    dots[:, 1, slots] = torch.linalg.vector_norm(fx, dim=1)
    if step > 0:
        move, change = moves[newest], changes[newest]
        for pair, value in ((move, x), (change, fx)):
            if running.all():
                torch.sub(value, pair, out=pair)
            else:
                assign(pair, torch.sub(value, pair, out=curvature), running)
        torch.sub(move, change, out=curvature)
        # The open slot's products are computed for nothing, but in one stroke with the others.
        dots[:, :2, :filled] = torch.bmm(spare, moves[:filled].permute(1, 2, 0))
        dots[:, 2:, :filled] = torch.bmm(move[:, None], changes[:filled].permute(1, 2, 0))
        dots[:, 2, slots] = torch.linalg.vector_norm(move, dim=1)
    assign(moves[slot], x, running)
    if fx.data_ptr() != changes[slot].data_ptr():  # else f has left it there
        assign(changes[slot], fx, running)
    dots[:, :, slots].square_()


def broyden_sums(state: BroydenState, step: int) -> tuple[NDArray[np.float64], bool]:
    """`[B, 3, m + 2]` float64 on the host, what `dots` holds, and whether the squares are `regular`."""
    if state.sums is None:
        sums = state.dots[:, 0].cpu().numpy()  # the one read of the device in a step
        fine = regular(_squares(sums, step))
        if not fine:
            _sum_again(state, sums, step)
        state.sums = sums, fine
    return state.sums


def _squares(dots: NDArray[np.float64], step: int) -> NDArray[np.float64]:
    """`‖g‖²` and `‖f‖²`, and from the second step on the newest `‖s‖²`, `[B, 2 or 3]`."""
    return dots[:, : 3 if step > 0 else 2, -1]


def broyden_advance(state: BroydenState, step: int, *, relative: bool, over_batch: bool, last: bool) -> int:
    """Judge every sample, keep the best iterates, and move the samples that go on to their next iterate.

    `last` says that no evaluation of f follows. Returns how many samples go on.
    """
    (sums, fine), slots = broyden_sums(state, step), state.slots
    running = state.record.running
    improved, moving = state.record.judge(
        sums[:, 0, slots], sums[:, 1, slots], relative=relative, over_batch=over_batch, regular=fine
    )
    keep_best(state, improved, moving)
    going = int(np.count_nonzero(moving))
    broyden_mix(state, step, running, moving if going and not last else None)
    return going


def broyden_mix(
    state: BroydenState, step: int, running: NDArray[np.bool_], moving: NDArray[np.bool_] | None
) -> None:
    """Take in the newest pair of the samples that ran, and move those of `moving` to their next iterate.

    running, moving: `[B]`; without `moving` nobody moves.
    """
    slots, record = state.slots, state.record
    slot, newest, filled = step % slots, (step - 1) % slots, min(step + 1, slots)
    sums, _ = broyden_sums(state, step)
    if step > 0:
        _extend(state, sums, newest, running)
    if moving is None:
        return

    pairs = record.count.numpy()
    coefficients, useful = _coefficients(state, sums[:, 0, :slots], slot, pairs, filled)
    np.copyto(pairs, np.where(useful, np.minimum(pairs + 1, slots - 1), 1), where=moving)

    # The open slot holds f(x), so with a weight of one there the sum is the next iterate.
    coefficients[:, slot] = 1
    weights = torch.from_numpy(coefficients[:, None]).to(state.changes)
    ring = state.changes[:filled].transpose(0, 1)
    for rows in runs(moving):
        if state.x.dtype == ring.dtype:
            torch.bmm(weights[rows], ring[rows], out=state.x[rows, None, :])
        else:
            state.x[rows] = torch.bmm(weights[rows], ring[rows])[:, 0]


def _extend(state: BroydenState, dots: NDArray[np.float64], newest: int, running: NDArray[np.bool_]) -> None:
    """The newest pair's row and column of M, and its square, for the samples that run."""
    slots = state.slots
    matrix, squares = state.matrix.numpy(), state.squares.numpy()
    rows = slice(None) if running.all() else running
    matrix[rows, newest, :] = -dots[rows, 2, :slots]
    matrix[rows, :, newest] = dots[rows, 1, :slots]
    squares[rows, newest] = dots[rows, 2, slots]


def _coefficients(
    state: BroydenState, right: NDArray[np.float64], slot: int, pairs: NDArray[np.float64], filled: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """c `[B, filled]` of the slots in use, and a mask `[B]`: False where it was of no use and is zero.

    Every pair is first scaled to unit `‖s_j‖`, so the solve sees no units; a pair without a move is left out.
    """
    with np.errstate(all="ignore"):
        age = (slot - np.arange(filled)) % state.slots
        scale = _scales(state.squares.numpy()[:, :filled], age, pairs)
        matrix = scaled_matrix(state.matrix.numpy()[:, :filled, :filled], scale)
        right = np.where(scale > 0, right[:, :filled], 0) * scale
        try:
            coefficients = scale * np.linalg.solve(matrix, right[:, :, None])[:, :, 0]
        except np.linalg.LinAlgError:  # one singular sample fails them all
            coefficients = (
                scale * torch.linalg.solve_ex(*map(torch.from_numpy, (matrix, right))).result.numpy()
            )
        useful = np.abs(coefficients).sum(axis=1) <= WEIGHT_LIMIT  # false for NaN too
    if not useful.all():
        coefficients[~useful] = 0
    return coefficients, useful


def _scales(
    squares: NDArray[np.float64], age: NDArray[np.int64], pairs: NDArray[np.float64]
) -> NDArray[np.float64]:
    """1 / ‖s_j‖ for the pairs that a sample may use, else 0. Age 0 is the open slot."""
    valid = (age >= 1) & (age <= pairs[:, None]) & (squares > LEAST_SQUARE)
    return np.where(valid, 1 / np.sqrt(squares), 0)


def scaled_matrix(matrix: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """M of unit pairs, and the identity where a pair is left out."""
    used = scale > 0
    matrix = np.where(used[:, :, None] & used[:, None, :], matrix, 0) * scale[:, :, None] * scale[:, None, :]
    diagonal = np.arange(matrix.shape[1])
    matrix[:, diagonal, diagonal] += ~used
    return matrix


def _sum_again(state: BroydenState, dots: NDArray[np.float64], step: int) -> None:
    """Replace sums of float32 squares near over- or underflow by sums in float64."""
    slots = state.slots
    if state.moves.dtype == torch.float64:
        return
    slot, newest, filled = step % slots, (step - 1) % slots, min(step + 1, slots)
    for sample in unsafe(_squares(dots, step), state.record):
        moves, changes = state.moves[:filled, sample], state.changes[:filled, sample]
        vectors = [changes[slot].double() - moves[slot].double(), changes[slot].double()]
        vectors += [moves[newest].double()] if step > 0 else []
        squares = dots[sample, : len(vectors), slots]
        if all(
            SAFE[0] < square < SAFE[1] or not vector.any()
            for square, vector in zip(squares, vectors, strict=True)
        ):
            continue  # what is zero is truly zero
        squares[:] = [vector.square().sum().item() for vector in vectors]
        if step > 0:
            products = (
                (moves, vectors[0]),
                (moves, vectors[2] - changes[newest].double()),
                (changes, vectors[2]),
            )
            for row, (ring, vector) in enumerate(products):
                dots[sample, row, :filled] = (ring.double() @ vector).cpu().numpy()


def broyden_adjoint(state: BroydenState, grad: Tensor) -> Tensor:
    """`u ≈ g (I − J)⁻¹` by the inverse that a solve has left behind: `u = g + Σ d_j s_j`, `Mᵀ d = Φᵀ g`.

    Each sample's pairs are those of the step it stopped at. A sample whose d is not of use gets g itself.
    Source: SHINE, Ramzi et al., arXiv 2106.00553, section 2.

    grad: `[B, N]`, of the state's dtype. Returns u, of the same.
    """
    slots, wide = state.slots, state.moves.dtype
    record = state.record.on_host()
    filled = min(int(record.steps.max().item()), slots)  # slots beyond were never written
    moves, changes = (ring[:filled].transpose(0, 1) for ring in (state.moves, state.changes))
    age = (record.steps.numpy().astype(np.int64)[:, None] - 1 - np.arange(slots)) % slots
    grad = grad.to(wide)
    products = torch.bmm(changes, grad[:, :, None])[..., 0].double().cpu().numpy()

    with np.errstate(all="ignore"):
        scale = _scales(state.squares.cpu().numpy(), age, record.count.numpy())[:, :filled]
        matrix = scaled_matrix(state.matrix.cpu().numpy()[:, :filled, :filled], scale)
        right = np.where(scale > 0, products, 0) * scale
        unit = torch.linalg.solve_ex(torch.from_numpy(matrix).mT, torch.from_numpy(right)).result.numpy()
        length = torch.linalg.vector_norm(grad, dim=1, dtype=torch.float64).cpu().numpy()
        useful = np.abs(unit).sum(axis=1) <= WEIGHT_LIMIT * length
        weights = np.where(useful[:, None], scale * unit, 0)

    chosen = torch.from_numpy(weights[:, None]).to(grad)
    moves = torch.where(chosen.mT != 0, moves.to(wide), 0)  # what is not of use may hold a NaN
    return (grad + torch.bmm(chosen, moves)[:, 0]).to(state.x.dtype)
