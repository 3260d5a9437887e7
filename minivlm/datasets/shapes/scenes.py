"""Scenes of the shapes world: one to three objects, each with a shape, a colour, a size and a place.

Scene i of a split is a pure function of (seed, split, i), computed by integers alone from the raw stream of a
counter-based generator (Philox; Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"). NumPy guarantees
the stream, so the same seed means the same scenes on every platform and in every version.

A scene knows no pixels. Lengths are in units of 1/16,384 of the image's side: a scene can be drawn at any size, and
hardly two ever coincide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")

# A class is a (shape, colour) pair, numbered 8 · shape + colour. Every shape and every colour has exactly one partner
# that it never meets in training: a model that names such a pair has composed it from parts that occur elsewhere.
CLASSES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
UNSEEN = np.array([8 * shape + (3 * shape + 1) % 8 for shape in range(8)])
SEEN = np.setdiff1d(np.arange(64), UNSEEN)

UNIT = 1 << 14  # the image's side
MOST = 3  # objects in a scene
# Four radii for small objects, four for large: 7.0 to 8.1 and 9.1 to 10.2 pixels of 64.
RADII = np.array([[112, 118, 124, 130], [146, 152, 158, 164]]) * UNIT // 1024
# Half the width and half the height of each shape in hundredths of the radius, so that shapes appear equally large.
EXTENTS = np.array([[100, 100], [88, 88], [100, 87], [100, 95], [96, 96], [80, 100], [100, 98], [100, 100]])

# sRGB. No two are closer than 39 in CIE L*a*b*, and none is closer than 40 to a grey, which all backgrounds nearly are.
PALETTE = np.array(
    [
        [220, 25, 35],  # red
        [250, 140, 10],  # orange
        [250, 230, 50],  # yellow
        [30, 160, 60],  # green
        [60, 215, 230],  # cyan
        [25, 95, 235],  # blue
        [140, 35, 165],  # purple
        [255, 140, 195],  # pink
    ]
)
SHRINK_STREAM = 1 << 33  # far from the streams that scenes are drawn from, and from that of the noise
DRAWS = 32  # raw 64-bit draws for one scene; a multiple of 4, because one step of Philox makes four


class SceneObject(NamedTuple):
    """One object, or its description in a caption: None where it names none. Boxes are fractions of the image's side."""

    shape: str
    colour: str
    size: str | None = None
    place: str | None = None
    box: tuple[float, float, float, float] | None = None  # left, top, right, bottom


class Scene(NamedTuple):
    """The objects of a scene, in reading order: row by row, from left to right."""

    objects: tuple[SceneObject, ...]


@dataclass(frozen=True)
class Scenes:
    """n scenes as arrays, one row each. A row has room for three objects, of which the first `count` are used."""

    count: np.ndarray  # (n,) 1 to 3
    shape: np.ndarray  # (n, 3) index into SHAPES, as are the next two into COLOURS and SIZES
    colour: np.ndarray
    size: np.ndarray
    step: np.ndarray  # (n, 3) which of the four radii of its size
    x: np.ndarray  # (n, 3) the centre, to the right and
    y: np.ndarray  # (n, 3) down
    paint: np.ndarray  # (n, 3, 3) the RGB in which an object is painted: its colour, slightly varied
    ground: np.ndarray  # (n, 3) the RGB of the background
    slope: np.ndarray  # (n, 2) by how much it grows brighter from the middle to the right and to the bottom
    grain: np.ndarray  # (n, 2) where in the film of noise its noise is taken from, and how strong it is
    shrink: np.ndarray  # (n,) what the radii of all its objects are divided by: 1, but in worlds with small objects

    def __len__(self) -> int:
        return len(self.count)

    @property
    def radius(self) -> np.ndarray:
        """(n, 3)"""
        return RADII[self.size, self.step] // self.shrink[:, None]

    @property
    def classes(self) -> np.ndarray:
        """(n, 3) index into CLASSES."""
        return len(COLOURS) * self.shape + self.colour

    @property
    def place(self) -> np.ndarray:
        """(n, 3) index into PLACES: the cell of the 3 × 3 grid in which the centre lies."""
        return 3 * (3 * self.y // UNIT) + 3 * self.x // UNIT

    @property
    def present(self) -> np.ndarray:
        """(n, 3) True where there is an object."""
        return np.arange(MOST) < self.count[:, None]

    @property
    def box(self) -> np.ndarray:
        """(n, 3, 4) left, top, right, bottom of each object, as fractions of the image's side."""
        centre = np.stack([self.x, self.y], axis=-1)
        half = self.radius[..., None] * EXTENTS[self.shape] // 100
        return np.concatenate([centre - half, centre + half], axis=-1) / UNIT  # a power of two: the division is exact

    def take(self, indices: Sequence[int] | np.ndarray | slice) -> Scenes:
        """The rows of these indices, as Scenes."""
        return Scenes(*(getattr(self, field.name)[indices] for field in fields(self)))

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Scene]:
        """The scenes of these indices, to be read by people: words instead of numbers."""
        rows = self.take(np.asarray(indices, dtype=np.int64))
        columns = (rows.count, rows.shape, rows.colour, rows.size, rows.place, rows.box)
        return [
            Scene(
                tuple(
                    SceneObject(SHAPES[s], COLOURS[c], SIZES[z], PLACES[p], tuple(box))
                    for s, c, z, p, box in zip(*(values[:count] for values in row), strict=True)
                )
            )
            for count, *row in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def __getitem__(self, index: int) -> Scene:
        return self.read([index])[0]


def draw_scenes(
    n: int,
    *,
    seed: int,
    stream: int,
    pairs: np.ndarray = SEEN,
    most: int = MOST,
    balanced: bool = False,
    shrink: int = 1,
) -> Scenes:
    """Scenes 0 … n − 1 of a stream. A scene does not depend on how many are drawn with it.

    pairs     the (shape, colour) classes that may occur
    balanced  scene i shows pair i modulo their number, rather than any
    most      one to this many objects; each has a cell of the 3 × 3 grid to itself and stays inside: no overlaps
    shrink    the objects of a scene are of 1, 1/2, … or 1/shrink of the usual size, equally often; all else is the same
    """
    raw = raw_draws(seed, stream, n * DRAWS).reshape(n, DRAWS)
    count = 1 + below(raw[:, 0], most)
    present = np.arange(MOST) < count[:, None]
    cell = np.argsort(raw[:, 1:10], axis=1, kind="stable")[:, :MOST]  # the first three of a random order of the nine
    cell = np.sort(np.where(present, cell, 9), axis=1) % 9  # in reading order, the unused ones last

    own = raw[:, 10:28].reshape(n, MOST, 6)  # six draws for each object
    pair = pairs[np.arange(n) % len(pairs)][:, None] if balanced else pairs[below(own[..., 0], len(pairs))]
    size = below(own[..., 1], 2)
    step = below(own[..., 2], 4)
    room = UNIT // 6 - RADII[size, step]  # how far the centre may leave the middle of the cell
    x = (2 * (cell % 3) + 1) * UNIT // 6 + below(own[..., 3], 2 * room + 1) - room
    y = (2 * (cell // 3) + 1) * UNIT // 6 + below(own[..., 4], 2 * room + 1) - room
    paint = np.clip(PALETTE[pair % 8] + spread(own[..., 5], 3, 12), 0, 255)

    level = 32 + below(raw[:, 28], 150)  # from nearly black to light grey
    ground = level[:, None] + spread(raw[:, 29], 3, 12)
    slope = spread(raw[:, 30], 2, 24)
    grain = np.stack([below(raw[:, 31], 1 << 20), 4 + below(raw[:, 31] >> np.uint64(20), 21)], axis=-1)
    objects = [np.where(present, values, 0) for values in (pair // 8, pair % 8, size, step, x, y)]
    colours = (np.where(present[..., None], paint, 0), ground, slope)
    divisors = 1 + below(raw_draws(seed, stream + SHRINK_STREAM, n), shrink)
    return Scenes(count, *objects, *(values.astype(np.int16) for values in colours), grain, divisors)


def distinct(scenes: Scenes) -> np.ndarray:
    """The indices, ascending, of the scenes whose objects (size, colour, shape, place) no earlier scene has."""
    described = [
        scenes.count[:, None],
        *(np.where(scenes.present, a, 0) for a in (scenes.shape, scenes.colour, scenes.size, scenes.place)),
    ]
    return np.sort(np.unique(np.concatenate(described, axis=1), axis=0, return_index=True)[1])


def raw_draws(seed: int, stream: int, n: int) -> np.ndarray:
    """(n,) uint64: the first numbers of one of the independent streams of a seed (both below 2⁶⁴)."""
    return np.random.Philox(key=seed + (stream << 64)).random_raw(n)


def below(draws: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """uint64 draws → integers 0 … bound − 1, as int64. Of 2⁶⁴ draws the remainder favours none noticeably."""
    return (draws % np.asarray(bound).astype(np.uint64)).astype(np.int64)


def spread(draws: np.ndarray, k: int, most: int) -> np.ndarray:
    """uint64 draws (…) → k integers from −most to most out of each, (…, k)."""
    parts = draws[..., None] >> (np.uint64(20) * np.arange(k, dtype=np.uint64)) & np.uint64(0xFFFFF)
    return below(parts, 2 * most + 1) - most
