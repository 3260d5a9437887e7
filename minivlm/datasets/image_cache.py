"""A cache of decoded pixels, so that only the first epoch pays for JPEG.

files ──read_image──> pixels, shorter side ≤ s ──> train-80-3f2a91c0.bin   all images end to end, uint8, memory-mapped
                                                   train-80.json           where each file's pixels are, or why not
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minivlm.datasets.images import VERSION, read_image
from minivlm.datasets.tar_index import member
from minivlm.errors import UserError
from minivlm.files import is_own_file, locked, parse_json, read_bytes


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
    """Size and time of a file; of the member of a tar file its size and the tar file's time. UserError if it is missing."""
    if (found := member(path)) is not None:
        return Row(found[2], found[3])
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    return Row(status.st_size, status.st_mtime_ns)
