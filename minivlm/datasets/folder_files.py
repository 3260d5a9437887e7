"""Reads the files of one's own folder: lines of JSON, captions, images, classes, and how splits are drawn.

Splits that the files do not give are drawn by a hash of the file's name, so that adding or removing other files never
moves an image from training to test.
"""

from __future__ import annotations

import json
import os
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlm.datasets.class_folders import SPLIT_NAMES
from minivlm.datasets.tar_index import is_member
from minivlm.errors import UserError
from minivlm.files import parse_json, read_bytes, readable

# Radford et al. 2021, §3.1.4, use "a photo of a {label}."; several wordings teach more than one phrase.
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "this is a {}.", "a {}.")
SPLITS = ("train", "val", "test")


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


def skip_broken(items: list, errors: dict[str, str], notes: list[str]) -> list:
    """The training items of which every image can be read; `notes` gets a sentence on the others. errors: image → sentence."""
    kept = [item for item in items if not errors.keys() & set(item.images)]
    total = len({image for item in items for image in item.images})
    if not kept:
        first = next(iter(errors.values()))
        raise UserError(f"None of the {total} training images can be read; the first: {first}")
    if errors:
        shown = " ".join(list(errors.values())[:5]) + (" …" if len(errors) > 5 else "")
        notes.append(f"{len(errors)} of {total} training images are skipped. {shown}")
    return kept


# --------------------------------------------------------------------------------------------------------------- splits


def hashed_split(name: str) -> str:
    """ "test" for a tenth of all file names, "val" for another, "train" for the rest."""
    return {0: "test", 1: "val"}.get(zlib.crc32(name.encode("utf-8", "surrogatepass")) % 10, "train")


def choose_split(items: list, split: str, directory: Path) -> tuple[list, list[str]]:
    """The items of `split` (each has an `image` and a `split`), and notes on what the files left to be chosen.

    No split or only "train" given: val and test are a tenth each, by hash. "val" missing: a tenth of train. "test"
    missing: val stands in. A split that stays empty because there are so few images: another one stands in. A line
    without a split, where others have one, counts as train.
    """
    if split not in SPLITS:
        raise UserError(f"There is no split {split!r}: it is one of train, val, test.")
    given = {item.split for item in items}
    given = {name or "train" for name in given} if given != {None} else set()
    if given and "train" not in given and split == "train":
        raise UserError(
            f"{directory} names the splits {', '.join(sorted(given))} but has nothing to train on ('train')."
        )
    notes = []
    drawn = {"train"}  # what a hash may draw out of the training images
    if given <= {"train"}:
        drawn |= {"val", "test"}
        notes.append("No val and test split are given: a tenth of the images each, by a hash of the file name.")
    elif "val" not in given and "train" in given:
        drawn |= {"val"}
        notes.append("No val split is given: a tenth of the training images, by a hash of the file name.")
    groups: dict[str, list] = {name: [] for name in SPLITS}
    for item in items:
        own = item.split or "train"
        hashed = hashed_split(item.image)
        groups[hashed if own == "train" and hashed in drawn else own].append(item)
    for stand_in in (split, *{"train": ("val", "test"), "val": ("test", "train"), "test": ("val", "train")}[split]):
        if groups[stand_in]:
            break
    if stand_in != split:
        warning = " What is judged has been trained on." if stand_in == "train" else ""
        notes.append(f"There are no {split} images: the {stand_in} images stand in for them.{warning}")
    return groups[stand_in], notes


# -------------------------------------------------------------------------------------------------------------- reading


def read_captions(directory: Path, problems: list[str] | None = None) -> list[Item]:
    """The lines of captions.jsonl; several lines about one image become one item with all their captions."""
    file = directory / "captions.jsonl"
    items: dict[str, Item] = {}
    read_lines(file, lambda values: add_item(items, caption_item(values, directory)), EXAMPLE, problems)
    if not items and not problems:
        raise UserError(f"{file} is empty: it needs one line an image, like {EXAMPLE}.")
    return list(items.values())


EXAMPLE = '{"image": "a.jpg", "caption": "a red kite"}'


def read_lines(file: Path, add: Callable[[Any], None], example: str, problems: list[str] | None = None) -> None:
    """add(values) for each line of JSON; a ValueError from it, or from reading, names the line, as in `read_folder`."""
    for number, line in enumerate(read_bytes(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            add(read_json(line, example))
        except ValueError as error:
            message = f"{file}, line {number}: {error}."
            if problems is None:
                raise UserError(message) from error
            problems.append(message)


def read_json(line: bytes, example: str) -> Any:
    """One line of JSON. ValueError: what is wrong with it."""
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"it is not JSON ({error.msg} at character {error.pos + 1}); a line looks like {example}"
        ) from None


def image_of(values: Any, example: str) -> str:
    """The image that a line names; ValueError if it names none."""
    if not isinstance(values, dict) or not isinstance(values.get("image"), str) or not values["image"]:
        raise ValueError(f'it names no "image"; a line looks like {example}')
    return values["image"]


def caption_item(values: dict, directory: Path) -> Item:
    image = image_of(values, EXAMPLE)
    given = [value for name in ("captions", "caption") if (value := values.get(name)) is not None]
    captions = [c for value in given for c in (value if isinstance(value, list) else [value])]
    if not given or not all(isinstance(c, str) for c in captions):
        raise ValueError(f'it has no caption: "captions" is a list of strings, "caption" one string, as in {EXAMPLE}')
    captions = [c.strip() for c in captions if c.strip()]
    if not captions:
        raise ValueError("its caption is empty")
    return Item(find_image(image, directory), captions, label_of(values), split_of(values))


def label_of(values: dict) -> str | None:
    """The class that a line names, if it does."""
    if (label := values.get("label")) is None:
        return None
    if not isinstance(label, (str, int, float)) or label != label:
        raise ValueError(f"its label is {label!r}, but must be a word or a number")
    if not (name := unicodedata.normalize("NFC", str(label)).strip()):
        raise ValueError("its label is empty: give it a name, or leave it out")
    return name


def split_of(values: dict) -> str | None:
    """The split that a line or an entry names, if it does."""
    if (split := values.get("split")) is None:
        return None
    if str(split).lower() not in SPLIT_NAMES:
        raise ValueError(f"its split is {split!r}, but there are train, val and test")
    return SPLIT_NAMES[str(split).lower()]


def find_image(image: str, directory: Path) -> str:
    """The path below `directory` of an image that a line calls `image`: there, or in its folder images/."""
    path = os.path.normpath(image)
    outside = (os.path.normpath(one) for one in (image, image.replace("\\", "/")))
    if any(os.path.isabs(one) or one.split(os.sep)[0] == os.pardir for one in outside):
        raise ValueError(f"the image {image!r} lies outside the folder; give its path relative to {directory}")
    for folder in ("", "images"):
        for spelling in dict.fromkeys((path, path.replace("\\", "/"))):  # "a\\1.jpg": it was written on Windows
            if found := on_disk(os.path.join(folder, spelling), directory):
                return found
    name = readable(image if len(image) <= 200 else f"{image[:200]}…")
    raise ValueError(f"there is no image {name!r}, neither in {directory} nor in its folder images")


def on_disk(path: str, directory: Path) -> str | None:
    """`path` as the disk spells it, if there is such a file: an accent may be one character or two (NFC, NFD)."""
    if is_member(directory / path):
        return Path(path).as_posix()
    found = Path()
    for part in Path(path).parts:
        spellings = dict.fromkeys((part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part)))
        there = next((name for name in spellings if os.path.exists(directory / found / name)), None)
        if there is None:
            return None
        found /= there
    return found.as_posix() if os.path.isfile(directory / found) else None


def add_item(items: dict[str, Item], item: Item) -> None:
    """Add `item`, or its captions to the item of the same image; ValueError if the two disagree on anything else."""
    known = items.setdefault(item.image, item)
    if (known.split, known.label) != (item.split, item.label):
        raise ValueError(f"an earlier line gives {item.image!r} another split or label")
    known.captions = [*known.captions, *(c for c in item.captions if c not in known.captions)]
