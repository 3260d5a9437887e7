"""One's own pictures: a folder with captions.jsonl, or with one sub-folder a class, as train, val and test pairs.

    DIR/captions.jsonl      {"image": "a.jpg", "captions": ["…"]}   the image in DIR or DIR/images; or "caption": "…"
                            optional: "split": "train" | "val" | "test", "label": "pink primrose"
    DIR/<class>/*.jpg       captions from TEMPLATES; see class_folders.py
    DIR/vqa.jsonl, DIR/conversations.json   what is said about an image is its captions (folder_talk.py)

Splits that the files do not give are drawn by a hash of the file's name, so that adding or removing other files never
moves an image from training to test. Training images come from a cache of shrunk pixels (images.py); val and test
images are decoded from the original file each time, so that what is measured is what the processor makes of the
original.
"""

from __future__ import annotations

import json
import os
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from minivlm.datasets.class_folders import SPLIT_NAMES, read_class_folders
from minivlm.datasets.images import ImageCache, cache_folder, read_image
from minivlm.datasets.judge import check_headers, check_pictures
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes import ShapesWorld, is_world
from minivlm.errors import UserError
from minivlm.files import parse_json, read_bytes, readable

# Radford et al. 2021, §3.1.4, speak of "a photo of a {label}."; several wordings teach more than one phrase.
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "this is a {}.", "a {}.")
SPLITS = ("train", "val", "test")


@dataclass
class Item:
    """One image of a folder: its path below it ("images/a.jpg"), its captions, and what else the files tell."""

    image: str
    captions: Sequence[str]
    label: str | None = None
    split: str | None = None

    @property
    def images(self) -> list[str]:
        return [self.image]


def open_pairs(
    directory: str | os.PathLike, split: str, *, image_size: int, cache: str | os.PathLike | None = None
) -> Pairs:
    """One split ("train", "val", "test") of a folder: the shapes world, captions.jsonl, questions, conversations or classes.

    image_size  the model's; training images are cached with a shorter side of 1.25 times it, room for a random crop
    cache       where decoded images are kept; by default DIR/.minivlm_cache, or the user's cache folder if DIR is
                read-only
    """
    directory = Path(directory)
    if is_world(directory):
        return ShapesWorld(directory, split)
    return FolderPairs(directory, split, image_size=image_size, cache=cache)


class FolderPairs(Pairs):
    """A split of a folder of pictures; see the module for what is recognised, `Pairs` for the interface.

    A training image that cannot be decoded is left out, counted and named in `notes` (and in `skipped`, key → why);
    in val and test it is an error, since a score over what happened to be readable would not be the folder's score.
    `notes` also says where a split was drawn or stands in for another.
    """

    def __init__(self, directory: Path, split: str, *, image_size: int, cache: str | os.PathLike | None = None):
        self.directory, self.split = Path(directory), split
        told: list[str] = []
        everything = read_folder(self.directory, notes=told)
        items, self.notes = choose_split(everything, split, self.directory)
        self.notes = [*told, *self.notes]
        self.skipped: dict[str, str] = {}
        self.cache = None
        if split == "train":
            folder = Path(cache) if cache else cache_folder(self.directory)
            self.cache = ImageCache(
                self.directory, [i.image for i in items], folder, shorter_side=ceil(1.25 * image_size)
            )
            self.skipped = self.cache.errors
            items = skip_broken(items, self.skipped, self.notes)
        else:
            check_headers(self.directory, [item.image for item in items], split)
        self.items = items
        names = sorted({item.label for item in everything if item.label is not None})
        self.classes = names or None
        position = {name: i for i, name in enumerate(names)}
        self.labels = np.array([position.get(i.label, -1) for i in items], dtype=np.int64) if names else None

    def __len__(self) -> int:
        return len(self.items)

    def images(self, indices: Sequence[int]) -> list[np.ndarray]:
        keys = [self.items[i].image for i in indices]
        if self.cache is not None:
            return [self.cache[key] for key in keys]
        return [np.array(read_image(self.directory / key)) for key in keys]  # a copy: torch wants writable memory

    def check_pictures(self) -> None:
        check_pictures(self.directory, [item.image for item in self.items], self.split)

    def all_captions(self, index: int) -> Sequence[str]:
        return self.items[index].captions

    def key(self, index: int) -> str:
        return self.items[index].image


def skip_broken(items: list, errors: dict[str, str], notes: list[str]) -> list:
    """The training items of which every image can be read; `notes` is told of the others. errors: image → sentence."""
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
        seen = " What is judged has been trained on." if stand_in == "train" else ""
        notes.append(f"There are no {split} images: the {stand_in} images stand in for them.{seen}")
    return groups[stand_in], notes


# -------------------------------------------------------------------------------------------------------------- reading


def read_folder(directory: Path, problems: list[str] | None = None, notes: list[str] | None = None) -> list[Item]:
    """Everything a folder holds. What is wrong with a line raises UserError, or is added to `problems` if given.

    notes: gets sentences on what is passed over without being wrong.
    """
    if not directory.is_dir():
        raise UserError(f"There is no folder {directory}.")
    if (directory / "captions.jsonl").exists():
        return read_captions(directory, problems)
    from minivlm.datasets.folder_conversations import find_talk, read_items

    if find_talk(directory):
        return read_items(directory, problems)
    classes, told = read_class_folders(directory)
    if notes is not None:
        notes += told
    if not classes:
        raise UserError(
            f"{directory} is no dataset that is recognised: looked for world.json (the shapes world), "
            f"conversations.json, vqa.jsonl, questions.jsonl, captions.jsonl, and images in sub-folders, one a class "
            f"({directory.name}/cat/1.jpg or {directory.name}/train/cat/1.jpg)."
        )
    if len({one.name for one in classes}) == 1:
        raise UserError(
            f"{directory} has images in one class sub-folder only, {classes[0].name!r}: at least two are needed to tell "
            "apart, or a captions.jsonl that says what is in each image."
        )
    items = []
    for one in classes:
        captions = [template.format(one.name) for template in TEMPLATES]  # one list, shared by all images of the class
        items += [Item(path, captions, one.name, one.split) for path in one.pictures()]
    return items


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
    """One line of JSON. ValueError says what is wrong with it."""
    try:
        return parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"it is not JSON ({error.msg} at character {error.pos + 1}); a line looks like {example}"
        ) from None


def image_of(values: Any, example: str) -> str:
    """What a line calls its image; ValueError if it names none."""
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
