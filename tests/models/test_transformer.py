"""The language models: what they are made of, what they carry along, how they are trained."""

from dataclasses import replace

import pytest
import torch

from triton_deq.models import CONFIGURATIONS, DEQTransformerLM, TransformerXL, find_configuration

TINY = replace(
    CONFIGURATIONS["tiny"], vocabulary=60, cutoffs=(10, 30), width=16, heads=2, head_width=8, inner=24
)


@pytest.fixture(autouse=True)
def _without_the_interpreter(monkeypatch):
    """tests/cells has the kernels; here they would only take their time."""
    monkeypatch.setattr("triton_deq.backend.interpreting", lambda: False)


def ids(length=7, batch=2):
    return torch.randint(TINY.vocabulary, (batch, length))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("wikitext103-post-ln", 98), ("wikitext103-pre-ln-jr", 98), ("wikitext103-transformer-xl", 110)],
)
def test_parameter_counts_are_the_papers(name, millions):
    configuration = CONFIGURATIONS[name]
    with torch.device("meta"):
        model = (TransformerXL if configuration.layers else DEQTransformerLM)(configuration)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(
        millions * 1e6, rel=0.01
    )


def contract(cell):
    """An untrained cell is close to the identity; with much injected and little of z it has a fixed point."""
    with torch.no_grad():
        cell.injection.weight.normal_()
        cell.qkv.parametrizations.weight.original0.mul_(0.3)
        cell.out.parametrizations.weight.original0.mul_(10)


@pytest.mark.parametrize("layers", [0, 2])
def test_one_text_in_segments_is_one_text(layers):
    """Without a loss of memory: the equilibrium of each token depends on those before it only."""
    configuration = replace(TINY, layers=layers, memory=20, tol=1e-9, max_steps=300)
    model = (TransformerXL if layers else DEQTransformerLM)(configuration).eval().double()
    if not layers:
        contract(model.cell)
    tokens = ids(9)
    with torch.no_grad():
        whole = model(tokens[:, :-1], tokens[:, 1:])
        memory, parts = None, []
        for low, high in ((0, 3), (3, 4), (4, 8)):
            out = model(tokens[:, low:high], tokens[:, low + 1 : high + 1], memory)
            memory = out.memory
            parts.append(out.nll)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.nll, rtol=1e-4, atol=1e-4)


def test_likelihoods_are_those_of_the_distribution():
    model = DEQTransformerLM(TINY).eval()
    tokens = ids()
    out = model(tokens[:, :-1], tokens[:, 1:])
    logs = model.log_prob(out.hidden)
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(2, 6))
    torch.testing.assert_close(out.nll, -logs.gather(-1, tokens[:, 1:, None])[..., 0])
    assert model(tokens).nll is None


def test_pretraining_unrolls_without_a_solve():
    model = DEQTransformerLM(TINY)
    tokens = ids()
    model.pretraining = True
    out = model(tokens[:, :-1], tokens[:, 1:])
    assert out.solution is None
    assert out.penalty == 0
    u = model.cell.inject(model.embedding(tokens[:, :-1]))
    z = model.cell(model.cell(model.cell.initial_state(u), u), u)
    torch.testing.assert_close(out.hidden, z)
    model.pretraining = False
    assert model(tokens[:, :-1], tokens[:, 1:]).solution.nfe > 2


@pytest.mark.parametrize("layers", [0, 2])
def test_training_reaches_every_parameter_and_learns(layers):
    configuration = replace(TINY, layers=layers, dropout=0.1, attention_dropout=0.1, penalty_probability=1.0)
    model = (TransformerXL if layers else DEQTransformerLM)(configuration)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    tokens, memory, losses = ids(), None, []
    for _ in range(12):
        out = model(tokens[:, :-1], tokens[:, 1:], memory)
        loss = out.nll.mean()
        optimizer.zero_grad()
        (loss + out.penalty).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        memory, losses = out.memory, [*losses, loss.item()]
    assert losses[-1] < losses[0] - 1
    assert (out.penalty > 0) == (layers == 0)


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("pretraining", [False, True])
def test_autocast(layers, pretraining):
    configuration = replace(TINY, layers=layers, dropout=0.1, attention_dropout=0.1, penalty_probability=1.0)
    model = (TransformerXL if layers else DEQTransformerLM)(configuration)
    model.pretraining = pretraining
    tokens, memory = ids(), None
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(tokens[:, :-1], tokens[:, 1:], memory)
        assert out.nll.dtype == torch.float32
        memory = out.memory
        (out.nll.mean() + out.penalty).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_spectral_radius_is_that_of_the_solve():
    model = DEQTransformerLM(TINY).eval()
    tokens = ids(4, batch=1)
    radius = model.spectral_radius(tokens)
    out = model.deq(model.embedding(tokens))
    z = out.value.detach()

    def flat(row):
        return model.cell(row.view_as(z), out.injection).flatten()

    jacobian = torch.autograd.functional.jacobian(flat, z.flatten())
    torch.testing.assert_close(radius[0], torch.linalg.eigvals(jacobian).abs().max(), rtol=1e-2, atol=1e-3)


def test_bad_input_is_named():
    model = DEQTransformerLM(TINY)
    tokens = ids()
    with pytest.raises(ValueError, match="tokens has the id 60, and ids run from 0 to 59"):
        model(torch.tensor([[3, 60, 0]]))
    with pytest.raises(ValueError, match="targets has the id -1"):
        model(torch.tensor([[3, 5, 0]]), torch.tensor([[5, 0, -1]]))
    with pytest.raises(TypeError, match=r"tokens is torch\.float32"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"targets has shape \(2, 6\)"):
        model(tokens, tokens[:, 1:])
    memory = model(tokens).memory
    with pytest.raises(ValueError, match=r"memory\.value has shape"):
        model(tokens[:1], None, memory)
    with pytest.raises(ValueError, match="'wikitext103-post-ln'|wikitext103-post-ln, "):
        find_configuration("huge")
    with pytest.raises(ValueError, match="layers=2"):
        DEQTransformerLM(replace(TINY, layers=2))
    with pytest.raises(ValueError, match="layers=0"):
        TransformerXL(TINY)
