"""A text in two parts, for a model whose encoder reads the first and whose decoder generates the second.

"three shapes. is there a red circle? yes"  →  "three shapes. is there a red circle?" | "yes"
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minivlm.conversation import IGNORED, Turn
from minivlm.datasets.shapes.episodes import words as words_of
from minivlm.processor import Processor

ASKS = ("?", ":")  # what a word ends with that is followed by an answer
BEFORE_ANSWERS = 0.5  # share of the texts with answers that are cut before one; the others are cut anywhere


def split(document: str | list[Turn], rng: np.random.Generator) -> tuple[str, str]:
    """A text cut between two words; a single word gives nothing and the word. A conversation is cut in front of one of its
    answers, which is the second part."""
    if not isinstance(document, str):
        at = 1 + 2 * int(rng.integers(len(document) // 2))
        return words_of(document[:at]), document[at].text
    words = document.split()
    cuts = range(1, len(words))
    answers = answers_in(words)
    if answers and rng.random() < BEFORE_ANSWERS:
        cuts = answers
    at = cuts[rng.integers(len(cuts))] if cuts else 0
    return " ".join(words[:at]), " ".join(words[at:])


def answers_in(words: Sequence[str]) -> list[int]:
    """The indices of a text's words that are answers, or start one."""
    return [i for i in range(1, len(words)) if words[i - 1].endswith(ASKS)]


def tokens_of(parts: tuple[str, str], processor: Processor) -> tuple[list[int], list[int]]:
    """Both parts as tokens: the first framed as a whole text, the second up to its end token.

    What does not fit the context is left out far from the cut: the start of the first part, the end of the second.
    """
    starts, context = int(processor.start_token is not None), processor.context
    first, second = processor.encode(parts)
    return first if len(first) <= context else first[:starts] + first[starts - context :], second[starts:][:context]


def collate_pairs(pairs: Sequence[tuple[list[int], list[int]]], processor: Processor) -> dict[str, Tensor]:
    """B pairs of what is read and what is generated → tokens (B, S), mask (B, S) of the one, labels (B, T) of the other."""
    read, generated = zip(*pairs, strict=True)
    return {
        "tokens": pad(read, processor.pad_token),
        "mask": pad([[1] * len(row) for row in read], 0).bool(),
        "labels": pad(generated, IGNORED),
    }


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
