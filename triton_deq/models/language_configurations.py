"""The named configurations: every number that makes a model, and the recipe it was published with."""

from dataclasses import dataclass, replace

from ..checks import check_count, check_number


@dataclass(frozen=True)
class LanguageModelConfiguration:
    """A language model of Transformer cells over an adaptive embedding.

    Attributes:
        vocabulary: V; data with another vocabulary replaces it.
        width, heads, head_width, inner: D, H, d and the feed-forward's width.
        cutoffs, div_value: of the adaptive embedding and softmax.
        pre_norm, dropout, attention_dropout, window, weight_norm, init_std: as in `TransformerCell`.
        segment, memory: tokens of a segment, and of the past before it.
        layers: 0 for a DEQ; else a stack of so many cells with weights of their own (Transformer-XL).
        unrolled: weight-tied layers while pretraining.
        max_steps, tol, backward_max_steps, backward_tol: of the solves.
        penalty, penalty_probability, penalty_growth, penalty_interval: γ, p, and what is added to γ how
            often, as in `JacobianPenalty`; γ = 0 for none.

    Raises:
        TypeError, ValueError: a field that cannot be.
    """

    vocabulary: int
    width: int
    heads: int
    head_width: int
    inner: int
    cutoffs: tuple[int, ...]
    div_value: int = 4
    pre_norm: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    window: int | None = None
    weight_norm: bool = True
    init_std: float = 0.02
    segment: int = 150
    memory: int = 150
    layers: int = 0
    unrolled: int = 2
    max_steps: int = 12
    tol: float = 1e-3
    backward_max_steps: int = 12
    backward_tol: float = 1e-4
    penalty: float = 0.0
    penalty_probability: float = 0.35
    penalty_growth: float = 0.0
    penalty_interval: int = 1

    def __post_init__(self):
        for name in ("segment", "unrolled", "max_steps", "backward_max_steps", "penalty_interval"):
            check_count(name, getattr(self, name))
        for name in ("memory", "layers"):
            check_count(name, getattr(self, name), least=0)
        check_number("penalty", self.penalty, 0)


# Bai, Koltun & Kolter, arXiv 2106.14342, table 2 and appendix; sizes from the authors' released settings.
_POST_LN = LanguageModelConfiguration(
    vocabulary=267735,
    width=700,
    heads=10,
    head_width=70,
    inner=48000,
    cutoffs=(20000, 40000, 200000),
    dropout=0.06,
    attention_dropout=0.01,
    max_steps=30,
    backward_max_steps=30,
)

CONFIGURATIONS = {
    "wikitext103-post-ln": _POST_LN,
    "wikitext103-pre-ln-jr": replace(
        _POST_LN,
        pre_norm=True,
        max_steps=14,
        backward_max_steps=14,
        penalty=1.6,
        penalty_growth=0.1,
        penalty_interval=35000,
    ),
    # The stacked model that the paper's table compares with: 18 layers, 110M parameters.
    "wikitext103-transformer-xl": replace(_POST_LN, inner=1550, weight_norm=False, layers=18),
    # For a machine without a GPU: minutes on two cores.
    "tiny": LanguageModelConfiguration(
        vocabulary=4000,
        width=64,
        heads=4,
        head_width=16,
        inner=256,
        cutoffs=(500, 2000),
        div_value=2,
        init_std=0.05,
        segment=32,
        memory=32,
        max_steps=30,
        backward_max_steps=30,
        penalty=0.1,
    ),
}
"""By name; the first three are sized for WikiText-103, "tiny" for the embedded text."""


def find_configuration(name: str) -> LanguageModelConfiguration:
    """The configuration of this name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in CONFIGURATIONS:
        raise ValueError(f"config={name!r} is unknown: choose one of {', '.join(CONFIGURATIONS)}")
    return CONFIGURATIONS[name]
