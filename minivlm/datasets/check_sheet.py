"""The sheet of `python -m minivlm.datasets.check DIR --save sheet.png`: each sample as evaluation and training see it."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path

import numpy as np

from minivlm.datasets.entries import Item
from minivlm.errors import UserError

Reader = Callable[[Item, int | None], np.ndarray]  # (item, shorter side or None for the original) → (H, W, 3) uint8
TILE, VIEWS, CAPTION = 128, 5, 36  # pixels, augmented views, pixels for two lines of caption


def draw_sheet(samples: list[tuple[Item, str]], read: Reader, processor, seed: int):
    """A PIL image, one row a sample: what the processor makes of the original, VIEWS augmentations, and the caption."""
    from PIL import Image, ImageDraw

    from minivlm.datasets.transforms import TrainTransform
    from minivlm.fonts import legible, write
    from minivlm.pictures import line_step, wrap

    config = processor.config
    transform = TrainTransform(config.image_size, config.mean, config.std)
    sheet = Image.new("RGB", ((1 + VIEWS) * (TILE + 4) + 8, len(samples) * (TILE + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (item, caption) in enumerate(samples):
        top = row * (TILE + CAPTION)
        small = read(item, ceil(1.25 * config.image_size))  # what the cache holds
        rngs = [np.random.default_rng((seed, row, i)) for i in range(VIEWS)]
        views = [processor.images([read(item, None)])[0], *transform([small] * VIEWS, [caption] * VIEWS, rngs)]
        for column, view in enumerate(views):
            left = column * (TILE + 4) + (8 if column else 0)  # a gap behind the evaluation view
            sheet.paste(to_image(view, config), (left, top))
        text = legible(f"{caption}   ({item.image})")
        for i, line in enumerate(wrap(text, 12, sheet.width - 4)[:2]):
            write(pen, (2, top + TILE + 3 + i * line_step(12)), line, 12, "black")
    return sheet


def save_sheet(sheet, path: Path) -> None:
    try:
        sheet.save(path)
    except (OSError, ValueError, KeyError) as error:  # no such folder, no room; an ending that names no image format
        raise UserError(f"the image {path} could not be written: {error}.") from error
    print(f"\nwrote {path}: the evaluation view, then augmented views of the same image")


def to_image(view, config):
    """(3, S, S) normalised → a TILE × TILE PIL image, pixels enlarged without smoothing."""
    from PIL import Image

    pixels = view.permute(1, 2, 0).numpy() * np.array(config.std) + np.array(config.mean)
    image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    return image.resize((TILE, TILE), Image.Resampling.NEAREST)
