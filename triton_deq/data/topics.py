"""A text that is always there: the help topics that ship with Python."""

import re
from collections import Counter

import numpy as np

from ..checks import check_count
from .corpus import EOS, SPLITS, UNKNOWN, Corpus

_TOKEN = re.compile(r"[^\W\d_]+|\d+|_+|([^\w\s])\1*")
_WORD = re.compile(r"\w")
_BLANK = re.compile(r"\n\s*\n")


def help_topics(minimum: int = 2) -> Corpus:
    """The help topics of `pydoc_data.topics` as a small corpus: some 80,000 tokens, 2,000 words.

    Words, numbers and runs of a punctuation mark are tokens, in lower case; `<eos>` ends a paragraph. Lines
    without a letter or digit are rules and frames of tables, and left out; so is a paragraph that has stood
    before, because some topics repeat others and a test must not hold what was trained on. Of ten topics
    with text left, in alphabetic order, the fifth validates and the tenth tests. The text differs between
    versions of Python.

    Args:
        minimum: of a word's occurrences in the training topics; the rarer ones are `<unk>`.

    Raises:
        ImportError: a Python that was installed without its help topics.
        TypeError, ValueError: minimum is not a positive int.
    """
    check_count("minimum", minimum)
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "this Python was installed without its help topics (pydoc_data): install its full standard "
            "library, or train on WikiText"
        ) from error
    seen: set[tuple[str, ...]] = set()
    fresh: list[list[str]] = []
    for topic in sorted(topics):
        text: list[str] = []
        for paragraph in _BLANK.split(topics[topic].lower()):
            tokens = _tokens(paragraph)
            if tokens and tokens not in seen:
                seen.add(tokens)
                text.extend((*tokens, EOS))
        if text:
            fresh.append(text)
    texts: dict[str, list[str]] = {name: [] for name in SPLITS}
    for place, text in enumerate(fresh):
        texts[{4: "valid", 9: "test"}.get(place % 10, "train")].extend(text)

    # Counter.most_common keeps the order of first appearance among equals.
    counts = Counter(texts["train"])
    frequent = [word for word, count in counts.most_common() if count >= minimum]
    rare = sum(count for count in counts.values() if count < minimum)
    place = sum(counts[word] >= rare for word in frequent)
    words = (*frequent[:place], UNKNOWN, *frequent[place:])
    ids = {word: number for number, word in enumerate(words)}
    streams = {
        name: np.array([ids.get(word, ids[UNKNOWN]) for word in text], dtype=np.int32)
        for name, text in texts.items()
    }
    return Corpus("Python's help topics", words, **streams)


def _tokens(paragraph: str) -> tuple[str, ...]:
    lines = (line for line in paragraph.splitlines() if _WORD.search(line))
    return tuple(match.group() for line in lines for match in _TOKEN.finditer(line))
