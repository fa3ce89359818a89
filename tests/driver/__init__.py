"""Triton's own way from Python to the driver, with a stand-in for the CUDA driver at its end.

The interpreter takes another way, and a GPU shows only what comes out. Here it is seen which parameters a
kernel would have got: at the first launch, which Triton makes, and at later ones, which go past it.
"""

import re
import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent


def obstacle() -> str:
    """What keeps Triton from building a launcher here; empty if nothing does."""
    from shutil import which

    if which("gcc") is None:
        return "Triton builds its launcher with a C compiler, and there is none"
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if headers.exists() else f"Triton builds its launcher with {headers}, which is missing"


def build(folder: Path) -> None:
    """Leave `libcuda.so.1` in the folder, with every function that this Triton's driver calls."""
    import triton

    nvidia = Path(triton.__file__).parent / "backends" / "nvidia"
    source = (HERE / "libcuda.c").read_text()
    called = set(re.findall(r"\bcu[A-Z]\w+(?=\()", (nvidia / "driver.c").read_text()))
    rest = sorted(called - set(re.findall(r"\bcu[A-Z]\w+(?=\()", source)))
    (folder / "rest.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in rest))
    subprocess.run(
        [
            *("gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1"),
            *(HERE / "libcuda.c", folder / "rest.c", "-I", nvidia / "include"),
        ],
        check=True,
    )
