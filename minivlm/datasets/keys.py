"""Which column of a table, or field of its rows, is what: known by its name, or chosen by --data.image_key, --data.caption_key.

A name is compared without capitals, spaces and underscores, so that "file_name", "File Name" and "fileName" are one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minivlm.datasets.class_folders import SPLIT_VALUES
from minivlm.datasets.source import Source

# What a column may be called, the surest names first: those of a line count only where none of a line above is there.
IMAGE = (
    "image filename filepath imagepath imgpath imagefile imagename imgname img path file imagefilename imgfile "
    "imagefilepath filepaths relativepath localpath photo picture images",
    "imageid imgid id key",
)
CAPTION = (
    "caption captions text title sentence sentences raw captiontext imagecaption",
    "description comment alttext alt prompt utf8caption tags referencestrs captionstr",
)
URL = ("url imageurl urls link flickrurl cocourl",)
LABEL = ("label classname class category labels species",)
SPLIT = ("split", "set subset partition dataset setname")
QUESTION = ("question",)
ANSWER = ("answer", "multiplechoiceanswer")
ANSWERS = ("answers",)
KIND = ("kind", "answertype", "questiontype")
TURNS = ("conversations", "messages")
NUMBERED = re.compile(r"(caption|captions|sentence|text|comment)\d+")  # caption_0, caption_1, …: all of them


class NoTable(ValueError):
    """Why the rows of a file are none that a model learns from."""


@dataclass(frozen=True)
class Keys:
    """gives: "captions", "questions" or "conversations"; of the rest, the name of the column or field, or None."""

    gives: str
    image: str | None
    captions: tuple[str, ...] = ()
    label: str | None = None
    split: str | None = None
    question: str | None = None
    answer: str | None = None
    answers: str | None = None
    kind: str | None = None
    turns: str | None = None

    def __str__(self) -> str:
        named = {"image": self.image, "caption": ", ".join(self.captions), "label": self.label, "split": self.split}
        named |= {"question": self.question, "answer": self.answer or self.answers, "turns": self.turns}
        return ", ".join(f"{what}: {key}" for what, key in named.items() if key)


def plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def matching(columns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The columns that are called like one of the names, of the surest line."""
    for line in names:
        if found := [column for column in columns if plain(column) in line.split()]:
            return found
    return []


def find_keys(columns: Sequence[str], row: Mapping[str, Any], source: Source, is_image: Callable[[str], bool]) -> Keys:
    """The keys of a table. row: its first one. is_image: is there an image that is called so?

    NoTable: nothing to learn from, or several columns that may be meant.
    """
    first = lambda names: next(iter(matching(columns, names)), None)
    optional = {"split": split_key(columns, row), "kind": first(KIND)}
    captions = caption_keys(columns, source)
    if (turns := first(TURNS)) and source.caption_key is None:
        image = next(iter(matching(columns, IMAGE[:1])), None) if source.image_key is None else source.image_key
        return Keys("conversations", image, turns=turns, split=optional["split"])
    question, answer, answers = first(QUESTION), first(ANSWER), first(ANSWERS)
    asks = question and (answer or answers) and source.caption_key is None
    label = first(LABEL)
    if not (asks or captions or label):
        raise NoTable(
            f"it has the columns {shown(columns)}, and none is known to hold a caption: choose it with --data.caption_key"
        )
    if (image := image_key(columns, row, source, is_image)) is None:
        if url := matching(columns, URL):
            raise NoTable(
                f"its images are addresses of the internet (in {shown(url)}): download them, with img2dataset for example, and "
                "read what that leaves"
            )
        raise NoTable(
            f"it has the columns {shown(columns)}, and none is known to name the image: choose it with --data.image_key"
        )
    if asks:
        return Keys("questions", image, question=question, answer=answer, answers=answers, **optional)
    if len(captions) > 1 and source.caption_key is None and not all(NUMBERED.fullmatch(plain(c)) for c in captions):
        raise Several("caption", captions)
    return Keys("captions", image, tuple(captions), label=label, split=optional["split"])


class Several(NoTable):
    """Several columns may be meant."""

    def __init__(self, what: str, columns: Sequence[str]):
        both = " with all of them, separated by commas" if what == "caption" else ""
        super().__init__(
            f"several of its columns may hold the {what}, {shown(columns)}: choose with --data.{what}_key "
            f"{columns[0]}{', or' + both if both else ''}"
        )


def caption_keys(columns: Sequence[str], source: Source) -> list[str]:
    """The columns that may hold the caption; those that were chosen, where some were."""
    if source.caption_key is None:
        return matching(columns, CAPTION) or [column for column in columns if NUMBERED.fullmatch(plain(column))]
    chosen = [source.caption_key] if source.caption_key in columns else re.split(r"\s*,\s*", source.caption_key)
    return [require(columns, name, "caption") for name in chosen]


def image_key(
    columns: Sequence[str], row: Mapping[str, Any], source: Source, is_image: Callable[[str], bool]
) -> str | None:
    """The column that names the image: of several, the one that names an image which is there."""
    if source.image_key is not None:
        return require(columns, source.image_key, "image")
    found = matching(columns, IMAGE)
    there = [key for key in found if isinstance(row.get(key), str) and is_image(row[key])] if len(found) > 1 else []
    if len(there or found) > 1:
        raise Several("image", there or found)
    return next(iter(there or found), None)


def require(columns: Sequence[str], name: str, what: str) -> str:
    if name not in columns:
        raise NoTable(f"it has no column {name!r}, as --data.{what}_key says: there are {shown(columns)}")
    return name


def split_key(columns: Sequence[str], row: Mapping[str, Any]) -> str | None:
    """A column that is called "split"; or like it, where its first value is the name of a split."""
    found = next(iter(matching(columns, SPLIT)), None)
    sure = found is not None and (plain(found) == "split" or str(row.get(found)).strip().lower() in SPLIT_VALUES)
    return found if sure else None


def shown(columns: Sequence[str]) -> str:
    """ "a, b, c" """
    return ", ".join(map(str, columns[:12])) + (", …" if len(columns) > 12 else "") or "(none)"
