"""Images: CIFAR-10's files, folders of images, augmentation, and batches that go on from any place."""

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from triton_deq.data import (
    CIFAR10,
    DIGITS,
    Augmentation,
    BrokenImage,
    ImageFolder,
    Split,
    TensorImages,
    cifar,
    cifar10,
    imagenet,
)


def python2_pickle(data, labels):
    """A batch as Python 2 and NumPy 1 wrote it: its strings are bytes, of no encoding."""
    rows, columns = data.shape
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
    array += b"J" + struct.pack("<i", rows) + b"J" + struct.pack("<i", columns) + b"\x86"
    array += b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    array += b"\x89T" + struct.pack("<i", data.size) + data.tobytes() + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + listed + b"u."


@pytest.fixture
def batches(tmp_path):
    """The official layout around six small batches, and their checksums."""
    folder = tmp_path / cifar.FOLDER
    folder.mkdir()
    draw = np.random.default_rng(0)
    held = {}
    for name in cifar.CHECKSUMS:
        data = draw.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = draw.integers(0, 10, 4).tolist()
        (folder / name).write_bytes(python2_pickle(data, labels))
        held[name] = data, labels
    checksums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in held}
    return folder, held, checksums


def test_cifar_10_is_read_from_its_batches(batches):
    folder, held, checksums = batches
    for place in (folder, folder.parent):
        split = cifar10(place, checksums)
        assert split.x.shape == (20, 3, 32, 32)
        assert split.x.dtype == torch.uint8
        data, labels = held["data_batch_2"]
        # A row is the red plane, then the green one, then the blue one, row by row.
        assert split.x[5, 1, 2, 3] == data[1, 1024 + 2 * 32 + 3]
        assert split.y[4:8].tolist() == labels
        assert split.valid_x.flatten(1).numpy().tobytes() == held["test_batch"][0].tobytes()
        assert split.valid_y.tolist() == held["test_batch"][1]


def test_files_that_are_not_cifar_10s(batches):
    folder, held, checksums = batches
    with pytest.raises(ValueError, match=r"data_batch_1 has the MD5 .* and 12,.* bytes.*c99cafc15224.*anew"):
        cifar10(folder)
    data, labels = held["data_batch_3"]
    path = folder / "data_batch_3"
    for content, message in (
        (path.read_bytes()[:500], "data_batch_3 is not a batch of CIFAR-10"),
        (
            python2_pickle(data[:, :3000], labels),
            r"data_batch_3 has data uint8 \(4, 3000\), not uint8 \(n, 3072\)",
        ),
        (python2_pickle(data, labels[:3]), "data_batch_3 has 3 labels, not a list of 4"),
        (python2_pickle(data, [0, 1, 2, 10]), "data_batch_3 has the label 10"),
        (b"\x80\x02]q\x00.", "data_batch_3 has data NoneType"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            cifar10(folder, checksums=None)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no file .*data_batch_3: unpack cifar-10-python"):
        cifar10(folder, checksums)


@pytest.mark.parametrize(
    "code",
    [b"cposix\nsystem\nU\x04true\x85R.", b"cnumpy\nload\nU\x01x\x85R.", b"cbuiltins\neval\nU\x011\x85R."],
)
def test_a_batch_runs_no_code(batches, code):
    folder, _, _ = batches
    (folder / "test_batch").write_bytes(b"\x80\x02" + code)
    with pytest.raises(ValueError, match="test_batch is not a batch of CIFAR-10 .it asks for"):
        cifar10(folder, checksums=None)


def test_shifts_and_flips_are_those_of_a_padded_image():
    augmentation = Augmentation((0.0, 0.0), (1.0, 1.0), pad=2, flip=True)
    images = torch.rand(64, 2, 5, 6)
    found = augmentation(images, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(images, [2] * 4)
    seen = set()
    for image, whole in zip(found, padded, strict=True):
        matches = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if torch.equal(image, _cut(whole, top, left, mirrored))
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 25  # of 50
    assert torch.equal(found, augmentation(images, torch.Generator().manual_seed(1)))
    assert not torch.equal(found, augmentation(images, torch.Generator().manual_seed(2)))


def _cut(image, top, left, mirrored):
    cut = image[:, top : top + 5, left : left + 6]
    return cut.flip(2) if mirrored else cut


def test_normalisation():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    wanted = (images / 255 - torch.tensor(CIFAR10.mean).view(3, 1, 1)) / torch.tensor(CIFAR10.std).view(
        3, 1, 1
    )
    torch.testing.assert_close(CIFAR10.normalise(images), wanted)
    plain = replace(CIFAR10, pad=0, flip=False)
    torch.testing.assert_close(plain(images, torch.Generator()), wanted)
    assert CIFAR10(images, torch.Generator()).shape == images.shape
    # What is shifted in is black, and normalised like all else.
    assert DIGITS(torch.zeros(4, 1, 8, 8), torch.Generator()).unique().numel() == 1
    with pytest.raises(ValueError, match="images have 3 channels, and mean="):
        DIGITS.normalise(images)
    with pytest.raises(ValueError, match="must have one number for each channel"):
        Augmentation((0.0,), (1.0, 1.0))


def tensors(count=20):
    images = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 1, 4, 4) / 255.0
    labels = torch.arange(count)
    return TensorImages(
        "numbers", Split(images, labels, images[:7], labels[:7]), Augmentation((0.0,), (1.0,), pad=1), count
    )


def test_an_epoch_has_every_image_once_and_the_next_another_order():
    batches = tensors().train(6, seed=3, device="cpu")
    assert len(batches) == 3
    epochs = [torch.cat([batches.take()[1] for _ in range(3)]) for _ in range(2)]
    assert all(len(set(epoch.tolist())) == 18 for epoch in epochs)
    assert not torch.equal(*epochs)
    assert (batches.epoch, batches.position) == (2, 0)


def test_batches_go_on_from_where_others_were():
    first = tensors().train(6, seed=3, device="cpu")
    for _ in range(4):
        first.take()
    second = tensors().train(6, seed=3, device="cpu")
    second.load_state_dict(first.state_dict())
    for ours, theirs in zip(first.take(), second.take(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="position=3 is none of these 3 batches'"):
        second.load_state_dict({"position": 3, "epoch": 0})


def test_ranks_share_a_batch_and_the_images_that_validate():
    data = tensors()
    whole = data.train(6, seed=3, device="cpu").take()[1]
    shares = [data.train(6, seed=3, device="cpu", rank=rank, world=2).take()[1] for rank in (0, 1)]
    assert torch.equal(torch.cat(shares), whole)
    held = [
        label for rank in (0, 1) for _, labels in data.valid(4, "cpu", rank, 2) for label in labels.tolist()
    ]
    assert sorted(held) == list(range(7))
    with pytest.raises(ValueError, match="batch=6 cannot be shared by world=4"):
        data.train(6, seed=3, device="cpu", world=4)
    with pytest.raises(ValueError, match="batch=21 is more than the 20 images"):
        data.train(21, seed=3, device="cpu")


@pytest.fixture
def folders(tmp_path):
    """Class a is red, b is blue to the left and red elsewhere; one image to train on is broken."""
    image_of = pytest.importorskip("PIL.Image").fromarray
    for part, count in (("train", 4), ("val", 3)):
        for name in "ab":
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = np.zeros((40, 60 + 4 * index, 3), dtype=np.uint8)
                pixels[..., 0] = 255
                if name == "b":
                    pixels[:, :20] = (0, 0, 255)
                image_of(pixels).save(place / f"{index}.{'JPEG' if name == 'a' else 'png'}")
            (place / "notes.txt").write_text("not an image")
    broken = tmp_path / "train/b/3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    return tmp_path


def test_folders_of_images(folders):
    valid = ImageFolder(folders / "val", size=28)
    assert valid.classes == ("a", "b")
    assert valid.files == ["a/0.JPEG", "a/1.JPEG", "a/2.JPEG", "b/0.png", "b/1.png", "b/2.png"]
    image, label = valid[3]
    assert (image.shape, image.dtype, label) == ((3, 28, 28), torch.uint8, 1)
    # 60 × 40 comes to 48 × 32, of which the columns 10 to 38 are kept: the edge at 16 comes to 6.
    edge = (image[2, 14] > image[0, 14]).sum()
    assert edge == 6
    with pytest.raises(BrokenImage, match=r"train/b/3.png cannot be decoded"):
        ImageFolder(folders / "train", size=28)[7]


def test_random_cuts_depend_on_seed_epoch_and_image_alone(folders):
    train = ImageFolder(folders / "train", size=16, augmented=True, seed=5)
    assert torch.equal(train[2, 4][0], train[2, 4][0])
    cuts = [train[epoch, 4][0] for epoch in range(40)]
    assert len({cut.numpy().tobytes() for cut in cuts}) > 15  # some are all red
    left = [(cut[2, 8, 0] > 128).item() for cut in cuts]
    right = [(cut[2, 8, -1] > 128).item() for cut in cuts]
    assert any(left)
    assert any(right)  # mirrored
    other = ImageFolder(folders / "train", size=16, augmented=True, seed=6)
    assert any(not torch.equal(other[epoch, 4][0], cuts[epoch]) for epoch in range(5))


def test_a_broken_image_stops_or_is_left_out(folders):
    strict = imagenet(folders, 16, workers=0).train(4, 0, "cpu")
    with pytest.raises(BrokenImage, match=r"3.png cannot be decoded .*: replace it, or .*on_error='skip'"):
        [strict.take() for _ in range(2)]
    lenient = imagenet(folders, 16, workers=0, on_error="skip").train(4, 0, "cpu")
    with pytest.warns(UserWarning, match="3.png cannot be decoded .*: it is left out") as told:
        taken = [lenient.take() for _ in range(4)]
    assert sorted(len(labels) for _, labels in taken) == [3, 3, 4, 4]
    assert len(told) == 1
    with pytest.raises(ValueError, match="on_error='ignore' is unknown"):
        imagenet(folders, on_error="ignore")


def test_workers_give_what_one_process_does_and_go_on_anywhere(folders):
    (folders / "train/b/3.png").unlink()
    state = torch.get_rng_state()
    alone = imagenet(folders, 16, workers=0).train(3, 1, "cpu")
    wanted = [alone.take() for _ in range(5)]
    shared = imagenet(folders, 16, workers=2).train(3, 1, "cpu")
    found = [shared.take() for _ in range(3)]
    shared.close()
    found.append(shared.take())
    later = imagenet(folders, 16, workers=0).train(3, 1, "cpu")
    later.load_state_dict(shared.state_dict())
    found.append(later.take())
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert torch.equal(state, torch.get_rng_state())
    held = [
        label
        for rank in (0, 1)
        for _, labels in imagenet(folders, 16, workers=0).valid(4, "cpu", rank, 2)
        for label in labels.tolist()
    ]
    assert sorted(held) == [0, 0, 0, 1, 1, 1]


def test_folders_that_cannot_be(folders):
    for image in (folders / "val/b").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match=r"val/b has no images"):
        imagenet(folders)
    (folders / "val/b").rename(folders / "val/c")
    (folders / "val/a/0.JPEG").rename(folders / "val/c/0.JPEG")
    with pytest.raises(ValueError, match=r"the classes differ: .*val lacks b; .*train lacks c; give both"):
        imagenet(folders)
    (folders / "flat").mkdir()
    with pytest.raises(ValueError, match="flat has no folders: sort its images into one for each"):
        ImageFolder(folders / "flat")
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere/train: the layout is"):
        imagenet(folders / "nowhere")
