"""Image files, and the members of tar files, to RGB pixels, safely."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from PIL import ExifTags, Image

from minivlm.datasets.tar_index import open_anywhere
from minivlm.errors import UserError

VERSION = 2  # of what a file's pixels are here; what was cached by another is made anew
MAX_PIXELS = 89_478_485  # pillow's own limit (a quarter of a gigabyte in RGB), where pillow only warns and we refuse
# Formats whose readers do nothing but decode pixels. Of pillow's others EPS starts Ghostscript, WMF asks the system to
# draw, IPTC opens what it holds as any format, and GRIB, HDF5 and BUFR call whatever handler was registered.
COMMON = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "ICO", "PSD", "DDS")
RARE = ("DIB", "CUR", "ICNS", "PCX", "DCX", "SGI", "SUN", "XBM", "XPM", "MSP", "PIXAR", "GBR", "FLI", "FTEX", "BLP")
WITHOUT_MARK = ("TGA", "IM", "PCD")  # their first bytes do not identify them, so they are tried last
TURNS = {  # EXIF orientation → what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def formats() -> list[str]:
    """The formats above that this pillow reads."""
    Image.init()
    return [name for name in (*COMMON, *RARE, *WITHOUT_MARK) if name in Image.OPEN]


@cache
def extensions() -> frozenset[str]:
    """Endings of the files that are taken for images: those of `formats`, as pillow knows them."""
    known = Image.registered_extensions().items()
    return frozenset(ending for ending, name in known if name in formats() or name == "MPO")


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """The image file, or member of a tar file, header read, size bearable; whatever fails here or in the body becomes one
    UserError.

    All images go through here: it opens only regular files, and only in formats that are safe to read.
    """
    with open_anywhere(path) as file:
        try:
            with Image.open(file, formats=formats()) as image:
                refuse_bomb(image.size)
                yield image
        except Exception as error:  # whatever a decoder throws at arbitrary bytes means the same: no image comes out
            raise UserError(f"{path} cannot be read as an image: {reason(error)}.") from error


def read_image(path: str | os.PathLike, shorter_side: int | None = None) -> Image.Image:
    """The image file as an upright RGB image; UserError where it is missing, broken, no image or too large.

    What `to_rgb` makes of it; of an animation, the first frame. With `shorter_side`, a larger image is shrunk to it
    (bicubic), a smaller one left alone.
    """
    with opened(path) as image:
        if shorter_side:
            # A JPEG decoder can skip detail on its way down: twice the wanted size is enough to shrink from.
            image.draft(None, (2 * shorter_side, 2 * shorter_side))
        upright = to_rgb(image)
    return shrink(upright, shorter_side) if shorter_side else upright


def check_header(path: str | os.PathLike) -> None:
    """UserError unless `path` is there, starts like an image and declares a bearable size. Decodes nothing."""
    with opened(path):
        pass


def refuse_bomb(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"its header declares {size[0]} x {size[1]} pixels, more than the limit of {MAX_PIXELS}")


def reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image format that is read here"
    return str(error).rstrip(".") or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Any pillow image → upright RGB: EXIF rotation applied, transparency over white, 16 bits scaled to 8, palette and
    CMYK converted. ValueError for pixels without a known range."""
    image.load()  # before it is asked how it lies: a TIFF turns itself
    turn = TURNS.get(orientation(image))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers without a known range")
    if image.mode.startswith("I"):
        rgb = from_integers(image)
    elif image.mode in ("La", "RGBa", "LA", "PA", "RGBA") or "transparency" in image.info:
        # A colour that stands for "transparent" has 16 bits in a file of 16 bits, of which pillow keeps the upper 8.
        if isinstance(key := image.info.get("transparency"), tuple) and max(key) > 255:
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in key)
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    else:
        rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # EXIF is bytes from anywhere: a damaged block does not give the orientation
        return None


def from_integers(image: Image.Image) -> Image.Image:
    """A gray image of 16 or 32 bits. pillow's own conversion would clip it to white.

    A file of 16 bits is scaled by its depth, however dark it is. 32 bits do not define white: 255 where no
    pixel is above, else 65535. ValueError beyond that.
    """
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels are numbers from {low} to {high}, and what is white among them is not known")
    sixteen = image.mode != "I" or image.format in ("PNG", "PPM") or high > 255
    gray = (values // 257 if sixteen else values).astype(np.uint8)
    if isinstance(key := image.info.get("transparency"), int):
        gray[values == key] = 255
    return Image.fromarray(gray).convert("RGB")


def shrink(image: Image.Image, shorter_side: int) -> Image.Image:
    """Scaled down so that the shorter side is `shorter_side`, the longer one rounded; never enlarged."""
    size = shrunk_size(image.size, shorter_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


def shrunk_size(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    scale = shorter_side / min(size)
    return size if scale >= 1 else tuple(max(shorter_side, round(side * scale)) for side in size)
