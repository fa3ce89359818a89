"""The examples before and after the one line: the same losses."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

import triton_deq.compat.torchdeq as compat
from tests.compat import locuslab_formulas
from triton_deq import backend
from triton_deq.compat import locuslab

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def losses(name: str) -> list[float]:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(steps=3)


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    yield
    compat.uninstall()


def test_from_torchdeq():
    before = losses("from_torchdeq_before")
    assert losses("from_torchdeq_after") == pytest.approx(before, rel=1e-4)


def test_from_locuslab(monkeypatch):
    """Their package is not installed: the formulas stand in for it."""
    jacobian = types.SimpleNamespace(jac_loss_estimate=locuslab.jac_loss_estimate)
    monkeypatch.setitem(sys.modules, "lib", types.ModuleType("lib"))
    monkeypatch.setitem(sys.modules, "lib.solvers", locuslab_formulas)
    monkeypatch.setitem(sys.modules, "lib.jacobian", jacobian)
    before = losses("from_locuslab_before")
    assert losses("from_locuslab_after") == pytest.approx(before, rel=1e-4)


def test_from_textbook():
    """Both solve to a residual of 1e-3, over the batch there and of each sample here."""
    before = losses("from_textbook_before")
    assert losses("from_textbook_after") == pytest.approx(before, rel=5e-3)
