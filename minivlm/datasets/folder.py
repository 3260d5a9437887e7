"""One's own images: a folder in any form that forms.py recognises, or with one sub-folder a class, as train, val, test pairs.

    captions                    of captions.jsonl, a table, COCO's JSON, a text beside each image, …
    questions, conversations    the texts about an image are its captions (folder_entries.py)
    DIR/<class>/*.jpg           captions from TEMPLATES; see class_folders.py

Splits that the files do not give are drawn (folder_files.py). Training images come from a cache of shrunk pixels
(images.py); val and test images are decoded from the original file each time, so that what is measured is what the
processor makes of the original.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minivlm.datasets.folder_entries import read_folder
from minivlm.datasets.folder_files import SPLITS, TEMPLATES, choose_split, skip_broken
from minivlm.datasets.image_cache import decode, open_cache
from minivlm.datasets.judge import check_headers, check_images
from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes import ShapesWorld, is_world
from minivlm.datasets.source import judged

__all__ = ["SPLITS", "TEMPLATES", "FolderPairs", "open_pairs"]


def open_pairs(
    directory: str | os.PathLike, split: str, *, image_size: int, cache: str | os.PathLike | None = None
) -> Pairs:
    """One split ("train", "val", "test") of a folder: the shapes world, captions, questions, conversations or classes.

    image_size  the model's; training images are cached with a shorter side of 1.25 times it, room for a random crop
    cache       where decoded images are kept; by default DIR/.minivlm_cache, or the user's cache folder if DIR is
                read-only
    """
    if is_world(directory):
        return ShapesWorld(Path(directory), judged(directory, split))
    return FolderPairs(directory, split, image_size=image_size, cache=cache)


class FolderPairs(Pairs):
    """A split of a folder of images; see the module for what is recognised, `Pairs` for the interface.

    A training image that cannot be decoded is left out, counted and named in `notes` (and in `skipped`, key → why);
    in val and test it is an error, since a score over what happened to be readable would not be the folder's score.
    `notes` also names splits that were drawn, or that stand in for others.
    """

    def __init__(
        self, directory: str | os.PathLike, split: str, *, image_size: int, cache: str | os.PathLike | None = None
    ):
        self.directory, self.split = Path(directory), split
        notes: list[str] = []
        everything = read_folder(directory, notes=notes)
        items, self.notes = choose_split(everything, split, directory)
        self.notes = [*notes, *self.notes]
        self.skipped: dict[str, str] = {}
        self.cache = None
        if split == "train":
            images = [item.image for item in items]
            self.cache = open_cache(directory, images, image_size=image_size, folder=cache)
            self.skipped = self.cache.errors
            items = skip_broken(items, self.skipped, self.notes)
            self.notes += self.cache.notes
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
            return self.cache.images(keys)
        return decode([self.directory / key for key in keys])

    def check_images(self) -> None:
        check_images(self.directory, [item.image for item in self.items], self.split)

    def all_captions(self, index: int) -> Sequence[str]:
        return self.items[index].captions

    def key(self, index: int) -> str:
        return self.items[index].image
