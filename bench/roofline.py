"""The least that an operation must move and compute, and the least time for it; numbers from the package."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

DTYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Work:
    """traffic: bytes through memory; operations: by the unit that does them."""

    traffic: int
    operations: Mapping[str, int]


def of_kernels(names: list[str], batch: int, entries: int) -> Work | None:
    """The work of these catalog entries together; None where there is no Triton to read the catalog with."""
    try:
        from triton_deq.kernels.catalog import ENTRIES
    except ImportError:
        return None
    catalog = {entry.name: entry for entry in ENTRIES}
    entries_of = [catalog[name] for name in names]
    operations: dict[str, int] = {}
    for entry in entries_of:
        for unit, count in entry.work(entry, batch, entries).items():
            operations[unit] = operations.get(unit, 0) + count
    return Work(sum(entry.traffic(entry, batch, entries) for entry in entries_of), operations)


def least_ms(work: Work, device: str) -> float | None:
    """On the device of this name, by its datasheet; None for one that the package has no datasheet of."""
    from triton_deq.inspection.roofline import DEVICES

    known = next((peaks for name, peaks in DEVICES.items() if name in device.lower()), None)
    if known is None or not set(work.operations) <= set(known.rates):
        return None
    arithmetic = [count / known.rates[unit] for unit, count in work.operations.items()]
    return 1e3 * max([work.traffic / known.bandwidth, *arithmetic])
