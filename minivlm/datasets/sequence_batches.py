"""Training batches of texts with images, of which a part is learnt: conversations, lessons, documents.

Every class has the methods of those in batches.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
from torch import Tensor

from minivlm.conversation import IGNORED, PLACEHOLDER, Sample, Turn, collate, encode_conversation
from minivlm.datasets.batches import ImagesOf, Rngs, conversation_notes
from minivlm.datasets.continuation import collate_pairs
from minivlm.datasets.conversations import Conversations
from minivlm.datasets.interleaved import Interleaved, encode_document
from minivlm.datasets.judge import exchanges
from minivlm.datasets.shapes.shots import END, LEAD, Lessons, Named
from minivlm.datasets.span_corruption import SENTINELS, with_sentinels
from minivlm.errors import UserError
from minivlm.losses import labelled
from minivlm.processor import Processor
from minivlm.special_tokens import Markup, as_text, without_placeholders

EXAMINED = 500  # samples, before the first step, to count how many are cut
EXAMPLE = 8  # about so many tokens has an example of a lesson


def batch_of(drawn: Sequence[tuple[Sample, list[int]]], processor: Processor, images: ImagesOf) -> dict[str, Tensor]:
    """Texts, and the samples whose images stand in each → tokens and labels (B, T), where the labels are, images (M, …)."""
    samples, shown_images = zip(*drawn, strict=True)
    batch = collate(samples, processor.pad_token)
    return {**batch, "where": labelled(batch["labels"]), **images([*chain.from_iterable(shown_images)])}


class ConversationTurns:
    """Conversations about images, of which the answers are learnt. captions: each is a request for a caption, and one."""

    def __init__(
        self,
        conversations: Conversations,
        processor: Processor,
        images: ImagesOf,
        directory: str,
        *,
        captions: bool = False,
    ):
        self.conversations, self.processor, self.images, self.directory = conversations, processor, images, directory
        self.turns: Callable[[int, np.random.Generator], list[Turn]]
        self.turns = conversations.caption_conversation if captions else conversations.conversation
        self.key = conversations.key

    def __len__(self) -> int:
        return len(self.conversations)

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        return batch_of([*map(self.draw, indices, rngs)], self.processor, self.images)

    def draw(self, index: int, rng: np.random.Generator) -> tuple[Sample, list[int]]:
        return self.sample(index, rng), [index]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        turns, context = self.turns(index, rng), self.processor.context
        try:
            return encode_conversation(turns, self.processor, context=context)
        except UserError:  # of several questions about an image, of which each fits alone (judge.py)
            return encode_conversation(turns[:2], self.processor, context=context)

    def length(self, index: int, rng: np.random.Generator) -> int:
        return sum(len(turn.text.split()) for turn in self.turns(index, rng))

    def notes(self) -> list[str]:
        """And how many conversations the context has no room for."""
        n = min(len(self), EXAMINED)
        cut = sum(self.sample(i, np.random.default_rng(i)).cut > 0 for i in range(n))
        context = self.processor.context
        note = [f"{cut} of the first {n} samples are longer than the context of {context} tokens: their text is cut"]
        return conversation_notes(self.conversations, self.directory) + (note if cut else [])


class QuestionsToEncoder:
    """Conversations for a T5, whose encoder reads images and questions and whose decoder generates the answers.

    all_at_once: share of the samples in which a sentinel token stands for every answer (span_corruption.py), where the
    tokeniser has such; in the others one question is asked alone. tokens and mask (B, S), labels (B, T), images.
    """

    def __init__(self, turns: ConversationTurns, *, all_at_once: float):
        self.conversations, self.turns, self.processor = turns, turns.turns, turns.processor
        known = all(self.processor.tokenizer.token_to_id(token) is not None for token in SENTINELS)
        self.all_at_once = all_at_once if known else None
        self.images, self.length, self.key, self.notes = turns.images, turns.length, turns.key, turns.notes

    def __len__(self) -> int:
        return len(self.conversations)

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        pairs = [*map(self.pair, indices, rngs)]
        return collate_pairs(pairs, self.processor) | self.images(indices)

    def pair(self, index: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """The tokens of the encoder, and those that the decoder generates."""
        whole = self.all_at_once is not None and rng.random() < self.all_at_once
        turns = self.turns(index, rng)
        return self.all_answers(turns) if whole else self.one_answer(turns, rng)

    def all_answers(self, turns: list[Turn]) -> tuple[list[int], list[int]]:
        shown = self.processor.ids([Markup(PLACEHOLDER)]) * sum(turn.text.count(PLACEHOLDER) for turn in turns)
        pieces = [as_text(without_placeholders(turn.text)) for turn in turns]
        read, generated = with_sentinels(pieces, self.processor, context=self.processor.context - len(shown))
        return shown + read, generated

    def one_answer(self, turns: list[Turn], rng: np.random.Generator) -> tuple[list[int], list[int]]:
        known = exchanges(turns)
        one = known[int(rng.integers(len(known)))]
        sample = encode_conversation(one, self.processor, context=self.processor.context)
        read = [token for token, label in zip(sample.tokens, sample.labels, strict=True) if label == IGNORED]
        return read, [label for label in sample.labels if label != IGNORED]


class NewWords:
    """Lessons, in which images are given made-up names; every name that occurred before is learnt."""

    def __init__(self, lessons: Lessons, processor: Processor, images: ImagesOf, *, ways: int, n: int, note: str = ""):
        """n: how many an epoch has; there is no end of them."""
        self.lessons, self.processor, self.images, self.ways, self.n, self.note = (
            lessons,
            processor,
            images,
            ways,
            n,
            note,
        )

    def __len__(self) -> int:
        return self.n

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        return batch_of([*map(self.draw, indices, rngs)], self.processor, self.images)

    def draw(self, index: int, rng: np.random.Generator) -> tuple[Sample, list[int]]:
        named = self.lessons.lesson(rng, most_ways=self.ways)
        return lesson_sample(named, self.processor), [image for image, _ in named]

    def length(self, index: int, rng: np.random.Generator) -> int:
        return EXAMPLE * len(self.lessons.lesson(rng, most_ways=self.ways))

    def key(self, index: int) -> str:
        return f"lesson {index}"

    def notes(self) -> list[str]:
        return [self.note]


def lesson_sample(lesson: list[Named], processor: Processor) -> Sample:
    """An image and what it is called, one after the other."""
    tokens = [] if processor.start_token is None else [processor.start_token]
    labels, known = [IGNORED] * len(tokens), set()
    given = processor.ids(f"{PLACEHOLDER}{LEAD}")
    for _, word in lesson:
        whole = processor.ids(f"{PLACEHOLDER}{LEAD} {as_text(word)}{END}")
        generated = whole[len(given) :]
        tokens += whole
        labels += [IGNORED] * len(given) + (generated if word in known else [IGNORED] * len(generated))
        known.add(word)
    return Sample(tokens, labels, [])


class Mixed:
    """Conversations, and in place of a share of them lessons."""

    def __init__(self, turns: ConversationTurns, lessons: NewWords, share: float):
        self.turns, self.lessons, self.share = turns, lessons, share
        self.images, self.key, self.notes = turns.images, turns.key, turns.notes

    def __len__(self) -> int:
        return len(self.turns)

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        drawn = [self.either(rng).draw(index, rng) for index, rng in zip(indices, rngs, strict=True)]
        return batch_of(drawn, self.turns.processor, self.images)

    def either(self, rng: np.random.Generator) -> ConversationTurns | NewWords:
        return self.lessons if rng.random() < self.share else self.turns

    def length(self, index: int, rng: np.random.Generator) -> int:
        return self.either(rng).length(index, rng)


class Documents:
    """Images between texts, of which what follows the first image is learnt: tokens, labels (B, T), images (M, 3, H, W)."""

    def __init__(self, documents: Interleaved, processor: Processor, directory: str):
        self.documents, self.processor, self.directory = documents, processor, directory
        self.key = documents.key

    def __len__(self) -> int:
        return len(self.documents)

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        batch = document_batch(self.documents, indices, [*map(self.documents.text, indices, rngs)], self.processor)
        return {**batch, "where": labelled(batch["labels"])}

    def length(self, index: int, rng: np.random.Generator) -> int:
        return len(self.documents.text(index, rng).split())

    def notes(self) -> list[str]:
        return [f"{len(self)} training documents in {self.directory}", *self.documents.notes]


def document_batch(
    documents: Interleaved, indices: Sequence[int], texts: Sequence[str], processor: Processor
) -> dict[str, Tensor]:
    samples = [encode_document(text, processor, context=processor.context) for text in texts]
    shown = zip(documents.images(indices), samples, strict=True)
    shown_images = [*chain.from_iterable(some[: placeholders(sample, processor)] for some, sample in shown)]
    return {**collate(samples, processor.pad_token), "images": processor.images(shown_images)}


def placeholders(sample: Sample, processor: Processor) -> int:
    """How many images a text has room for."""
    return sample.tokens.count(processor.image_token_id)
