"""Hides words and regions, which a model that fuses then predicts.

Devlin et al. 2019 (BERT), §3.1; Chen et al. 2020 (UNITER), §3.2.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from minivlm.conversation import IGNORED

SHARE = 0.15  # of the words, and of the regions; at least one


def hide_words(
    row: Sequence[int], rng: np.random.Generator, *, mask_token: int, vocab_size: int, special: Collection[int]
) -> tuple[list[int], list[int]]:
    """A text's tokens → what is shown of them, and the labels: those that are hidden, IGNORED elsewhere.

    Of the hidden ones 80 % become the mask token, 10 % any other, 10 % stay as they are, so that a visible word is
    not trusted either. special tokens are never hidden.
    """
    words = [i for i, token in enumerate(row) if token not in special]
    shown, labels = list(row), [IGNORED] * len(row)
    for i in rng.permutation(words)[: share_of(len(words))].tolist():
        labels[i], chance = row[i], rng.random()
        if chance < 0.9:
            shown[i] = mask_token if chance < 0.8 else int(rng.integers(vocab_size))
    return shown, labels


def hide_regions(n: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) bool: True = hidden, to be predicted."""
    hidden = np.zeros(n, dtype=bool)
    hidden[rng.permutation(n)[: share_of(n)]] = True
    return hidden


def share_of(n: int) -> int:
    return max(1, round(SHARE * n)) if n else 0
