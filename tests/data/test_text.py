"""Texts: vocabularies, the cache, files that are not whole, and segments."""

import math
import os
import re

import numpy as np
import pytest
import torch

from triton_deq.data import Corpus, Segments, help_topics, wikitext

TRAIN = " = A title = \n\nthe cat saw the dog .\n the dog , <unk> , slept .\n"
VALID = "the cat slept .\n"
TEST = "the bird <unk> .\n"


@pytest.fixture
def folder(tmp_path):
    for split, text in {"train": TRAIN, "valid": VALID, "test": TEST}.items():
        (tmp_path / f"wiki.{split}.tokens").write_text(text, encoding="utf-8")
    return tmp_path


def rewrite(path, text):
    """Another text, and a time of change that differs whatever the file system's clock resolves."""
    later = path.stat().st_mtime_ns + 10**9
    path.write_text(text, encoding="utf-8")
    os.utime(path, ns=(later, later))


def test_the_vocabulary_is_in_transformer_xls_order(folder):
    corpus = wikitext(folder)
    assert corpus.words == (
        "<eos>", "the", "=", "dog", ".", ",", "A", "title", "cat", "saw", "<unk>", "slept"
    )  # fmt: skip
    lines = ["= A title =", "", "the cat saw the dog .", "the dog , <unk> , slept ."]
    assert corpus.decode(corpus.train) == " ".join(f"{line} <eos>".strip() for line in lines)
    assert corpus.decode(corpus.valid) == "the cat slept . <eos>"
    assert corpus.decode(corpus.test) == "the <unk> <unk> . <eos>"
    assert corpus.train.dtype == np.int32
    assert isinstance(corpus.train, np.memmap)


def test_the_cache_serves_until_a_file_changes(folder, tmp_path):
    first = wikitext(folder)
    written = (folder / "triton-deq-cache/train.npy").stat().st_mtime_ns
    assert wikitext(folder).words == first.words
    assert (folder / "triton-deq-cache/train.npy").stat().st_mtime_ns == written
    rewrite(folder / "wiki.train.tokens", TRAIN.replace("saw", "ate"))
    changed = wikitext(folder)
    assert "ate" in changed.ids
    assert changed.fingerprint != first.fingerprint
    assert not list(folder.rglob("*.tmp"))

    elsewhere = wikitext(folder, cache=tmp_path / "other")
    assert elsewhere.fingerprint == changed.fingerprint
    assert (tmp_path / "other/vocabulary.txt").read_text().split() == list(changed.words)


@pytest.mark.parametrize("damage", ["cut", "gone", "stamp"])
def test_a_damaged_cache_is_made_anew(folder, damage):
    wanted = wikitext(folder).train.tolist()
    ids, stamp = (folder / "triton-deq-cache" / name for name in ("train.npy", "stamp.json"))
    if damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-8])
    elif damage == "gone":
        ids.unlink()
    else:
        stamp.write_text("{")
    assert wikitext(folder).train.tolist() == wanted


def test_a_build_that_fails_leaves_no_cache(folder):
    rewrite(folder / "wiki.train.tokens", "the cat .\n")
    with pytest.raises(ValueError, match=r"wiki\.valid\.tokens has the word 'slept'.*no <unk>"):
        wikitext(folder)
    assert not (folder / "triton-deq-cache/stamp.json").exists()
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"no file .*wiki\.valid\.tokens: the official layout is wiki\.train"),
        (b"", ValueError, r"wiki\.valid\.tokens is empty"),
        (b"the cat\nthe d", ValueError, r"wiki\.valid\.tokens does not end with the end of a line"),
        (b"the \xff cat\n", ValueError, r"wiki\.valid\.tokens is not UTF-8"),
    ],
)
def test_files_that_are_not_whole(folder, content, error, message):
    path = folder / "wiki.valid.tokens"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        wikitext(folder)


def test_a_cache_that_cannot_be_written_says_what_to_pass(folder):
    (folder / "triton-deq-cache").write_text("in the way")
    with pytest.raises(OSError, match="cannot be written .*pass cache=FOLDER"):
        wikitext(folder)


def test_a_file_shorter_than_the_published_one_is_remarked_on(folder, monkeypatch):
    published = {"train": (1,), "valid": (5,), "test": (5,)}
    monkeypatch.setattr("triton_deq.data.wiki._PUBLISHED", published)
    with pytest.warns(UserWarning, match=r"wiki\.train\.tokens has 21 tokens, not 1 as published"):
        wikitext(folder)


def test_help_topics():
    corpus = help_topics()
    assert 1500 < len(corpus.words) < 6000
    assert len(corpus.train) > 50_000
    assert min(len(corpus.valid), len(corpus.test)) > 1000
    counts = np.bincount(corpus.train, minlength=len(corpus.words))
    assert (np.diff(counts) <= 0).all(), "not by falling frequency"
    assert counts.min() >= 2
    again = help_topics()
    assert again.fingerprint == corpus.fingerprint
    assert np.array_equal(again.test, corpus.test)
    held_out = corpus.decode(corpus.valid).split(" <eos> ")
    long = [text for text in held_out if len(text.split()) > 20]
    train = corpus.decode(corpus.train)
    assert len(long) > 20
    assert not [text for text in long if text in train]


def test_the_unigram_model_is_add_one():
    corpus = Corpus("t", ("a", "b", "c"), *(np.array(ids, np.int32) for ids in ([0, 0, 1], [0, 2], [1])))
    wanted = math.exp(-(math.log(3 / 6) + math.log(1 / 6)) / 2)
    assert math.isclose(corpus.unigram_perplexity("valid"), wanted)
    with pytest.raises(ValueError, match="split='dev' is unknown"):
        corpus.unigram_perplexity("dev")


def test_the_unigram_model_of_the_help_topics_is_far_below_chance():
    corpus = help_topics()
    assert 100 < corpus.unigram_perplexity("valid") < len(corpus.words) / 3


def test_words_outside_the_vocabulary():
    one = np.zeros(1, np.int32)
    assert Corpus("t", ("a", "<unk>"), one, one, one).encode(["a", "z"]) == [0, 1]
    with pytest.raises(ValueError, match="'z' is not in the vocabulary of t"):
        Corpus("t", ("a",), one, one, one).encode(["z"])


IDS = np.arange(23, dtype=np.int32)


def test_segments_are_contiguous_rows():
    """22 predictions in 3 rows of 7, and one that is left out."""
    segments = Segments(IDS, batch=3, length=4)
    first, last = list(segments)
    assert len(segments) == 2
    assert first[0].tolist() == [[0, 1, 2, 3], [7, 8, 9, 10], [14, 15, 16, 17]]
    assert last[0].tolist() == [[4, 5, 6], [11, 12, 13], [18, 19, 20]]
    assert torch.equal(first[1], first[0] + 1)
    assert torch.equal(last[1], last[0] + 1)
    assert first[0].dtype == first[1].dtype == torch.int64
    assert (segments.position, segments.epoch) == (0, 1)
    assert torch.equal(segments.take()[0], first[0])


def test_segments_go_on_where_they_were():
    whole = Segments(IDS, batch=2, length=3)
    for _ in range(2):
        whole.take()
    other = Segments(IDS, batch=2, length=3)
    other.load_state_dict(whole.state_dict())
    for _ in range(6):
        assert torch.equal(whole.take()[1], other.take()[1])
    assert whole.state_dict() == other.state_dict()
    with pytest.raises(ValueError, match="position=6 is none of these"):
        Segments(IDS, batch=2, length=4).load_state_dict({"position": 6, "epoch": 0})


def test_ranks_share_the_rows():
    whole, parts = Segments(IDS, 4, 2), [Segments(IDS, 4, 2, rank=rank, world=2) for rank in (0, 1)]
    for tokens, _ in whole:
        assert torch.equal(tokens, torch.cat([part.take()[0] for part in parts]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch=0 is too small"),
        ({"length": 8}, ValueError, "length=8 does not fit: 23 tokens in batch=3 rows leave 7"),
        ({"batch": 50}, ValueError, "leave 0 tokens a row"),
        ({"world": 2}, ValueError, "batch=3 cannot be shared by world=2"),
        ({"rank": 1}, ValueError, re.escape("rank=1 is outside [0, 0]")),
        ({"ids": [1, 2, 3]}, TypeError, "ids must be a one-dimensional"),
    ],
)
def test_segments_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        Segments(**{"ids": IDS, "batch": 3, "length": 4, **arguments})
