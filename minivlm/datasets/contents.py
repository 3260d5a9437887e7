"""Counts what a folder holds, in one place, so that a recipe which does not suit it is refused before anything is trained.

train.py llava --data DIR ──→ contents(DIR) ──→ {"captions": 73, "texts": 146}   does llava learn from any of these?
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import chain

from minivlm.datasets.class_episodes import find_classes, is_class_folder
from minivlm.datasets.conversations import has_conversations
from minivlm.datasets.duplicates import MOST, shared_images
from minivlm.datasets.entries import Conversation, Quiz
from minivlm.datasets.folder_entries import has_captions, read_entries
from minivlm.datasets.folder_files import SPLITS, choose_split
from minivlm.datasets.folder_view import stamps
from minivlm.datasets.interleaved import Interleaved, is_interleaved
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.conversations import ShapesConversations
from minivlm.datasets.source import Source
from minivlm.errors import UserError

# What can be learned from, and how it is called in a sentence. Several may be true of one folder.
KINDS = {
    "pairs": "images with captions, answers or classes",
    "captions": "images with captions or classes",
    "questions": "questions about images",
    "questions about one image each": "questions about one image each",
    "captions and questions": "captions and questions about the same images",
    "conversations": "images with texts",
    "texts": "texts",
    "documents": "documents of images and texts",
    "classes": "images in class folders",
}
FILES = {
    "captions": "captions.jsonl",
    "questions": "vqa.jsonl or conversations.json",
    "questions about one image each": "vqa.jsonl",
    "captions and questions": "captions.jsonl beside vqa.jsonl",
    "texts": "captions.jsonl, vqa.jsonl, conversations.json or interleaved.jsonl",
    "pairs": "captions.jsonl, vqa.jsonl, conversations.json or class folders",
    "conversations": "captions.jsonl, vqa.jsonl or conversations.json",
}
Contents = dict[str, Counter[str]]  # split → kind → number of samples


def contents(directory: str | os.PathLike) -> Contents:
    """How many samples of each kind each split has. UserError: no folder, none that is recognised, or broken files."""
    return of_splits(directory)[0]


def of_splits(directory: str | os.PathLike) -> tuple[Contents, dict[str, list[str]], dict[str, list[str]]]:
    source = Source.of(directory)
    if not source.path.is_dir():
        raise UserError(f"There is no folder {source}.")
    return read_contents(replace(source, directory=source.path.resolve()), stamps(source.path))


def split_notes(directory: str | os.PathLike, split: str, *, few_shot: bool = False) -> list[str]:
    """Sentences on splits that the files do not give: which samples (few_shot: classes) are taken for them."""
    if is_world(directory):
        return []
    if few_shot and is_class_folder(directory):
        return choose_split(find_classes(directory), split, directory)[1]
    return of_splits(directory)[1][split]


def stand_ins(directory: str | os.PathLike, *splits: str, few_shot: bool = False) -> list[str]:
    """The notes on splits that do not exist, for which others stand in."""
    found = (note for split in splits for note in split_notes(directory, split, few_shot=few_shot))
    return [note for note in dict.fromkeys(found) if stands_in([note])]


def stands_in(notes: list[str]) -> bool:
    """Whether the notes on a split say that another is taken for it."""
    return any("stand in for them" in note for note in notes)


def leaks(directory: str | os.PathLike, *, most: int | None = MOST) -> list[str]:
    """Sentences on images that are held out and trained on. most: files that are read to find out; None: all of a size."""
    if is_world(directory):
        return []
    _, notes, images = of_splits(directory)
    own = {split: images[split] for split in images if not stands_in(notes[split])}
    return shared_images(directory, own, most=most)


@lru_cache(maxsize=4)
def read_contents(directory: Source, _: tuple) -> tuple[Contents, dict[str, list[str]], dict[str, list[str]]]:
    """And the notes on each split, and its images."""
    notes: dict[str, list[str]] = {split: [] for split in SPLITS}
    images: dict[str, list[str]] = {}
    if is_world(directory):
        return world_contents(directory), notes, images
    found: Contents = {split: Counter() for split in SPLITS}
    if is_interleaved(directory):
        for split in SPLITS:
            documents = Interleaved(directory, split, image_size=None)
            notes[split] = list(documents.notes)
            found[split] += Counter({"documents": len(documents), "texts": len(list(documents.texts()))})
    if is_class_folder(directory):
        count_classes(directory, found)
    if has_conversations(directory) or not is_interleaved(directory):
        try:
            entries = read_entries(directory)
        except UserError:
            if not found["train"]["classes"]:
                raise
            return found, notes, images  # lessons make names of their own; `check_suits` reports others
        for split in available(entries):
            chosen, drawn = choose_split(entries, split, directory)
            found[split] += count(chosen, directory, split)
            notes[split] = [*notes[split], *drawn]
            images[split] = list(dict.fromkeys(image for entry in chosen for image in entry.images))
    return found, notes, images


def available(items: list) -> list[str]:
    """The splits that can be had: all three, unless everything belongs to val or test."""
    return [split for split in SPLITS if split != "train" or any(item.split in (None, "train") for item in items)]


def count(entries: list, directory: Source, split: str) -> Counter[str]:
    """Count the entries of one split, from `read_entries`."""
    captions = {entry.key for entry in entries if entry.captions}
    single = {entry.key for entry in entries if len(entry.images) == 1}
    asked = [entry for entry in entries if isinstance(entry, (Quiz, Conversation)) and entry.questions()]
    numbers = {
        "pairs": len(captions) if has_captions(directory) else len(single),
        "captions": len(captions),
        "questions": len(asked),
        "questions about one image each": len(asked) if all(len(e.images) == 1 for e in entries) else 0,
        "captions and questions": len({entry.key for entry in asked} & captions),
        "conversations": len(entries) if any(entry.images for entry in entries) else 0,
    }
    if not is_class_folder(directory):
        numbers["texts"] = len(set(chain.from_iterable(entry.texts() for entry in entries)))
    return +Counter(numbers)


def count_classes(directory: Source, found: Contents) -> None:
    """Folders of images, however deep, whose names a lesson does not read."""
    try:
        classes = find_classes(directory)
    except UserError:  # which those who read the names as well report
        return
    for split in available(classes):
        found[split]["classes"] = len(choose_split(classes, split, directory)[0])


def world_contents(directory: Source) -> Contents:
    """All but documents and class folders; its texts and lessons have no end."""
    n = len(ShapesConversations(directory, "train"))
    kinds = [kind for kind in KINDS if kind not in ("documents", "classes")]
    return {split: Counter(dict.fromkeys(kinds, n)) | Counter(texts=10**6) for split in SPLITS}


def summary(found: Counter[str]) -> str:
    """ "90 questions about images, 180 texts" """
    specific = [kind for kind in ("captions", "questions", "documents", "classes") if found[kind]]
    if found["classes"]:
        specific = ["classes"]
    elif not specific:
        specific = [kind for kind in ("conversations", "texts") if found[kind]][:1]
    named = [f"{KINDS[kind].removesuffix(' or classes')} ({found[kind]})" for kind in specific]
    return " and ".join(named) or "nothing that is learnt from"
