"""Adaptive embedding and softmax over one set of word vectors: rare words have short ones.

Grave et al., "Efficient softmax approximation for GPUs", arXiv 1609.04309; Baevski & Auli, "Adaptive input
representations", arXiv 1809.10853.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..checks import check_count
from ..ops.cross_entropy import cross_entropy


class AdaptiveEmbedding(nn.Module):
    """`√D · E_i[token] P_i` for a token of cluster i, whose vectors E_i have D / div_value^i entries.

    Args:
        vocabulary: V, the number of words; a word's id is its rank by frequency.
        width: D.
        cutoffs: the ids at which clusters 1, 2, … begin, rising; at least one.
        div_value: by how much the vectors shrink from cluster to cluster.

    Shapes: tokens int64 `[...]` in 0 … V − 1, and `[..., D]` out.

    Raises:
        TypeError, ValueError: cut-offs that do not rise within the vocabulary, or clusters without a vector.
    """

    def __init__(self, vocabulary: int, width: int, cutoffs: tuple[int, ...], div_value: int = 1):
        super().__init__()
        check_count("vocabulary", vocabulary)
        check_count("width", width)
        check_count("div_value", div_value)
        for cutoff in cutoffs:
            check_count("cutoffs", cutoff)
        self.bounds = (0, *cutoffs, vocabulary)
        if not cutoffs or any(low >= high for low, high in pairwise(self.bounds)):
            raise ValueError(
                f"cutoffs={tuple(cutoffs)!r} must be at least one id, rising from above 0 to below "
                f"vocabulary={vocabulary}"
            )
        widths = [width // div_value**cluster for cluster in range(len(self.bounds) - 1)]
        if widths[-1] == 0:
            raise ValueError(
                f"width={width} cannot be divided by div_value={div_value} {len(cutoffs)} times: give fewer "
                "cutoffs or a smaller div_value"
            )
        self.width = width
        self.clusters = nn.ModuleList(
            Cluster(high - low, each, width)
            for (low, high), each in zip(pairwise(self.bounds), widths, strict=True)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        total: Any = 0
        for cluster, low in zip(self.clusters, self.bounds, strict=False):
            total = total + cluster(tokens - low)
        return total * self.width**0.5


class Cluster(nn.Module):
    """Word vectors E `[words, entries]` and their way P `[entries, D]` to the model's width."""

    def __init__(self, words: int, entries: int, width: int):
        super().__init__()
        self.words = nn.Embedding(words, entries)
        self.projection = nn.Linear(width, entries, bias=False)

    def forward(self, at: Tensor) -> Tensor:
        """`E[at] P`, and zeros where `at` is none of the cluster's words."""
        # All tokens are embedded, so that the host need not wait for how many belong here.
        count = self.words.num_embeddings
        vectors = self.words(at.clamp(0, count - 1)) @ self.projection.weight
        return torch.where(((at >= 0) & (at < count))[..., None], vectors, 0)


class AdaptiveSoftmax(nn.AdaptiveLogSoftmaxWithLoss):
    """torch's adaptive softmax on the word vectors of an `AdaptiveEmbedding`, with biases.

    The tails share the embedding's projections; the head has one of its own, as in the authors' code.
    `forward(hidden [N, D], targets [N])` gives `.output`, the targets' log-probabilities `[N]`.
    """

    def __init__(self, embedding: AdaptiveEmbedding):
        *cutoffs, vocabulary = embedding.bounds[1:]
        # The layers that it makes are replaced.
        super().__init__(embedding.width, vocabulary, cutoffs, div_value=1, device="meta")
        first, *rest = embedding.clusters
        self.head: Any = Head(first, embedding.width, self.n_clusters)
        self.tail: Any = nn.ModuleList(Tail(cluster) for cluster in rest)

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The targets' negative log-likelihood `[N]`, of hidden `[N, D]`.

        A cluster's words are computed for the rows that need them, and the host waits to know which those
        are. A tracer cannot wait, so in torch.compile and torch.export all rows get all words.
        """
        choice, clusters = targets, []
        for cluster, (low, high) in enumerate(pairwise(self.cutoffs)):
            here = (targets >= low) & (targets < high)
            choice = torch.where(here, self.cutoffs[0] + cluster, choice)
            clusters.append((self.tail[cluster], here, (targets - low).clamp(0, high - low - 1)))
        value = cross_entropy(self.head.logits(hidden), choice, self.head_size)
        for tail, here, word in clusters:
            if torch.compiler.is_compiling():
                value = value + torch.where(here, cross_entropy(tail.logits(hidden), word), 0)
            else:
                (rows,) = here.nonzero(as_tuple=True)
                value = value.index_add(0, rows, cross_entropy(tail.logits(hidden[rows]), word[rows]))
        return value


class Head(nn.Module):
    """Logits of the most frequent words and of the clusters: `(h P) [E; C]ᵀ + b`."""

    def __init__(self, cluster: Any, width: int, clusters: int):
        super().__init__()
        self._cluster = (cluster,)  # in a tuple: its weights are the embedding's, and no part of this module
        words, entries = cluster.words.weight.shape
        self.projection = nn.Linear(width, entries, bias=False)
        self.clusters = nn.Linear(entries, clusters)
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, hidden: Tensor) -> Tensor:
        return _wide(self.logits(hidden)[:, : len(self.bias) + len(self.clusters.bias)])

    def logits(self, hidden: Tensor) -> Tensor:
        """As products leave them: with up to seven columns behind, for rows of a multiple of 16 bytes."""
        (cluster,) = self._cluster
        weights: list[Tensor] = [cluster.words.weight, self.clusters.weight]
        biases: list[Tensor] = [self.bias, self.clusters.bias]
        spare = -sum(map(len, biases)) % 8
        if spare:
            weights.append(self.bias.new_zeros(spare, weights[0].shape[1]))
            biases.append(self.bias.new_zeros(spare))
        weight = torch.cat(weights)
        return functional.linear(self.projection(hidden.to(weight.dtype)), weight, torch.cat(biases))


class Tail(nn.Module):
    """Logits of a cluster's words: `(h Pᵀ) Eᵀ + b`."""

    def __init__(self, cluster: Any):
        super().__init__()
        self._cluster = (cluster,)
        self.bias = nn.Parameter(torch.zeros(len(cluster.words.weight)))

    def forward(self, hidden: Tensor) -> Tensor:
        return _wide(self.logits(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        (cluster,) = self._cluster
        weight = cluster.words.weight
        return functional.linear(cluster.projection(hidden.to(weight.dtype)), weight, self.bias)


def _wide(logits: Tensor) -> Tensor:
    """At least float32, also where autocast has made them narrower: softmaxes are taken of them."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
