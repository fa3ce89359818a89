"""How the named configurations are trained, where the command line does not say otherwise."""

from dataclasses import dataclass, replace
from typing import Any

from .options import TrainingOptions


@dataclass(frozen=True)
class Recipe:
    """Sequences or images of a batch, and the trainer's options."""

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


def _changed(recipe: Recipe, **options: Any) -> Recipe:
    return replace(recipe, options=replace(recipe.options, **options))


# arXiv 2106.14342, its appendix and the authors' released settings: 200 epochs of 520 steps, and 50 of 781.
_CIFAR10_LARGE = Recipe(
    batch=96,
    options=TrainingOptions(
        steps=104_000,
        pretrain_steps=20_000,
        lr=1e-3,
        clip=0.0,
        validate_every=520,
        checkpoint_every=520,
        log_every=100,
    ),
)
_CIFAR10_TINY = Recipe(
    batch=64,
    options=replace(
        _CIFAR10_LARGE.options,
        steps=39_050,
        pretrain_steps=3000,
        weight_decay=2.5e-6,
        validate_every=781,
        checkpoint_every=781,
    ),
)

# 120 epochs of 11,439 steps. The authors pretrain for 510,000 steps of 128 images, here as many images.
_IMAGENET = Recipe(
    batch=112,
    options=TrainingOptions(
        steps=1_372_680,
        pretrain_steps=510_000 * 128 // 112,
        optimizer="nesterov",
        lr=0.05,
        weight_decay=5e-5,
        clip=0.0,
        validate_every=11_439,
        checkpoint_every=2000,
        log_every=200,
    ),
)

IMAGE_RECIPES = {
    # For a machine without a GPU: minutes on two cores.
    "digits": Recipe(
        batch=96,
        options=TrainingOptions(
            steps=600,
            pretrain_steps=100,
            lr=1e-3,
            clip=1.0,
            validate_every=100,
            checkpoint_every=100,
            log_every=20,
        ),
    ),
    "cifar10-tiny": _CIFAR10_TINY,
    "cifar10-tiny-jr": _CIFAR10_TINY,
    "cifar10-large": _CIFAR10_LARGE,
    "cifar10-large-jr": _changed(_CIFAR10_LARGE, pretrain_steps=16_000),
    "imagenet-small": _IMAGENET,
    "imagenet-small-jr": _changed(_IMAGENET, lr=0.04, weight_decay=2e-5),
    **{
        f"imagenet-{size}{kind}": _changed(_IMAGENET, weight_decay=1e-4)
        for size in ("large", "xl")
        for kind in ("", "-jr")
    },
}
"""By the configuration's name, one for each classifier."""


def image_recipe_for(config: str) -> Recipe:
    """The recipe of an image classifier.

    Raises:
        ValueError: none has this name.
    """
    if config not in IMAGE_RECIPES:
        raise ValueError(f"config={config!r} is unknown: choose one of {', '.join(IMAGE_RECIPES)}")
    return IMAGE_RECIPES[config]
