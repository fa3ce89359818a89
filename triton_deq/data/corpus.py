"""A text as numbers: a vocabulary, and three streams of ids."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..checks import check_choice

SPLITS = ("train", "valid", "test")
EOS = "<eos>"
"""Ends every line (WikiText) or paragraph (the help topics)."""
UNKNOWN = "<unk>"
"""Stands for the words that the vocabulary lacks."""

_BLOCK = 1 << 22  # ids counted at once, so that a mapped file of any length takes little memory


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenised text.

    Attributes:
        name: of the data, for logs.
        words: the vocabulary; a word's place is its id.
        train, valid, test: int32 `[n]` ids in the order of the text, in memory or mapped from a file.
    """

    name: str
    words: tuple[str, ...]
    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each word."""
        return {word: place for place, word in enumerate(self.words)}

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of vocabulary and lengths: two runs with the same one read the same text."""
        digest = hashlib.sha256("\n".join(self.words).encode())
        digest.update(str([len(self.split(name)) for name in SPLITS]).encode())
        return digest.hexdigest()[:16]

    def split(self, name: str) -> np.ndarray:
        """`train`, `valid` or `test`.

        Raises:
            ValueError: another name.
        """
        check_choice("split", name, SPLITS)
        return getattr(self, name)

    def encode(self, words: Iterable[str]) -> list[int]:
        """The ids of words.

        Raises:
            ValueError: a word that is not in the vocabulary, which has no `<unk>` either.
        """
        unknown = self.ids.get(UNKNOWN)
        found = []
        for word in words:
            place = self.ids.get(word, unknown)
            if place is None:
                raise ValueError(f"the word {word!r} is not in the vocabulary of {self.name}: leave it out")
            found.append(place)
        return found

    def decode(self, ids: Iterable[int]) -> str:
        """The words of ids, with spaces between."""
        return " ".join(self.words[place] for place in ids)

    def unigram_perplexity(self, split: str = "valid") -> float:
        """`exp(−mean log p(w))` over a split, with `p(w) = (count of w in train + 1) / (n + V)`.

        What a model that knows the words' frequencies and nothing else reaches: any use of the context has
        to be better.
        """
        counts = self._counts(self.train) + 1
        log_p = np.log(counts / counts.sum())
        held = self._counts(self.split(split))
        return math.exp(-(held @ log_p) / held.sum())

    def _counts(self, ids: np.ndarray) -> np.ndarray:
        counts = np.zeros(len(self.words), dtype=np.int64)
        for start in range(0, len(ids), _BLOCK):
            counts += np.bincount(ids[start : start + _BLOCK], minlength=len(self.words))
        return counts
