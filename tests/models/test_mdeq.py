"""The models on images: their sizes, what they carry along, what they refuse."""

import copy
from dataclasses import replace

import pytest
import torch

from triton_deq.models import (
    IMAGE_CONFIGURATIONS,
    MDEQClassifier,
    MDEQSegmenter,
    find_image_configuration,
    segmentation_loss,
)
from triton_deq.models.mdeq import relative_error

DIGITS = replace(IMAGE_CONFIGURATIONS["digits"], init_std=0.1, dropout=0.0)
PIXELS = replace(DIGITS, head=(), classes=3, penalty=0.0)


@pytest.fixture(autouse=True)
def _without_the_interpreter(monkeypatch):
    """tests/cells has the kernels; here they would only take their time."""
    monkeypatch.setattr("triton_deq.backend.interpreting", lambda: False)


def images(batch=3, size=8):
    return torch.rand(batch, 1, size, size)


def settled(configuration=DIGITS, **options):
    """A model whose cell has a fixed point: what is injected is much, and of z there is little."""
    torch.manual_seed(2)
    model = MDEQClassifier(replace(configuration, tol=1e-4, max_steps=60), **options)
    with torch.no_grad():
        for _ in range(30):
            model.stem(images(16))  # the statistics of the BatchNorms
        model.stem[-2].weight.mul_(5)
        for block in model.cell.blocks:
            block.second.conv.parametrizations.weight.original0.mul_(0.05)
        for unit in model.cell.post:
            unit.norm.weight.mul_(0.1)
        model.cell.blocks[1].norm.weight.mul_(0.1)
    return model.eval()


# Of the authors' released settings, counted by their code.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cifar10-tiny", 158_890),
        ("cifar10-large", 11_097_438),
        ("cifar10-large-jr", 11_097_438),
        ("imagenet-small", 16_808_936),
        ("imagenet-small-jr", 18_613_496),
        ("imagenet-large", 67_063_624),
        ("imagenet-xl", 90_463_280),
    ],
)
def test_parameter_counts_are_the_released_ones(name, count):
    with torch.device("meta"):
        model = MDEQClassifier(find_image_configuration(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("name", IMAGE_CONFIGURATIONS)
def test_every_configuration_makes_a_model(name):
    configuration = find_image_configuration(name)
    kind = MDEQClassifier if configuration.head else MDEQSegmenter
    with torch.device("meta"):
        model = kind(replace(configuration, initialiser=1.0))
    assert sum(each.numel() for each in model.initialiser.parameters()) < 0.02 * sum(
        each.numel() for each in model.parameters()
    )
    assert (model.penalty is not None) == (configuration.penalty > 0)
    assert name.endswith("-jr") or name == "digits" or model.penalty is None


def test_a_training_step(monkeypatch):
    model = MDEQClassifier(replace(DIGITS, penalty_probability=1.0))
    out = model(images())
    assert out.logits.shape == (3, 10)
    (out.logits.logsumexp(1).mean() + out.penalty).backward()
    assert out.solution.nfe == DIGITS.max_steps
    assert out.solution.backward.nfe == DIGITS.backward_max_steps
    assert out.penalty > 0
    assert all(each.grad.isfinite().all() for each in model.parameters())


def test_pretraining_is_unrolled():
    model = MDEQClassifier(replace(DIGITS, pretraining_penalty=0.5, penalty_probability=1.0))
    model.pretraining = model.penalty.pretraining = True
    out = model(images())
    assert out.solution is None
    assert out.penalty > 0
    u = model.cell.inject(model.stem(images()))
    z = model.cell.initial_state(u)
    for _ in range(DIGITS.unrolled):
        z = model.cell(z, u)
    assert out.state.shape == z.shape


def test_other_sizes_and_a_stem_that_halves():
    configuration = replace(DIGITS, downsamplings=2, image_channels=3)
    model = MDEQClassifier(configuration).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, 16, 32)).logits.shape == (2, 10)


def test_finished_images_leave_the_batch():
    model, x = settled(), images(6)
    compacted = settled(compact=0.9)
    compacted.load_state_dict(model.state_dict())
    with torch.no_grad():
        whole, part = model(x), compacted(x)
    assert whole.solution.converged.all()
    torch.testing.assert_close(part.logits, whole.logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(part.solution.steps, whole.solution.steps)


def test_a_warm_start_saves_evaluations():
    model, x = settled(), images()
    with torch.no_grad():
        first = model(x)
        again = model(x + 1e-3, first.state)
    assert again.solution.nfe < first.solution.nfe


def test_a_learned_start():
    torch.manual_seed(0)
    model = settled(replace(DIGITS, initialiser=1.0, penalty=0.0)).train()
    model.stem.eval()
    x = images(8)
    with torch.no_grad():
        features = model.stem(x)
        assert model.initialiser(features).count_nonzero() == 0
    out = model(x)
    assert out.initial.item() == pytest.approx(1.0)  # zeros are as far as z* itself
    # The gain is zero at first: nothing before it has a gradient, and the cell has none of this loss.
    gained = torch.autograd.grad(out.initial, [*model.parameters()], allow_unused=True, retain_graph=True)
    reached = {
        name for (name, _), grad in zip(model.named_parameters(), gained, strict=True) if grad is not None
    }
    assert reached
    assert all(name.startswith("initialiser") for name in reached)

    optimiser = torch.optim.Adam(model.initialiser.parameters(), 0.05)
    for _ in range(40):
        optimiser.zero_grad()
        model(x).initial.backward()
        optimiser.step()
    assert model(x).initial < 0.7
    model.eval()
    with torch.no_grad():
        learned = model(x)
        model.deq.stopping = replace(model.deq.stopping, max_steps=1)
        early, from_zero = model(x).state, model(x, torch.zeros_like(learned.state)).state
    assert (early - learned.state).norm() < 0.9 * (from_zero - learned.state).norm()


def test_relative_error():
    value = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert relative_error(torch.zeros_like(value), value).item() == 1
    assert relative_error(value, value).item() == 0


def test_segmentation():
    model = MDEQSegmenter(PIXELS)
    out = model(images(2, 16))
    assert out.logits.shape == (2, 3, 16, 16)
    labels = torch.randint(3, (2, 32, 32))
    labels[:, 0] = 255
    loss = segmentation_loss(out.logits, labels, class_weights=torch.tensor([1.0, 2.0, 3.0]))
    loss.backward()
    raised = torch.nn.functional.interpolate(out.logits, (32, 32), mode="bilinear", align_corners=True)
    logs = raised.log_softmax(1).permute(0, 2, 3, 1)[:, 1:].reshape(-1, 3)
    kept = labels[:, 1:].reshape(-1)
    weights = torch.tensor([1.0, 2.0, 3.0])[kept]
    wanted = -(weights * logs.gather(1, kept[:, None])[:, 0]).sum() / weights.sum()
    torch.testing.assert_close(loss, wanted)
    assert all(each.grad is not None for each in model.parameters())


def test_a_copy_is_the_same():
    model, x = settled(replace(DIGITS, initialiser=1.0)), images()
    with torch.no_grad():
        wanted = model(x).logits
        torch.testing.assert_close(copy.deepcopy(model)(x).logits, wanted)
        other = settled(replace(DIGITS, initialiser=1.0))
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(x).logits, wanted)


def test_spectral_radius():
    radius = settled().spectral_radius(images(), 20)
    assert radius.shape == (3,)
    assert (radius < 1).all()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.rand(2, 3, 8, 8), ValueError, r"images is \(2, 3, 8, 8\): give images \[B, 1, H, W\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), TypeError, "images has dtype torch.uint8"),
        (torch.rand(2, 1, 7, 8), ValueError, "images are 7×8.*multiples of 2"),
        ([1], ValueError, "images is list"),
    ],
)
def test_bad_images(given, error, message):
    with pytest.raises(error, match=message):
        MDEQClassifier(DIGITS)(given)


def test_bad_configurations():
    with pytest.raises(ValueError, match="config='imagenet' is unknown: choose one of digits"):
        find_image_configuration("imagenet")
    with pytest.raises(ValueError, match=r"head=\(8,\) has 1 numbers, and channels=\(16, 32\) has 2"):
        replace(DIGITS, head=(8,))
    with pytest.raises(ValueError, match=r"head=\(\) is for a segmentation"):
        MDEQClassifier(PIXELS)
    with pytest.raises(ValueError, match=r"head=\(8, 16\) is for a classifier"):
        MDEQSegmenter(DIGITS)
    with pytest.raises(ValueError, match="labels has shape"):
        segmentation_loss(torch.rand(2, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64))
