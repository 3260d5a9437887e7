"""A text beside each image, called like it: a.jpg with a.txt, a.caption or a.json, at any depth.

img2dataset's "files" (00000/000000000.jpg, .txt, .json) and kohya's folders are so. The text is the caption; of JSON it is
the field "caption", or the one that --data.caption_key names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivlm.datasets.class_folders import SPLIT_NAMES, Listing
from minivlm.datasets.entries import Item
from minivlm.datasets.keys import CAPTION, NoTable, matching, require, shown
from minivlm.datasets.source import Source
from minivlm.errors import UserError
from minivlm.files import check_text, parse_json, read_bytes

TEXTS = (".txt", ".caption")
BOXES = re.compile(rb"\s*(\d+(\s+[\d.]+){4,}\s*)+")  # of YOLO: a class and four numbers a line
FIRST = 20


@dataclass
class Beside:
    """The texts of images: image → file; and the images that have none."""

    texts: dict[str, str] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)

    @property
    def endings(self) -> str:
        return ", ".join(sorted({os.path.splitext(text)[1] for text in self.texts.values()}))


def texts_beside(listing: Listing) -> Beside:
    """Which file of a listing is the text of which image: a .txt before a .caption before a .json."""
    others = set(listing.others)
    found = Beside()
    for image in listing.images:
        stem = os.path.splitext(image)[0]
        names = (f"{one}{ending}" for ending in (*TEXTS, ".json") for one in (stem, image))  # a.txt, or a.jpg.txt
        if text := next((name for name in names if name in others), None):
            found.texts[image] = text
        else:
            found.without.append(image)
    return found


def check_are_captions(directory: Path, found: Beside, source: Source) -> str | None:
    """The field of the JSON files that holds the caption, by the first of them; None: they are texts.

    NoTable: they hold something else, such as boxes.
    """
    first = list(found.texts.values())[:FIRST]
    plain = [read_bytes(directory / name) for name in first if name.endswith(TEXTS)]
    if plain and all(BOXES.fullmatch(text) for text in plain if text.strip()) and any(map(bytes.strip, plain)):
        raise NoTable(f"{first[0]} and the texts like it hold the numbers of boxes, as YOLO's do, and no captions")
    fields = [record(directory / name).keys() for name in first if name.endswith(".json")]
    return json_key(list(dict.fromkeys(key for one in fields for key in one)), first[0], source) if fields else None


def json_key(columns: list[str], name: str, source: Source) -> str:
    if source.caption_key is not None:
        return require(columns, source.caption_key, "caption")
    if not (known := matching(columns, CAPTION)):
        raise NoTable(
            f"{name} has the fields {shown(columns)}, and none is known to hold a caption: choose it with --data.caption_key"
        )
    return known[0]


def record(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_bytes(path))
    except ValueError as error:
        raise NoTable(f"{path} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise NoTable(f"{path} holds no object with a caption")
    return values


def read_beside(
    directory: Path, found: Beside, key: str | None, problems: list[str] | None, notes: list[str]
) -> list[Item]:
    """The images with captions. A text that is empty or cannot be read raises UserError, or goes to `problems`."""
    items = []
    for image, name in found.texts.items():
        try:
            items.append(Item(image, captions_in(directory / name, key), None, split_of_folder(image)))
        except (ValueError, UserError) as error:
            message = f"{directory / name}: {str(error).rstrip('.')}."
            if problems is None:
                raise UserError(message) from error
            problems.append(message)
    if n := len(found.without):
        notes.append(
            f"{n} of {n + len(found.texts)} images have no text beside them, and are not used ({some(found.without)})."
        )
    return items


def captions_in(path: Path, key: str | None) -> list[str]:
    if path.suffix == ".json":
        value = record(path).get(key)
    else:
        try:
            value = read_bytes(path).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError("it is not UTF-8 text") from None
    captions = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in captions):
        raise ValueError(f'it has no caption: its "{key}" is {value!r}')
    captions = [text for one in captions if (text := " ".join(one.split()))]
    if not captions:
        raise ValueError("its caption is empty")
    for caption in captions:
        check_text(caption)
    return captions


def split_of_folder(image: str) -> str | None:
    """train/…, val/… and test/… give the split."""
    folder, slash, _ = image.partition("/")
    return SPLIT_NAMES.get(folder.lower()) if slash else None


def some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
