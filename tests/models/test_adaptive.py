"""The adaptive embedding and softmax, against tables of all words."""

import pytest
import torch
from torch.nn import functional

from triton_deq.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax


def both(dtype=torch.float64):
    embedding = AdaptiveEmbedding(20, 8, (5, 12), 2)
    softmax = AdaptiveSoftmax(embedding)
    for parameter in softmax.parameters():
        torch.nn.init.normal_(parameter)
    return embedding.to(dtype), softmax.to(dtype)


def test_every_word_has_its_vector():
    embedding, _ = both()
    table = torch.cat([c.words.weight @ c.projection.weight for c in embedding.clusters]) * 8**0.5
    torch.testing.assert_close(embedding(torch.arange(20)), table)
    tokens = torch.randint(20, (2, 3, 4))
    torch.testing.assert_close(embedding(tokens), table[tokens])


def test_vectors_shrink_from_cluster_to_cluster():
    embedding, _ = both()
    assert [tuple(c.words.weight.shape) for c in embedding.clusters] == [(5, 8), (7, 4), (8, 2)]


def test_log_probabilities_are_those_of_the_two_levels():
    embedding, softmax = both()
    hidden = torch.randn(6, 8, dtype=torch.float64)
    head = softmax.head
    top = hidden @ head.projection.weight.mT
    first = torch.log_softmax(
        torch.cat([top @ embedding.clusters[0].words.weight.mT + head.bias, head.clusters(top)], dim=1), dim=1
    )
    parts = [first[:, :5]]
    for at, cluster in enumerate(list(embedding.clusters)[1:]):
        logits = hidden @ cluster.projection.weight.mT @ cluster.words.weight.mT + softmax.tail[at].bias
        parts.append(first[:, 5 + at, None] + torch.log_softmax(logits, dim=1))
    wanted = torch.cat(parts, dim=1)
    torch.testing.assert_close(softmax.log_prob(hidden), wanted)
    targets = torch.tensor([0, 4, 5, 11, 12, 19])
    torch.testing.assert_close(
        softmax(hidden, targets).output, -functional.nll_loss(wanted, targets, reduction="none")
    )
    torch.testing.assert_close(wanted.exp().sum(1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("autocast", [False, True])
def test_likelihoods_are_those_of_torchs_module(autocast):
    """And so are their gradients, beside which columns that are no words leave nothing."""
    embedding, softmax = both(torch.float32)
    parameters = [*softmax.parameters(), *embedding.parameters()]
    hidden, targets = torch.randn(40, 8, requires_grad=True), torch.randint(20, (40,))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, wanted = softmax.nll(hidden, targets), -softmax(hidden, targets).output
    assert found.dtype == torch.float32
    error = 1e-6 if not autocast else 2e-2
    assert (found - wanted).norm() <= error * wanted.norm()
    gradients = (
        torch.autograd.grad(each.sum(), (hidden, *parameters), materialize_grads=True)
        for each in (found, wanted)
    )
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= error * theirs.norm()


def test_likelihoods_of_one_cluster_alone():
    """From rows of a multiple of 16 bytes, also where the head has 5 words and 2 clusters."""
    _, softmax = both()
    hidden = torch.randn(3, 8, dtype=torch.float64)
    assert softmax.head.logits(hidden).shape == (3, 8)
    assert softmax.head(hidden).shape == (3, 7)
    for low, high in ((0, 5), (5, 12), (12, 20)):
        targets = torch.randint(low, high, (3,))
        wanted = -softmax(hidden, targets).output
        torch.testing.assert_close(softmax.nll(hidden, targets), wanted)


def test_words_and_projections_are_shared():
    embedding, softmax = both()
    softmax(torch.randn(3, 8, dtype=torch.float64), torch.tensor([1, 7, 15])).loss.backward()
    assert all(c.words.weight.grad is not None for c in embedding.clusters)
    own = {id(parameter) for parameter in softmax.parameters()}
    assert not own & {id(parameter) for parameter in embedding.parameters()}, "one weight under two names"


def test_a_tracer_gets_the_same_without_waiting(monkeypatch):
    _, softmax = both()
    hidden, targets = torch.randn(6, 8, dtype=torch.float64), torch.tensor([0, 4, 5, 11, 12, 19])
    wanted = softmax.nll(hidden, targets)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(softmax.nll(hidden, targets), wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((20, 8, (12, 5)), "must be at least one id, rising"),
        ((20, 8, (5, 20)), "below vocabulary=20"),
        ((20, 8, ()), r"cutoffs=\(\)"),
        ((20, 8, (5, 5)), "rising"),
        ((20, 8, (5, 12), 4), "div_value=4 2 times"),
    ],
)
def test_bad_cutoffs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveEmbedding(*arguments)
