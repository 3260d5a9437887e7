"""Samples of one's own folder: images (paths below it) with captions, questions or a conversation about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from minivlm.conversation import DESCRIBE, PLACEHOLDER, Turn, with_images
from minivlm.datasets.conversation_base import ask_for_caption
from minivlm.datasets.judge import Problem
from minivlm.special_tokens import as_text

MOST = 4  # questions of one conversation


@dataclass
class Item:
    """One image of a folder: its path below it ("images/a.jpg"), its captions, and what else the files hold."""

    image: str
    captions: Sequence[str]
    label: str | None = None
    split: str | None = None

    @property
    def images(self) -> list[str]:
        return [self.image]


@dataclass
class Entry:
    """Images (paths below the folder), and the texts about them."""

    images: list[str]
    split: str | None
    key: str  # the first image, or the name of an entry without any
    _: KW_ONLY
    captions: Sequence[str] = ()
    name: str = ""  # in messages; nothing: the key

    def __post_init__(self):
        self.name = self.name or self.key

    @property
    def image(self) -> str:
        """The name by which a split is drawn."""
        return self.key


@dataclass
class Captioned(Entry):
    def judged(self, problem: Problem) -> tuple[Captioned | None, list[str]]:
        """The part that can be learned from, or None, and the reasons for leaving out the rest (see judge.py)."""
        known, why = fitting(self.captions, caption_turns, problem)
        return (replace(self, captions=known) if known else None), why

    def conversation(self, rng: np.random.Generator) -> list[Turn]:
        return ask_for_caption(self.captions, rng)

    def questions(self) -> list[Asked]:
        return []

    def texts(self) -> Sequence[str]:
        return self.captions

    about = texts


class Asked(NamedTuple):
    text: str
    answer: str  # the one that is learned
    answers: tuple[str, ...]  # those that are right
    kind: str = "all"


@dataclass
class Quiz(Entry):
    """All questions about one image."""

    asked: list[Asked] = field(default_factory=list)

    def judged(self, problem: Problem) -> tuple[Quiz | None, list[str]]:
        alone = lambda q: [Turn("user", with_images(q.text)), Turn("assistant", as_text(q.answer))]
        known, why = fitting(self.captions, caption_turns, problem)
        asked, more = fitting(self.asked, alone, problem)
        return (replace(self, captions=known, asked=asked) if known or asked else None), why + more

    def conversation(self, rng: np.random.Generator) -> list[Turn]:
        """Some of the questions, in any order, the image in front of the first. A caption, if there is one, is asked for as
        well."""
        asked = self.asked
        if self.captions:
            asked = [*asked, Asked(DESCRIBE, self.captions[int(rng.random() * len(self.captions))], ())]
        chosen = [asked[i] for i in rng.permutation(len(asked))[:MOST]]
        turns = [turn for q in chosen for turn in (Turn("user", q.text), Turn("assistant", as_text(q.answer)))]
        return [Turn("user", with_images(turns[0].text)), *turns[1:]]

    def questions(self) -> list[Asked]:
        return self.asked

    def texts(self) -> list[str]:
        return [*(f"{q.text} {q.answer}" for q in self.asked), *self.captions]

    about = texts


@dataclass
class Conversation(Entry):
    turns: list[Turn]

    def judged(self, problem: Problem) -> tuple[Conversation | None, list[str]]:
        why = problem(self.turns)
        return (None, [why]) if why else (self, [])

    def conversation(self, rng: np.random.Generator) -> list[Turn]:
        return self.turns

    def questions(self) -> list[Asked]:
        """The first question and its answer, if all images, and there are some, come with it."""
        user, assistant = [turn.text for turn in self.turns if turn.role != "system"][:2]
        if not self.images or user.count(PLACEHOLDER) != len(self.images):
            return []
        return [Asked(without_placeholders(user), assistant.strip(), (assistant.strip(),))]

    def texts(self) -> list[str]:
        """A user's turn and its answer are one text."""
        dialogue = [turn.text for turn in self.turns if turn.role != "system"]
        texts = [without_placeholders(" ".join(dialogue[i : i + 2])) for i in range(0, len(dialogue), 2)]
        return [*texts, *self.captions]

    def about(self) -> list[str]:
        return [turn.text.strip() for turn in self.turns if turn.role == "assistant"]


def caption_turns(caption: str) -> list[Turn]:
    return [Turn("user", with_images(DESCRIBE)), Turn("assistant", as_text(caption))]


def fitting(things: Sequence, turns: Callable[[Any], list[Turn]], problem: Problem) -> tuple[list, list[str]]:
    """The things whose turns have no problem, and the problems of the others."""
    problems = [problem(turns(thing)) for thing in things]
    return [x for x, p in zip(things, problems, strict=True) if not p], [p for p in problems if p]


def without_placeholders(text: str) -> str:
    return " ".join(text.replace(PLACEHOLDER, " ").split())
