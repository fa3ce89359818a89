"""Language models of Transformer cells: the DEQ-Transformer, and the stack that it is compared with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cells.transformer import Memory, TransformerCell, TransformerInjection
from ..deq import DEQ, Injected
from ..implicit import ImplicitGradient
from ..jacobian import JacobianPenalty, spectral_radius
from ..solvers import Solution, Solver
from ..trees import register, register_namedtuple
from .adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from .language_configurations import LanguageModelConfiguration


@dataclass(frozen=True)
class LanguageModelOutput:
    """What a language model gives for one segment.

    Attributes:
        nll: `[B, T]`, the negative log-likelihood of each target, or None without targets.
        hidden: `[B, T, D]`, what the softmax reads.
        memory: to be passed with the next segment.
        solution: how the solve went; None in a model or phase without one.
        penalty: a scalar to add to the loss.
    """

    nll: Tensor | None
    hidden: Tensor
    memory: Any
    solution: Solution | None
    penalty: Tensor


register(LanguageModelOutput)
register_namedtuple(Memory)


class LanguageModel(nn.Module):
    """What both models share: adaptive embedding and softmax with tied weights, and dropout beside them.

    Args:
        configuration: all numbers of the model.
    """

    def __init__(self, configuration: LanguageModelConfiguration):
        super().__init__()
        self.configuration = configuration
        self.embedding = AdaptiveEmbedding(
            configuration.vocabulary, configuration.width, configuration.cutoffs, configuration.div_value
        )
        self.softmax = AdaptiveSoftmax(self.embedding)
        for part in (self.embedding, self.softmax):
            for name, parameter in part.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, 0, configuration.init_std)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, memory: Any = None
    ) -> LanguageModelOutput:
        """One segment.

        Args:
            tokens, targets: int64 `[B, T]`, ids below the vocabulary's size.
            memory: of the segment before, or None at the start of a text.

        Raises:
            TypeError, ValueError: ids that are none, shapes or a memory that do not fit.
        """
        self._check_ids(tokens=tokens, **({} if targets is None else {"targets": targets}))
        value, memory, solution, penalty = self._body(self._dropped(self.embedding(tokens)), memory)
        hidden = self._dropped(value)
        nll = None
        if targets is not None:
            nll = self.softmax.nll(hidden.flatten(0, 1), targets.flatten()).view(targets.shape)
        return LanguageModelOutput(nll, hidden, memory, solution, penalty)

    def log_prob(self, hidden: Tensor) -> Tensor:
        """The log-probabilities `[..., V]` of the next word, from `LanguageModelOutput.hidden`."""
        return self.softmax.log_prob(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])

    def _body(self, x: Tensor, memory: Any) -> tuple[Tensor, Any, Solution | None, Tensor]:
        """From embedded tokens to what the softmax reads, the next memory, the solution and the penalty."""
        raise NotImplementedError

    def _dropped(self, x: Tensor) -> Tensor:
        """Variational dropout: the same entries for all tokens of a sequence."""
        kept = 1 - self.configuration.dropout
        if not self.training or kept == 1:
            return x
        return x * (x.new_empty(x.shape[0], 1, x.shape[-1]).bernoulli_(kept) / kept)

    def _check_ids(self, **given: Any) -> None:
        """Ids by the name of their argument, the tokens first."""
        for name, ids in given.items():
            if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64:
                found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
                raise TypeError(f"{name} is {found}: give ids as an int64 tensor [B, T]")
            if ids.shape != given["tokens"].shape:
                raise ValueError(
                    f"{name} has shape {tuple(ids.shape)} and tokens {tuple(given['tokens'].shape)}: give "
                    "each token the one that follows it"
                )
        if torch.compiler.is_compiling() or given["tokens"].numel() == 0:
            return
        # The host looks once: a GPU waits for each look.
        bounds = torch.stack([bound for ids in given.values() for bound in torch.aminmax(ids)]).tolist()
        for name, low, high in zip(given, bounds[::2], bounds[1::2], strict=True):
            if low < 0 or high >= self.configuration.vocabulary:
                raise ValueError(
                    f"{name} has the id {low if low < 0 else high}, and ids run from 0 to "
                    f"{self.configuration.vocabulary - 1}: was it made with another vocabulary?"
                )


class DEQTransformerLM(LanguageModel):
    """The DEQ-Transformer: hidden states are the equilibrium of one Transformer cell (arXiv 1909.01377).

    Args:
        configuration: all numbers of the model.
        solver, graph: of the forward solve, as in `DEQ`; state_dtype: as there.

    Attributes:
        pretraining: True for the first part of training: `unrolled` applications of the cell from zero,
            without a solve.

    The memory holds past fixed points and what was injected at them, without gradients.
    """

    def __init__(
        self,
        configuration: LanguageModelConfiguration,
        *,
        solver: Solver | None = None,
        graph: bool = False,
        state_dtype: torch.dtype | None = None,
    ):
        super().__init__(configuration)
        if configuration.layers:
            raise ValueError(f"layers={configuration.layers}: a DEQ has one cell; TransformerXL is a stack")
        self.pretraining = False
        self.deq = DEQ(
            transformer_cell(configuration),
            solver,
            tol=configuration.tol,
            max_steps=configuration.max_steps,
            graph=graph,
            gradient=ImplicitGradient(
                tol=configuration.backward_tol, max_steps=configuration.backward_max_steps
            ),
            penalty=_penalty(configuration),
            state_dtype=state_dtype,
        )

    @property
    def cell(self) -> TransformerCell:
        cell = self.deq.cell
        assert isinstance(cell, TransformerCell)
        return cell

    @property
    def penalty(self) -> JacobianPenalty | None:
        return self.deq.penalty

    def _body(self, x: Tensor, memory: Memory | None) -> tuple[Tensor, Memory, Solution | None, Tensor]:
        if not self.pretraining:
            out = self.deq((x, memory))
            following = self._remember(out.value, out.injection, memory)
            return out.value, following, out.solution, out.penalty
        u = self.cell.inject((x, memory))
        z = self.cell.initial_state(u)
        for _ in range(self.configuration.unrolled):
            z = self.cell(z, u)
        return z, self._remember(z, u, memory), None, z.new_zeros(())

    def _remember(self, value: Tensor, u: TransformerInjection, before: Memory | None) -> Memory:
        return self.cell.memory(value, u, before, self.configuration.memory)

    @torch.no_grad()
    def spectral_radius(self, tokens: Tensor, memory: Memory | None = None, steps: int = 150) -> Tensor:
        """`max |λ(J)|` at the equilibrium of each sequence, `[B]`; see `td.spectral_radius`."""
        self._check_ids(tokens=tokens)
        out = self.deq((self._dropped(self.embedding(tokens)), memory))
        return spectral_radius(Injected(self.cell, out.injection), out.value, steps)


class TransformerXL(LanguageModel):
    """A stack of Transformer cells with weights of their own (Dai et al., arXiv 1901.02860).

    The memory of a layer are its past inputs. `configuration.layers` says how many there are.
    """

    def __init__(self, configuration: LanguageModelConfiguration):
        super().__init__(configuration)
        if not configuration.layers:
            raise ValueError(
                "layers=0: a stack needs at least one; the model of one cell is DEQTransformerLM"
            )
        self.layers = nn.ModuleList(
            transformer_cell(configuration, injected=False) for _ in range(configuration.layers)
        )

    def _body(self, x: Tensor, memory: Any) -> tuple[Tensor, Any, None, Tensor]:
        memory = [None] * len(self.layers) if memory is None else memory
        following = []
        for layer, before in zip(self.layers, memory, strict=True):
            cell: Any = layer
            u = cell.inject((x, before))
            following.append(cell.memory(x, u, before, self.configuration.memory))
            x = cell(x, u)
        return x, following, None, x.new_zeros(())


def transformer_cell(configuration: LanguageModelConfiguration, injected: bool = True) -> TransformerCell:
    return TransformerCell(
        configuration.width,
        configuration.heads,
        configuration.inner,
        configuration.head_width,
        pre_norm=configuration.pre_norm,
        dropout=configuration.dropout,
        attention_dropout=configuration.attention_dropout,
        window=configuration.window,
        weight_norm=configuration.weight_norm,
        injected=injected,
        init_std=configuration.init_std,
    )


def _penalty(configuration: LanguageModelConfiguration) -> JacobianPenalty | None:
    if configuration.penalty == 0:
        return None
    return JacobianPenalty(
        configuration.penalty,
        configuration.penalty_probability,
        growth=configuration.penalty_growth,
        growth_interval=configuration.penalty_interval,
    )
