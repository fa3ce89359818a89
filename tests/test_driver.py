"""Every kernel's launch as a driver would see it."""

import json
import os
import subprocess
import sys

import pytest
from triton_deq.kernels.catalog import ENTRIES

from tests import driver

if driver.obstacle():
    pytest.skip(driver.obstacle(), allow_module_level=True)

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """In a process of its own: no interpreter, and the stand-in where Triton looks for the driver."""
    folder = tmp_path_factory.mktemp("driver")
    driver.build(folder)
    libraries = os.pathsep.join([str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "tests.driver", str(folder / "libcuda.so.1")],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_LIBCUDA_PATH": str(folder),
            "TRITON_CACHE_DIR": str(folder / "cache"),
            "LD_LIBRARY_PATH": libraries,
        },
        cwd=driver.HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_gets_what_it_was_given(found):
    """By Triton's own launch, and by those after it that go past Triton."""
    assert {row["kernel"] for row in found["catalog"]} == {entry.kernel.fn.__name__ for entry in ENTRIES}
    for row in found["catalog"]:
        assert row["got"] == row["wanted"], row["kernel"]


def test_a_kernel_is_compiled_once_for_numbers_that_it_leaves_open(found):
    """So that the last batch of an epoch, or one that has become smaller, does not wait for a compiler."""
    assert {row["kernel"]: row["compiled"] for row in found["catalog"] if row["compiled"] != 1} == {}


def test_launches_past_triton_take_the_kernel_that_it_takes(found):
    """Whatever the arguments: what Triton compiles a kernel anew for is told apart."""
    kernels = set()
    for row in found["toy"]:
        tritons, *past = row["launched"]
        assert past == [tritons] * 2, row["given"]
        kernels.add(tritons[0])
    assert len(kernels) > 50
