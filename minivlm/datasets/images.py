"""Image files to RGB pixels, safely; and a cache of decoded pixels, so that only the first epoch pays for JPEG.

files ──read_image──> pixels, shorter side ≤ s ──> train-80-3f2a91c0.bin   all images end to end, uint8, memory-mapped
                                                   train-80.json           where each file's pixels are, or why not
"""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from minivlm.errors import UserError
from minivlm.files import is_own_file, locked, open_regular, parse_json, read_bytes

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
    """The image file, header read, size bearable; whatever fails here or in the body becomes one UserError.

    All image files go through here: it opens only regular files, and only in formats that are safe to read.
    """
    with open_regular(path) as file:
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
    scale = shorter_side / min(image.size)
    if scale >= 1:
        return image
    size = [max(shorter_side, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)


# ---------------------------------------------------------------------------------------------------------------- cache


@dataclass
class Row:
    """One file in the index. `bytes` and `modified` (ns) show whether it changed; `error`: why it cannot be read."""

    bytes: int
    modified: int
    offset: int = 0
    height: int = 0
    width: int = 0
    error: str | None = None

    def fits(self, size: int) -> bool:
        """Whether a build writes such a row for a file of `size` bytes of pixels; indexes come with folders from anywhere."""
        numbers = (self.bytes, self.modified, self.offset, self.height, self.width)
        if any(type(number) is not int for number in numbers):
            return False
        if self.error is not None:
            return isinstance(self.error, str) and self.error != ""
        inside = self.offset >= 0 and self.offset + self.height * self.width * 3 <= size
        return inside and self.height > 0 and self.width > 0

    def same_file(self, other: Row) -> bool:
        return (self.bytes, self.modified) == (other.bytes, other.modified)


class ImageCache:
    """The decoded images of `keys` (paths relative to `root`), shorter side at most `shorter_side`.

    Opened for the first time it decodes every file behind a progress bar; later it reads the index alone, and decodes
    only what is new or has changed. `errors` (key → sentence) holds the files that cannot be read; `self[key]` gives
    the others as (H, W, 3) uint8, a view of the memory-mapped file.
    """

    def __init__(self, root: Path, keys: Sequence[str], folder: Path, *, shorter_side: int, name: str = "train"):
        self.root, self.folder, self.shorter_side = root, folder, shorter_side
        self.index = folder / f"{name}-{shorter_side}.json"
        self.rows, self.pixels = self.load()
        wanted = {key: stamp(root / key) for key in keys}
        if not self.holds(wanted):
            with self.alone():
                self.rows, self.pixels = self.load()  # what another process has built meanwhile
                if not self.holds(wanted):
                    self.build(wanted)
                    self.rows, self.pixels = self.load()
        self.errors = {key: row.error for key, row in self.rows.items() if row.error}

    def __getitem__(self, key: str) -> np.ndarray:
        row = self.rows[key]
        end = row.offset + row.height * row.width * 3
        return self.pixels[row.offset : end].reshape(row.height, row.width, 3)

    def holds(self, wanted: dict[str, Row]) -> bool:
        """Whether it is about these files, and none has changed since."""
        if wanted.keys() != self.rows.keys():
            return False
        return all(row.same_file(self.rows[key]) for key, row in wanted.items())

    def load(self) -> tuple[dict[str, Row], np.ndarray]:
        """What is on disk; nothing at all if there is no index, or one that is not of our making or does not fit its
        pixels: build() makes it anew."""
        nothing = {}, np.zeros(0, dtype=np.uint8)
        try:
            index = parse_json(read_bytes(self.index), texts=False)
            rows = {key: Row(**row) for key, row in index["rows"].items()}
            pixels, size = self.folder / index["pixels"], index["bytes"]
            ours = index["version"] == VERSION and self.names(index["pixels"]) and is_own_file(pixels)
            if not ours or pixels.stat().st_size != size or not all(row.fits(size) for row in rows.values()):
                return nothing
        except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError):
            return nothing
        # Copy-on-write, since torch complains about arrays that are read-only; and a plain ndarray over the map, since
        # slicing an np.memmap costs ten times as much.
        return rows, np.asarray(np.memmap(pixels, dtype=np.uint8, mode="c")) if size else nothing[1]

    def names(self, pixels: str) -> bool:
        """Whether a file of pixels may have this name."""
        return re.fullmatch(re.escape(self.index.stem) + r"-[0-9a-f]{8}\.bin", pixels) is not None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Two processes that want one cache build it one after the other."""
        with self.disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / "lock"):
                yield

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"The cache of decoded images in {self.folder} could not be written ({error.strerror or error}): "
                "free some space there, or name another folder as cache."
            ) from error

    def build(self, wanted: dict[str, Row]) -> None:
        """Write pixels and index, under temporary names first: a build that is killed leaves the old cache."""
        pixels, index = (self.folder / f".building-{os.getpid()}{suffix}" for suffix in (".bin", ".json"))
        for leftover in (pixels, index):
            leftover.unlink(missing_ok=True)
        try:
            with pixels.open("xb") as file:
                for key, image in self.decoded(wanted):
                    wanted[key].offset, (wanted[key].height, wanted[key].width) = file.tell(), image.shape[:2]
                    file.write(image.tobytes())
                total = file.tell()
            rows = {key: asdict(row) for key, row in wanted.items()}
            # The name identifies the content: a process that has mapped the earlier pixels still reads them.
            final = f"{self.index.stem}-{zlib.crc32(json.dumps(rows).encode()):08x}.bin"
            index.write_text(
                json.dumps({"version": VERSION, "pixels": final, "bytes": total, "rows": rows}), encoding="utf-8"
            )
            os.replace(pixels, self.folder / final)
            os.replace(index, self.index)
        finally:
            pixels.unlink(missing_ok=True)
            index.unlink(missing_ok=True)
        for old in self.folder.glob(f"{self.index.stem}-*.bin"):
            if self.names(old.name) and old.name != final:
                old.unlink(missing_ok=True)

    def decoded(self, wanted: dict[str, Row]) -> Iterator[tuple[str, np.ndarray]]:
        """(key, pixels) of every readable file, in order; an `error` is noted in its row. Shows a progress bar."""

        def decode(key: str) -> np.ndarray | UserError:
            old = self.rows.get(key)
            if old and wanted[key].same_file(old):
                return UserError(old.error) if old.error else self[key]
            try:
                return np.asarray(read_image(self.root / key, self.shorter_side))
            except UserError as error:
                return error

        for key, image in zip(wanted, in_parallel(decode, list(wanted), "decoding images"), strict=True):
            if isinstance(image, UserError):
                wanted[key].error = str(image)
            else:
                yield key, image


def in_parallel(function: Callable, arguments: Sequence, title: str) -> Iterator:
    """function(argument) for each, in order, on all cores (pillow frees Python's lock). Shows a progress bar."""
    from tqdm import tqdm

    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(arguments), desc=title) as bar:
        for start in range(0, len(arguments), 256):  # a few at a time: bounded memory, and Ctrl-C takes effect soon
            for result in pool.map(function, arguments[start : start + 256]):
                yield result
                bar.update()


def stamp(path: Path) -> Row:
    """Size and time of a file. UserError if it is missing."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    return Row(status.st_size, status.st_mtime_ns)


def cache_folder(directory: Path) -> Path:
    """Where the cache of `directory` belongs: inside it, or under the user's cache folder if it is marked read-only, or
    brings along a link that leads elsewhere."""
    directory = directory.resolve()
    inside = directory / ".minivlm_cache"
    anyone_may_write = directory.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    if anyone_may_write and os.access(directory, os.W_OK) and not inside.is_symlink():  # os.access alone: root may all
        return inside
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "minivlm" / f"{directory.name}-{zlib.crc32(os.fsencode(directory)):08x}"
