"""Everything that one's own folder holds, as images with captions or as conversations: what its forms give, put together.

Where a folder has several files (captions and questions) all are read; captions of an image that is asked about belong to its
questions. A folder in which nothing describes the images may have a sub-folder for each class (class_folders.py).
"""

from __future__ import annotations

import os
from functools import lru_cache

from minivlm.datasets.class_folders import read_class_folders, subfolders
from minivlm.datasets.entries import Captioned, Conversation, Entry, Item, Quiz
from minivlm.datasets.folder_files import TEMPLATES
from minivlm.datasets.folder_view import LOOKED_INTO, Found, is_settled, stamps
from minivlm.datasets.forms import recognised, why_not
from minivlm.datasets.source import Source
from minivlm.datasets.unknown import unknown
from minivlm.errors import UserError


def gives(found: list[Found], *kinds: str) -> list[Found]:
    return [one for one in found if one.gives in kinds]


def has_captions(directory: str | os.PathLike) -> bool:
    """Whether a file describes the images, beside the questions and conversations that there may be."""
    return bool(gives(recognised(directory), "captions"))


def has_questions(directory: str | os.PathLike) -> bool:
    """Whether a file holds questions or conversations."""
    return bool(gives(recognised(directory), "questions", "conversations"))


def read_all(source: Source, kinds: tuple[str, ...], problems: list[str] | None, notes: list[str] | None) -> list:
    """The samples of these kinds. A command reads them for each split: while no file changes they are read once."""
    times = stamps(source.path)
    if problems is None and is_settled(times):
        samples, told = read_once(source, kinds, times)
    else:
        samples, told = read_anew(gives(recognised(source), *kinds), problems)
    if notes is not None:
        notes += [note for note in told if note not in notes]
    return list(samples)


@lru_cache(maxsize=2)
def read_once(source: Source, kinds: tuple[str, ...], _: tuple) -> tuple[list, list[str]]:
    return read_anew(gives(recognised(source), *kinds), None)


def read_anew(found: list[Found], problems: list[str] | None) -> tuple[list, list[str]]:
    told = list(dict.fromkeys(note for one in found for note in one.notes))
    return [sample for one in found for sample in one.read(problems, told)], told


def read_folder(
    directory: str | os.PathLike, problems: list[str] | None = None, notes: list[str] | None = None
) -> list[Item]:
    """Everything a folder holds. What is wrong with a line raises UserError, or is added to `problems` if given.

    notes: gets sentences on what is passed over without being wrong.
    """
    source = Source.of(directory)
    if not source.path.is_dir():
        raise UserError(f"There is no folder {source}.")
    found = recognised(source)
    if gives(found, "captions"):
        return read_all(source, ("captions",), problems, notes)
    return read_items(source, problems, notes) if found else read_classes(source, notes)


def read_classes(source: Source, notes: list[str] | None) -> list[Item]:
    """The images of class folders. UserError where there are none, or they hold something else."""
    meant = why_not(source) or one_level_down(source)
    try:
        classes, passed_over = read_class_folders(source)
    except UserError:
        if meant:  # a file that was meant to describe them says more
            raise UserError(" ".join(meant[:3])) from None
        raise
    if notes is not None:
        notes += passed_over
    if not classes:
        raise UserError(" ".join(meant[:3]) or unknown(source))
    if len({one.name for one in classes}) == 1 and meant:
        raise UserError(" ".join(meant[:3]))
    if len({one.name for one in classes}) == 1:
        raise UserError(
            f"{source} has images in one class sub-folder only, {classes[0].name!r}: at least two are "
            "needed, or a captions.jsonl that describes each image."
        )
    items = []
    for one in classes:
        captions = [template.format(one.name) for template in TEMPLATES]  # one list, shared by all images of the class
        items += [Item(path, captions, one.name, one.split) for path in one.images()]
    return items


def one_level_down(source: Source) -> list[str]:
    """A sentence where the folder holds the dataset, rather than being it."""
    folders = subfolders(source.path)
    found = recognised(folders[0]) if len(folders) == 1 and folders[0].name.lower() not in LOOKED_INTO else []
    return [f"{source} is no dataset, but its folder {folders[0]} is one ({found[0]}): name that."] if found else []


def read_entries(
    directory: str | os.PathLike, problems: list[str] | None = None, notes: list[str] | None = None
) -> list[Captioned | Quiz | Conversation]:
    """Everything a folder holds. What is wrong with an entry raises UserError, or is added to `problems` if given."""
    source = Source.of(directory)
    if not source.path.is_dir():
        raise UserError(f"There is no folder {source}.")
    found = recognised(source)
    if not gives(found, "questions", "conversations"):  # captions, or classes
        return [captioned(item) for item in read_folder(source, problems, notes)]
    entries = read_all(source, ("questions", "conversations"), problems, notes)
    return entries + add_captions(entries, read_all(source, ("captions",), problems, notes))


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


def read_items(
    directory: str | os.PathLike, problems: list[str] | None = None, notes: list[str] | None = None
) -> list[Item]:
    """The entries as images with captions: each answer, behind its question where that is short (vqa.jsonl)."""
    items: dict[tuple, Item] = {}
    for entry in read_entries(directory, problems, notes):
        if len(entry.images) == 1:
            item = items.setdefault((entry.key, entry.split), Item(entry.key, [], None, entry.split))
            item.captions = [*dict.fromkeys([*item.captions, *entry.about()])]
    if not items and not problems:
        raise UserError(f"{directory} has no conversation about one image alone, so it holds no images with captions.")
    return list(items.values())
