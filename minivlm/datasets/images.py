"""Image files to RGB pixels, safely; and a cache of decoded pixels, so that only the first epoch pays for JPEG.

files ──read_image──> pixels, shorter side ≤ s ──> train-80-3f2a91c0.bin   all images end to end, uint8, memory-mapped
                                                   train-80.json           where each file's pixels are, or why not
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from minivlm.errors import UserError

MAX_PIXELS = 89_478_485  # pillow's own limit (a quarter of a gigabyte in RGB), where pillow only warns and we refuse
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """The image file, header read, size bearable; whatever fails here or in the body becomes one UserError."""
    try:
        with Image.open(path) as image:
            refuse_bomb(image.size)
            yield image
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except Exception as error:  # whatever a decoder throws at arbitrary bytes means the same: no picture comes out
        raise UserError(f"{path} cannot be read as an image: {reason(error)}.") from error


def read_image(path: str | os.PathLike, shorter_side: int | None = None) -> Image.Image:
    """The image file as an upright RGB image; UserError where it is missing, broken, no image or too large.

    EXIF rotation is applied, transparency laid over white, 16-bit gray scaled to 8 bits, palette and CMYK converted;
    of an animation, the first frame. With `shorter_side`, a larger image is shrunk to it (bicubic), a smaller one
    left alone.
    """
    with opened(path) as image:
        if shorter_side:
            # A JPEG decoder can skip detail on its way down: twice the wanted size is enough to shrink from.
            image.draft(None, (2 * shorter_side, 2 * shorter_side))
        upright = to_rgb(ImageOps.exif_transpose(image))
    return shrink(upright, shorter_side) if shorter_side else upright


def check_header(path: str | os.PathLike) -> None:
    """UserError unless `path` is there, begins like an image and declares a bearable size. Decodes nothing."""
    with opened(path):
        pass


def refuse_bomb(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"its header declares {size[0]} x {size[1]} pixels, more than the limit of {MAX_PIXELS}")


def reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is no image format that pillow knows"
    return str(error).rstrip(".") or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Any pillow mode → RGB, with transparency over white."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers without a known range")
    if image.mode.startswith("I"):  # 16-bit gray; pillow's own conversion would clip it to white
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


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
    """One file in the index. `bytes` and `modified` (ns) tell whether it changed; `error`: why it cannot be read."""

    bytes: int
    modified: int
    offset: int = 0
    height: int = 0
    width: int = 0
    error: str | None = None

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
        if wanted.keys() != self.rows.keys() or not all(row.same_file(self.rows[key]) for key, row in wanted.items()):
            self.build(wanted)
            self.rows, self.pixels = self.load()
        self.errors = {key: row.error for key, row in self.rows.items() if row.error}

    def __getitem__(self, key: str) -> np.ndarray:
        row = self.rows[key]
        end = row.offset + row.height * row.width * 3
        return self.pixels[row.offset : end].reshape(row.height, row.width, 3)

    def load(self) -> tuple[dict[str, Row], np.ndarray]:
        """What is on disk; nothing at all if there is no index, or one that does not fit its pixels."""
        nothing = {}, np.zeros(0, dtype=np.uint8)
        try:
            index = json.loads(self.index.read_text())
            pixels = self.folder / index["pixels"]
            if pixels.stat().st_size != index["bytes"]:
                return nothing
        except (FileNotFoundError, json.JSONDecodeError):
            return nothing  # never built, or removed in part by hand: build() makes it whole
        # Copy-on-write, since torch complains about arrays that are read-only; and a plain ndarray over the map, since
        # slicing an np.memmap costs ten times as much.
        mapped = np.asarray(np.memmap(pixels, dtype=np.uint8, mode="c")) if index["bytes"] else nothing[1]
        return {key: Row(**row) for key, row in index["rows"].items()}, mapped

    def build(self, wanted: dict[str, Row]) -> None:
        """Write pixels and index, under temporary names first: a build that is killed leaves the old cache."""
        pixels, index = (self.folder / f".building-{os.getpid()}{suffix}" for suffix in (".bin", ".json"))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with pixels.open("wb") as file:
                for key, image in self.decoded(wanted):
                    wanted[key].offset, (wanted[key].height, wanted[key].width) = file.tell(), image.shape[:2]
                    file.write(image.tobytes())
                total = file.tell()
            rows = {key: asdict(row) for key, row in wanted.items()}
            # The name tells the content apart, so that two processes that build at once write the same file.
            final = f"{self.index.stem}-{zlib.crc32(json.dumps(rows).encode()):08x}.bin"
            index.write_text(json.dumps({"pixels": final, "bytes": total, "rows": rows}))
            os.replace(pixels, self.folder / final)
            os.replace(index, self.index)
        except OSError as error:
            raise UserError(
                f"The cache of decoded images in {self.folder} could not be written ({error.strerror or error}): "
                "free some space there, or name another folder as cache."
            ) from error
        finally:
            pixels.unlink(missing_ok=True)
            index.unlink(missing_ok=True)
        for old in self.folder.glob(f"{self.index.stem}-????????.bin"):
            if old.name != final:
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
        for start in range(0, len(arguments), 256):  # a few at a time: bounded memory, and Ctrl-C is heard soon
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
    """Where the cache of `directory` belongs: inside it, or under the user's cache folder if it is marked read-only."""
    directory = directory.resolve()
    anyone_may_write = directory.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    if anyone_may_write and os.access(directory, os.W_OK):  # os.access alone says yes to root everywhere
        return directory / ".minivlm_cache"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "minivlm" / f"{directory.name}-{zlib.crc32(os.fsencode(directory)):08x}"
