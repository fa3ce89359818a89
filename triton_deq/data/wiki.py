"""WikiText (Merity et al., arXiv 1609.07843) in its official layout, with Transformer-XL's vocabulary."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .corpus import EOS, SPLITS, UNKNOWN, Corpus

FILES = {split: f"wiki.{split}.tokens" for split in SPLITS}
_LAYOUT = "the official layout is " + ", ".join(FILES.values())

# Tokens with <eos>, as published. WikiText-2 shares the last two.
_PUBLISHED = {"train": (103_227_021, 2_088_628), "valid": (217_646,), "test": (245_569,)}

_VERSION = 1  # of the cache's format
_BLOCK = 1 << 20  # ids held before they are written


def wikitext(folder: str | Path, cache: str | Path | None = None) -> Corpus:
    """The corpus in `folder`, which has wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens.

    A line is a paragraph, its tokens are split by white space, and `<eos>` is appended to each, also to an
    empty one. The vocabulary is Transformer-XL's, so that ids agree with published weights: `<eos>`, then the
    words of the training file by falling frequency, equals by first appearance (267,735 for WikiText-103).
    Words that only the other files have become `<unk>`.

    Vocabulary and ids are made once and kept in a cache, which is made anew when a file's size or time of
    change differs. Files are read line by line and ids mapped from the cache, so that memory stays small.

    Args:
        folder: where the three files are; nothing is downloaded.
        cache: a folder for the cache; `folder`/triton-deq-cache by default.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, empty, cut off or not UTF-8; a word that is not
            in the vocabulary, which has no `<unk>`.
        OSError: a cache that cannot be written.

    Warns:
        UserWarning: some files have the published number of tokens and another has not.
    """
    sources = {split: Path(folder) / name for split, name in FILES.items()}
    for path in sources.values():
        _check_whole(path)
    place = Path(folder) / "triton-deq-cache" if cache is None else Path(cache)
    stamp = {
        "version": _VERSION,
        "sources": {split: [path.stat().st_size, path.stat().st_mtime_ns] for split, path in sources.items()},
    }
    corpus = _load(place, stamp)
    if corpus is None:
        try:
            _build(sources, place, stamp)
        except OSError as error:
            raise OSError(
                f"the cache {place} cannot be written ({error}): free space there, or pass cache=FOLDER"
            ) from error
        corpus = _load(place, stamp)
        if corpus is None:
            raise OSError(f"the cache {place} changed while it was read: does another program write there?")
    _compare_with_published(corpus)
    return corpus


def _check_whole(path: Path) -> None:
    """The file is there, has text, and ends with the end of a line."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: {_LAYOUT}")
    with path.open("rb") as file:
        if not file.read(1):
            raise ValueError(f"{path} is empty: it was to have a paragraph a line; copy it anew")
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            raise ValueError(
                f"{path} does not end with the end of a line, so it seems to be cut off: copy it anew (or "
                "append a line feed, if it is complete)"
            )


def _compare_with_published(corpus: Corpus) -> None:
    """Say so where one file is the published one and another has a length of its own."""
    matches = {split: len(corpus.split(split)) in _PUBLISHED[split] for split in SPLITS}
    for split in SPLITS:
        if any(matches.values()) and not matches[split]:
            wanted = " or ".join(f"{count:,}" for count in _PUBLISHED[split])
            warnings.warn(
                f"{FILES[split]} has {len(corpus.split(split)):,} tokens, not {wanted} as published: unless "
                "you changed it, copy it anew",
                stacklevel=3,
            )


def _lines(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield [*line.split(), EOS]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): copy it anew") from error


def _load(cache: Path, stamp: dict[str, Any]) -> Corpus | None:
    """What the cache holds, or None where it is of other sources, damaged or not there."""
    try:
        held = json.loads((cache / "stamp.json").read_text())
        if held["stamp"] != stamp:
            return None
        words = tuple((cache / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[:-1])
        ids = {split: np.load(cache / f"{split}.npy", mmap_mode="r") for split in SPLITS}
        lengths = {"words": len(words)} | {split: len(stream) for split, stream in ids.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Corpus("WikiText", words, **ids) if lengths == held["lengths"] else None


def _build(sources: dict[str, Path], cache: Path, stamp: dict[str, Any]) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    # Without the stamp there is no cache: it goes first and comes last.
    (cache / "stamp.json").unlink(missing_ok=True)
    counts: Counter[str] = Counter()
    for tokens in _lines(sources["train"]):
        counts.update(tokens[:-1])
    words = [EOS, *(word for word, _ in counts.most_common() if word != EOS)]
    with _replacing(cache / "vocabulary.txt") as file:
        for word in words:
            file.write(f"{word}\n".encode())
    ids = {word: place for place, word in enumerate(words)}
    lengths = {"words": len(words)}
    for split, path in sources.items():
        lengths[split] = _encode(path, ids, cache / f"{split}.npy")
    with _replacing(cache / "stamp.json") as file:
        file.write(json.dumps({"stamp": stamp, "lengths": lengths}).encode())


def _encode(path: Path, ids: dict[str, int], to: Path) -> int:
    """Write the ids of a file as a NumPy array of int32; returns how many there are."""
    length = sum(len(tokens) for tokens in _lines(path))
    unknown = ids.get(UNKNOWN)
    with _replacing(to) as file:
        header = {"descr": "<i4", "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        block: list[int] = []
        for tokens in _lines(path):
            for word in tokens:
                place = ids.get(word, unknown)
                if place is None:
                    raise ValueError(
                        f"{path} has the word {word!r}, which {FILES['train']} lacks, and the vocabulary has "
                        f"no {UNKNOWN}: take the files of one distribution"
                    )
                block.append(place)
            if len(block) >= _BLOCK:
                file.write(np.array(block, dtype="<i4").tobytes())
                block.clear()
        file.write(np.array(block, dtype="<i4").tobytes())
    return length


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is written to its end, and not before."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
