"""The authors' checkpoints in our models: the same outputs, every weight accounted for."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.compat import locuslab_models as theirs
from triton_deq import backend
from triton_deq.compat.checkpoints import WrongCheckpoint, load_locuslab_checkpoint
from triton_deq.models import (
    DEQTransformerLM,
    LanguageModelConfiguration,
    MDEQClassifier,
    MDEQConfiguration,
    MDEQSegmenter,
    find_image_configuration,
)

IMAGES = MDEQConfiguration(
    channels=(4, 8, 12),
    classes=5,
    head=(2, 3, 4),
    final=7,
    groups=4,
    expansion=2,
    image_size=(16, 16),
    downsamplings=1,
    unrolled=3,
)
WORDS = LanguageModelConfiguration(
    vocabulary=40, width=16, heads=4, head_width=4, inner=24, cutoffs=(8, 16, 28), div_value=2, unrolled=3
)


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch):
    monkeypatch.setattr(backend, "interpreting", lambda: False)


def of_images(configuration=IMAGES, segments=False):
    return theirs.mdeq_weights(
        configuration.channels,
        configuration.expansion,
        configuration.classes,
        configuration.head,
        configuration.final,
        downsamplings=configuration.downsamplings,
        post_affine=configuration.post_affine,
        segments=segments,
    )


def of_words(configuration=WORDS, normal=True):
    bounds = (0, *configuration.cutoffs, configuration.vocabulary)
    return theirs.transformer_weights(
        bounds, configuration.width, configuration.heads, configuration.inner, configuration.div_value, normal
    )


def saved(tmp_path, content, name="theirs.pkl"):
    path = tmp_path / name
    torch.save(content, path)
    return path


def unrolled(model):
    """In double precision, with applications of f from zero instead of a solve."""
    model = model.double().eval()
    model.pretraining = True
    return model


@pytest.mark.parametrize("post_affine", [True, False])
@pytest.mark.parametrize("channels", [(4, 8, 12), (4, 8)])
def test_a_classifier(tmp_path, channels, post_affine):
    configuration = replace(
        IMAGES, channels=channels, head=IMAGES.head[: len(channels)], post_affine=post_affine
    )
    weights = of_images(configuration)
    model = unrolled(MDEQClassifier(configuration))
    assert load_locuslab_checkpoint(saved(tmp_path, weights), model) is model
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    maps = theirs.mdeq_maps(weights, images, channels, 4, 3, 1)
    out = model(images)
    u = model.cell.inject(model.stem(images))
    for one, other in zip(model.cell.maps(out.state, u), maps, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.logits.double(), theirs.classified(weights, maps), rtol=0, atol=1e-5)


def test_a_segmenter(tmp_path):
    configuration = replace(IMAGES, head=())
    weights = of_images(configuration, segments=True)
    model = unrolled(MDEQSegmenter(configuration))
    load_locuslab_checkpoint(saved(tmp_path, weights), model)
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    maps = theirs.mdeq_maps(weights, images, IMAGES.channels, 4, 3, 1)
    expected = theirs.segmented(weights, maps)
    torch.testing.assert_close(model(images).logits.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_a_transformer(tmp_path, pre_norm, window):
    configuration = replace(WORDS, pre_norm=pre_norm, window=window, memory=6)
    weights = of_words()
    model = unrolled(DEQTransformerLM(configuration))
    load_locuslab_checkpoint(saved(tmp_path, weights), model)
    bounds, past = (0, *WORDS.cutoffs, WORDS.vocabulary), None
    memory, us = torch.zeros(2, 16, 0, dtype=torch.float64), torch.zeros(2, 48, 0, dtype=torch.float64)
    for _ in range(2):  # the second segment has a memory
        tokens = torch.randint(40, (2, 6))
        out = model(tokens, None, past)
        past = out.memory
        word = theirs.embedded(weights, tokens, bounds, 16).transpose(1, 2)
        us = torch.cat([us, theirs.convolution(weights, "inject_conv", word)], dim=2)[..., -12:]
        z = torch.zeros_like(word)
        for _ in range(3):
            z = theirs.transformer_layer(weights, z, us, memory, 4, pre_norm, window or 1000)
        memory = z
        torch.testing.assert_close(out.hidden, z.transpose(1, 2), rtol=0, atol=1e-5)
    rows = out.hidden.flatten(0, 1)
    expected = theirs.log_prob(weights, rows, bounds)
    torch.testing.assert_close(model.log_prob(rows).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("has_pairs", [True, False], ids=["pairs in the file", "none in the file"])
@pytest.mark.parametrize("wants_pairs", [True, False], ids=["pairs in the model", "none in the model"])
def test_weight_normalisation(tmp_path, has_pairs, wants_pairs):
    weights = of_words(normal=has_pairs)
    model = DEQTransformerLM(replace(WORDS, weight_norm=wants_pairs)).double()
    load_locuslab_checkpoint(saved(tmp_path, weights), model)
    if has_pairs:
        v = weights["func.pos_ff.ff1_net.weight_v"]
        expected = weights["func.pos_ff.ff1_net.weight_g"] * v / v.norm(dim=1, keepdim=True)
    else:
        expected = weights["func.pos_ff.ff1_net.weight"]
    torch.testing.assert_close(model.cell.up.weight, expected)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda w: {"epoch": 3, "state_dict": w, "optimizer": {"lr": 0.1}},
        lambda w: {f"module.{key}": value for key, value in w.items()},
        lambda w: {key: value.float() for key, value in w.items()},
    ],
    ids=["a training's checkpoint", "DataParallel", "float32"],
)
def test_what_their_training_writes(tmp_path, wrapped):
    weights = of_images()
    model = load_locuslab_checkpoint(saved(tmp_path, wrapped(weights)), MDEQClassifier(IMAGES))
    torch.testing.assert_close(model.head.classify.weight, weights["classifier.weight"].float())
    assert model.head.classify.weight.dtype == torch.float32
    assert model.stem[1].num_batches_tracked == 7


def test_the_configuration_is_found_by_the_shapes(tmp_path):
    configuration = find_image_configuration("imagenet-small")
    weights = {key: value.float() for key, value in of_images(configuration).items()}
    model = load_locuslab_checkpoint(saved(tmp_path, weights))
    assert model.configuration == configuration
    torch.testing.assert_close(model.head.classify.weight, weights["classifier.weight"])


def test_several_configurations_of_one_shape(tmp_path):
    weights = of_images(find_image_configuration("cifar10-tiny"))
    path = saved(tmp_path, weights)
    with pytest.raises(WrongCheckpoint, match="say which, model='cifar10-tiny' or 'cifar10-tiny-jr'"):
        load_locuslab_checkpoint(path)
    assert load_locuslab_checkpoint(path, "cifar10-tiny").configuration.penalty == 0


def test_no_configuration_of_these_shapes(tmp_path):
    with pytest.raises(WrongCheckpoint, match="no configuration has these shapes; the nearest is"):
        load_locuslab_checkpoint(saved(tmp_path, of_images()))


def spoilt(change):
    def spoil(weights):
        change(weights)
        return weights

    return spoil


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("classifier.bias"), "missing head.classify.bias"),
        (lambda w: w.update(extra=torch.zeros(2)), r"unexpected extra \(2,\)"),
        (
            lambda w: w.update({"classifier.weight": torch.zeros(5, 8)}),
            r"classifier.weight gives head.classify.weight the shape \(5, 8\), and the model's is \(5, 7\)",
        ),
        (
            lambda w: w.pop("fullstage.branches.0.blocks.0.conv1.weight_g"),
            "missing deq.cell.blocks.0.first.conv.parametrizations.weight.original0",
        ),
        (
            lambda w: w.update({"fullstage.branches.3.blocks.0.gn1.bias": torch.zeros(3)}),
            "unexpected fullstage.branches.3.blocks.0.gn1.bias",
        ),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_loaded(tmp_path, change, message):
    weights = of_images()
    change(weights)
    model = MDEQClassifier(IMAGES)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WrongCheckpoint, match=message):
        load_locuslab_checkpoint(saved(tmp_path, weights), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("crit.out_layers.1.weight", "crit.out_layers.1.weight differs from word_emb.emb_layers.1.weight"),
        ("crit.out_projs.2.weight", "crit.out_projs.2.weight differs from word_emb.emb_projs.2.weight"),
        ("pos_emb.inv_freq", "pos_emb.inv_freq is not what our model computes"),
    ],
)
def test_what_a_transformer_holds_twice_must_agree(tmp_path, key, message):
    weights = of_words()
    weights[key] = weights[key] + 1
    with pytest.raises(WrongCheckpoint, match=message):
        load_locuslab_checkpoint(saved(tmp_path, weights), DEQTransformerLM(WORDS))


def test_another_model(tmp_path):
    path = saved(tmp_path, of_words())
    with pytest.raises(WrongCheckpoint, match="is of a DEQTransformerLM, and model is a MDEQClassifier"):
        load_locuslab_checkpoint(path, MDEQClassifier(IMAGES))
    with pytest.raises(WrongCheckpoint, match="not a checkpoint of this DEQTransformerLM: .*the shape"):
        load_locuslab_checkpoint(path, DEQTransformerLM(replace(WORDS, inner=25)))
    with pytest.raises(TypeError, match="model is a Linear: give a DEQTransformerLM"):
        load_locuslab_checkpoint(path, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="config='wikitext' is unknown"):
        load_locuslab_checkpoint(path, "wikitext")


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.pkl"):
        load_locuslab_checkpoint(tmp_path / "nothing.pkl")

    whole = saved(tmp_path, nn.Linear(2, 2), "whole.pt")
    with pytest.raises(
        WrongCheckpoint, match=r"holds a whole model.*torch\.save\(model\.state_dict\(\), path\)"
    ):
        load_locuslab_checkpoint(whole)

    path = saved(tmp_path, of_images())
    short = tmp_path / "short.pkl"
    short.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(WrongCheckpoint, match=r"short\.pkl is truncated, or no checkpoint"):
        load_locuslab_checkpoint(short)

    text = tmp_path / "text.pkl"
    text.write_text("weights")
    with pytest.raises(WrongCheckpoint, match=r"text\.pkl is"):
        load_locuslab_checkpoint(text)

    with pytest.raises(WrongCheckpoint, match="holds a list, not weights by their names"):
        load_locuslab_checkpoint(saved(tmp_path, [1, 2], "list.pkl"))
    with pytest.raises(WrongCheckpoint, match="holds a int under 'epoch', not a weight"):
        load_locuslab_checkpoint(saved(tmp_path, {"epoch": 3}, "epoch.pkl"))
    with pytest.raises(WrongCheckpoint, match="none of the authors' models.*it begins with a, b"):
        load_locuslab_checkpoint(saved(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}, "other.pkl"))
