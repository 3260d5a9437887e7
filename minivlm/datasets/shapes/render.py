"""Draws scenes of the shapes world, many at a time. Integers only, so that the bytes are the same everywhere.

ground + slope ─→ canvas ←─ objects: paint · alpha, from an atlas of sprites
                    └─→ + noise, a window of one long film ─→ uint8
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from minivlm.datasets.shapes.scenes import RADII, SHAPES, UNIT, Scenes, raw_draws

SUBPIXELS = 8  # along each side of a pixel: 64 samples, so alpha runs from 0 to 64 and paint · alpha fits 16 bits
BLOCK = 64  # scenes drawn at once: few enough to stay in the processor's cache
FILM_STREAM = 1 << 32  # far from the streams that scenes are drawn from

# Corners in thousandths of the radius, to the right and down, around the middle of the bounding box.
POLYGONS = {
    "square": [(-880, -880), (880, -880), (880, 880), (-880, 880)],
    "triangle": [(0, -866), (1000, 866), (-1000, 866)],
    "star": [(0, -951), (284, -291), (1000, -225), (460, 250), (618, 951), (0, 584)],  # and its mirror image
    "cross": [(-300, -960), (300, -960), (300, -300), (960, -300), (960, 300), (300, 300), (300, 960), (-300, 960)],
    "diamond": [(0, -1000), (800, 0), (0, 1000), (-800, 0)],
}
POLYGONS["star"] += [(-x, y) for x, y in POLYGONS["star"][-2:0:-1]]
POLYGONS["cross"] += [(-300, 300), (-960, 300), (-960, -300), (-300, -300)]


def render(scenes: Scenes, image_size: int) -> np.ndarray:
    """n scenes → (n, S, S, 3) uint8 RGB."""
    images = np.empty((len(scenes), image_size, image_size, 3), dtype=np.uint8)
    for start in range(0, len(scenes), BLOCK):
        block = slice(start, start + BLOCK)
        images[block] = render_block(scenes.take(block), image_size)
    return images


def render_block(scenes: Scenes, S: int) -> np.ndarray:
    """A row of pixels is one run of 3 S numbers: NumPy is slow where the innermost axis is as short as RGB."""
    n, sprites = len(scenes), {int(by): atlas(S, int(by)) for by in np.unique(scenes.shrink)}
    margin = (
        max(sprite.shape[-2] for sizes in sprites.values() for sprite in sizes) // 2
    )  # so that no sprite leaves the canvas
    canvas = np.zeros((n, S + 2 * margin, 3 * (S + 2 * margin)), dtype=np.int16)
    image = canvas[:, margin:-margin, 3 * margin : -3 * margin]  # (n, S, 3 S), a view
    image[:] = background(scenes, S)
    for k in range(scenes.present.shape[1]):
        for by, sizes in sprites.items():
            for size, sprite in enumerate(sizes):
                rows = np.flatnonzero((scenes.count > k) & (scenes.size[:, k] == size) & (scenes.shrink == by))
                paste(canvas, margin, scenes, k, rows, sprite, S)
    image += noise(scenes, S)
    return np.clip(image, 0, 255).astype(np.uint8).reshape(n, S, S, 3)


def background(scenes: Scenes, S: int) -> np.ndarray:
    """(n, S, 3 S): a plain colour, lit a little from one side."""
    offset = 2 * np.arange(S, dtype=np.int16) + 1 - S  # −S … S
    across, down = (scenes.slope[:, i, None] * offset // S for i in (0, 1))  # (n, S)
    row = scenes.ground[:, None] + across[:, :, None]  # (n, S, 3)
    return row.reshape(-1, 1, 3 * S) + down[:, :, None]


def paste(
    canvas: np.ndarray, margin: int, scenes: Scenes, k: int, rows: np.ndarray, sprite: np.ndarray, S: int
) -> None:
    """Paint the k-th object of the scenes `rows`, which have sprites of one size."""
    side = sprite.shape[2]
    left, top = ((centre[rows, k] * S + UNIT // 2) // UNIT + margin - side // 2 for centre in (scenes.x, scenes.y))
    alpha = sprite[scenes.shape[rows, k], scenes.step[rows, k]]  # (m, side, 3 side)
    paint = np.tile(scenes.paint[rows, k], side)[:, None]  # (m, 1, 3 side)
    windows = sliding_window_view(canvas, (side, 3 * side), axis=(1, 2), writeable=True)  # [row, top, left] is a window
    under = windows[rows, top, 3 * left]
    windows[rows, top, 3 * left] = under + ((paint - under) * alpha >> 6)


def noise(scenes: Scenes, S: int) -> np.ndarray:
    """(n, S, 3 S): every image takes its window of the film, at its own place and strength."""
    windows = sliding_window_view(film(), 3 * S * S)
    grain = windows[scenes.grain[:, 0]].astype(np.int16)  # (n, 3 S S), −127 … 127
    grain *= scenes.grain[:, 1:].astype(np.int16)
    grain >>= 7
    return grain.reshape(-1, S, 3 * S)


@functools.cache
def film() -> np.ndarray:
    """(4 Mi,) int8 noise, more often small than large. Drawn once: fresh noise for every image would be slow."""
    halves = raw_draws(0, FILM_STREAM, 1 << 20).astype("<u8").view(np.uint8).reshape(2, -1) >> 1  # 0 … 127
    return halves[0].astype(np.int8) - halves[1].astype(np.int8)


@functools.cache
def atlas(S: int, shrink: int = 1) -> list[np.ndarray]:
    """Small and large objects: alpha from 0 to 64, (shapes, radii, side, 3 side) int16, three times for RGB."""
    sprites = []
    for radii in RADII // shrink:
        side = 2 * (int(radii.max()) * S // UNIT + 1)
        offset = (
            2 * np.arange(side // 2 * SUBPIXELS, dtype=np.int64) + 1
        )  # of a sample from the middle, in half samples
        alpha = np.empty((len(SHAPES), len(radii), side, side), dtype=np.int16)
        for i, shape in enumerate(SHAPES):
            for j, radius in enumerate(radii.tolist()):
                half = offset * 1000 * UNIT // (2 * SUBPIXELS * S * radius)  # in thousandths of the radius
                line = np.concatenate([-half[::-1], half])
                samples = inside(shape, line, line[:, None]).reshape(side, SUBPIXELS, side, SUBPIXELS)
                alpha[i, j] = samples.sum(axis=(1, 3))
        sprites.append(np.repeat(alpha, 3, axis=-1))
    return sprites


def inside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether points (x to the right, y down, in thousandths of the radius) belong to a shape."""
    if shape == "circle":
        return x * x + y * y <= 1000**2
    if shape == "ring":
        square = x * x + y * y
        return (square >= 500**2) & (square <= 1000**2)
    if shape == "heart":  # (x² + y² − 1)³ ≤ x² y³, here in hundredths and moved to the middle of its box
        x, y = abs(x) * 114 // 1000, 12 - y * 114 // 1000
        return (x * x + y * y - 100**2) ** 3 <= x * x * y * y * y * 100
    return inside_polygon(POLYGONS[shape], x, y)


def inside_polygon(corners: list[tuple[int, int]], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The even-odd rule: from a point inside, a ray to the right crosses the outline an odd number of times."""
    odd = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 > y1:
            x0, y0, x1, y1 = x1, y1, x0, y0
        odd ^= (y0 <= y) & (y < y1) & ((x - x0) * (y1 - y0) < (x1 - x0) * (y - y0))
    return odd
