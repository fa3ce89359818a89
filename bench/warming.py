"""Compiles what a run will launch, on all cores at once: `python -m bench.warming PART PARTS SCALE GROUP...`.

A GPU that is borrowed for minutes should not wait for one core that compiles. Each process calls our variants
of its part of the cases once; Triton's cache on disk has the kernels from then on.
"""

import sys

from triton_deq.timing import Stopwatch

from . import environment as environments
from .cases import Setting


def main(part: int, parts: int, scale: str, groups: list[str]) -> int:
    from .groups import GROUPS

    device = environments.choose_device()
    setting = Setting(device, scale, 0, Stopwatch(device), "no")
    number, failed = 0, 0
    for group in groups:
        for case in GROUPS[group](setting):
            for variant in case.variants:
                number += variant.backend == "triton"
                if variant.backend == "triton" and number % parts == part:
                    try:
                        variant.prepare()()
                        setting.watch.synchronize()
                    except Exception as error:  # the row of the run itself will tell
                        failed += 1
                        print(group, *case.key, variant.name, f"{type(error).__name__}: {error}"[:300])
    print(f"part {part}: {failed} failed")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
