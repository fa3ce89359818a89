"""The feed-forward's kernels."""

from collections.abc import Iterator

from ..reference import feedforward as reference
from .case import Case, Row, poisoned, relative_error, row, sum_bound

MOST_INNER = 75
"""The inner layer's width, at most: the interpreter is slow, and a second tile of columns shows as much."""


def check_feedforward(case: Case) -> Iterator[Row]:
    """The hidden layer of two tokens a sequence, with a mask and without, and its gradient."""
    from ..ops import feedforward as op

    batch, width = case.shape
    bound = sum_bound(case, width)
    inner = min(2 * width + 1, MOST_INNER)
    s, vector = (case.randn(2 * batch, width, stream=stream).unflatten(0, (batch, 2)) for stream in (0, 1))
    weight, bias, matrix = (
        case.randn(inner, width, stream=2),
        case.randn(inner, stream=3),
        case.randn(width, inner, stream=4),
    )
    mask = (case.randn(batch, inner, stream=5).unsqueeze(1) > -0.5) * s.new_tensor(1.25)
    for quantity, given in (("value", None), ("masked value", mask)):
        out = op.feedforward_fwd(s, weight, bias, given, poisoned(s, batch, 2, inner))
        expected = reference.feedforward(
            s.double(), weight.double(), bias.double(), None if given is None else given.double()
        )
        yield row(case, "feedforward", "feedforward", quantity, relative_error(out, expected), bound)

    gradient = op.feedforward_vjp_fwd(vector, matrix, out, poisoned(s, batch, 2, inner))
    expected = reference.feedforward_vjp(vector.double(), matrix.double(), out.double())
    yield row(case, "feedforward", "feedforward_vjp", "gradient", relative_error(gradient, expected), bound)
