"""Images → arrays of one size: opened, padded, resized, cropped and normalised as the published preprocessing does it,
to the bit where that works on PIL images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Union

import numpy as np

from minivlm.errors import UserError
from minivlm.processor_config import ProcessorConfig

if TYPE_CHECKING:
    from PIL import Image

Picture = Union["Image.Image", str, os.PathLike, np.ndarray]  # a path or an (H, W, 3) uint8 array stand for an image


def as_list(images: Picture | Sequence[Picture]) -> Sequence[Picture]:
    """Several images as they are; one image in a list."""
    from PIL.Image import Image

    one = isinstance(images, (str, os.PathLike, Image)) or (isinstance(images, np.ndarray) and images.ndim == 3)
    return [images] if one else images


def open_image(picture: Picture) -> Image.Image:
    """A path, an array or a PIL image of any mode → upright RGB, transparency over white."""
    from PIL import Image

    from minivlm.datasets.images import read_image, reason, to_rgb

    if isinstance(picture, (str, os.PathLike)):
        return read_image(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise TypeError(f"an array must be (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
        return Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        try:
            return to_rgb(picture)
        except Exception as error:  # one that was opened, but never loaded, fails in as many ways as a file
            raise UserError(f"an image cannot be read: {reason(error)}.") from error
    raise TypeError(f"an image is a PIL image, a path or an array, not {type(picture).__name__}")


def views(image: Image.Image, config: ProcessorConfig) -> list[np.ndarray]:
    """The image as a whole, and its tiles row by row; each (S, S, 3).  Liu et al. 2024 (LLaVA-NeXT), "AnyRes"."""
    n, S, image = config.tiles, config.image_size, pad(image, config)
    whole = crop(np.asarray(resize(image, config)), config)
    if n == 1:
        return [whole]
    large = crop(np.asarray(resize(image, config, n)), config, n)  # (n·S, n·S, 3)
    return [whole, *large.reshape(n, S, n, S, 3).swapaxes(1, 2).reshape(-1, S, S, 3)]


def pad(image: Image.Image, config: ProcessorConfig) -> Image.Image:
    """The image in the middle of a square, as LLaVA-1.5 was trained (Liu et al. 2024, §3.2)."""
    from PIL.Image import new

    from minivlm.datasets.images import MAX_PIXELS

    (W, H), side = image.size, max(image.size)
    if config.pad_color is None or W == H:
        return image
    if side * side > MAX_PIXELS:  # it will be made smaller anyway, but the square would fill the memory before
        scale = MAX_PIXELS**0.5 / side
        W, H = max(1, int(W * scale)), max(1, int(H * scale))
        image, side = image.resize((W, H)), max(W, H)
    square = new("RGB", (side, side), config.pad_color)
    square.paste(image, ((side - W) // 2, (side - H) // 2))
    return square


def resize(image: Image.Image, config: ProcessorConfig, times: int = 1) -> Image.Image:
    """times: as many times larger than the config says."""
    from PIL.Image import Resampling

    from minivlm.datasets.images import MAX_PIXELS

    c = config
    if c.resize == "none":
        return image
    size, (W, H) = (c.resize_to or c.image_size) * times, image.size
    if c.resize == "squash":
        W, H = size, size
    else:
        short, long = min(W, H), max(W, H)
        long = int(size * long / short)
        W, H = (size, long) if W <= H else (long, size)
    if W * H <= MAX_PIXELS:
        return image.resize((W, H), Resampling[c.resample.upper()])
    if c.crop == "none":
        raise UserError(f"an image of {image.width}×{image.height} is too narrow to be resized to {W}×{H} pixels.")
    return resize_middle(image, (W, H), config, times, Resampling[c.resample.upper()])


def resize_middle(
    image: Image.Image, size: tuple[int, int], config: ProcessorConfig, times: int, resample: int
) -> Image.Image:
    """Resize only what `crop` will keep of the image: an image of 1×20,000 would fill the memory."""
    S = config.image_size * times
    starts = [max(0, first_row(side - S, config)) for side in size]
    ends = [min(side, start + S) for side, start in zip(size, starts, strict=True)]
    scale = [own / side for own, side in zip(image.size, size, strict=True)]
    box = [place * by for place, by in zip(starts + ends, scale * 2, strict=True)]
    return image.resize([end - start for end, start in zip(ends, starts, strict=True)], resample, box=tuple(box))


def crop(pixels: np.ndarray, config: ProcessorConfig, times: int = 1) -> np.ndarray:
    """(H, W, 3) → the middle (S, S, 3); black around an image that is smaller."""
    if config.crop == "none":
        return pixels
    S = config.image_size * times
    canvas = np.zeros((S, S, 3), dtype=np.uint8)
    top, left = (first_row(n - S, config) for n in pixels.shape[:2])
    inside = pixels[max(top, 0) : top + S, max(left, 0) : left + S]
    h, w = inside.shape[:2]
    canvas[max(-top, 0) :][:h, max(-left, 0) :][:, :w] = inside
    return canvas


def first_row(spare: int, config: ProcessorConfig) -> int:
    """The first pixel of a crop of a side with so many pixels too many; negative: so much black before it."""
    if config.crop == "floor":
        return spare // 2
    return round(spare / 2) if spare > 0 else -(-spare // 2)


def normalise(pixels: np.ndarray, config: ProcessorConfig) -> np.ndarray:
    """(B, H, W, 3) uint8 → (B, 3, H, W) float32, through a table of the 256 values that a channel can have."""
    c = config
    levels = (np.arange(256) * c.rescale).astype(np.float32)[:, None]
    values = (levels - np.float32(c.mean)) / np.float32(c.std)  # (256, 3)
    return np.stack([values[:, channel][pixels[..., channel]] for channel in range(3)], axis=1)
