"""The images that predictions name: of the shapes world, of a folder in any form that training takes, or of image files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image

from minivlm.datasets.conversations import has_conversations, open_conversations
from minivlm.datasets.images import extensions, read_image
from minivlm.datasets.shapes import ShapesWorld, is_world
from minivlm.datasets.shapes.world import SPLITS
from minivlm.errors import UserError
from minivlm.evaluate.predictions import ImageNames

Images = Mapping[str, list[Image.Image]]


def images_named(names: Iterable[str], directory: str | os.PathLike, *, side: int) -> Images:
    """Name → the images of that sample, usually one, with a shorter side of at most about `side` pixels. Those that are not in
    the folder are left out. UserError where there is no such folder, or an image cannot be read."""
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: there is no such folder of images.")
    names = [*dict.fromkeys(name for name in names if name)]
    if is_world(directory):
        return of_world(names, directory)
    found: dict[str, list[Image.Image]] = {}
    data = has_conversations(directory)
    sources = [lambda some: of_split(some, directory, "test", side)] if data else []  # of a sample all images
    sources.append(lambda some: of_files(some, Path(directory), side))
    for split in ("val", "train") if data else ():  # of archives and tables, which hold the images themselves
        sources.append(lambda some, split=split: of_split(some, directory, split, side))
    for images_in in sources:
        if missing := [name for name in names if name not in found]:
            found |= images_in(missing)
    return found


def of_world(names: Iterable[str], directory: str | os.PathLike) -> Images:
    """ "test/012.png", "unseen/12": splits and places in them."""
    found, splits = {}, {}
    for name in names:
        split, _, number = name.removesuffix(".png").partition("/")
        if not number.isdecimal() or split not in SPLITS:
            continue
        data = splits[split] = splits.get(split) or ShapesWorld(Path(directory), split)
        if int(number) < len(data):
            found[name] = [Image.fromarray(data.images([int(number)])[0])]
    return found


def of_split(names: Iterable[str], directory: str | os.PathLike, split: str, side: int) -> Images:
    data = open_conversations(directory, split, image_size=side)
    index = {data.key(i): i for i in range(len(data))}
    known = ImageNames([*index])
    places = {name: index[key] for name in names if (key := known.find(name)) is not None}
    return {name: [Image.fromarray(image) for image in data.images([i])[0]] for name, i in places.items()}


def of_files(names: Iterable[str], directory: Path, side: int) -> Images:
    files = {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.suffix.lower() in extensions() and path.is_file()
    }
    known = ImageNames([*files])
    places = {name: files[key] for name in names if (key := known.find(name)) is not None}
    return {name: [read_image(path, shorter_side=side)] for name, path in places.items()}
