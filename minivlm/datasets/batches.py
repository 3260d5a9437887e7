"""Training batches of samples with images: the arguments of a model's `losses`.

Every class here, and in question_batches.py, sequence_batches.py and text_batches.py, has

    batch(indices, rngs, step)   the arguments of `losses`, by name; what is chosen for a sample, its own rng draws
    length(index, rng)           about how long the text of a sample is, in any unit, drawn as `batch` draws it
    key(index), len, notes()     the name of a sample for messages; how many there are; what the user should know

`images` is a function: indices of samples → {"images": pixels, or `ImageFeatures` where the vision tower is frozen}.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minivlm.conversation import Sample, collate
from minivlm.datasets.conversations import Conversations
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes.negatives import changed
from minivlm.datasets.transforms import TrainTransform
from minivlm.layers.tower import ImageFeatures
from minivlm.processor import Processor
from minivlm.processor_config import ProcessorConfig

Rngs = Sequence[np.random.Generator]
ImagesOf = Callable[[Sequence[int]], dict[str, Tensor]]


class Captions:
    """An image and one of its captions: tokens and mask (B, T), images (B, 3, S, S) or, where `cache` keeps some, features.

    augment: crops, flips and colours. whole: captions that name everything, where the data word them in several ways.
    cache: what a frozen tower computed once of each image, as it is; see recipes/vision_cache.py.
    """

    def __init__(
        self,
        pairs: Pairs,
        processor: Processor,
        directory: str,
        *,
        augment: bool = False,
        whole: bool = False,
        cache: Any = None,
    ):
        self.pairs, self.processor, self.directory, self.augment = pairs, processor, directory, augment
        self.whole, self.cache = whole, cache
        c, unit = processor.config, 255 * processor.config.rescale  # 1, but for a publisher who has it otherwise
        mean, std = ([value / unit for value in values] for values in (c.mean, c.std))
        self.transform = TrainTransform(c.image_size, mean, std, augment=augment)
        self.as_published = not augment and not is_centre_crop(c)

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        captions = [*map(self.caption, indices, rngs)]
        tokens, mask = self.processor.text(captions, cut=True)
        return {"images": self.images(indices, captions, rngs), "tokens": tokens, "mask": mask}

    def images(self, indices: Sequence[int], captions: Sequence[str], rngs: Rngs) -> Tensor | ImageFeatures:
        if self.cache is not None and self.cache.features is not None:
            return self.cache(indices)["images"]
        pixels = self.pairs.images(indices)
        return self.processor.images(pixels) if self.as_published else self.transform(pixels, captions, rngs)

    def caption(self, index: int, rng: np.random.Generator) -> str:
        if not self.whole:
            return self.pairs.captions([index], rng)[0]
        known = self.pairs.all_captions(index)
        return known[int(rng.random() * len(known))]

    def length(self, index: int, rng: np.random.Generator) -> int:
        return len(self.caption(index, rng).split())

    def key(self, index: int) -> str:
        return self.pairs.key(index)

    def notes(self) -> list[str]:
        frozen = self.augment and self.cache is not None and self.cache.frozen
        told = "the vision tower is frozen: images whose features are kept are not augmented"
        return [*pair_notes(self.pairs, self.processor, self.directory), *([told] if frozen else [])]


def is_centre_crop(config: ProcessorConfig) -> bool:
    """Whether images are prepared as `TrainTransform` does it: the shorter side resized, the centre square taken."""
    size = config.resize == "shortest" and config.resize_to in (None, config.image_size) and config.crop != "none"
    return size and config.pad_color is None and config.resample == "bicubic"


def pair_notes(pairs: Pairs, processor: Processor, directory: str) -> list[str]:
    cut = processor.too_long(list(pairs.texts()))
    note = f"{cut} captions are longer than the context of {processor.context} tokens and are cut to it"
    return [f"{len(pairs)} training images in {directory}", *pairs.notes, *([note] if cut else [])]


class CaptionsWithNegatives:
    """A caption and, for a share of the samples, one that is nearly right: tokens, mask, false, false_mask (B, T), images.

    guess: what the image shows is unknown, so that a false caption is a guess.
    """

    def __init__(
        self,
        pairs: Pairs,
        processor: Processor,
        images: ImagesOf,
        directory: str,
        *,
        false_captions: float,
        guess: bool = False,
    ):
        self.pairs, self.processor, self.images, self.directory = pairs, processor, images, directory
        self.false_captions, self.guess = false_captions, guess

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        captions, false = zip(*map(self.captions, indices, rngs), strict=True)
        tokens, mask = self.processor.text(captions, cut=True)
        batch = {"tokens": tokens, "mask": mask}
        if any(false):
            batch["false"], false_mask = self.processor.text([text or "" for text in false], cut=True)
            batch["false_mask"] = false_mask & torch.tensor([text is not None for text in false])[:, None]
        return batch | self.images(indices)

    def captions(self, index: int, rng: np.random.Generator) -> tuple[str, str | None]:
        """A caption, and a nearly right one or none. Both have one style, so that the style gives nothing away."""
        wanted = rng.random() < self.false_captions
        if self.guess:
            caption = self.pairs.all_captions(index)[0]
            return caption, changed(caption, rng) if wanted else None
        if wanted and (false := self.pairs.false_caption(index, rng)) is not None:
            return self.pairs.all_captions(index)[0], false
        return self.pairs.captions([index], rng)[0], None

    def length(self, index: int, rng: np.random.Generator) -> int:
        return max(len(text.split()) for text in self.captions(index, rng) if text is not None)

    def key(self, index: int) -> str:
        return self.pairs.key(index)

    def notes(self) -> list[str]:
        return pair_notes(self.pairs, self.processor, self.directory)


class WithQuestions:
    """Captions, and beside each a question about the image: question, answer and their masks (B, ·)."""

    def __init__(self, captions: CaptionsWithNegatives, conversations: Conversations):
        self.captions, self.conversations, self.processor = captions, conversations, captions.processor
        self.length, self.key, self.notes = captions.length, captions.key, captions.notes

    def __len__(self) -> int:
        return len(self.captions)

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        again = deepcopy(rngs)  # the question is drawn with the same numbers as the caption
        batch = self.captions.batch(indices, rngs, step)
        questions, answers = zip(*map(self.exchange, indices, again), strict=True)
        batch["question"], batch["question_mask"] = self.processor.text(questions, cut=True)
        batch["answer"], batch["answer_mask"] = self.processor.text(answers, cut=True)
        return batch

    def exchange(self, index: int, rng: np.random.Generator) -> tuple[str, str]:
        """One question about an image, and its answer."""
        questions = self.conversations.asked(index, rng)
        question = questions[int(rng.integers(len(questions)))]
        return question.text, question.answers[0]


class CaptionsToGenerate:
    """An image and one of its captions, all of which is to be generated: images, tokens and labels (B, T)."""

    def __init__(self, conversations: Conversations, processor: Processor, images: ImagesOf, directory: str):
        self.conversations, self.processor, self.images, self.directory = conversations, processor, images, directory
        self.key = conversations.key

    def __len__(self) -> int:
        return len(self.conversations)

    def batch(self, indices: Sequence[int], rngs: Rngs, step: int) -> dict[str, Tensor]:
        captions = [one_caption(self.conversations, index, rng) for index, rng in zip(indices, rngs, strict=True)]
        rows = [self.processor.cut(row) for row in self.processor.encode(captions)]
        return self.images(indices) | collate([Sample(row, row, []) for row in rows], self.processor.pad_token)

    def length(self, index: int, rng: np.random.Generator) -> int:
        return len(one_caption(self.conversations, index, rng).split())

    def notes(self) -> list[str]:
        return conversation_notes(self.conversations, self.directory)


def one_caption(conversations: Conversations, index: int, rng: np.random.Generator) -> str:
    known = conversations.captions(index)
    return known[int(rng.random() * len(known))]


def conversation_notes(conversations: Conversations, directory: str) -> list[str]:
    return [f"{len(conversations)} training samples in {directory}", *conversations.notes]
