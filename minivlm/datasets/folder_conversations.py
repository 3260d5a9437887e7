"""One split of one's own folder as conversations: the texts of its files (folder_entries.py), and the images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from minivlm.conversation import DESCRIBE, Turn
from minivlm.datasets.conversation_base import Conversations, Question
from minivlm.datasets.entries import Captioned, Conversation, Entry, Quiz, caption_turns, fitting
from minivlm.datasets.folder_entries import read_entries
from minivlm.datasets.folder_files import choose_split, skip_broken
from minivlm.datasets.image_cache import decode, open_cache
from minivlm.datasets.judge import Problem, check_headers, check_images, leave_out


class FolderEntries:
    """The entries of one split of a folder, and their images.

    A training sample with an image that cannot be decoded is left out, and named in `notes` and `skipped` (image → why);
    in val and test it is an error. Training images come from a cache with a shorter side of 1.25 times image_size.
    """

    def __init__(self, directory: str | os.PathLike, split: str, entries: Sequence[Entry], *, image_size: int | None):
        self.directory, self.split = Path(directory), split
        entries, self.notes = choose_split(entries, split, directory)
        self.skipped: dict[str, str] = {}
        self.cache = None
        images = list(dict.fromkeys(image for entry in entries for image in entry.images)) if image_size else []
        if split == "train":
            if images:
                self.cache = open_cache(directory, images, image_size=image_size)
                self.skipped = self.cache.errors
                entries = skip_broken(entries, self.skipped, self.notes)
                self.notes += self.cache.notes
        else:
            check_headers(self.directory, images, split)
        self.entries = entries
        self.one_image_each = all(len(entry.images) == 1 for entry in entries)

    def __len__(self) -> int:
        return len(self.entries)

    def images(self, indices: Sequence[int]) -> list[list[np.ndarray]]:
        keys = [image for i in indices for image in self.entries[i].images]
        flat = iter(self.cache.images(keys) if self.cache else decode([self.directory / key for key in keys]))
        return [[next(flat) for _ in self.entries[i].images] for i in indices]

    def key(self, index: int) -> str:
        return self.entries[index].key

    def check_images(self) -> None:
        """UserError where an image cannot be decoded."""
        check_images(self.directory, [image for entry in self.entries for image in entry.images], self.split)


class FolderConversations(Conversations):
    """A split of a folder; see the module for what is recognised, `Conversations` for the interface.

    Questions about one image are one sample, of which a conversation asks up to four.
    """

    def __init__(self, directory: str | os.PathLike, split: str, *, image_size: int | None):
        told: list[str] = []
        entries = read_entries(directory, notes=told)
        self.folder = FolderEntries(directory, split, entries, image_size=image_size)
        self.split, self.notes, self.skipped = split, [*told, *self.folder.notes], self.folder.skipped
        self.one_image_each = self.folder.one_image_each
        self.free_answers = any(isinstance(entry, Conversation) for entry in self.entries)

    @property
    def entries(self) -> Sequence[Captioned | Quiz | Conversation]:
        return self.folder.entries

    def __len__(self) -> int:
        return len(self.folder)

    def images(self, indices: Sequence[int]) -> list[list[np.ndarray]]:
        return self.folder.images(indices)

    def key(self, index: int) -> str:
        return self.folder.key(index)

    def check_images(self) -> None:
        self.folder.check_images()

    def leave_out(self, problem: Problem, *, captions: bool = False) -> None:
        """captions: where a sample has captions, they alone are learned from."""

        def judge(entry: Entry) -> tuple[Entry | None, list[str]]:
            if not captions or not entry.captions:
                return entry.judged(problem)
            known, why = fitting(entry.captions, caption_turns, problem)
            return (replace(entry, captions=known) if known else None), why

        self.folder.entries = leave_out(self.entries, judge, self.notes)

    def keep_captioned(self) -> None:
        kept = [entry for entry in self.entries if entry.captions]
        if others := len(self.entries) - len(kept):
            self.notes = [*self.notes, f"{others} of {len(self.entries)} training samples have no caption: left out."]
        self.folder.entries = kept

    def image_count(self, index: int) -> int:
        return len(self.entries[index].images)

    def conversation(self, index: int, rng: np.random.Generator) -> list[Turn]:
        return self.entries[index].conversation(rng)

    def texts(self) -> Iterator[str]:
        request = [DESCRIBE] if any(entry.captions for entry in self.entries) else []
        yield from dict.fromkeys([*request, *(text for entry in self.entries for text in entry.texts())])

    def asked(self, index: int, rng: np.random.Generator) -> list[Question]:
        """All that vqa.jsonl asks about the image, or the first question of the conversation."""
        return [Question(index, q.text, q.answers, q.kind) for q in self.entries[index].questions()]

    def questions(self) -> list[Question]:
        """The questions of vqa.jsonl, or the first of each conversation about images."""
        return [
            Question(index, asked.text, asked.answers, asked.kind)
            for index, entry in enumerate(self.entries)
            for asked in entry.questions()
        ]

    def captions(self, index: int) -> list[str]:
        return list(self.entries[index].captions)
