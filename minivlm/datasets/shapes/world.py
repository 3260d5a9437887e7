"""The shapes world: a few coloured shapes on a noisy background, made by integers from a seed, nothing to download.

    DIR/world.json    what was made; written last, so a world without it is not complete
    DIR/train.npy     (n, S, S, 3) uint8, memory-mapped when opened
    DIR/test/         the 500 test scenes as PNG files with captions.jsonl: real files, to try things on

When a split is opened, its scenes are drawn anew (scenes.py), and so are its pixels, except for train
(render.py): both take milliseconds. Captions describe a scene, fresh in every epoch (text.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minivlm.datasets.pairs import Pairs
from minivlm.datasets.shapes.negatives import any_negative
from minivlm.datasets.shapes.render import render
from minivlm.datasets.shapes.scenes import CLASSES, MOST, SEEN, UNSEEN, Scenes, distinct, draw_scenes
from minivlm.datasets.shapes.text import canonical, describe
from minivlm.errors import UserError, nearest
from minivlm.files import locked, parse_json, read_bytes

VERSION = 1  # of what a seed means; a change to scenes or pixels raises it
LOCK = ".making"  # who makes a world holds it
CHUNK = 512  # images rendered and written at a time


class Split(NamedTuple):
    """The arguments of `draw_scenes` for a split."""

    stream: int
    n: int | None  # None: as many as the world has training images
    pairs: np.ndarray = SEEN
    most: int = MOST
    balanced: bool = False


SPLITS = {
    "train": Split(0, None),
    "val": Split(1, 500),
    "test": Split(2, 500),  # no two with the same canonical caption
    "single_seen": Split(3, 8 * len(SEEN), SEEN, most=1, balanced=True),  # one object: is each class recognised?
    "single_unseen": Split(4, 56 * len(UNSEEN), UNSEEN, most=1, balanced=True),  # and those that training never shows?
    "unseen": Split(5, 500, np.arange(len(CLASSES))),  # like test, but at least one object is of an unseen pair
}


@dataclass(frozen=True)
class World:
    """world.json: all that the content of a directory depends on."""

    version: int
    seed: int
    train: int
    image_size: int
    shrink: int = 1  # objects are of 1, 1/2, … or 1/shrink of the usual size (see draw_scenes)

    def record(self) -> dict[str, int]:
        """What world.json holds; earlier versions know no shrink, and read a world without it."""
        return {name: value for name, value in asdict(self).items() if name != "shrink" or value != 1}


def split_scenes(split: str, *, seed: int, train: int, shrink: int = 1) -> Scenes:
    """The scenes of a split of the world with this seed and this many training images."""
    stream, n, pairs, most, balanced = SPLITS[split]
    how = dict(seed=seed, stream=stream, pairs=pairs, most=most, shrink=shrink)
    if split == "test":
        candidates = draw_scenes(2 * n, **how)
        return candidates.take(distinct(candidates)[:n])
    if split == "unseen":  # a quarter of the candidates
        candidates = draw_scenes(8 * n, **how)
        shows = (np.isin(candidates.classes, UNSEEN) & candidates.present).any(axis=1)
        return candidates.take(np.flatnonzero(shows)[:n])
    return draw_scenes(n or train, **how, balanced=balanced)


def scenes_of(world: World, split: str) -> Scenes:
    return split_scenes(split, seed=world.seed, train=world.train, shrink=world.shrink)


class ShapesWorld(Pairs):
    """One of the SPLITS of a world that `make_shapes` has made.

    Training captions are worded anew at each call; the others are canonical: size, colour, shape and place of every
    object. `scenes` holds the facts behind the images. The single splits have `labels` and 64 `classes` ("red circle").

    Raises UserError for an unknown split, and where the directory holds no world, a broken or an older one.
    """

    def __init__(self, directory: str | os.PathLike, split: str):
        if split not in SPLITS:
            raise UserError(f"the shapes world has no split {split!r}.{nearest(split, SPLITS)}")
        self.directory, self.split = Path(directory), split
        self.world = read_world(self.directory)
        self.scenes = scenes_of(self.world, split)
        if split == "train":
            self.pixels = open_pixels(self.directory, self.world)
        else:
            self.pixels = render(self.scenes, self.world.image_size)
        if SPLITS[split].most == 1:
            self.classes = list(CLASSES)
            self.labels = self.scenes.classes[:, 0].astype(np.int64)

    def __len__(self) -> int:
        return len(self.scenes)

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(B, S, S, 3) uint8, a copy."""
        return np.asarray(self.pixels[np.asarray(indices, dtype=np.int64)])

    def captions(self, indices: Sequence[int] | np.ndarray, rng: np.random.Generator) -> list[str]:
        scenes = self.scenes.read(indices)
        return [describe(scene, rng) if self.split == "train" else canonical(scene) for scene in scenes]

    def all_captions(self, index: int) -> list[str]:
        """The canonical caption. There are hundreds of wordings; this one holds every fact of the scene."""
        return [canonical(self.scenes[index])]

    def false_caption(self, index: int, rng: np.random.Generator) -> str:
        """The canonical caption with another colour, shape, size or place of one object (see `negatives`)."""
        scene = self.scenes[index]
        return any_negative(scene, scene.objects, rng)

    def key(self, index: int) -> str:
        return f"test/{index:03d}.png" if self.split == "test" else f"{self.split}/{index}"

    def texts(self) -> Iterator[str]:
        """The canonical caption and another wording of every scene, each text once: together they hold every word."""
        rng = np.random.default_rng(0)
        scenes = self.scenes.read(np.arange(len(self)))
        yield from dict.fromkeys(text for scene in scenes for text in (canonical(scene), describe(scene, rng)))


def make_shapes(
    directory: str | os.PathLike,
    *,
    seed: int = 0,
    train: int = 30_000,
    image_size: int = 64,
    shrink: int = 1,
    progress: bool = True,
) -> None:
    """Make a shapes world in a directory, with a progress bar; the same world is left as it is, another is replaced.

    A run that is killed leaves no world.json, so nothing that could be taken for a world; the next call starts afresh.
    Two processes that want one world make it once: the other waits. Raises UserError for numbers out of range, and where
    the directory cannot be written or holds files of somebody else under these names.
    """
    for name, value, least, most in (
        ("seed", seed, 0, 2**63),
        ("train", train, 1, 10**8),
        ("image_size", image_size, 32, 512),
        ("shrink", shrink, 1, 8),
    ):
        if not least <= value <= most:
            raise UserError(f"{name} {value} of the shapes world is out of range: choose from {least} to {most}.")
    directory, world = Path(directory), World(VERSION, seed, train, image_size, shrink)
    if is_made(directory, world):
        return
    refuse_strangers(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(directory, error) from error
    try:
        with locked(directory / LOCK):
            if is_made(directory, world):  # by the process that was waited for
                return
            (directory / "world.json").unlink(missing_ok=True)
            write_train(directory / "train.npy", world, progress)
            write_test(directory / "test", world)
            write_whole(directory / "world.json", json.dumps(world.record()) + "\n")
    except OSError as error:
        (directory / "train.npy.partial").unlink(missing_ok=True)  # it may be what filled the disk
        raise cannot_write(directory, error) from error


def refuse_strangers(directory: Path) -> None:
    """UserError where files that no world left there would be written over."""
    if is_world(directory):
        try:
            facts = parse_json(read_bytes(directory / "world.json"))
        except ValueError:  # a damaged one
            return
        names = [] if not isinstance(facts, dict) or "seed" in facts else ["world.json"]
    elif (directory / LOCK).exists():  # a world that was started
        return
    else:
        names = [name for name in ("train.npy", "test") if (directory / name).exists()]
    if names:
        raise UserError(
            f"{directory} holds a {names[0]} that belongs to no shapes world, and would be written over: move it "
            "away, or choose another directory."
        )


def cannot_write(directory: Path, error: OSError) -> UserError:
    reason = f"could not be written to {directory}: {error.strerror or error}"
    return UserError(f"the shapes world {reason}. Make room or choose another directory.")


def is_world(directory: str | os.PathLike) -> bool:
    """Whether the folder holds a shapes world."""
    return (Path(directory) / "world.json").is_file()


def is_made(directory: Path, world: World) -> bool:
    try:
        open_pixels(directory, world)
        return read_world(directory) == world and (directory / "test" / "captions.jsonl").is_file()
    except UserError:  # none there, or a damaged one
        return False


def write_train(path: Path, world: World, progress: bool) -> None:
    """Write the images as a plain file: in a memory map a full disk would be a crash instead of an error."""
    from tqdm import tqdm

    scenes = scenes_of(world, "train")
    shape = (world.train, world.image_size, world.image_size, 3)
    partial = path.with_name(path.name + ".partial")
    with (
        open(partial, "wb") as file,
        tqdm(total=world.train, desc="shapes world", unit=" images", disable=not progress) as bar,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for start in range(0, world.train, CHUNK):
            images = render(scenes.take(slice(start, start + CHUNK)), world.image_size)
            file.write(images)
            bar.update(len(images))
    os.replace(partial, path)


def write_test(directory: Path, world: World) -> None:
    from PIL import Image

    directory.mkdir(exist_ok=True)
    scenes = scenes_of(world, "test")
    lines = []
    for i, (pixels, scene) in enumerate(
        zip(render(scenes, world.image_size), scenes.read(np.arange(len(scenes))), strict=True)
    ):
        Image.fromarray(pixels).save(directory / f"{i:03d}.png")
        lines.append(json.dumps({"image": f"{i:03d}.png", "caption": canonical(scene), "split": "test"}) + "\n")
    write_whole(directory / "captions.jsonl", "".join(lines))


def write_whole(path: Path, text: str) -> None:
    """A file that is there is there as a whole."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_world(directory: Path) -> World:
    path, remedy = directory / "world.json", f"make it with `python data/shapes/prepare.py --out {directory}`."
    if not path.is_file():
        raise UserError(f"there is no complete shapes world in {directory} (no world.json): {remedy}")
    try:
        facts = parse_json(read_bytes(path))
        version = facts.get("version", VERSION)
        if version == VERSION:
            return World(**facts)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not describe a shapes world ({error}): {remedy}") from error
    raise UserError(
        f"the shapes world in {directory} has version {version}, this program makes and reads {VERSION}: {remedy}"
    )


def open_pixels(directory: Path, world: World) -> np.ndarray:
    path, shape = directory / "train.npy", (world.train, world.image_size, world.image_size, 3)
    remedy = f"make it again with `python data/shapes/prepare.py --out {directory}`."
    try:
        pixels = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is missing or incomplete ({error}): {remedy}") from error
    if pixels.shape != shape or pixels.dtype != np.uint8:
        raise UserError(f"{path} holds {pixels.shape} {pixels.dtype}, but world.json promises {shape} uint8: {remedy}")
    return pixels
