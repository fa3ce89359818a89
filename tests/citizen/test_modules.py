"""Modules keep PyTorch's manners: states, copies, dtypes, devices, layouts, autocast, determinism."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import triton_deq as td
from tests.citizen.instances import MODULES, NOT_MODULES, Instance
from triton_deq import models

every = pytest.mark.parametrize("instance", MODULES, ids=lambda instance: instance.name)
solving = pytest.mark.parametrize(
    "instance",
    [each for each in MODULES if not each.name.endswith("Cell") or "DEQ" in each.name],
    ids=lambda i: i.name,
)


def trained(
    instance: Instance, module: nn.Module, inputs, seed: int = 3
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The value and the gradients of one training step."""
    torch.manual_seed(seed)
    value = instance.value(module, *inputs)
    value.float().square().mean().backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.requires_grad]
    module.zero_grad()
    return value.detach(), gradients


def assert_same_step(instance: Instance, module: nn.Module, other: nn.Module, inputs) -> None:
    value, gradients = trained(instance, module, inputs)
    again, others = trained(instance, other, inputs)
    torch.testing.assert_close(value, again, rtol=0, atol=0)
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_every_public_module_is_here():
    named = " ".join(instance.name for instance in MODULES)
    for name in {*td.__all__} - NOT_MODULES:
        assert name in named, name
    public = {name for name in models.__all__ if isinstance(getattr(models, name), type)}
    for name in public & {each for each in public if issubclass(getattr(models, each), nn.Module)}:
        assert name in named, name


@every
def test_state_dict(instance):
    module, other, inputs = instance.make(), instance.make(), instance.inputs()
    trained(instance, module, inputs)
    assert other.load_state_dict(module.state_dict(), strict=True)
    assert_same_step(instance, module, other, inputs)


@every
def test_copies(instance):
    """Also of a module that was used: nothing that it remembers of a step goes along or breaks."""
    module, inputs = instance.make(), instance.inputs()
    trained(instance, module, inputs)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    ]
    for other in copies:
        own = {tensor.data_ptr() for tensor in module.state_dict().values() if torch.is_tensor(tensor)}
        assert not own & {parameter.data_ptr() for parameter in other.parameters()}
        assert_same_step(instance, copy.deepcopy(module), other, inputs)


def test_a_layer_with_another_parametrization_is_not_half_pickled():
    cell = td.TransformerCell(8, 2, 16, 4)
    nn.utils.parametrize.register_parametrization(cell.qkv, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(cell)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(instance, dtype):
    module = instance.make().to(dtype)
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in instance.inputs()]
    value, gradients = trained(instance, module, inputs)
    assert value.dtype in (dtype, torch.promote_types(dtype, torch.float32))
    assert value.isfinite().all()
    assert all(gradient.dtype == dtype for gradient in gradients)


@every
def test_another_default_dtype(instance):
    torch.set_default_dtype(torch.float64)
    try:
        value, gradients = trained(instance, instance.make(), instance.inputs())
    finally:
        torch.set_default_dtype(torch.float32)
    assert value.dtype == torch.float64
    assert all(gradient.dtype == torch.float64 for gradient in gradients)


@every
def test_made_without_memory_and_filled_later(instance):
    with torch.device("meta"):
        module = instance.make()
    assert all(parameter.is_meta for parameter in module.parameters())
    other = instance.make()
    module = module.to_empty(device="cpu")
    module.load_state_dict(other.state_dict())
    assert_same_step(instance, other, module, instance.inputs())


CELLS = {
    "MLPCell": partial(td.MLPCell, 6, 3, hidden=5, layer_norm=True),
    "TransformerCell": partial(td.TransformerCell, 8, 2, 6, weight_norm=True),
    "MDEQCell": partial(td.MDEQCell, (4, 8), 2),
}


@pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)
def test_cells_take_device_and_dtype(make):
    for device, dtype in (("cpu", torch.float64), ("meta", torch.bfloat16)):
        parameters = make(device=device, dtype=dtype).parameters()
        assert {(each.device.type, each.dtype) for each in parameters} == {(device, dtype)}


@every
def test_autocast(instance):
    module, inputs = instance.make(), instance.inputs()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        value = instance.value(module, *inputs)
    value.float().square().mean().backward()
    assert value.isfinite().all()
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@every
def test_functional_call(instance):
    module, other, inputs = instance.make(), instance.make(), instance.inputs()
    torch.manual_seed(1)
    wanted = instance.value(other, *inputs)

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, *given):
            return instance.value(self.inner, *given)

    given = {
        f"inner.{name}": value.detach().clone().requires_grad_() for name, value in other.named_parameters()
    }
    given |= {f"inner.{name}": value for name, value in other.named_buffers()}
    torch.manual_seed(1)
    value = torch.func.functional_call(Called(), given, inputs)
    torch.testing.assert_close(value, wanted, rtol=0, atol=0)
    value.square().mean().backward()
    wanted.square().mean().backward()
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(given[f"inner.{name}"].grad, parameter.grad, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in module.parameters())


@every
def test_the_same_bits_in_deterministic_mode(instance):
    module, inputs = instance.make(), instance.inputs()
    torch.use_deterministic_algorithms(True)
    try:
        first = trained(instance, copy.deepcopy(module), inputs)
        second = trained(instance, copy.deepcopy(module), inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(one, two) for one, two in zip(first[1], second[1], strict=True))
    assert first[0].isfinite().all(), "memory that PyTorch filled with NaN has leaked"


@pytest.mark.parametrize("instance", [i for i in MODULES if "MDEQ" in i.name], ids=lambda i: i.name)
def test_layouts_of_images(instance):
    module = instance.make().eval()
    (x,) = instance.inputs()
    values = [
        instance.value(module, x.contiguous(memory_format=layout))
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-6)
    cell = getattr(module, "cell", module)
    if isinstance(cell, td.MDEQCell) and hasattr(cell, "maps"):
        features = torch.randn(2, cell.channels[0], 4, 4)
        u = cell.inject(features)
        for each in cell.maps(cell.initial_state(u), u):
            assert all(sample.is_contiguous(memory_format=torch.channels_last) for sample in each[:, None])


@solving
def test_without_gradients(instance):
    module, inputs = instance.make().eval(), instance.inputs()
    wanted = instance.value(module, *inputs).detach()
    with torch.no_grad():
        torch.testing.assert_close(instance.value(module, *inputs), wanted, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(instance.value(module, *inputs), wanted, rtol=1e-5, atol=1e-6)
    module.train()  # inference has left nothing behind that a gradient would stumble over
    assert all(gradient is not None for gradient in trained(instance, module, inputs)[1])


@solving
def test_used_twice_in_one_graph(instance):
    module, inputs = instance.make().eval(), instance.inputs()
    once = trained(instance, module, inputs)[1]
    value = instance.value(module, *inputs)
    again = instance.value(module, *inputs)
    (value.float().square().mean() + again.float().square().mean()).backward()
    for parameter, gradient in zip(module.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-4, atol=1e-6)


@solving
def test_backward_twice(instance):
    module, inputs = instance.make().eval(), instance.inputs()
    loss = instance.value(module, *inputs).float().square().mean()
    parameters = list(module.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@solving
def test_gradient_checkpointing(instance):
    module, inputs = instance.make().eval(), instance.inputs()
    plain = trained(instance, module, inputs)[1]
    value = checkpoint(lambda *given: instance.value(module, *given), *inputs, use_reentrant=False)
    value.float().square().mean().backward()
    for parameter, gradient in zip(module.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


@every
def test_frozen_weights(instance):
    module, inputs = instance.make(), instance.inputs()
    first, *rest = module.parameters()
    first.requires_grad_(False)
    instance.value(module, *inputs).float().square().mean().backward()
    assert first.grad is None
    assert all(parameter.grad is not None for parameter in rest)
    total = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
    assert total.isfinite()


@every
def test_it_says_what_it_is(instance):
    said = repr(instance.make())
    assert said.startswith(instance.name.split()[0] + "(")
    assert "object at 0x" not in said
