"""The cases of `python -m bench run` one at a time under pytest-benchmark, for work on a single op.

    pytest bench --benchmark-save=before        then, after a change:
    pytest bench --benchmark-compare --benchmark-group-by=param:case

Variants do not take turns here and caches stay warm, so these numbers are no evidence about peers; that is
what `python -m bench run` is for. Each result carries the row that it would be, in `extra_info`.
"""

from dataclasses import asdict

import pytest

pytest.importorskip("pytest_benchmark")

from bench import environment as environments
from bench.cases import Case, Setting, Variant
from bench.groups import GROUPS
from bench.runner import make_row
from triton_deq.timing import Stopwatch, quantiles

DEVICE = environments.choose_device()
SETTING = Setting(DEVICE, "quick", 0, Stopwatch(DEVICE), "no")
ENVIRONMENT = environments.look(DEVICE)


def variants() -> list:
    """A test for each variant of each case."""
    found = []
    for group in GROUPS.values():
        for case in group(SETTING):
            name = " ".join(map(str, (case.group, *case.key)))
            for variant in case.variants:
                found.append(pytest.param(case, variant, id=f"{name} {variant.name}"))
    return found


@pytest.mark.parametrize(("case", "variant"), variants())
def test_case(benchmark, case: Case, variant: Variant) -> None:
    try:
        call = variant.prepare()
    except Exception as error:
        pytest.skip(str(error))

    def synchronised() -> None:
        call()
        SETTING.watch.synchronize()

    benchmark(synchronised)
    times = [1e3 * seconds for seconds in benchmark.stats.stats.data]
    row = make_row(case, variant.name, SETTING, ENVIRONMENT, {"backend": variant.backend, **quantiles(times)})
    benchmark.extra_info.update(asdict(row))
