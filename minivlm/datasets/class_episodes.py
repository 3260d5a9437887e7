"""Few-shot episodes from one's own images: a folder with a sub-folder a class, such as Omniglot's drawings.

    DIR/…/character01/*.png         a class is a folder that holds images, however deep; what it is called is not read
    DIR/train/…   DIR/test/…        the splits, as in folder.py; otherwise they are drawn by a hash of the class's path

Folders that hold something else than the images of a class are refused, as in class_folders.py.

Images of some classes are shown under made-up names, and then another one of any of them, whose name is asked for.
Vinyals et al. 2016, "Matching Networks for One Shot Learning", §4.1; Lake et al. 2015 (Omniglot).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minivlm.datasets.class_folders import (
    SPLIT_NAMES,
    Listing,
    list_folder,
    refuse_other_layouts,
    subfolders,
)
from minivlm.datasets.class_names import names_file
from minivlm.datasets.folder_files import choose_split
from minivlm.datasets.forms import recognised
from minivlm.datasets.images import read_image
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.shots import Lessons, Shot, ShotEpisode
from minivlm.datasets.source import Source
from minivlm.errors import UserError


@dataclass
class ImageClass:
    image: str  # the path of its folder, by which a split is drawn
    split: str | None
    images: list[Path] = field(default_factory=list)


def is_class_folder(directory: str | os.PathLike) -> bool:
    """Whether the folder has images in sub-folders, and no file that describes them."""
    path = Source.of(directory).path
    return path.is_dir() and not is_world(path) and not recognised(directory) and bool(subfolders(path))


def class_episodes(
    directory: str | os.PathLike, n: int, *, shots: int, ways: int = 5, seed: int = 0, split: str = "test"
) -> list[ShotEpisode]:
    """`n` episodes of `shots` examples in all, in held-out words. UserError: too few classes, or images of one."""
    classes = read_classes(directory, split)
    check_enough(classes, Path(directory), split, shots=shots, ways=ways)
    lessons, images = class_lessons(classes)
    rng = np.random.default_rng([seed, ways, shots])
    episodes = []
    for _ in range(n):
        drawn = lessons.episode(rng, shots=shots, ways=ways)
        *examples, query = (Shot(np.array(read_image(images[image])), word) for image, word in drawn)
        episodes.append(ShotEpisode(examples, query))
    return episodes


def class_lessons(classes: list[ImageClass]) -> tuple[Lessons, list[Path]]:
    """Lessons in which a class is a look, and the images that their numbers stand for."""
    numbers = np.repeat(np.arange(len(classes)), [len(one.images) for one in classes])
    return Lessons(numbers), [image for one in classes for image in one.images]


def read_classes(directory: str | os.PathLike, split: str) -> list[ImageClass]:
    """The classes of a split, in the order of their names. UserError: no folder, or none with images."""
    return choose_split(find_classes(directory), split, directory)[0]


def find_classes(source: str | os.PathLike) -> list[ImageClass]:
    """The classes of all splits."""
    directory = Source.of(source).path
    if not directory.is_dir():
        raise UserError(f"There is no folder {directory}.")
    listing = list_folder(directory)
    found: dict[str, ImageClass] = {}
    holds: dict[str, Listing] = {}
    for name in listing.images:
        folder, parts = os.path.dirname(name), name.split("/")
        if len(parts) > 1:
            own = SPLIT_NAMES.get(parts[0].lower()) if len(parts) > 2 else None
            found.setdefault(folder, ImageClass(folder, own)).images.append(directory / name)
            holds.setdefault(folder, Listing()).images.append(os.path.basename(name))
    for name in listing.others:
        if (folder := os.path.dirname(name)) in holds:
            holds[folder].others.append(os.path.basename(name))
    if not os.path.lexists(names_file(source)):
        refuse_other_layouts(directory, holds, named=False)
    if not found:
        raise UserError(f"{directory} has no sub-folders of images, one a class.")
    return list(found.values())


def check_enough(classes: list[ImageClass], directory: Path, split: str, *, shots: int, ways: int) -> None:
    if len(classes) < ways:
        raise UserError(
            f"{directory} has {len(classes)} {split} classes (folders of images), but an episode has {ways}: ask for "
            f"fewer --ways, or put those that are to be judged by into {directory / split}."
        )
    most = -(-shots // ways)
    for one in classes:
        if len(one.images) <= most:
            raise UserError(
                f"{directory / one.image} has {len(one.images)} images, but an episode shows {most} of them and "
                "asks for another: ask for fewer --shots, or add some."
            )
