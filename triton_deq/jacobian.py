"""What the Jacobian of f at a state is like: its norm, its spectral radius, and a penalty on the norm."""

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from . import backend as backends
from .arnoldi import dominant_pair, normalise
from .checks import (
    check_choice,
    check_count,
    check_generator,
    check_graph,
    check_number,
    check_reached,
    check_state,
    check_value,
    explain_compiled,
)
from .ops.jacobian import DISTRIBUTIONS, probe, squared_norm
from .reference import jacobian as reference
from .reference.record import accumulate_dtype
from .solvers.packing import Map, State, packed
from .weight_caches import kept_apart

Function = Callable[[Tensor], Tensor]


REDUCTIONS = ("mean", "none")
KEPT_DRAWS = 64
"""How many of a penalty's last draws activation checkpointing can repeat: calls before one backward pass."""


def jacobian_norm(
    f: Map,
    z: State,
    probes: int = 1,
    distribution: str = "gaussian",
    generator: torch.Generator | None = None,
    backend: str = "auto",
    reduction: str = "mean",
) -> Tensor:
    """Estimate `‖∂f/∂z‖_F²` of each sample, divided by its number of entries; the mean over the batch.

    `1/(M·B·N) Σ_m Σ_b ‖ε_mbᵀ J_b‖²`, unbiased for independent ε of mean 0 and variance 1 (Hutchinson; Bai,
    Koltun & Kolter, arXiv 2106.14342, eq. 6). It costs `probes` vector-Jacobian products. Differentiable in z
    and in what f closes over.

    `torch.compile` takes it into one graph, its backward included, with new probes at every call, and the
    transforms of `torch.func` go through it. There `torch.func.vjp` runs f, so f must not write into its
    buffers, as BatchNorm does in train mode.

    Args:
        f: from a state to a state; the samples of a batch must not depend on each other. If it has a method
            `vjp(z)` that returns f(z) and the function `ε ↦ εᵀJ` for ε `[..., B, ...]`, both differentiable,
            that is called instead of the autograd engine, and no double backward is needed. If it has
            `jacobian_norms(z, seed, probes, distribution)`, the kernels are asked for `‖ε_mᵀ J_b‖²` `[M, B]`
            first: a differentiable tensor, or None to decline.
        z: `[B, ...]`, floating. f(z) may have another floating dtype, as under autocast; the probes have
            that of f(z), and the norms are summed in z's accumulation dtype. Or several such tensors, as in
            `solve`.
        probes: M, how many random vectors.
        distribution: of their entries: "gaussian", or "rademacher" (±1), whose variance is lower.
        generator: where randomness comes from; by default the global generator of z's device. Where kernels
            can run, one seed a call, from which kernels and reference make the same probes; elsewhere, as
            on a CPU, the probes themselves, as `torch.randn` draws them.
        backend: "auto", "triton" or "reference".
        reduction: "mean", or "none" for each sample's own estimate `1/(M·N) Σ_m ‖ε_mbᵀ J_b‖²`.

    Returns:
        A scalar, or `[B]`, in the accumulation dtype, float32 or float64; 0 for an empty batch.

    Raises:
        TypeError, ValueError: an argument that cannot be, named with its value and the remedy.
        RuntimeError: under `torch.inference_mode`, if f closes over a tensor that was made there.
    """
    f, z, _ = packed("z", f, z)
    name = _check_estimate(z, probes, distribution, generator, backend, reduction)
    draw = _Probes(z, distribution, generator, name)
    fused = getattr(f, "jacobian_norms", None)
    if fused is not None and name == "triton":
        norms = fused(z, draw.seed, probes, distribution)
        if norms is not None:
            return _reduce(norms, z, reduction)
    closed = closed_vjp(f)
    value, pullback = vjp(f, z) if closed is None else closed(z)
    check_value(value, z, same_dtype=False)
    vectors = [draw(value, index) for index in range(probes)]
    if closed is None:
        norms = torch.stack([squared_norm(pullback(vector), name) for vector in vectors])
    else:  # All probes at once; one alone need not be copied.
        products = pullback(torch.stack(vectors) if probes > 1 else vectors[0][None])
        norms = squared_norm(products.flatten(0, 1), name).view(probes, z.shape[0])
    return _reduce(norms, z, reduction)


def jacobian_norm_of(
    value: Tensor,
    z: Tensor,
    probes: int = 1,
    distribution: str = "gaussian",
    generator: torch.Generator | None = None,
    backend: str = "auto",
    reduction: str = "mean",
) -> Tensor:
    """`jacobian_norm(f, z)` for code that has `value = f(z)` already: f is not evaluated again.

    The same number for the same seed, and what `jac_loss_estimate(value, z, vecs=probes)` of the authors'
    code estimates (arXiv 2106.14342, eq. 6). It always goes through the autograd engine's double backward,
    which `torch.compile` cannot put into one graph: inside a compiled function call `jacobian_norm`, and also
    where f was compiled by itself.

    Args:
        value: f(z), `[B, ...]`, floating, with its graph.
        z: `[B, ...]`, floating, of requires_grad=True when value was computed from it.
        probes, distribution, generator, backend, reduction: as in `jacobian_norm`.

    Returns:
        As `jacobian_norm`.

    Raises:
        TypeError, ValueError: an argument that cannot be, a z that needs no gradient or a value without a
            graph that leads to z, named with the remedy.
        RuntimeError: in a graph of `torch.compile`; in the estimate's backward pass, if a function that was
            compiled has computed the value.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "jacobian_norm_of needs a double backward, which torch.compile cannot put into one graph: call "
            "jacobian_norm(f, z) there, or jacobian_norm_of outside of the compiled function"
        )
    name = _check_estimate(z, probes, distribution, generator, backend, reduction)
    check_value(value, z, same_dtype=False, name="value")
    check_graph(value, z)
    draw = _Probes(z, distribution, generator, name)
    norms = []
    for index in range(probes):
        vector = draw(value, index)
        product = check_reached(_engine_product(value, z, vector, create_graph=torch.is_grad_enabled()))
        explain_compiled(product)
        norms.append(squared_norm(product, name))
    return _reduce(torch.stack(norms), z, reduction)


def _check_estimate(
    z: Any, probes: Any, distribution: Any, generator: Any, backend: str, reduction: Any
) -> str:
    """Check what every estimate is asked with; the backend that serves it."""
    check_state("z", z)
    check_count("probes", probes)
    check_choice("distribution", distribution, DISTRIBUTIONS)
    check_generator(generator)
    check_choice("reduction", reduction, REDUCTIONS)
    return backends.choose(z, backend)[0]


def _reduce(norms: Tensor, z: Tensor, reduction: str) -> Tensor:
    """From `‖ε_mbᵀ J_b‖²`, `[M, B]`, to the estimate."""
    probes = norms.shape[0]
    if reduction == "none":
        return norms.sum(0) / (probes * max(math.prod(z.shape[1:]), 1))
    return norms.sum() / (probes * max(z.numel(), 1))


def closed_vjp(f: Any) -> Callable[[Tensor], tuple[Tensor, Function]] | None:
    """f's own `z ↦ (f(z), ε ↦ εᵀJ)` for ε `[..., B, ...]`, if it has one."""
    return getattr(f, "vjp", None)


def vjp(f: Function, z: Tensor) -> tuple[Tensor, Function]:
    """`f(z)` and `ε ↦ εᵀJ`, both differentiable in z and in what f closes over.

    Under torch.compile the product is written out in the forward (`torch.func.vjp`), because a compiled
    region has no double backward; and in the transforms of torch.func, which the engine does not know.
    Otherwise the engine does it, which takes any f: also one with running statistics or with an
    autograd.Function that torch.func cannot transform. What was compiled by itself runs as it was written.
    """
    if backends.transformed():
        value, transposed = torch.func.vjp(f, z)[:2]
        check_value(value, z, same_dtype=False)
        return value, lambda vector: transposed(vector)[0]
    if torch.is_grad_enabled():
        z = z if z.requires_grad else z.detach().requires_grad_()
        return _engine_vjp(f, z, create_graph=True)
    if torch.is_inference_mode_enabled():
        return _vjp_in_inference(f, z)
    with torch.enable_grad():
        return _engine_vjp(f, z.detach().requires_grad_(), create_graph=False)


def _vjp_in_inference(f: Function, z: Tensor) -> tuple[Tensor, Function]:
    """Outside of inference mode, where the engine records nothing, so that every product would be 0."""
    with torch.inference_mode(False), torch.enable_grad():
        try:
            return _engine_vjp(f, z.clone().requires_grad_(), create_graph=False)
        except RuntimeError as error:
            if "nference tensor" not in str(error):
                raise
            raise RuntimeError(
                "f closes over a tensor that torch.inference_mode() has made, which has no derivatives: make "
                "it under torch.no_grad() instead, or clone it outside of inference mode"
            ) from error


def _engine_vjp(f: Function, z: Tensor, create_graph: bool) -> tuple[Tensor, Function]:
    with _uncompiled() if create_graph else nullcontext():
        value = f(z)
    check_value(value, z, same_dtype=False)

    def pullback(vector: Tensor) -> Tensor:
        product = _engine_product(value, z, vector, create_graph) if value.requires_grad else None
        return torch.zeros_like(z) if product is None else product  # None: f does not depend on z

    return value, pullback


def _uncompiled() -> AbstractContextManager[Any]:
    """While entered, what was compiled runs as it was written: compiled it has no double backward."""
    if "torch._dynamo" not in sys.modules:  # then nothing was, and to import it takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _engine_product(value: Tensor, z: Tensor, vector: Tensor, create_graph: bool) -> Tensor | None:
    """`εᵀ ∂value/∂z`; None where no graph leads from value to z."""
    return torch.autograd.grad(
        value, z, vector, create_graph=create_graph, retain_graph=True, allow_unused=True
    )[0]


class _Probes:
    """The probes of one estimate: ε like a value, by its index.

    They come from one seed, int64 `[1]` on z's device, where kernels can run: those and the reference then
    make the same ones. Where none can, nothing is to be compared, and PyTorch draws them in a fraction of
    the time. The host waits for neither, if the generator is on z's device.
    """

    def __init__(self, z: Tensor, distribution: str, generator: torch.Generator | None, name: str):
        self.distribution = distribution
        self.generator = generator
        self.name = name
        self.seed: Tensor | None = None
        if backends.kernels_can(z):
            at = generator.device if generator is not None else z.device
            self.seed = torch.randint(2**63 - 1, (1,), generator=generator, device=at).to(z.device)

    def __call__(self, value: Tensor, index: int) -> Tensor:
        if self.seed is None:
            return reference.drawn_probe(value, self.distribution, self.generator)
        return probe(value, self.seed, index, self.distribution, self.name)


def spectral_radius(f: Map, z: State, steps: int = 150) -> Tensor:
    """`max |λ(∂f/∂z)|` of each sample, by restarted Arnoldi iteration on `Jᵀ`.

    A power iteration with a Rayleigh quotient is wrong where the largest eigenvalues are a complex pair,
    as they often are in a DEQ. A Krylov space of up to 20 vectors holds such a pair, and the eigenvalues of
    J's projection on it (Saad, "Numerical Methods for Large Eigenvalue Problems", 2011, ch. 6) tell its
    modulus. Each cycle starts from the sum of the Ritz vectors that belong to the largest one, until in
    every sample what they leave of `J x − λ x` is no longer than `√ε |λ|`, with the dtype's ε. Where steps
    are left for as many vectors as the state has entries, the next space is all there is.

    Args:
        f: from a state to a state; the samples of a batch must not depend on each other. Its `vjp` is used
            as in `jacobian_norm`, if it has one.
        z: `[B, ...]`, floating, or several such tensors, as in `solve`.
        steps: how many vector-Jacobian products it may take, at least 1.

    Returns:
        `[B]` float32, or float64 for a float64 state.

    Raises:
        TypeError, ValueError: an argument that cannot be, named with its value and the remedy.
        RuntimeError: inside torch.compile; under `torch.inference_mode`, if f closes over a tensor that was
            made there.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "spectral_radius reads the device between products: call it outside of a compiled function"
        )
    f, z, _ = packed("z", f, z)
    check_state("z", z)
    check_count("steps", steps)
    with torch.no_grad(), kept_apart():
        if z.numel() == 0:
            return torch.zeros(z.shape[0], dtype=accumulate_dtype(z.dtype), device=z.device)
        closed = closed_vjp(f)
        value, pullback = vjp(f, z) if closed is None else closed(z)
        check_value(value, z, same_dtype=False)
        return dominant_pair(pullback, value, z, steps)[0]


def spectral_pair_of(value: Tensor, z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """`spectral_radius` for code that has `value = f(z)` already, and the vector that belongs to it.

    Args:
        value: f(z), `[B, ...]`, floating, with its graph, which is kept.
        z: `[B, ...]`, floating, of requires_grad=True when value was computed from it.
        steps: as in `spectral_radius`.

    Returns:
        The radius `[B]`, and a vector like z of length 1 in each sample: an eigenvector of `Jᵀ`, or one of
        the plane that belongs to a complex pair.

    Raises:
        TypeError, ValueError: as `jacobian_norm_of`.
    """
    check_state("z", z)
    check_count("steps", steps)
    check_value(value, z, same_dtype=False, name="value")
    check_graph(value, z)
    with torch.no_grad():
        if z.numel() == 0:
            return torch.zeros(
                z.shape[0], dtype=accumulate_dtype(z.dtype), device=z.device
            ), torch.zeros_like(z)

        def pullback(vector: Tensor) -> Tensor:
            return check_reached(_engine_product(value, z, vector, create_graph=False))

        radius, rows = dominant_pair(pullback, value, z, steps)
        return radius, normalise(rows)[0].view(z.shape).to(z.dtype)


def _number(value: float) -> Tensor:
    """As a tensor, because a compiled graph would hold a Python number as a constant."""
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _in_backward() -> bool:
    """Whether autograd's engine is what calls, as it does what checkpointing makes anew."""
    return torch._C._current_graph_task_id() != -1


class JacobianPenalty(nn.Module):
    """`τ γ · jacobian_norm(f, z*)` with `τ ~ Bernoulli(p)` drawn once a call (arXiv 2106.14342, eq. 6).

    The draws come from a seeded generator of their own, so that every data-parallel rank draws the same. Its
    state and the counts are part of `state_dict`. A call is a training step.

    A graph of `torch.compile` cannot hold such a draw. Where the penalty is called inside a compiled
    function, call `draw()` before each call of that function: one call of the penalty uses up one draw, and
    without any it raises under `fullgraph=True` and breaks the graph otherwise. The function is compiled
    twice, with the estimate and without, so that a step with τ = 0 costs nothing there either; a γ that
    changes is an input of the graph and compiles nothing anew.

    Activation checkpointing calls a model once more in the backward pass, which is no step: such a call has
    the τ and γ of the one that it repeats. They are found by a number that each draw takes from PyTorch's
    generator on the CPU, which `torch.utils.checkpoint` sets back (unless `preserve_rng_state=False`).

    Args:
        weight: γ ≥ 0. The paper uses 0.5 (CIFAR-10) to 2.5 (WikiText-103) and 3 (ImageNet).
        probability: p in [0, 1], how often the penalty is computed at all; it is not rescaled by 1/p.
        probes: M, random vectors an estimate.
        distribution: "gaussian" or "rademacher".
        seed: of the draws τ.
        growth: added to γ after every `growth_interval` calls.
        growth_interval: calls, at least 1.
        stop_after: the penalty is zero from that many calls on; None: never.
        pretraining_weight: γ while `pretraining` is True, as in unrolled pretraining; None: the same γ.

    Attributes:
        pretraining: for the trainer to set; False at first.
        calls, fired: how often it was asked, and how often it was computed: each of these cost `probes`
            vector-Jacobian products and their gradient.

    Raises:
        TypeError, ValueError: an argument outside its range.
    """

    def __init__(
        self,
        weight: float,
        probability: float = 1.0,
        probes: int = 1,
        distribution: str = "gaussian",
        seed: int = 0,
        *,
        growth: float = 0.0,
        growth_interval: int = 1,
        stop_after: int | None = None,
        pretraining_weight: float | None = None,
    ):
        super().__init__()
        check_number("weight", weight, 0)
        check_number("probability", probability, 0, 1)
        check_count("probes", probes)
        check_choice("distribution", distribution, DISTRIBUTIONS)
        check_count("seed", seed, least=0)
        check_number("growth", growth, 0)
        check_count("growth_interval", growth_interval)
        if stop_after is not None:
            check_count("stop_after", stop_after, least=0)
        if pretraining_weight is not None:
            check_number("pretraining_weight", pretraining_weight, 0)
        self.weight = weight
        self.probability = probability
        self.probes = probes
        self.distribution = distribution
        self.growth = growth
        self.growth_interval = growth_interval
        self.stop_after = stop_after
        self.pretraining_weight = pretraining_weight
        self.pretraining = False
        self.calls = 0
        self.fired = 0
        self._draws = torch.Generator("cpu").manual_seed(seed)
        self._drawn: bool | None = None  # τ of the next call, where it is known already
        self._scale = _number(0.0)  # γ of the last draw
        self._recent: dict[int, tuple[bool, Tensor]] = {}  # τ and γ of the last draws, for those repeated

    @property
    def present_weight(self) -> float:
        """γ of the next call."""
        if self.stop_after is not None and self.calls >= self.stop_after:
            return 0.0
        if self.pretraining and self.pretraining_weight is not None:
            return self.pretraining_weight
        return self.weight + self.growth * (self.calls // self.growth_interval)

    def draw(self) -> bool:
        """Draw τ for the next call ahead of it, as `torch.compile` needs; whether that call will fire.

        A second draw before a call takes the place of the first, which was counted.
        """
        mark = int(torch.randint(2**63 - 1, (), device="cpu"))  # the same again in a call that is repeated
        if _in_backward() and mark in self._recent:
            self._drawn, self._scale = self._recent[mark]
            return self._drawn
        weight = self.present_weight
        tau = torch.rand((), generator=self._draws, device="cpu").item() < self.probability
        self._drawn = tau and weight > 0
        self._scale = _number(weight)  # a new one: nothing may be written into from inside torch.func
        self.calls += 1
        self.fired += self._drawn
        self._recent[mark] = self._drawn, self._scale
        if len(self._recent) > KEPT_DRAWS:
            del self._recent[next(iter(self._recent))]
        return self._drawn

    def forward(self, f: Map, z: State, backend: str = "auto") -> Tensor:
        """A scalar to add to the loss; zero where τ is 0. Gradients reach what f closes over, and z.

        Args:
            f, z, backend: as in `jacobian_norm`.

        Raises:
            As `jacobian_norm`; RuntimeError in a graph of `torch.compile` without a `draw()` before it.
        """
        f, z, _ = packed("z", f, z)
        if self._drawn is None:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "a JacobianPenalty inside a compiled function has no draw: call penalty.draw() before "
                    "each call of that function"
                )
            self.draw()
        fires, self._drawn = self._drawn, None
        if not fires:
            return z.new_zeros((), dtype=accumulate_dtype(z.dtype))
        norm = jacobian_norm(f, z, self.probes, self.distribution, backend=backend)
        return self._scale.to(norm.dtype) * norm

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight}, probability={self.probability}, probes={self.probes}, "
            f"distribution={self.distribution!r}, fired={self.fired} of {self.calls}"
        )

    def get_extra_state(self) -> Tensor:
        """Bytes in one tensor, because there are files of a model's state that hold tensors alone."""
        drawn = -1 if self._drawn is None else int(self._drawn)
        counts = torch.tensor([self.calls, self.fired, drawn], device="cpu")
        scale = self._scale.reshape(1)
        return torch.cat([counts.view(torch.uint8), scale.view(torch.uint8), self._draws.get_state()])

    def set_extra_state(self, state: Tensor) -> None:
        counts, scale, draws = state.clone().cpu().tensor_split([24, 32])
        self.calls, self.fired, drawn = counts.view(torch.int64).tolist()
        self._drawn = None if drawn < 0 else bool(drawn)
        self._scale = scale.view(torch.float64)[0]
        self._draws.set_state(draws.clone())  # it reads from where the memory begins

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_draws": self._draws.get_state()}  # a Generator cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._draws = torch.Generator("cpu")
        self._draws.set_state(state["_draws"])
