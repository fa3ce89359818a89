"""A pytest plugin, `-p bench.telling`: each failure is told in full when it happens, not at the end.

On a borrowed GPU the end may not come.
"""

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n=== {report.nodeid} ({report.when})\n{report.longreprtext}\n", flush=True)
