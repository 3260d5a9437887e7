"""Training batches of texts alone: for a language model, and for a T5, whose encoder reads a part of each.

Every class has the methods of those in batches.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from minivlm.conversation import IGNORED, Sample, Turn, collate, encode_conversation
from minivlm.datasets.batches import Rngs
from minivlm.datasets.continuation import collate_pairs, split, tokens_of
from minivlm.datasets.shapes.episodes import document, words
from minivlm.datasets.span_corruption import drop, with_sentinels
from minivlm.processor import Processor

SHAPES_DOCUMENTS = 10**6  # as many as anyone will read; document i is made when it is asked for
Document = str | list[Turn]  # a text, or a conversation


class Texts:
    """Texts, which are learnt whole, and conversations, whose answers are learnt: tokens and labels (B, T).

    texts: None for those of the shapes world, which are drawn as they are read.
    """

    def __init__(self, texts: list[str] | None, processor: Processor, directory: str):
        self.texts, self.processor, self.directory = texts, processor, directory

    def __len__(self) -> int:
        return SHAPES_DOCUMENTS if self.texts is None else len(self.texts)

    def read(self, index: int) -> Document:
        return document(0, "train", index) if self.texts is None else self.texts[index]

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        samples = [text_sample(self.read(index), self.processor) for index in indices]
        return collate(samples, self.processor.pad_token)

    def length(self, index: int, rng: np.random.Generator) -> int:
        return len(text_sample(self.read(index), self.processor).tokens)

    def key(self, index: int) -> str:
        return f"text {index}"

    def notes(self) -> list[str]:
        if self.texts is None:
            return [f"texts of the shapes world, drawn as they are read ({self.directory})"]
        cut, context = self.processor.too_long(self.texts), self.processor.context
        note = f"{cut} texts are longer than the context of {context} and are cut to it"
        return [f"{len(self.texts)} texts in {self.directory}", *([note] if cut else [])]


def text_sample(text: Document, processor: Processor) -> Sample:
    """At most as long as the context."""
    if not isinstance(text, str):
        return encode_conversation(text, processor, context=processor.context)
    tokens = processor.cut(processor.encode([text])[0])
    return Sample(tokens, [IGNORED, *tokens[1:]], [])


class SpanCorruption:
    """Texts for a T5: a share with sentinel tokens for the spans that are to be generated, the others cut in two.

    tokens and mask (B, S) of the encoder, labels (B, T); every step cuts anew.
    """

    def __init__(self, texts: Texts, *, share: float):
        self.texts, self.processor, self.share = texts, texts.processor, share
        self.read, self.key, self.notes = texts.read, texts.key, texts.notes

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        return collate_pairs([*map(self.pair, indices, rngs)], self.processor)

    def pair(self, index: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """The tokens of the encoder, and those that the decoder generates."""
        if rng.random() < self.share:
            return with_sentinels(drop(self.read(index), rng), self.processor)
        return tokens_of(split(self.read(index), rng), self.processor)

    def length(self, index: int, rng: np.random.Generator) -> int:
        spans = rng.random() < self.share
        return len((words(self.read(index)) if spans else split(self.read(index), rng)[0]).split())
