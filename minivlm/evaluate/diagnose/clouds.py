"""Draws two clouds of vectors in the plane that shows most of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from minivlm.fonts import font
from minivlm.pictures import CURVES, EDGE, INK, MARGIN, PALE, PAPER

SIDE, DRAWN = 360, 200  # pixels of a panel, and pairs that are drawn
IMAGES, TEXTS = CURVES[0], CURVES[1]


def plane(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """(N, D) twice → (N, 2) twice, and the share of the variance along both axes: the principal components of all 2N
    vectors, by a singular value decomposition of the centred ones."""
    both = torch.cat([x, y])
    both = both - both.mean(dim=0)
    _, values, directions = torch.linalg.svd(both, full_matrices=False)
    flat = both @ directions[:2].T
    flat = torch.nn.functional.pad(flat, (0, 2 - flat.shape[1]))
    shares = values.square() / values.square().sum().clamp(min=1e-12)
    return flat[: len(x)], flat[len(x) :], [*shares[:2].tolist(), 0.0][:2]


def clouds(panels: Mapping[str, tuple[Tensor, Tensor]], *, data: str) -> Image.Image:
    """panels: title → the vectors (N, D) of images and of their texts. A point each, and a line between the two of a pair."""
    top = MARGIN + 56
    page = Image.new("RGB", (MARGIN + len(panels) * (SIDE + MARGIN), top + SIDE + 60), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), f"Images and texts in one space: {data}", INK, font(17))
    for i, (title, vectors) in enumerate(panels.items()):
        left = MARGIN + i * (SIDE + MARGIN)
        x, y, shares = plane(*vectors)
        draw.text((left, top - 24), title, INK, font(13))
        draw.rectangle((left, top, left + SIDE, top + SIDE), outline=EDGE)
        draw_pairs(draw, x, y, (left, top))
        axes = f"two principal axes: {shares[0]:.0%} and {shares[1]:.0%} of the variance"
        draw.text((left, top + SIDE + 6), axes, PALE, font(13))
    for i, (name, colour) in enumerate((("image", IMAGES), ("text", TEXTS))):
        x, y = MARGIN + 90 * i, top + SIDE + 40
        draw.ellipse((x, y - 5, x + 10, y + 5), colour)
        draw.text((x + 16, y), name, INK, font(13), anchor="lm")
    return page


def draw_pairs(draw: ImageDraw.ImageDraw, x: Tensor, y: Tensor, corner: tuple[int, int]) -> None:
    """One scale for both axes, as large as fits."""
    step = max(1, len(x) // DRAWN)
    both = torch.stack([x, y])[:, ::step][:, :DRAWN]  # (2, n, 2)
    low, high = both.amin(dim=(0, 1)), both.amax(dim=(0, 1))
    scale = (SIDE - 24) / max(float((high - low).max()), 1e-12)
    middle = torch.tensor(corner) + SIDE / 2
    places = ((both - (low + high) / 2) * scale + middle).tolist()
    for a, b in zip(*places, strict=True):
        draw.line((*a, *b), EDGE)
    for cloud, colour in zip(places, (IMAGES, TEXTS), strict=True):
        for px, py in cloud:
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), colour)
