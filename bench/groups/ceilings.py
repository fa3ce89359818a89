"""What the device can do at all: copy bandwidth, and matrix products in each dtype."""

from collections.abc import Iterator

import torch

from triton_deq.timing import Call

from ..cases import Case, Setting, Variant
from ..roofline import Work

GROUP = "ceilings"
COPY_BYTES = {"tiny": 1 << 16, "quick": 1 << 26, "full": 1 << 28}
SIDES = {"tiny": 64, "quick": 1024, "full": 2048}


def cases(setting: Setting) -> Iterator[Case]:
    yield _copy(setting)
    dtypes = [torch.float32, torch.bfloat16, torch.float16] if setting.gpu else [torch.float32]
    for dtype in dtypes:
        yield _product(setting, dtype)


def _copy(setting: Setting) -> Case:
    count = COPY_BYTES[setting.scale] * (8 if setting.gpu else 1) // 4

    def prepare() -> Call:
        source, target = torch.rand(count, device=setting.device), torch.empty(count, device=setting.device)
        return lambda: target.copy_(source)

    work = Work(traffic=8 * count, operations={})
    variants = (Variant("copy", prepare),)
    return Case(GROUP, "copy", "forward", torch.float32, (count,), variants, work=work)


def _product(setting: Setting, dtype: torch.dtype) -> Case:
    """Random operands: on zeros some devices are faster. float32 in IEEE arithmetic, PyTorch's default."""
    side = SIDES[setting.scale] * (4 if setting.gpu else 1)

    def prepare() -> Call:
        a, b = (torch.randn(side, side, device=setting.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    work = Work(traffic=3 * side * side * dtype.itemsize, operations={"product": 2 * side**3})
    variants = (Variant("matrix product", prepare),)
    return Case(GROUP, "matmul", "forward", dtype, (side, side), variants, work=work)
