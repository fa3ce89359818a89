"""Convolutions with weights that oneDNN has laid out: PyTorch's values, and when they serve."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import triton_deq as td
from triton_deq import backend as backends
from triton_deq.cells import mdeq_layers, prepacked
from triton_deq.cells.prepacked import Prepacked

pytestmark = pytest.mark.skipif(not prepacked._AVAILABLE, reason="PyTorch has no oneDNN here")


@pytest.fixture(autouse=True)
def _kernels_cannot(monkeypatch):
    monkeypatch.setattr(backends, "interpreting", lambda: False)


@pytest.fixture
def packed(monkeypatch):
    """How many weights were packed, as a list of their shapes."""
    seen = []

    class Spy:
        def _reorder_convolution_weight(self, weight, *rest):
            seen.append(tuple(weight.shape))
            return torch.ops.mkldnn._reorder_convolution_weight(weight, *rest)

        def _convolution_pointwise(self, *given):
            return torch.ops.mkldnn._convolution_pointwise(*given)

    monkeypatch.setattr(prepacked, "_ONEDNN", Spy())
    return seen


def maps(*shape, **kind):
    return torch.randn(shape, **kind).contiguous(memory_format=torch.channels_last)


def hold(product, x, weight, stride=1):
    stride, padding = (stride, stride), (weight.shape[2] // 2,) * 2
    found = product.conv2d(x, weight, stride, padding)
    wanted = functional.conv2d(x.double(), weight.double(), None, stride, padding)
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    return found


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_values_are_pytorchs(size, stride, packed):
    product, weight = Prepacked(), maps(24, 7, size, size)
    for batch in (2, 5, 3):  # a solve's batch gets smaller when what has stopped leaves it
        found = hold(product, maps(batch, 7, 10, 6), weight, stride)
        assert found.is_contiguous(memory_format=torch.channels_last)
    state = torch.randn(2, 3 * 7 * 60)  # maps with others between their samples
    hold(product, state[:, 420:840].unflatten(1, (10, 6, 7)).permute(0, 3, 1, 2), weight, stride)
    assert packed == [(24, 7, size, size)]


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 on this processor"
)
def test_bfloat16(packed):
    x, weight = (maps(*shape).bfloat16() for shape in ((2, 8, 6, 6), (16, 8, 3, 3)))
    found = Prepacked().conv2d(x, weight, (1, 1), (1, 1))
    wanted = functional.conv2d(x, weight, padding=1)
    assert found.dtype == torch.bfloat16
    assert len(packed) == 1
    torch.testing.assert_close(found, wanted)


def test_each_weight_is_packed_once_and_kept(packed):
    product = Prepacked()
    for _ in range(20):  # without a hold on it, a weight's memory would be the next one's
        hold(product, maps(2, 8, 6, 6), maps(16, 8, 3, 3))
    assert len(packed) == 20


def test_a_weight_that_changes_in_place(packed):
    product, x, weight = Prepacked(), maps(2, 8, 6, 6), maps(16, 8, 3, 3)
    for _ in range(3):
        hold(product, x, weight)
        weight.mul_(2)
    assert len(packed) == 3


def test_a_copy_begins_anew(packed):
    product, x, weight = Prepacked(), maps(2, 8, 6, 6), maps(16, 8, 3, 3)
    hold(product, x, weight)
    for other in (copy.deepcopy(product), pickle.loads(pickle.dumps(product))):
        hold(other, x, weight)
    assert len(packed) == 3


def test_a_single_map_with_a_large_weight(packed):
    hold(Prepacked(), maps(1, 64, 5, 5), maps(256, 64, 3, 3))
    assert len(packed) == 1
    hold(Prepacked(), maps(1, 8, 5, 5), maps(8, 8, 3, 3))  # which PyTorch does faster
    assert len(packed) == 1


class Dressed(torch.Tensor):
    """A subclass, of whose memory nobody knows."""


@pytest.mark.parametrize("case", ["double", "half", "subclass", "switched off", "watched", "empty"])
def test_pytorchs_operator_serves_otherwise(case, packed):
    dtype = {"double": torch.float64, "half": torch.float16}.get(case, torch.float32)
    x, weight = maps(0 if case == "empty" else 2, 8, 6, 6, dtype=dtype), maps(16, 8, 3, 3, dtype=dtype)
    if case == "subclass":
        x = x.as_subclass(Dressed)
    product, given = Prepacked(), (x, weight, (1, 1), (1, 1))
    if case == "watched":
        with FlopCounterMode(display=False) as counter:
            found = product.conv2d(*given)
        assert counter.get_total_flops() > 0
    else:
        with torch.backends.mkldnn.flags(enabled=case != "switched off"):
            found = product.conv2d(*given)
    assert not packed
    torch.testing.assert_close(found.as_subclass(torch.Tensor), functional.conv2d(x, weight, padding=1))


def test_solves_use_them_and_gradients_do_not(packed):
    torch.manual_seed(0)
    cell = td.MDEQCell((8, 16), groups=4, expansion=2)
    deq = td.DEQ(cell, max_steps=4, tol=0.0)
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    deq(x).value.sum().backward()
    count = len(cell._units)
    assert len(packed) == count  # once a solve, not once an evaluation
    with torch.inference_mode():
        deq(x)
    assert len(packed) == 2 * count
    cell(cell.initial_state(cell.inject(x)), cell.inject(x)).sum().backward()
    assert len(packed) == 2 * count


def test_a_changed_weight_is_packed_anew():
    """An injection has its weights for good; the next one has those of then."""
    torch.manual_seed(0)
    cell = td.MDEQCell((8, 16), groups=4, expansion=2, weight_norm=False)
    x, z = torch.randn(2, 8, 8, 8), torch.randn(2, 8 * 64 + 16 * 16)
    for _ in range(3):
        with torch.no_grad():
            without = cell.inject(x)._replace(prepacked=None)
            torch.testing.assert_close(cell(z, cell.inject(x)), cell(z, without))
            for unit in cell._units:
                nn.init.normal_(unit.conv.weight)


def test_compaction_goes_on_with_them():
    torch.manual_seed(0)
    cell = td.MDEQCell((8, 16), groups=4, expansion=2)
    x = torch.randn(6, 8, 8, 8) * torch.logspace(-2, 1, 6)[:, None, None, None]
    with torch.no_grad():
        whole, fewer = (td.DEQ(cell, max_steps=40, tol=1e-5, compact=part)(x).value for part in (None, 0.9))
    torch.testing.assert_close(whole, fewer, rtol=1e-3, atol=1e-3)


def test_a_product_that_is_differentiated_has_a_graph():
    unit = mdeq_layers.ConvNorm(8, 16, 3, 4)
    u = mdeq_layers.MDEQInjection(maps(2, 8, 6, 6), (unit.conv.weight,), None, (), (), Prepacked())
    assert unit.product(maps(2, 8, 6, 6), u).requires_grad
    with torch.no_grad():
        tangent = torch.func.jvp(lambda x: unit.product(x, u), (maps(2, 8, 6, 6),), (maps(2, 8, 6, 6),))[1]
    assert tangent.abs().sum() > 0
