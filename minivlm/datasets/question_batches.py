"""Training batches for answers chosen from a list, and for captions with hidden words or regions.

Every class has the methods of those in batches.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minivlm.conversation import IGNORED
from minivlm.datasets.answers import AnswerList
from minivlm.datasets.batches import ImagesOf, Rngs, one_caption
from minivlm.datasets.continuation import pad
from minivlm.datasets.conversations import Conversations, Question
from minivlm.datasets.masking import hide_regions, hide_words
from minivlm.processor import Processor


class QuestionsOfList:
    """A question about each image with its right answers among those of a list: tokens, mask (B, T), answers (B, A).

    samples: those of `conversations` that are asked about. right: question → (A,), how right each answer of the list is.
    known_notes: what the user should know.
    """

    def __init__(
        self,
        conversations: Conversations,
        samples: Sequence[int],
        answers: AnswerList,
        right: Callable[[Question], np.ndarray],
        processor: Processor,
        images: ImagesOf,
        known_notes: list[str],
    ):
        self.conversations, self.samples, self.answers, self.right = conversations, samples, answers, right
        self.processor, self.images, self.known_notes = processor, images, known_notes

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        return self.asked(indices, rngs) | self.images([self.samples[i] for i in indices])

    def asked(self, indices: Sequence[int], rngs: Rngs) -> dict[str, Tensor]:
        """The batch without its images."""
        chosen = [*map(self.question, indices, rngs)]
        tokens, mask = self.processor.text([question.text for question in chosen], cut=True)
        return {"tokens": tokens, "mask": mask, "answers": torch.from_numpy(np.stack([*map(self.right, chosen)]))}

    def question(self, index: int, rng: np.random.Generator) -> Question:
        sample = self.samples[index]
        asked = [question for question in self.conversations.asked(sample, rng) if self.answers.knows(question)]
        return asked[rng.integers(len(asked))] if asked else Question(sample, "", ())  # to which nothing is right

    def length(self, index: int, rng: np.random.Generator) -> int:
        return len(self.question(index, rng).text.split())

    def key(self, index: int) -> str:
        return self.conversations.key(self.samples[index])

    def notes(self) -> list[str]:
        return self.known_notes


class MaskedCaptions:
    """True captions and false ones, of which something is hidden: tokens, mask, labels (B, T), matches (B,), hidden (B, R).

    Half of them are shown whole. The others, true and false alike, have something hidden, so that a mask does not reveal
    whether they match; what it hides is predicted for the true ones alone.

    hide: words, both words and regions, or either of them. mask: the token that stands where a word is hidden. regions: R,
    how many an image has. heads: of the model, "words" and "regions" among them if it predicts these. paired: half as many
    images, each with a true caption and a false one, so that the batch differs in what makes a caption false, and in less else.
    nearly_right: the share of the false captions that differ from a true one by a word, where the data have such.
    """

    def __init__(
        self,
        conversations: Conversations,
        samples: Sequence[int],
        processor: Processor,
        images: ImagesOf,
        *,
        hide: Literal["words", "either", "both"],
        mask: str,
        regions: int,
        heads: Sequence[str],
        paired: bool = False,
        nearly_right: float = 0.5,
    ):
        self.conversations, self.samples, self.processor, self.images = conversations, samples, processor, images
        self.hide, self.regions, self.heads, self.paired = hide, regions, heads, paired
        self.nearly_right = nearly_right
        self.mask_token = processor.tokenizer.token_to_id(mask)
        self.special = {processor.start_token, processor.end_token, processor.pad_token}

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        samples = [self.samples[i % len(self.samples)] for i in indices]
        rows, labels, hidden, matches = [], [], [], []
        half = (len(samples) + 1) // 2  # of true captions, beside as many false ones of the same images
        samples = [*samples[:half], *samples[: len(samples) - half]] if self.paired else samples
        for i, (sample, rng) in enumerate(zip(samples, rngs, strict=True)):
            wanted = i >= half if self.paired else rng.random() < 0.5
            false = self.false_caption(sample, rng) if wanted else None
            hide = self.hide if self.hide != "either" else "words" if rng.random() < 0.5 else "regions"
            whole = rng.random() < 0.5
            [row] = self.processor.encode([false or one_caption(self.conversations, sample, rng)])
            shown, label = self.masked(self.processor.cut(row), rng, words=hide != "regions" and not whole)
            rows.append(shown)
            labels.append(label if false is None else [IGNORED] * len(label))
            hidden.append(hide_regions(self.regions, rng) & (hide != "words" and not whole))
            matches.append(false is None)
        tokens, mask = pad(rows, self.processor.pad_token), pad([[1] * len(row) for row in rows], 0).bool()
        batch = {"tokens": tokens, "mask": mask, "matches": torch.tensor(matches)}
        if "words" in self.heads:
            batch["labels"] = pad(labels, IGNORED)
        if "regions" in self.heads:
            batch["hidden"] = torch.from_numpy(np.stack(hidden))
        return batch | self.images(samples)

    def masked(self, row: list[int], rng: np.random.Generator, *, words: bool) -> tuple[list[int], list[int]]:
        if not words:
            return row, [IGNORED] * len(row)
        sizes = dict(mask_token=self.mask_token, vocab_size=self.processor.vocab_size, special=self.special)
        return hide_words(row, rng, **sizes)

    def false_caption(self, sample: int, rng: np.random.Generator) -> str | None:
        """One that is nearly right, where the data have some; else, and in the other cases, that of another image."""
        if rng.random() < self.nearly_right and (false := self.conversations.false_caption(sample, rng)) is not None:
            return false
        other = one_caption(self.conversations, self.samples[int(rng.integers(len(self.samples)))], rng)
        return None if other in self.conversations.captions(sample) else other


class Alternating:
    """Questions, and in every `every`-th step captions."""

    def __init__(self, questions: QuestionsOfList, captions: MaskedCaptions, every: int):
        self.questions, self.captions, self.every = questions, captions, every
        self.length, self.key, self.notes = questions.length, questions.key, questions.notes

    def __len__(self) -> int:
        return len(self.questions)

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        of = self.captions if step % self.every == self.every - 1 else self.questions
        return of.batch(indices, rngs, step)


class QuestionsAndCaptions:
    """A question and a caption of each image: tokens, mask of the caption, question, question_mask, answers, images."""

    def __init__(self, questions: QuestionsOfList):
        self.questions, self.key, self.notes = questions, questions.key, questions.notes

    def __len__(self) -> int:
        return len(self.questions)

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        of, samples = self.questions, [self.questions.samples[i] for i in indices]
        asked = of.asked(indices, rngs)
        captions = [one_caption(of.conversations, sample, rng) for sample, rng in zip(samples, rngs, strict=True)]
        tokens, mask = of.processor.text(captions, cut=True)
        question = {"question": asked["tokens"], "question_mask": asked["mask"], "answers": asked["answers"]}
        return {"tokens": tokens, "mask": mask, **question, **of.images(samples)}

    def length(self, index: int, rng: np.random.Generator) -> int:
        """The length of the caption, the longer of the two; it is drawn second."""
        self.questions.question(index, rng)
        return len(one_caption(self.questions.conversations, self.questions.samples[index], rng).split())
