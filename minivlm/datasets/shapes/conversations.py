"""The shapes world in conversation: its images with questions, answers and captions (Liu et al. 2023, "Visual
Instruction Tuning").

    <image> is there a red circle?     yes
    where is the star?                 top left

Training draws other questions in every epoch (questions.py). Held-out questions are always the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from minivlm.conversation import DESCRIBE, Turn, with_images
from minivlm.datasets.conversation_base import Conversations, Question
from minivlm.datasets.shapes import ShapesWorld
from minivlm.datasets.shapes.facts import about_unseen
from minivlm.datasets.shapes.questions import ask, judge
from minivlm.datasets.shapes.text import canonical
from minivlm.errors import UserError, nearest

CAPTIONS = 0.2  # share of the training conversations that are a caption
QUESTIONS = {"train": 0, "val": 100, "test": 300, "unseen": 150}  # of each kind


class ShapesConversations(Conversations):
    """One split of a world that `make_shapes` has made: "train", "val", "test" or "unseen".

    "unseen" has scenes like those of test, but in each at least one object combines a colour and a shape that training
    never does; the others are as usual. Its questions are about such objects: a model that answers them composes.

    Raises UserError for an unknown split, and where the directory holds no world, a broken or an older one.
    """

    def __init__(self, directory: str | os.PathLike, split: str):
        if split not in QUESTIONS:
            raise UserError(f"there are no conversations for a split {split!r}.{nearest(split, QUESTIONS)}")
        self.world, self.split = ShapesWorld(directory, split), split
        self.scenes = self.world.scenes.read(np.arange(len(self.world)))

    def __len__(self) -> int:
        return len(self.scenes)

    def images(self, indices: Sequence[int]) -> list[list[np.ndarray]]:
        """One (S, S, 3) uint8 image for each sample."""
        return [[pixels] for pixels in self.world.images(indices)]

    def conversation(self, index: int, rng: np.random.Generator) -> list[Turn]:
        """The caption, or up to six questions and their answers, drawn by `rng`."""
        if rng.random() < CAPTIONS or not (asked := ask(self.scenes[index], rng)):
            return self.caption_conversation(index, rng)
        turns = []
        for question in asked:
            turns += [Turn("user", question.text), Turn("assistant", question.answer)]
        return [turns[0]._replace(text=with_images(turns[0].text)), *turns[1:]]

    def asked(self, index: int, rng: np.random.Generator) -> list[Question]:
        """As many questions as a conversation has, up to six."""
        return [Question(index, q.text, (q.answer,), q.kind) for q in ask(self.scenes[index], rng)]

    def false_caption(self, index: int, rng: np.random.Generator) -> str:
        return self.world.false_caption(index, rng)

    def captions(self, index: int) -> list[str]:
        """The canonical caption alone: it is complete, so that a model's can be compared with the scene."""
        return [canonical(self.scenes[index])]

    def questions(self) -> list[Question]:
        """Questions, equally many of every kind, as nearly as their balance allows; none for train."""
        wanted = about_unseen if self.split == "unseen" else None
        judged = judge(self.scenes, QUESTIONS[self.split], wanted=wanted) if QUESTIONS[self.split] else []
        return [Question(index, asked.text, (asked.answer,), asked.kind) for index, asked in judged]

    def key(self, index: int) -> str:
        return self.world.key(index)

    def texts(self) -> Iterator[str]:
        """Captions of every scene in several wordings, questions and answers about every scene; each text once."""
        rng = np.random.default_rng(0)
        asked = (
            text for scene in self.scenes for question in ask(scene, rng) for text in (question.text, question.answer)
        )
        yield from dict.fromkeys((DESCRIBE, *self.world.texts(), *asked))
