"""The two models of a comparison, from their names."""

import copy
import importlib
import os
import sys
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..deq import DEQ
from ..implicit import ImplicitGradient
from ..models import (
    CONFIGURATIONS,
    IMAGE_CONFIGURATIONS,
    DEQTransformerLM,
    MDEQClassifier,
    MDEQSegmenter,
    TransformerXL,
)
from ..solvers import Anderson, Broyden
from .peers import RESNETS, resnet, transformer_xl
from .plan import Plan, Refusal, sentence
from .tasks import Example, Images, Narrow, Task, Tokens, prediction, shape_of

IMAGE = (3, 32, 32)
"""What a factory's model is fed with where nothing says otherwise."""


@dataclass
class Side:
    """One model of the comparison.

    Attributes:
        role: "model" or "against".
        name: as the command line has it.
        model: on the device; task: what it is fed with.
        deq: the first DEQ in it, whose time is taken apart; None without one.
        probability: of the penalty in the model's own configuration; None without a penalty.
        note: a sentence about it.
    """

    role: str
    name: str
    model: nn.Module
    task: Task
    deq: DEQ | None
    probability: float | None
    note: str

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def in_dtype(self, dtype: str) -> "Side":
        """Itself, or where `plan.DTYPES` asks for more than autocast a copy that is so."""
        if dtype in ("fp32", "bf16"):
            return self
        model, task = copy.deepcopy(self.model), self.task
        if dtype == "pure-bf16":
            model, task = model.to(torch.bfloat16), Narrow(task, torch.bfloat16)
        else:
            for deq in _deqs(model):
                deq.state_dtype = torch.bfloat16
        return replace(self, model=model, task=task, deq=_first_deq(model))


def find_sides(plan: Plan, device: torch.device, batch: int | None) -> list[Side]:
    """The model and its peer, if one is asked for.

    Raises:
        Refusal: a name that is none, a factory that gives no model, a missing package.
    """
    torch.manual_seed(plan.seed)
    model, note, task = _model(plan)
    sides = [_side(plan, "model", plan.model, model, task, note, device)]
    against = _default_peer(plan, model) if plan.against is None else plan.against
    if against != "none":
        torch.manual_seed(plan.seed)
        peer, note, own = _peer(plan, against, sides[0], device, batch or 2)
        sides.append(_side(plan, "against", against, peer, own, note, device))
        if isinstance(own, Example) and ":" in plan.model and plan.image_size is None:
            sides[0].task = own if isinstance(sides[0].task, Images) else sides[0].task
    if not any(side.deq for side in sides):
        for option in ("nfe", "solver"):
            if getattr(plan, option) is not None:
                raise Refusal(
                    f"--{option} {getattr(plan, option)} has nothing to set: no td.DEQ is part of "
                    f"{' or of '.join(side.name for side in sides)}; leave it out"
                )
    return sides


def _model(plan: Plan) -> tuple[nn.Module, str, Task]:
    name = plan.model
    if ":" in name:
        model = _made("--model", name)
        return model, "of your own", _task_of(model, plan)
    if name in IMAGE_CONFIGURATIONS:
        image = IMAGE_CONFIGURATIONS[name]
        classify = MDEQClassifier if image.head else MDEQSegmenter
        size = (image.image_channels, *image.image_size)
        return classify(image), f"{classify.__name__} at {name}", Images(*_sized(size, plan))
    if name in CONFIGURATIONS:
        text = CONFIGURATIONS[name]
        if plan.image_size is not None:
            raise Refusal(f"--image-size has nothing to set: {name} is a language model; leave it out")
        speak = TransformerXL if text.layers else DEQTransformerLM
        return speak(text), f"{speak.__name__} at {name}", Tokens(text.vocabulary, text.segment)
    known = ", ".join([*IMAGE_CONFIGURATIONS, *CONFIGURATIONS])
    raise Refusal(f"--model {name} is unknown: choose one of {known}, or give module.path:factory")


def _default_peer(plan: Plan, model: nn.Module) -> str:
    if plan.model in CONFIGURATIONS:
        return "transformer-xl"
    return "none" if isinstance(model, MDEQSegmenter) else "resnet101"


def _peer(
    plan: Plan, name: str, other: Side, device: torch.device, batch: int
) -> tuple[nn.Module, str, Task]:
    if ":" in name:
        model = _made("--against", name)
        task = Example(model) if hasattr(model, "example_input") else other.task
        return model, "of your own", task
    if name == "transformer-xl":
        if plan.model not in CONFIGURATIONS:
            raise Refusal(
                f"--against transformer-xl needs a language model, and --model {plan.model} is none: choose "
                f"one of {', '.join(CONFIGURATIONS)}, or another peer"
            )
        return *transformer_xl(plan.model, CONFIGURATIONS[plan.model]), other.task
    if name not in RESNETS:
        raise Refusal(
            f"--against {name} is unknown: choose one of {', '.join(RESNETS)}, transformer-xl, none, or give "
            "module.path:factory"
        )
    shape = shape_of(_arguments(other, batch, device))
    if len(shape) != 4:
        raise Refusal(
            f"--against {name} takes images [B, C, H, W], and {other.name} is fed with {list(shape)}: give "
            "--against none or a factory"
        )
    return *resnet(name, shape[1:], _classes(other, batch, device)), other.task


def _side(
    plan: Plan, role: str, name: str, model: nn.Module, task: Task, note: str, device: torch.device
) -> Side:
    deqs = _deqs(model)
    probability = next((deq.penalty.probability for deq in deqs if deq.penalty is not None), None)
    for deq in deqs:
        configure(deq, plan)
    side = Side(role, name, model.to(device), task, _first_deq(model), probability, note)
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        _initialise(side, plan, device)
    if len(deqs) > 1:
        side.note += f"; it has {len(deqs)} DEQs, and the first of them is taken apart"
    return side


def _deqs(model: nn.Module) -> list[DEQ]:
    return [part for part in model.modules() if isinstance(part, DEQ)]


def _first_deq(model: nn.Module) -> DEQ | None:
    return next(iter(_deqs(model)), None)


def _initialise(side: Side, plan: Plan, device: torch.device) -> None:
    """Lazy layers take their shapes from the first call."""
    try:
        with torch.no_grad():
            side.model.eval()(*side.task.arguments(side.model, plan.batch[0] if plan.batch else 2, device))
    except Exception as error:
        raise Refusal(f"--{side.role} {side.name}: its first call failed ({sentence(error)})") from error


def configure(deq: DEQ, plan: Plan) -> None:
    """Solver, evaluations and penalty as they were asked for."""
    backward: dict[str, Any] = {}
    if plan.solver is not None:
        kind = {"anderson": Anderson, "broyden": Broyden}[plan.solver]
        deq.solver = backward["solver"] = kind()
    if plan.nfe is not None:
        deq.stopping = replace(deq.stopping, tol=0.0, max_steps=plan.nfe)
        backward |= {"tol": 0.0, "max_steps": plan.nfe}
    if backward and isinstance(deq.gradient, ImplicitGradient):
        if deq.gradient.shine is not None and plan.solver == "anderson":
            raise Refusal(
                f"--solver anderson: the model's gradient has shine={deq.gradient.shine!r}, which needs "
                "Broyden; leave --solver out"
            )
        deq.gradient = replace(deq.gradient, **backward)
    if deq.penalty is not None:
        if plan.penalty:  # at every step, or its cost would fall into some of the rounds only
            deq.penalty.probability, deq.penalty.stop_after = 1.0, None
        else:
            deq.penalty = None


# ------------------------------------------------------------------------------------------- factories


def _made(option: str, text: str) -> nn.Module:
    """What the factory `module.path:name` returns."""
    path, _, name = text.partition(":")
    with _current_folder_importable():
        try:
            module = importlib.import_module(path)
        except Exception as error:
            raise Refusal(
                f"{option} {text}: importing {path} failed ({sentence(error)}): run the command in the "
                "folder that holds it, or install it"
            ) from error
        try:
            factory = attrgetter(name)(module)
        except AttributeError:
            raise Refusal(f"{option} {text}: {path} has no {name!r}: name a callable of it") from None
        if not callable(factory):
            raise Refusal(
                f"{option} {text}: {name} is {type(factory).__name__}, which cannot be called: name a "
                "callable without arguments that returns an nn.Module"
            )
        try:
            model = factory()
        except Exception as error:
            raise Refusal(
                f"{option} {text}: calling it failed ({sentence(error)}): it is called without arguments"
            ) from error
    if not isinstance(model, nn.Module):
        raise Refusal(f"{option} {text} returned {type(model).__name__}: let it return an nn.Module")
    return model


class _current_folder_importable:
    """The `triton-deq` script, unlike `python -m`, does not look into the folder that it is run in."""

    def __enter__(self) -> None:
        self._before = list(sys.path)
        sys.path.insert(0, os.getcwd())

    def __exit__(self, *error: object) -> None:
        sys.path[:] = self._before


def _task_of(model: nn.Module, plan: Plan) -> Task:
    if hasattr(model, "example_input"):
        if plan.image_size is not None:
            raise Refusal(f"--image-size has nothing to set: {plan.model} has example_input; leave it out")
        return Example(model)
    return Images(*_sized(IMAGE, plan))


def _sized(shape: tuple[int, ...], plan: Plan) -> tuple[int, int, int]:
    """The shape `(C, H, W)` with what `--image-size` says of it."""
    given = plan.image_size or ()
    channels, height, width = (*shape[: 3 - len(given)], *given)
    return channels, height, width


def _arguments(side: Side, batch: int, device: torch.device) -> tuple[Any, ...]:
    try:
        return side.task.arguments(side.model, batch, device)
    except Exception as error:
        raise Refusal(f"--model {side.name}: its example_input failed ({sentence(error)})") from error


def _classes(side: Side, batch: int, device: torch.device) -> int:
    """How many the model tells apart: its configuration says, or the width of what it returns; else 1000."""
    if side.name in IMAGE_CONFIGURATIONS:
        return IMAGE_CONFIGURATIONS[side.name].classes
    try:
        with torch.no_grad():
            logits = prediction(side.model.eval()(*side.task.arguments(side.model, batch, device)))
    except Exception:  # its rows will say so
        return 1000
    return logits.shape[1] if logits.dim() == 2 else 1000
