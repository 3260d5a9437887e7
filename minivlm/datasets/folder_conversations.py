"""One's own pictures in conversation: a folder with conversations.json, vqa.jsonl or captions.jsonl.

DIR/conversations.json  LLaVA's format: [{"id": "1", "image": "a.jpg", "conversations": [
                        {"from": "human", "value": "<image>\\nwhat is it?"}, {"from": "gpt", "value": "a kite"}]}]
                        "image" may be a list, one for each <image>, or absent; optional: "split"
DIR/vqa.jsonl           {"image": "a.jpg", "question": "what is it?", "answer": "a kite"}, or questions.jsonl
                        optional: "answers": [all that are right], "split", and "kind", "answer_type" or
                        "question_type", for each of which the accuracy is told
DIR/captions.jsonl      as in folder.py, which also says how splits are drawn and images are found, cached and read
DIR/<class>/*.jpg       likewise: what is said about an image is the name of its class

Where a folder has several of these files all are read; captions of an image that is asked about belong to its questions.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache, partial
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivlm.conversation import DESCRIBE, PLACEHOLDER, Turn, check_conversation, with_images
from minivlm.datasets.conversations import Conversations, Question, ask_for_caption
from minivlm.datasets.folder import (
    Item,
    choose_split,
    find_image,
    image_of,
    read_captions,
    read_folder,
    read_lines,
    skip_broken,
    split_of,
)
from minivlm.datasets.images import ImageCache, cache_folder, read_image
from minivlm.datasets.judge import Problem, check_headers, check_pictures, leave_out
from minivlm.errors import UserError
from minivlm.files import check_texts, parse_json, read_bytes
from minivlm.special_tokens import as_text

MOST = 4  # questions of one conversation

# ---------------------------------------------------------------------------------------------------------- one sample


@dataclass
class Entry:
    """Pictures (paths below the folder), and what is said about them."""

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
        """What a split is drawn by."""
        return self.key


@dataclass
class Captioned(Entry):
    def judged(self, problem: Problem) -> tuple[Captioned | None, list[str]]:
        """Without what nothing can be learnt from; None if that is all; and why (see judge.py)."""
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
    answer: str  # the one that is learnt
    answers: tuple[str, ...]  # those that are right
    kind: str = "all"


@dataclass
class Quiz(Entry):
    """All questions about one picture."""

    asked: list[Asked] = field(default_factory=list)

    def judged(self, problem: Problem) -> tuple[Quiz | None, list[str]]:
        alone = lambda q: [Turn("user", with_images(q.text)), Turn("assistant", as_text(q.answer))]
        known, why = fitting(self.captions, caption_turns, problem)
        asked, more = fitting(self.asked, alone, problem)
        return (replace(self, captions=known, asked=asked) if known or asked else None), why + more

    def conversation(self, rng: np.random.Generator) -> list[Turn]:
        """Some of the questions, in any order, the picture in front of the first. A caption, if there is one, is asked for as
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
        """The first question and its answer, if all pictures, and there are some, come with it."""
        user, assistant = [turn.text for turn in self.turns if turn.role != "system"][:2]
        if not self.images or user.count(PLACEHOLDER) != len(self.images):
            return []
        return [Asked(without_marks(user), assistant.strip(), (assistant.strip(),))]

    def texts(self) -> list[str]:
        """What the user says and the answer to it are one text."""
        spoken = [turn.text for turn in self.turns if turn.role != "system"]
        told = [without_marks(" ".join(spoken[i : i + 2])) for i in range(0, len(spoken), 2)]
        return [*told, *self.captions]

    def about(self) -> list[str]:
        return [turn.text.strip() for turn in self.turns if turn.role == "assistant"]


def caption_turns(caption: str) -> list[Turn]:
    return [Turn("user", with_images(DESCRIBE)), Turn("assistant", as_text(caption))]


def fitting(things: Sequence, turns: Callable[[Any], list[Turn]], problem: Problem) -> tuple[list, list[str]]:
    """Those of the things without a problem in what is said about them, and the problems of the others."""
    problems = [problem(turns(thing)) for thing in things]
    return [x for x, p in zip(things, problems, strict=True) if not p], [p for p in problems if p]


def without_marks(text: str) -> str:
    return " ".join(text.replace(PLACEHOLDER, " ").split())


# --------------------------------------------------------------------------------------------------------- the dataset


class FolderEntries:
    """The entries of one split of a folder, and their pictures.

    A training sample with an image that cannot be decoded is left out, and told in `notes` and `skipped` (image → why);
    in val and test it is an error. Training images come from a cache with a shorter side of 1.25 times image_size.
    """

    def __init__(self, directory: Path, split: str, entries: Sequence[Entry], *, image_size: int | None):
        self.directory, self.split = directory, split
        entries, self.notes = choose_split(entries, split, directory)
        self.skipped: dict[str, str] = {}
        self.cache = None
        images = list(dict.fromkeys(image for entry in entries for image in entry.images)) if image_size else []
        if split == "train":
            side = ceil(1.25 * image_size) if image_size else 0
            if images:
                self.cache = ImageCache(self.directory, images, cache_folder(self.directory), shorter_side=side)
                self.skipped = self.cache.errors
                entries = skip_broken(entries, self.skipped, self.notes)
        else:
            check_headers(self.directory, images, split)
        self.entries = entries
        self.one_picture_each = all(len(entry.images) == 1 for entry in entries)

    def __len__(self) -> int:
        return len(self.entries)

    def images(self, indices: Sequence[int]) -> list[list[np.ndarray]]:
        return [[self.read(image) for image in self.entries[i].images] for i in indices]

    def read(self, image: str) -> np.ndarray:
        return np.array(read_image(self.directory / image)) if self.cache is None else self.cache[image]

    def key(self, index: int) -> str:
        return self.entries[index].key


class FolderConversations(FolderEntries, Conversations):
    """A split of a folder; see the module for what is recognised, `Conversations` for the interface.

    Questions about one picture are one sample, of which a conversation asks up to four.
    """

    entries: list[Captioned | Quiz | Conversation]

    def __init__(self, directory: str | os.PathLike, split: str, *, image_size: int | None):
        super().__init__(Path(directory), split, read_entries(Path(directory)), image_size=image_size)
        self.free_answers = any(isinstance(entry, Conversation) for entry in self.entries)

    def leave_out(self, problem: Problem, *, captions: bool = False) -> None:
        """captions: where a sample has captions, they alone are learnt from."""

        def judge(entry: Entry) -> tuple[Entry | None, list[str]]:
            if not captions or not entry.captions:
                return entry.judged(problem)
            known, why = fitting(entry.captions, caption_turns, problem)
            return (replace(entry, captions=known) if known else None), why

        self.entries = leave_out(self.entries, judge, self.notes)

    def keep_captioned(self) -> None:
        kept = [entry for entry in self.entries if entry.captions]
        if others := len(self.entries) - len(kept):
            self.notes = [*self.notes, f"{others} of {len(self.entries)} training samples have no caption: left out."]
        self.entries = kept

    def pictures(self, index: int) -> int:
        return len(self.entries[index].images)

    def check_pictures(self) -> None:
        check_pictures(self.directory, [image for entry in self.entries for image in entry.images], self.split)

    def conversation(self, index: int, rng: np.random.Generator) -> list[Turn]:
        return self.entries[index].conversation(rng)

    def texts(self) -> Iterator[str]:
        request = [DESCRIBE] if any(entry.captions for entry in self.entries) else []
        yield from dict.fromkeys([*request, *(text for entry in self.entries for text in entry.texts())])

    def asked(self, index: int, rng: np.random.Generator) -> list[Question]:
        """All that vqa.jsonl asks about the picture, or the first question of the conversation."""
        return [Question(index, q.text, q.answers, q.kind) for q in self.entries[index].questions()]

    def questions(self) -> list[Question]:
        """Those of vqa.jsonl, or the first of each conversation about pictures."""
        return [
            Question(index, asked.text, asked.answers, asked.kind)
            for index, entry in enumerate(self.entries)
            for asked in entry.questions()
        ]

    def captions(self, index: int) -> list[str]:
        return list(self.entries[index].captions)


# ------------------------------------------------------------------------------------------------------------- reading


TALK_FILES = ("conversations.json", "vqa.jsonl", "questions.jsonl")


def find_talk(directory: Path) -> Path | None:
    """The first file with questions or conversations, if there is one."""
    return next((directory / name for name in TALK_FILES if (directory / name).exists()), None)


def read_entries(directory: Path, problems: list[str] | None = None) -> list[Captioned | Quiz | Conversation]:
    """Everything a folder holds. What is wrong with an entry raises UserError, or is added to `problems` if given."""
    if not directory.is_dir():
        raise UserError(f"There is no folder {directory}.")
    if not find_talk(directory):  # captions, or classes
        return [captioned(item) for item in read_folder(directory, problems)]
    find = cache(partial(find_image, directory=directory))  # many entries may be about one image
    entries = []
    for file in (directory / name for name in TALK_FILES if (directory / name).exists()):
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
    """The same as images with captions: what is answered, behind its question where that is short (vqa.jsonl)."""
    items: dict[tuple, Item] = {}
    for entry in read_entries(directory, problems):
        if len(entry.images) == 1:
            item = items.setdefault((entry.key, entry.split), Item(entry.key, [], None, entry.split))
            item.captions = [*dict.fromkeys([*item.captions, *entry.about()])]
    if not items and not problems:
        raise UserError(f"{directory} has no conversation about one image alone, so it holds no images with captions.")
    return list(items.values())


EXAMPLE = '{"image": "a.jpg", "question": "how many dogs are there?", "answer": "two"}'


def read_questions(file: Path, find, problems: list[str] | None) -> list[Quiz]:
    """One entry for each image and split: in some datasets an image has questions to train on, and others to test."""
    entries: dict[tuple, Quiz] = {}

    def add(values: dict) -> None:
        image, split = find(image_of(values, EXAMPLE)), split_of(values)
        asked = read_question(values)
        entries.setdefault((image, split), Quiz([image], split, image)).asked.append(asked)

    read_lines(file, add, EXAMPLE, problems)
    if not entries and not problems:
        raise UserError(f"{file} is empty: it needs one line a question, like {EXAMPLE}.")
    return list(entries.values())


def read_question(values: dict) -> Asked:
    """ValueError says what is wrong. Where there is no "answer", the most frequent one of "answers" is learnt."""
    text, answers = values.get("question"), values.get("answers")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'it has no "question"; a line looks like {EXAMPLE}')
    answers = answers if isinstance(answers, list) else [] if answers is None else [answers]
    given = answers if values.get("answer") is None else [values["answer"]]
    if not given:
        raise ValueError(f"it has no answer; a line looks like {EXAMPLE}")
    if not all(isinstance(a, (str, int, float)) and a == a for a in given + answers):  # NaN is none
        raise ValueError(f'an answer is a string and "answers" a list of them, as in {EXAMPLE}')
    given, answers = [str(a).strip() for a in given], [str(a).strip() for a in answers]
    if not any(given):
        raise ValueError("its answer is empty")
    answer = Counter(a for a in given if a).most_common(1)[0][0]
    right = tuple(answers) if answer in answers else (answer, *answers)
    kinds = [values[name] for name in ("kind", "answer_type", "question_type") if values.get(name)]
    return Asked(as_text(text.strip()), answer, right, str(kinds[0]) if kinds else "all")


SPEAKERS = {"human": "user", "gpt": "assistant"}
TALK_EXAMPLE = (
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
    """ValueError or UserError says what is wrong."""
    if not isinstance(values, dict) or not isinstance(values.get("conversations"), list):
        raise ValueError(f'it has no list "conversations"; an entry looks like {TALK_EXAMPLE}')
    check_texts(values)
    images = values.get("image") or values.get("images") or []  # some datasets say the one, some the other
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
    return Turn(SPEAKERS.get(turn["from"], turn["from"]), turn["value"])
