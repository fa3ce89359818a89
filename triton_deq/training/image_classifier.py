"""The task of an image classifier, and how its accuracy depends on the evaluations of f that it may take."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..checks import check_count
from ..data import ImageData
from .equilibrium import EquilibriumTask, solve_scalars
from .ranks import Ranks
from .task import Loss, Scalars

_MANY = 100  # classes, above which the five best are counted too


class ImageClassifierTask(EquilibriumTask):
    """An `MDEQClassifier` and labelled images.

    Scalars: loss (the mean cross-entropy, in nats), accuracy (the share of images whose class has the largest
    logit) and, where there is a solve, nfe, residual (the median over images) and unconverged (their share),
    the same of the backward solve, the penalty, and initial, the loss of a learned start. Validation takes
    all images; top5_accuracy, where there are more than 100 classes, is the share whose class is among the
    five largest; radius is the mean spectral radius over the first batch.

    Args:
        model: on its device.
        data: the images, as many classes as the model has.
        batch: images of all ranks together; validation has as many.
        seed: of the order of the images, and of what is done to them at random.
        radius_steps: of the power method at validation.

    Raises:
        TypeError, ValueError: data that do not fit the model, or a batch that does not fit the data.
    """

    def __init__(self, model: nn.Module, data: ImageData, batch: int, seed: int = 0, radius_steps: int = 50):
        super().__init__(model)
        check_count("radius_steps", radius_steps)
        described: Any = model.configuration
        if described.classes != data.classes:
            raise ValueError(
                f"the model has classes={described.classes}, and {data.name} has {data.classes}: make the "
                f"model with classes={data.classes}"
            )
        ranks = self._ranks
        if data.validation < ranks.world:
            raise ValueError(
                f"{data.name} has {data.validation} images to validate, fewer than the {ranks.world} ranks: "
                "give it more, or start fewer"
            )
        self.data, self.batch, self.radius_steps = data, batch, radius_steps
        self._train = data.train(batch, seed, self._device, ranks.rank, ranks.world)
        self.valid: Iterable[tuple[Tensor, Tensor]] = data.valid(batch, self._device, ranks.rank, ranks.world)
        self.configuration = {
            "model": type(model).__name__,
            **asdict(described),
            "images": data.fingerprint,
            "batch": batch,
            "data_seed": seed,
        }

    def loss(self, module: nn.Module) -> Loss:
        images, labels = self._train.take()
        out = module(images)
        loss = cross_entropy(out.logits, labels)
        return Loss(
            loss + out.penalty + out.initial, partial(self._image_scalars, loss.detach(), out, labels)
        )

    def validate(self) -> dict[str, float]:
        sums: dict[str, float] = {"images": 0.0}
        radius: dict[str, float] = {}
        for images, labels in self.valid:
            if self._equilibrium and not radius:
                model: Any = self.model
                radii = model.spectral_radius(images, self.radius_steps)
                radius = {"radius": radii.double().mean().item()}
            out = self.model(images)
            scalars: Scalars = {
                "loss": cross_entropy(out.logits, labels),
                "accuracy": _share(out.logits, labels, 1),
                **solve_scalars(out.solution),
            }
            if out.logits.shape[1] > _MANY:
                scalars["top5_accuracy"] = _share(out.logits, labels, 5)
            for name, scalar in scalars.items():
                sums[name] = sums.get(name, 0.0) + len(labels) * float(scalar)
            sums["images"] += len(labels)
        # A rank may have one image more than another: sums are what adds up.
        means = self._ranks.mean(sums)
        count = means.pop("images")
        return {**{name: value / count for name, value in means.items()}, **self._ranks.mean(radius)}

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"train": self._train.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._train.load_state_dict(state["train"])

    def close(self) -> None:
        """End the processes that decode images, if there are any."""
        self._train.close()

    def _image_scalars(self, loss: Tensor, out: Any, labels: Tensor) -> Scalars:
        scalars = self._scalars(loss, out)
        scalars["accuracy"] = _share(out.logits.detach(), labels, 1)
        if out.initial.requires_grad:
            scalars["initial"] = out.initial.detach()
        return scalars


def _share(logits: Tensor, labels: Tensor, best: int) -> Tensor:
    """The share of images whose class is among the ones with the largest logits."""
    return (logits.topk(best, 1).indices == labels[:, None]).any(1).float().mean()


@torch.no_grad()
def evaluate_by_nfe(
    model: Any, batches: Iterable[tuple[Tensor, Tensor]], evaluations: Iterable[int] = range(1, 9)
) -> dict[int, float]:
    """The accuracy where each forward solve takes so many evaluations of f, with no tolerance to stop it.

    A solve gives an iterate whose residual it has measured, which takes an evaluation itself: with one, that
    is where it starts.

    Under data-parallel training each rank calls this with its share of the images, and all get the same.

    Args:
        model: an `MDEQClassifier`, or another module whose `deq` solves for what it classifies.
        batches: images and labels, read once.
        evaluations: each at least 1.

    Returns:
        The accuracy by the number of evaluations.

    Raises:
        TypeError, ValueError: a number that cannot be; a model that is still pretraining, and solves nothing;
            no images.
    """
    numbers = list(evaluations)
    for number in numbers:
        check_count("evaluations", number)
    if getattr(model, "pretraining", False):
        raise ValueError("model.pretraining=True, so that it does not solve: set it to False")
    training, stopping = model.training, model.deq.stopping
    correct, count = dict.fromkeys(numbers, 0.0), 0
    model.eval()
    try:
        for images, labels in batches:
            for number in numbers:
                model.deq.stopping = replace(stopping, tol=0.0, max_steps=number)
                correct[number] += (model(images).logits.argmax(1) == labels).sum().item()
            count += len(labels)
    finally:
        model.deq.stopping = stopping
        model.train(training)
    means = Ranks().mean({"count": float(count), **{str(number): held for number, held in correct.items()}})
    if not means["count"]:
        raise ValueError("batches has no images: give those that validate")
    return {number: means[str(number)] / means["count"] for number in numbers}


def build_image_classifier(
    config: str, classes: int, penalty: float | None = None, initialiser: float | None = None
) -> nn.Module:
    """The classifier of a named configuration, for so many classes.

    Args:
        config: a name in `triton_deq.models.IMAGE_CONFIGURATIONS`.
        classes: of the images.
        penalty: γ in place of the configuration's; 0 for none.
        initialiser: weight of the learned start's loss in place of the configuration's; 0 for none.

    Raises:
        TypeError, ValueError: an unknown name, one of a segmentation, or a weight that cannot be.
    """
    from ..models import MDEQClassifier, find_image_configuration

    configuration = replace(find_image_configuration(config), classes=classes)
    if penalty is not None:
        configuration = replace(configuration, penalty=penalty)
    if initialiser is not None:
        configuration = replace(configuration, initialiser=initialiser)
    return MDEQClassifier(configuration)
