"""The interface of datasets for the prefix pattern: images, and conversations about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from minivlm.conversation import DESCRIBE, Turn, as_text, with_images
from minivlm.datasets.judge import Problem


def ask_for_caption(captions: Sequence[str], rng: np.random.Generator) -> list[Turn]:
    """A request, and one of the captions of the image."""
    caption = as_text(captions[int(rng.random() * len(captions))])
    return [Turn("user", with_images(DESCRIBE)), Turn("assistant", caption)]


class Question(NamedTuple):
    """A question to be judged by."""

    index: int  # the sample whose images it is about
    text: str  # without <image> placeholders: they stand in front of it, one for each image of the sample
    answers: tuple[str, ...]  # any of them is right; ten: those of ten people (VQA v2)
    kind: str = "all"  # accuracy is reported for each kind


class Conversations:
    """One split of images with conversations. A dataset sets `split`, and defines the methods that raise here.

    split  "train", "val" or "test"
    notes  sentences that the user should read: what was skipped, which split stands in for a missing one
    one_image_each  False where some samples have several images, or none
    free_answers  True where the questions are those of conversations, whose answers are sentences
    """

    split: str
    notes: Sequence[str] = ()
    one_image_each: bool = True
    free_answers: bool = False

    def __len__(self) -> int:
        raise NotImplementedError

    def images(self, indices: Sequence[int]) -> list[list[np.ndarray]]:
        """The images of each sample, (H, W, 3) uint8 RGB; sizes may differ."""
        raise NotImplementedError

    def leave_out(self, problem: Problem, *, captions: bool = False) -> None:
        """Leave out the samples from which nothing can be learned, and list them in `notes` (judge.py)."""

    def keep_captioned(self) -> None:
        """Leave out the samples without captions, and count them in `notes`."""

    def image_count(self, index: int) -> int:
        """How many images a sample has."""
        return 1

    def check_images(self) -> None:
        """UserError where an image cannot be decoded."""

    def conversation(self, index: int, rng: np.random.Generator) -> list[Turn]:
        """The turns about the images of a sample; where there is a choice, `rng` makes it."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """The sample's name in messages: a file name, or "train/123"."""
        raise NotImplementedError

    def texts(self) -> Iterator[str]:
        """All texts of the split, each once: what a tokeniser and a language model are trained on."""
        raise NotImplementedError

    def questions(self) -> list[Question]:
        """The questions that a model is judged by, always the same ones; none where the data hold none."""
        return []

    def asked(self, index: int, rng: np.random.Generator) -> list[Question]:
        """Questions about a sample to learn from; where there is a choice, `rng` makes it."""
        return []

    def captions(self, index: int) -> list[str]:
        """The captions of the image; none where the data have no captions."""
        return []

    def false_caption(self, index: int, rng: np.random.Generator) -> str | None:
        """A caption with a single thing changed that makes it false; None where the data have none."""
        return None

    def caption_conversation(self, index: int, rng: np.random.Generator) -> list[Turn]:
        """A request for a caption, and one of them; where there is none, a conversation."""
        if not (known := self.captions(index)):
            return self.conversation(index, rng)
        return ask_for_caption(known, rng)
