"""What the rows of a verification must be."""

from collections.abc import Iterable

from triton_deq.verification import Row


def assert_within_bounds(rows: Iterable[Row]) -> None:
    over = [row for row in rows if not row.passed]
    assert not over, "\n".join(map(str, over))
