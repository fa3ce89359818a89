"""The house: which part may import which, one name per op, and an import that asks no device anything."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import triton_deq

ROOT = Path(__file__).resolve().parents[1]

# Every part of the package with its floor. A part may import from lower floors only; parts on one floor do
# not know each other. A part is a folder or a file right under triton_deq/; "__init__" is the public names.
FLOORS = (
    ("openmp", "status", "environment", "memory", "page", "precision", "timing", "trees", "weight_caches"),
    ("backend",),
    ("checks", "kernels", "emulation"),
    ("reference",),
    ("compiled",),
    ("ops", "arnoldi"),
    ("solvers", "cells"),
    ("jacobian",),
    ("implicit",),
    ("gradients",),
    ("deq",),
    ("models",),
    ("__init__",),
    ("verification", "inspection", "data"),
    ("training", "compat"),
    ("demo", "profile"),
    ("cli",),
    ("__main__",),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}

# The arrows that floors alone would allow and the design does not.
ONLY_IMPORTED_BY = {
    "kernels": {"ops", "verification", "inspection"},
    "compiled": {"ops"},
    "emulation": {"ops"},
}
IMPORTS_NOTHING_OF_OURS = {"kernels"}

# Third-party packages. What is not named here is for everyone.
RUNTIME = {"torch", "numpy"}
THIRD_PARTY = {
    "backend": RUNTIME | {"numba"},
    "compiled": RUNTIME | {"numba", "llvmlite"},
    "kernels": {"triton"},
    "emulation": RUNTIME | {"triton"},
    "ops": RUNTIME | {"triton"},
    "verification": RUNTIME | {"triton"},
    "inspection": RUNTIME | {"triton"},
    "data": RUNTIME | {"PIL", "sklearn"},
    "training": RUNTIME | {"matplotlib", "rich"},
    "demo": RUNTIME | {"matplotlib", "rich", "torchdeq"},
    "profile": RUNTIME | {"matplotlib", "rich", "torchvision", "transformers"},
    "compat": RUNTIME | {"torchdeq"},
}

# Modules of kernels/, reference/ and ops/ that serve all ops and are none.
HELPERS = {
    "__init__",
    "buffers",
    "mixing",
    "systems",
    "primitives",
    "products",
    "heads",
    "activations",
    "record",
    "rows",
    "interpreted",
    "launch",
    "places",
}


def modules() -> dict[str, Path]:
    """Every module's full name and file, as installed."""
    found = {}
    for package, folder in (("triton_deq", ROOT / "triton_deq"), ("triton_deq.kernels", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts))] = path
    return found


MODULES = modules()


def part_of(module: str) -> str:
    """`triton_deq.solvers.loop` belongs to `solvers`, `triton_deq` itself to `__init__`."""
    return [*module.split("."), "__init__"][1]


def exists(module: str) -> bool:
    return module in MODULES or f"{module}.__init__" in MODULES


def imports(name: str, source: str) -> Iterator[tuple[int, str]]:
    """The line and the full name of each module that `source` imports, also inside functions."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            anchor = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(anchor + ([node.module] if node.module else []))
            for alias in node.names:
                # `from . import x` imports the module x where there is one, else a name of the package.
                yield node.lineno, f"{base}.{alias.name}" if exists(f"{base}.{alias.name}") else base


def faults(name: str, source: str) -> list[str]:
    """What is wrong with the imports of one module."""
    part = part_of(name)
    if part not in FLOOR:
        return [f"{part!r} has no floor: add it to FLOORS in tests/test_architecture.py"]
    found = []
    for line, target in imports(name, source):
        top = target.split(".")[0]
        if top == "triton_deq":
            used = part_of(target)
            if used == part and used != "__init__":
                continue
            if used not in FLOOR:
                fault = f"{used!r} has no floor: add it to FLOORS in tests/test_architecture.py"
            elif part in IMPORTS_NOTHING_OF_OURS:
                fault = f"{part} imports nothing else of triton_deq"
            elif part not in ONLY_IMPORTED_BY.get(used, {part}):
                fault = f"only {', '.join(sorted(ONLY_IMPORTED_BY[used]))} may import {used}"
            elif FLOOR[used] >= FLOOR[part]:
                fault = f"{part} may import from lower floors only, and {used} is not below it"
            else:
                continue
        elif top in sys.stdlib_module_names or top in THIRD_PARTY.get(part, RUNTIME):
            continue
        else:
            fault = f"{part} may import {', '.join(sorted(THIRD_PARTY.get(part, RUNTIME)))}, not {top}"
        found.append(f"line {line}: imports {target}: {fault}")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_arrows_point_one_way(name: str) -> None:
    path = MODULES[name]
    found = faults(name, path.read_text(encoding="utf-8"))
    assert not found, "\n".join([f"{path.relative_to(ROOT)}:", *found])


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("triton_deq.cells.mlp", "from ..solvers import Anderson"),
        ("triton_deq.cells.mlp", "import triton_deq"),
        ("triton_deq.cells.mlp", "import triton_deq.solvers.loop"),
        ("triton_deq.cells.mlp", "def late():\n    from .. import jacobian"),
        ("triton_deq.kernels.anderson", "import torch"),
        ("triton_deq.kernels.anderson", "from ..backend import choose"),
        ("triton_deq.reference.anderson", "import triton.language as tl"),
        ("triton_deq.reference.anderson", "from ..ops.anderson import anderson_start"),
        ("triton_deq.solvers.loop", "from ..kernels import anderson"),
        ("triton_deq.deq", "import kernels"),
        ("triton_deq.deq", "import bench.peers"),
        ("triton_deq.novelty", "import torch"),
    ],
)
def test_a_wrong_arrow_is_seen(name: str, source: str) -> None:
    assert faults(name, source)


def test_one_op_has_one_name_everywhere() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the catalog needs triton")
    listing = run("""
        import json
        from triton_deq.kernels.catalog import ENTRIES
        print(json.dumps([[entry.op, entry.name] for entry in ENTRIES]))
    """)
    entries = json.loads(listing)
    assert all(op and name for op, name in entries), entries

    places = {
        "kernels/{}.py": names("kernels"),
        "triton_deq/reference/{}.py": names("triton_deq/reference"),
        "triton_deq/ops/{}.py": names("triton_deq/ops"),
        "tests/ops/test_{}.py": {name.removeprefix("test_") for name in names("tests/ops", "test_*.py")},
        "an entry with op={!r} in kernels/catalog/": {op for op, _ in entries},
    }
    missing = [
        f"{op} lacks {place.format(op)}"
        for op in sorted(set().union(*places.values()))
        for place, there in places.items()
        if op not in there
    ]
    assert not missing, "\n".join(["a module that is no op belongs in HELPERS", *missing])


def test_every_kernel_has_a_benchmark() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the catalog needs triton")
    listing = run("""
        import json
        from triton_deq.kernels.catalog import ENTRIES
        print(json.dumps(sorted({entry.name.split("[")[0] for entry in ENTRIES})))
    """)
    benchmarks = (ROOT / "bench/groups/kernels.py").read_text(encoding="utf-8")
    missing = [kernel for kernel in json.loads(listing) if f'"{kernel}"' not in benchmarks]
    assert not missing, f"bench/groups/kernels.py lacks {missing}"


def names(folder: str, pattern: str = "*.py") -> set[str]:
    """The ops that a folder has a module of. What is named `op_part` is a part of `op`."""
    found = {path.stem for path in (ROOT / folder).glob(pattern)} - HELPERS
    return {name for name in found if not any(name.startswith(f"{other}_") for other in found)}


def test_import_asks_no_device_anything() -> None:
    run("""
        import sys
        import torch

        def refuse(*args, **kwargs):
            raise AssertionError("importing triton_deq asked for a device")

        questions = (
            "is_available", "device_count", "current_device", "current_accelerator", "get_device_capability",
            "get_device_name", "get_device_properties", "init", "_lazy_init", "synchronize",
        )
        for module in (torch.cuda, torch.xpu, torch.mps, torch.accelerator, torch.backends.mps):
            for question in questions:
                if hasattr(module, question):
                    setattr(module, question, refuse)

        def compilers():
            return {name for name in sys.modules if name.split(".")[0] in ("triton", "numba")}

        before = compilers()  # some builds of PyTorch import triton by themselves
        import triton_deq
        assert compilers() == before, "importing triton_deq imported triton or numba"
        assert not torch.cuda.is_initialized(), "importing triton_deq initialised CUDA"
    """)


def run(code: str) -> str:
    """Run `code` in a fresh interpreter that compiles kernels, and return what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", triton_deq.__all__)
def test_public_names_have_a_docstring(name: str) -> None:
    doc = getattr(triton_deq, name).__doc__ or ""
    # Dataclasses and named tuples write their signature where there is no docstring.
    assert doc.strip(), f"td.{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"td.{name} has no docstring"
