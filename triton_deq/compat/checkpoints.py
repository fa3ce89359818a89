"""The authors' trained weights (locuslab/deq) in our models.

    from triton_deq.compat.checkpoints import load_locuslab_checkpoint

    model = load_locuslab_checkpoint("MDEQ_ImageNet_small.pkl")                     # found by its shapes
    model = load_locuslab_checkpoint("wt103.pkl", "wikitext103-post-ln")            # or named

Their repository links a DEQ-Transformer for WikiText-103 and MDEQs for ImageNet and Cityscapes in the READMEs
of `DEQ-Sequence` and `MDEQ-Vision`.
"""

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import (
    CONFIGURATIONS,
    IMAGE_CONFIGURATIONS,
    DEQTransformerLM,
    MDEQClassifier,
    MDEQSegmenter,
    find_configuration,
    find_image_configuration,
)
from ..models.mdeq import MDEQ


class WrongCheckpoint(ValueError):
    """A file that holds no weights, or not those of the model asked for. The model is as it was."""


class Layout(NamedTuple):
    """Where the authors' weights belong in a model of ours.

    places: patterns of their names and what these are here. A place is `name` or `name|change`; without a
        change the tensor is taken as it is.
    copies: names that hold what another of their names holds.
    computed: names that hold what we compute, with the function that says what that is.
    """

    places: Mapping[str, str]
    copies: Mapping[str, str]
    computed: Mapping[str, Callable[[Tensor], Tensor]]


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix": lambda weight: weight.flatten(1) if weight.dim() > 1 else weight,  # a convolution of size 1
    "transposed": lambda weight: weight.mT if weight.dim() > 1 else weight,
    "reversed": lambda weight: weight.flip(0),  # they count the clusters from the last
}


def _frequencies(like: Tensor) -> Tensor:
    even = torch.arange(0, 2 * len(like), 2, dtype=torch.float32)
    return 1 / (10000 ** (even / (2 * len(like))))


_ATTENTION = {
    "qkv_net": "qkv",
    "r_net": "positions",
    "o_net": "out",
}
TRANSFORMER = Layout(
    places={
        r"word_emb\.emb_layers\.(\d+)\.weight": r"embedding.clusters.\1.words.weight",
        r"word_emb\.emb_projs\.(\d+)\.weight": r"embedding.clusters.\1.projection.weight|transposed",
        r"crit\.out_projs\.0\.weight": r"softmax.head.projection.weight|transposed",
        r"crit\.out_layers\.0\.bias": r"softmax.head.bias",
        r"crit\.out_layers\.(\d+)\.bias": r"softmax.tail.\1.bias|shifted",
        r"crit\.cluster_(weight|bias)": r"softmax.head.clusters.\1|reversed",
        r"inject_conv\.weight": r"deq.cell.injection.weight|matrix",
        r"inject_conv\.bias": r"deq.cell.injection.bias",
        **{
            rf"func\.dec_attn\.{theirs}\.(weight|weight_g|weight_v)": rf"deq.cell.{ours}.\1|matrix"
            for theirs, ours in _ATTENTION.items()
        },
        r"func\.dec_attn\.o_net\.bias": r"deq.cell.out.bias",
        r"func\.dec_attn\.r_w_bias": r"deq.cell.content_bias",
        r"func\.dec_attn\.r_r_bias": r"deq.cell.position_bias",
        r"func\.pos_ff\.ff1_net\.(\w+)": r"deq.cell.up.\1",
        r"func\.pos_ff\.ff2_net\.(\w+)": r"deq.cell.down.\1",
    },
    copies={
        r"crit\.out_layers\.(\d+)\.weight": r"word_emb.emb_layers.\1.weight",
        r"crit\.out_projs\.([1-9]\d*)\.weight": r"word_emb.emb_projs.\1.weight",
    },
    computed={"pos_emb.inv_freq": _frequencies},
)
_BLOCK, _HEAD = r"deq.cell.blocks.\1", r"head.widen.\1"
_CELL = {
    r"downsample\.(\d+)\.(\w+)": r"stem.\1.\2",
    r"stage0\.0\.weight": r"stem.6.weight",
    r"stage0\.1\.(\w+)": r"stem.7.\1",
    r"fullstage\.branches\.(\d+)\.blocks\.0\.conv1\.(\w+)": rf"{_BLOCK}.first.conv.\2",
    r"fullstage\.branches\.(\d+)\.blocks\.0\.gn1\.(\w+)": rf"{_BLOCK}.first.norm.\2",
    r"fullstage\.branches\.(\d+)\.blocks\.0\.conv2\.(\w+)": rf"{_BLOCK}.second.conv.\2",
    r"fullstage\.branches\.(\d+)\.blocks\.0\.gn2\.(\w+)": rf"{_BLOCK}.second.norm.\2",
    r"fullstage\.branches\.(\d+)\.blocks\.0\.gn3\.(\w+)": rf"{_BLOCK}.norm.\2",
    r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.conv\.(\w+)": r"deq.cell.fuse.\1.\2.0.conv.\3",
    r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.gnorm\.(\w+)": r"deq.cell.fuse.\1.\2.0.norm.\3",
    r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.conv\.(\w+)": r"deq.cell.fuse.\1.\2.\3.conv.\4",
    r"fullstage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.gnorm\.(\w+)": r"deq.cell.fuse.\1.\2.\3.norm.\4",
    r"fullstage\.post_fuse_layers\.(\d+)\.conv\.(\w+)": r"deq.cell.post.\1.conv.\2",
    r"fullstage\.post_fuse_layers\.(\d+)\.gnorm\.(\w+)": r"deq.cell.post.\1.norm.\2",
}
CLASSIFIER = Layout(
    places={
        **_CELL,
        r"incre_modules\.(\d+)\.0\.conv1\.(\w+)": rf"{_HEAD}.body.0.0.\2",
        r"incre_modules\.(\d+)\.0\.bn1\.(\w+)": rf"{_HEAD}.body.0.1.\2",
        r"incre_modules\.(\d+)\.0\.conv2\.(\w+)": rf"{_HEAD}.body.1.0.\2",
        r"incre_modules\.(\d+)\.0\.bn2\.(\w+)": rf"{_HEAD}.body.1.1.\2",
        r"incre_modules\.(\d+)\.0\.conv3\.(\w+)": rf"{_HEAD}.body.2.0.\2",
        r"incre_modules\.(\d+)\.0\.bn3\.(\w+)": rf"{_HEAD}.body.2.1.\2",
        r"incre_modules\.(\d+)\.0\.downsample\.(\d+)\.(\w+)": rf"{_HEAD}.shortcut.\2.\3",
        r"downsamp_modules\.(\d+)\.(\d+)\.(\w+)": r"head.down.\1.\2.\3",
        r"final_layer\.(\d+)\.(\w+)": r"head.final.\1.\2",
        r"classifier\.(\w+)": r"head.classify.\1",
    },
    copies={},
    computed={},
)
SEGMENTER = Layout(
    places={
        **_CELL,
        r"last_layer\.([01])\.(\w+)": r"head.mix.\1.\2",
        r"last_layer\.3\.(\w+)": r"head.classify.\1",
    },
    copies={},
    computed={},
)

Kind = tuple[type[nn.Module], Layout, Callable[[str], Any], list[str], str]
_OF_IMAGES = {
    True: [name for name in IMAGE_CONFIGURATIONS if name.startswith("cityscapes")],
    False: [name for name in IMAGE_CONFIGURATIONS if not name.startswith("cityscapes")],
}
KINDS: tuple[Kind, ...] = (
    (
        DEQTransformerLM,
        TRANSFORMER,
        find_configuration,
        [name for name, each in CONFIGURATIONS.items() if not each.layers],
        "word_emb.emb_layers.0.weight",
    ),
    (MDEQClassifier, CLASSIFIER, find_image_configuration, _OF_IMAGES[False], "classifier.weight"),
    (MDEQSegmenter, SEGMENTER, find_image_configuration, _OF_IMAGES[True], "last_layer.0.weight"),
)
"""The model, its layout, its configurations, and a weight of theirs that only it has."""


def load_locuslab_checkpoint(path: str | Path, model: nn.Module | str | None = None) -> nn.Module:
    """The authors' weights in a model of ours.

    Every weight of theirs must have a place and every weight of ours one of theirs; shapes must agree; what
    they hold twice must be equal. A pair of weight normalisation becomes that of PyTorch, or one weight in a
    model without it. All is checked before the first number is copied.

    Args:
        path: a file that `torch.save` wrote from their `state_dict()`, or their training's checkpoint.
        model: a `DEQTransformerLM`, `MDEQClassifier` or `MDEQSegmenter`, which gets the weights in its own
            dtype and on its device; or the name of a configuration in `triton_deq.models`; or None, where
            exactly one named configuration has these shapes. What no shape tells, such as the number of
            heads or groups, is the configuration's.

    Returns:
        The model, or a new one on the CPU.

    Raises:
        FileNotFoundError: no such file.
        WrongCheckpoint: a file that is no checkpoint or truncated; weights of another model.
        TypeError, ValueError: a model that is none of ours, an unknown name.
    """
    theirs = _read(Path(path))
    kind = _kind_of(theirs, path)
    model = _built(model, kind, theirs)
    placed = _placed(theirs, model, kind[1])
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in placed.items():
            own[name].copy_(tensor)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    """The weights in a file, by their names; nothing but tensors and containers is unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give the path of a checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
            raise WrongCheckpoint(
                f"{path} holds a whole model, whose code would have to be run: load it with the authors' "
                "repository and save its weights, torch.save(model.state_dict(), path)"
            ) from error
        raise WrongCheckpoint(f"{path} is no checkpoint: torch.load cannot read it") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WrongCheckpoint(f"{path} is truncated, or no checkpoint ({said}): copy it anew") from error

    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content:
        raise WrongCheckpoint(f"{path} holds {_described(content)}, not weights by their names")
    strangers = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise WrongCheckpoint(
            f"{path} holds {_described(content[strangers[0]])} under {strangers[0]!r}, not a weight"
        )
    return {key.removeprefix("module."): value for key, value in content.items()}


def _described(value: Any) -> str:
    return "nothing" if isinstance(value, dict) and not value else f"a {type(value).__name__}"


def _kind_of(theirs: Mapping[str, Tensor], path: str | Path) -> Kind:
    for kind in KINDS:
        if kind[-1] in theirs:
            return kind
    wanted = "; ".join(f"{kind[0].__name__}: {kind[-1]}" for kind in KINDS)
    raise WrongCheckpoint(
        f"{path} is none of the authors' models, each of which has a weight of its own ({wanted}); it begins "
        f"with {', '.join(list(theirs)[:3])}"
    )


def _built(model: Any, kind: Kind, theirs: Mapping[str, Tensor]) -> nn.Module:
    """The model to be filled: the one given, one of the name, or the only one that fits."""
    wanted, layout, find, names, _ = kind
    if isinstance(model, wanted):
        return model
    if isinstance(model, (DEQTransformerLM, MDEQ)):
        raise WrongCheckpoint(
            f"the checkpoint is of a {wanted.__name__}, and model is a {type(model).__name__}"
        )
    if isinstance(model, str):
        configuration: Any = find(model)
        return wanted(configuration)
    if model is not None:
        raise TypeError(
            f"model is a {type(model).__name__}: give a DEQTransformerLM, MDEQClassifier or MDEQSegmenter, "
            "the name of a configuration, or nothing"
        )
    faults = {}
    for name in names:
        with torch.device("meta"):
            faults[name] = _faults(theirs, wanted(find(name)), layout)[1]
    fitting = [name for name, found in faults.items() if not found]
    if len(fitting) == 1:
        return wanted(find(fitting[0]))
    if fitting:
        raise WrongCheckpoint(
            f"several configurations have these shapes: say which, model={' or '.join(map(repr, fitting))}"
        )
    nearest = min(faults, key=lambda name: len(faults[name]))
    raise WrongCheckpoint(
        f"no configuration has these shapes; the nearest is {nearest!r}: {_told(faults[nearest])}. Give a "
        "model of your own configuration"
    )


def _placed(theirs: Mapping[str, Tensor], model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Their weights by our names, once nothing is wrong."""
    placed, faults = _faults(theirs, model, layout)
    if faults:
        raise WrongCheckpoint(f"this is not a checkpoint of this {type(model).__name__}: {_told(faults)}")
    return placed


def _told(faults: list[str], most: int = 8) -> str:
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more


def _faults(
    theirs: Mapping[str, Tensor], model: nn.Module, layout: Layout
) -> tuple[dict[str, Tensor], list[str]]:
    """Their weights by our names, and all that is wrong with them, in their order."""
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    found: dict[str, tuple[str, Tensor]] = {}
    faults = []
    for key, tensor in theirs.items():
        copied = _translated(key, layout.copies)
        computed = layout.computed.get(key)
        place = _translated(key, layout.places)
        if copied is not None:
            if copied not in theirs:
                faults.append(f"{key} has no {copied} beside it")
            elif not torch.equal(tensor, theirs[copied]):
                faults.append(f"{key} differs from {copied}, and our model has one weight for both")
        elif computed is not None:
            if not torch.allclose(tensor.float(), computed(tensor), rtol=1e-5):
                faults.append(f"{key} is not what our model computes")
        elif place is None:
            faults.append(f"unexpected {key} {tuple(tensor.shape)}")
        else:
            name, value = _changed(place, tensor)
            found[name] = key, value

    placed = _normalised(found, own)
    for name, (key, value) in placed.items():
        if name not in own:
            faults.append(f"unexpected {key}: the model has no {name}")
        elif own[name].shape != value.shape:
            has, wants = tuple(value.shape), tuple(own[name].shape)
            faults.append(f"{key} gives {name} the shape {has}, and the model's is {wants}")
    faults += [f"missing {name}" for name in _needed(model) if name not in placed]
    return {name: value for name, (_, value) in placed.items()}, faults


def _needed(model: nn.Module) -> list[str]:
    """Our names that their checkpoint must fill: of what is shared the first, and no penalty's state."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return [name for name in names if not name.startswith("deq.penalty.")]


def _translated(key: str, patterns: Mapping[str, str]) -> str | None:
    for pattern, place in patterns.items():
        match = re.fullmatch(pattern, key)
        if match is not None:
            return match.expand(place)
    return None


def _changed(place: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The name and the tensor as it is here."""
    name, _, change = place.partition("|")
    if change == "shifted":  # our tails are counted from 0, and theirs from 1
        head, number, rest = re.fullmatch(r"(.*\.)(\d+)(\..*)", name).groups()  # type: ignore[union-attr]
        return f"{head}{int(number) - 1}{rest}", tensor
    return name, CHANGES[change](tensor) if change else tensor


def _normalised(
    found: Mapping[str, tuple[str, Tensor]], own: Mapping[str, Tensor]
) -> dict[str, tuple[str, Tensor]]:
    """Pairs of weight normalisation as the model has them: torch's, or one weight."""
    placed = {}
    for name, (key, value) in found.items():
        base, _, part = name.rpartition(".")
        pair = [f"{base}.parametrizations.weight.original{each}" for each in (0, 1)]
        if part == "weight_g":
            if pair[0] in own:
                placed[pair[0]] = key, value.view(-1, *[1] * (own[pair[0]].dim() - 1))
        elif part == "weight_v" and pair[1] in own:
            placed[pair[1]] = key, value
        elif part == "weight_v" and f"{base}.weight_g" in found:
            g = found[f"{base}.weight_g"][1].view(-1, *[1] * (value.dim() - 1))
            placed[f"{base}.weight"] = key, torch._weight_norm(value, g, 0)
        elif part == "weight" and pair[0] in own:
            g = torch.linalg.vector_norm(value.flatten(1), dim=1).view(-1, *[1] * (value.dim() - 1))
            placed[pair[0]], placed[pair[1]] = (key, g), (key, value)
        else:
            placed[name] = key, value
    return placed
