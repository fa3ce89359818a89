"""The task of a language model: predict the next token, with a memory from segment to segment."""

import math
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import check_count
from ..data import Corpus, Segments
from .averages import Averages
from .equilibrium import EquilibriumTask, solve_scalars
from .task import Loss


class LanguageModelTask(EquilibriumTask):
    """A `DEQTransformerLM` (or `TransformerXL`) and a corpus.

    Scalars: loss (the mean negative log-likelihood of a token, in nats), perplexity and, where there is a
    solve, nfe, residual (the median over sequences) and unconverged (their share), the same of the backward
    solve, and the penalty. Validation reads the whole split in order; radius is the mean spectral radius over
    the sequences of its first segment.

    Args:
        model: on its device.
        corpus: the text; the model's vocabulary has its size.
        batch: sequences of all ranks together; validation has as many.
        length: tokens of a segment; the model's `configuration.segment` by default.
        radius_steps: of the power method at validation.

    Raises:
        TypeError, ValueError: sizes that do not fit the text or each other.
    """

    def __init__(
        self,
        model: nn.Module,
        corpus: Corpus,
        batch: int,
        length: int | None = None,
        radius_steps: int = 50,
    ):
        check_count("radius_steps", radius_steps)
        super().__init__(model)
        self.corpus = corpus
        described: Any = model.configuration
        if described.vocabulary != len(corpus.words):
            raise ValueError(
                f"the model has vocabulary={described.vocabulary}, and {corpus.name} has "
                f"{len(corpus.words)} words: make the model with vocabulary={len(corpus.words)}"
            )
        self.batch = batch
        self.length: int = described.segment if length is None else length
        self.radius_steps = radius_steps
        self._train = self._segments(corpus.train)
        self._segments(corpus.valid)  # complains now rather than at the first validation
        self._memory: Any = None
        self.configuration = {
            "model": type(model).__name__,
            **asdict(described),
            "text": corpus.fingerprint,
            "batch": batch,
            "length": self.length,
        }

    def loss(self, module: nn.Module) -> Loss:
        if self._train.position == 0:
            self._memory = None
        tokens, targets = self._train.take()
        out = module(tokens, targets, self._memory)
        self._memory = out.memory
        loss = out.nll.mean()
        return Loss(loss + out.penalty, partial(self._scalars, loss.detach(), out))

    def validate(self) -> dict[str, float]:
        averages = Averages()
        memory, total, count = None, 0.0, 0
        radius: dict[str, float] = {}
        for tokens, targets in self._segments(self.corpus.valid):
            if count == 0 and self._equilibrium:
                model: Any = self.model
                radii = model.spectral_radius(tokens, None, self.radius_steps)
                radius = {"radius": radii.double().mean().item()}
            out = self.model(tokens, targets, memory)
            memory = out.memory
            total += out.nll.double().sum().item()
            count += targets.numel()
            averages.add(solve_scalars(out.solution))
        means = {"loss": total / count, **averages.take(), **radius}
        return self.summarise(self._ranks.mean(means))  # each rank has as many tokens

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        perplexity = math.exp(means["loss"]) if means["loss"] < 700 else math.inf
        return {"loss": means["loss"], "perplexity": perplexity, **means}

    def state_dict(self) -> dict[str, Any]:
        return {"train": self._train.state_dict(), "memory": _pack(self._memory)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._train.load_state_dict(state["train"])
        self._memory = _unpack(state["memory"], self._device)

    def _segments(self, ids: np.ndarray) -> Segments:
        ranks = self._ranks
        return Segments(ids, self.batch, self.length, self._device, ranks.rank, ranks.world)


def _pack(memory: Any) -> Any:
    """A memory as what a checkpoint can hold: its tensors in lists, and the names of what they stood in."""
    if isinstance(memory, tuple | list):
        parts = [_pack(part) for part in memory]
        return {"type": type(memory).__name__, "parts": parts}
    return memory.detach().cpu() if isinstance(memory, Tensor) else memory


def _unpack(held: Any, device: torch.device) -> Any:
    if not isinstance(held, dict):
        return held.to(device) if isinstance(held, Tensor) else held
    parts = [_unpack(part, device) for part in held["parts"]]
    if held["type"] in ("tuple", "list"):
        return tuple(parts) if held["type"] == "tuple" else parts
    from ..cells.transformer import Memory

    return Memory(*parts)


def build_language_model(config: str, vocabulary: int, penalty: float | None = None) -> nn.Module:
    """The model of a named configuration, for a vocabulary of this size.

    Args:
        config: a name in `triton_deq.models.CONFIGURATIONS`.
        vocabulary: V.
        penalty: γ in place of the configuration's; 0 for none.

    Raises:
        TypeError, ValueError: an unknown name, or a penalty that cannot be.
    """
    from ..models import DEQTransformerLM, TransformerXL, find_configuration

    configuration = find_configuration(config)
    cutoffs = tuple(cutoff for cutoff in configuration.cutoffs if cutoff < vocabulary)
    # A vocabulary that is smaller than each of them is halved: the softmax needs one at least.
    cutoffs = cutoffs or (max(1, vocabulary // 2),)
    configuration = replace(configuration, vocabulary=vocabulary, cutoffs=cutoffs)
    if penalty is not None:
        configuration = replace(configuration, penalty=penalty)
    return TransformerXL(configuration) if configuration.layers else DEQTransformerLM(configuration)
