"""n-grams of captions and of their references, counted once for BLEU and CIDEr-D.

    a dog on a sofa  →  n = 1: a ×2, dog, on, sofa;  n = 2: a dog, dog on, on a, a sofa;  …

Every n-gram is a number, and a table of counts is three columns (owner, n-gram, count): all sums below are sums over columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

N = 4  # the longest n-gram


class Table(NamedTuple):
    """How often each n-gram of one length stands in each text. All (E,); sorted by owner, then by gram."""

    owner: np.ndarray  # which text, or which image
    gram: np.ndarray
    count: np.ndarray


class NGrams:
    """texts: one an image, references: one or more an image; all tokenised, with spaces between the tokens.

    tables[n - 1]   candidates (owner: image) and references (owner: reference)
    image           (R,) the image of each reference
    lengths, reference_lengths   tokens of each caption (M,) and of each reference (R,)
    """

    def __init__(self, texts: Sequence[str], references: Sequence[Sequence[str]]):
        if len(texts) != len(references):
            raise ValueError(f"{len(texts)} captions, but references of {len(references)} images")
        if not all(references):
            raise ValueError(f"image {[*map(bool, references)].index(False)} has no references")
        self.image = np.repeat(np.arange(len(references)), [len(known) for known in references])
        words = [text.split() for text in texts] + [text.split() for known in references for text in known]
        lengths = np.array([len(one) for one in words], dtype=np.int64)
        self.lengths, self.reference_lengths = lengths[: len(texts)], lengths[len(texts) :]
        vocabulary: dict[str, int] = {}
        tokens = np.array([vocabulary.setdefault(w, len(vocabulary)) for one in words for w in one], dtype=np.int64)
        self.tables: list[tuple[Table, Table]] = []
        self.kinds: list[int] = []  # different n-grams of each length
        grams = tokens
        owner, left = np.repeat(np.arange(len(words)), lengths), remaining(lengths)
        for n in range(1, N + 1):
            if n > 1:  # the n-gram here is the (n − 1)-gram here and the token n − 1 places on
                at = np.flatnonzero(left >= n)
                pairs = grams[at] * len(vocabulary) + tokens[at + n - 1]
                grams = np.full(len(tokens), -1)
                grams[at] = np.unique(pairs, return_inverse=True)[1]
            here = left >= n
            kinds = int(grams.max(initial=-1)) + 1
            whole = count(owner[here], grams[here], kinds)
            mine = whole.owner < len(texts)
            candidates = Table(*(column[mine] for column in whole))
            others = Table(whole.owner[~mine] - len(texts), whole.gram[~mine], whole.count[~mine])
            self.tables.append((candidates, others))
            self.kinds.append(kinds)


def remaining(lengths: np.ndarray) -> np.ndarray:
    """For each token of texts of these lengths, how many there are from it to the end of its text."""
    ends = np.repeat(np.cumsum(lengths), lengths)
    return ends - np.arange(len(ends))


def count(owner: np.ndarray, gram: np.ndarray, kinds: int) -> Table:
    keys, counts = np.unique(owner * max(1, kinds) + gram, return_counts=True)
    return Table(keys // max(1, kinds), keys % max(1, kinds), counts)


def look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of the wanted keys, 0 where there is none. keys: sorted."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=values.dtype)
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
