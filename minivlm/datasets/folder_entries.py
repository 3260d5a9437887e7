"""One's own images in conversation: a folder with conversations.json, vqa.jsonl or captions.jsonl.

DIR/conversations.json  LLaVA's format: [{"id": "1", "image": "a.jpg", "conversations": [
                        {"from": "human", "value": "<image>\\nwhat is it?"}, {"from": "gpt", "value": "a kite"}]}]
                        "image" may be a list, one for each <image>, or absent; optional: "split"
DIR/vqa.jsonl           {"image": "a.jpg", "question": "what is it?", "answer": "a kite"}, or questions.jsonl
                        optional: "answers": [all that are right], "split", and "kind", "answer_type" or
                        "question_type", for each of which the accuracy is reported
DIR/captions.jsonl      as in folder.py, which also describes how splits are drawn and images are found, cached and read
DIR/<class>/*.jpg       likewise: the text about an image is the name of its class

Where a folder has several of these files all are read; captions of an image that is asked about belong to its questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivlm.conversation import DESCRIBE, PLACEHOLDER, Turn, check_conversation, with_images
from minivlm.datasets.class_folders import read_class_folders
from minivlm.datasets.conversation_base import ask_for_caption
from minivlm.datasets.folder_files import (
    TEMPLATES,
    Item,
    find_image,
    image_of,
    read_captions,
    read_lines,
    split_of,
)
from minivlm.datasets.judge import Problem
from minivlm.errors import UserError
from minivlm.files import check_texts, parse_json, read_bytes
from minivlm.special_tokens import as_text

MOST = 4  # questions of one conversation

# ---------------------------------------------------------------------------------------------------------- one sample


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


# ------------------------------------------------------------------------------------------------------------- reading


CONVERSATION_FILES = ("conversations.json", "vqa.jsonl", "questions.jsonl")


def find_conversations(directory: Path) -> Path | None:
    """The first file with questions or conversations, if there is one."""
    return next((directory / name for name in CONVERSATION_FILES if (directory / name).exists()), None)


def read_folder(directory: Path, problems: list[str] | None = None, notes: list[str] | None = None) -> list[Item]:
    """Everything a folder holds. What is wrong with a line raises UserError, or is added to `problems` if given.

    notes: gets sentences on what is passed over without being wrong.
    """
    if not directory.is_dir():
        raise UserError(f"There is no folder {directory}.")
    if (directory / "captions.jsonl").exists():
        return read_captions(directory, problems)
    if find_conversations(directory):
        return read_items(directory, problems)
    classes, passed_over = read_class_folders(directory)
    if notes is not None:
        notes += passed_over
    if not classes:
        raise UserError(
            f"{directory} is no dataset that is recognised: looked for world.json (the shapes world), "
            f"conversations.json, vqa.jsonl, questions.jsonl, captions.jsonl, and images in sub-folders, one a class "
            f"({directory.name}/cat/1.jpg or {directory.name}/train/cat/1.jpg)."
        )
    if len({one.name for one in classes}) == 1:
        raise UserError(
            f"{directory} has images in one class sub-folder only, {classes[0].name!r}: at least two are "
            "needed, or a captions.jsonl that describes each image."
        )
    items = []
    for one in classes:
        captions = [template.format(one.name) for template in TEMPLATES]  # one list, shared by all images of the class
        items += [Item(path, captions, one.name, one.split) for path in one.images()]
    return items


def read_entries(directory: Path, problems: list[str] | None = None) -> list[Captioned | Quiz | Conversation]:
    """Everything a folder holds. What is wrong with an entry raises UserError, or is added to `problems` if given."""
    if not directory.is_dir():
        raise UserError(f"There is no folder {directory}.")
    if not find_conversations(directory):  # captions, or classes
        return [captioned(item) for item in read_folder(directory, problems)]
    find = cache(partial(find_image, directory=directory))  # many entries may be about one image
    entries = []
    for file in (directory / name for name in CONVERSATION_FILES if (directory / name).exists()):
        read = read_conversations if file.suffix == ".json" else read_questions
        entries += read(file, find, problems)
    if (directory / "captions.jsonl").exists():
        entries += add_captions(entries, read_captions(directory, problems))
    return entries


def captioned(item: Item) -> Captioned:
    return Captioned(item.images, item.split, item.image, captions=item.captions)


def add_captions(entries: list[Entry], items: list[Item]) -> list[Captioned]:
    """Captions go to the entries about the same image alone, and of the same split; returned are the other captions."""
    about: dict[str, list[Entry]] = {}
    for entry in entries:
        if len(entry.images) == 1:
            about.setdefault(entry.key, []).append(entry)
    left = []
    for item in items:
        for entry in (same := about.get(item.image, [])):
            entry.split = entry.split or item.split
            if item.split in (None, entry.split):
                entry.captions = item.captions
        if not any(entry.captions is item.captions for entry in same):
            left.append(captioned(item))
    return left


def read_items(directory: Path, problems: list[str] | None = None) -> list[Item]:
    """The entries as images with captions: each answer, behind its question where that is short (vqa.jsonl)."""
    items: dict[tuple, Item] = {}
    for entry in read_entries(directory, problems):
        if len(entry.images) == 1:
            item = items.setdefault((entry.key, entry.split), Item(entry.key, [], None, entry.split))
            item.captions = [*dict.fromkeys([*item.captions, *entry.about()])]
    if not items and not problems:
        raise UserError(f"{directory} has no conversation about one image alone, so it holds no images with captions.")
    return list(items.values())


QUESTION_EXAMPLE = '{"image": "a.jpg", "question": "how many dogs are there?", "answer": "two"}'


def read_questions(file: Path, find, problems: list[str] | None) -> list[Quiz]:
    """One entry for each image and split: in some datasets an image has questions to train on, and others to test."""
    entries: dict[tuple, Quiz] = {}

    def add(values: dict) -> None:
        image, split = find(image_of(values, QUESTION_EXAMPLE)), split_of(values)
        asked = read_question(values)
        entries.setdefault((image, split), Quiz([image], split, image)).asked.append(asked)

    read_lines(file, add, QUESTION_EXAMPLE, problems)
    if not entries and not problems:
        raise UserError(f"{file} is empty: it needs one line a question, like {QUESTION_EXAMPLE}.")
    return list(entries.values())


def read_question(values: dict) -> Asked:
    """A line as a question; ValueError: what is wrong with it.

    Where there is no "answer", the most frequent one of "answers" is learned.
    """
    text, answers = values.get("question"), values.get("answers")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'it has no "question"; a line looks like {QUESTION_EXAMPLE}')
    answers = answers if isinstance(answers, list) else [] if answers is None else [answers]
    given = answers if values.get("answer") is None else [values["answer"]]
    if not given:
        raise ValueError(f"it has no answer; a line looks like {QUESTION_EXAMPLE}")
    if not all(isinstance(a, (str, int, float)) and a == a for a in given + answers):  # NaN is none
        raise ValueError(f'an answer is a string and "answers" a list of them, as in {QUESTION_EXAMPLE}')
    given, answers = [str(a).strip() for a in given], [str(a).strip() for a in answers]
    if not any(given):
        raise ValueError("its answer is empty")
    answer = Counter(a for a in given if a).most_common(1)[0][0]
    right = tuple(answers) if answer in answers else (answer, *answers)
    kinds = [values[name] for name in ("kind", "answer_type", "question_type") if values.get(name)]
    return Asked(as_text(text.strip()), answer, right, str(kinds[0]) if kinds else "all")


ROLES = {"human": "user", "gpt": "assistant"}
CONVERSATION_EXAMPLE = (
    '{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nwhat is it?"}, '
    '{"from": "gpt", "value": "a kite"}]}'
)


def read_conversations(file: Path, find, problems: list[str] | None) -> list[Conversation]:
    try:
        values = parse_json(read_bytes(file), texts=False)  # of each entry by itself
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{file} is not JSON ({error}).") from None
    if not isinstance(values, list) or not values:
        raise UserError(f'{file} holds no list of conversations, [{{"image": …, "conversations": […]}}, …].')
    entries = []
    for number, value in enumerate(values, 1):
        name = f"entry {number}" + (f" (id {value['id']})" if isinstance(value, dict) and "id" in value else "")
        try:
            entries.append(read_conversation(value, find, name))
        except (ValueError, UserError) as error:
            message = f"{file}, {name}: {str(error).rstrip('.')}."
            if problems is None:
                raise UserError(message) from error
            problems.append(message)
    return entries


def read_conversation(values: dict, find, name: str) -> Conversation:
    """An entry as a conversation; ValueError or UserError: what is wrong with it."""
    if not isinstance(values, dict) or not isinstance(values.get("conversations"), list):
        raise ValueError(f'it has no list "conversations"; an entry looks like {CONVERSATION_EXAMPLE}')
    check_texts(values)
    images = values.get("image") or values.get("images") or []  # datasets use either
    images = images if isinstance(images, list) else [images]
    if not all(isinstance(image, str) for image in images):
        raise ValueError('its "image" is no file name, and no list of them')
    turns = [read_turn(turn) for turn in values["conversations"]]
    check_conversation(turns, len(images))
    images = [find(image) for image in images]
    key = images[0] if images else str(values.get("id", name))
    return Conversation(images, split_of(values), key, turns, name=name)


def read_turn(turn) -> Turn:
    if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("from", "value")):
        raise ValueError('a turn looks like {"from": "human", "value": "what is it?"}, with "gpt" for the answer')
    return Turn(ROLES.get(turn["from"], turn["from"]), turn["value"])
