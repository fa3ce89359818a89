"""How the named configurations are trained, where the command line does not say otherwise."""

from dataclasses import dataclass

from .options import TrainingOptions


@dataclass(frozen=True)
class Recipe:
    """Sequences of a batch, and the trainer's options."""

    batch: int
    options: TrainingOptions


WIKITEXT103 = Recipe(
    batch=60,
    # arXiv 2106.14342: 23 epochs of 11,470 segments of 60 × 150 tokens, the first epoch is warm-up. How long
    # to pretrain is our choice.
    options=TrainingOptions(
        steps=263_810,
        pretrain_steps=30_000,
        warmup_steps=11_470,
        lr=2.5e-4,
        validate_every=4000,
        checkpoint_every=1000,
        log_every=200,
    ),
)

RECIPES = {
    "tiny": Recipe(
        batch=16,
        options=TrainingOptions(
            steps=800,
            pretrain_steps=200,
            warmup_steps=40,
            lr=1e-3,
            clip=1.0,
            validate_every=100,
            checkpoint_every=100,
            log_every=20,
        ),
    )
}
"""By the configuration's name; the others have `WIKITEXT103`."""


def recipe_for(config: str) -> Recipe:
    return RECIPES.get(config, WIKITEXT103)
