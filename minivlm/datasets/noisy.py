"""Captions as the web has them: some belong to another image. Here it is known which, so that a filter can be judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from minivlm.datasets.pairs import Pairs
from minivlm.errors import UserError

TRIES = 20  # to find an image that has another caption


class NoisyPairs(Pairs):
    """`pairs`, of which this share are captioned as some other image is, the same one each time.

    wrong   (n,) bool: which captions are of another image
    source  (n,) int64: of which
    The same seed gives the same captions. An image whose caption all others share keeps its own.
    """

    def __init__(self, pairs: Pairs, share: float, *, seed: int = 0):
        if not 0 <= share <= 1:
            raise UserError(f"the share of wrong captions is {share}, but must be between 0 and 1.")
        self.pairs, n = pairs, len(pairs)
        self.split, self.classes, self.labels = pairs.split, pairs.classes, pairs.labels
        rng = np.random.default_rng((seed, n))
        self.source = np.arange(n)
        for i in rng.permutation(n)[: round(share * n)].tolist():
            own = set(pairs.all_captions(i))
            others = (int(j) for j in rng.integers(n, size=TRIES))
            self.source[i] = next((j for j in others if own.isdisjoint(pairs.all_captions(j))), i)
        self.wrong = self.source != np.arange(n)
        self.notes = [*pairs.notes, f"{self.wrong.sum()} of the {n} captions are those of another image"]

    def __len__(self) -> int:
        return len(self.pairs)

    def images(self, indices: Sequence[int]) -> list[np.ndarray]:
        return self.pairs.images(indices)

    def all_captions(self, index: int) -> Sequence[str]:
        return self.pairs.all_captions(int(self.source[index]))

    def captions(self, indices: Sequence[int], rng: np.random.Generator) -> list[str]:
        return self.pairs.captions(self.source[np.asarray(indices, dtype=np.int64)].tolist(), rng)

    def key(self, index: int) -> str:
        return self.pairs.key(index)

    def texts(self) -> Iterator[str]:
        return self.pairs.texts()
