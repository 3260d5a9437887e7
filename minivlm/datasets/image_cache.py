"""A cache of decoded pixels, so that only the first epoch pays for JPEG; what it has no room for is decoded by workers.

files ──read_image──> pixels, shorter side ≤ s ──> train-80-3f2a91c0.bin   all images end to end, uint8, memory-mapped
                                                   train-80.json           where each file's pixels are, or why not
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path

import numpy as np

from minivlm.datasets.images import VERSION, opened, read_image, shrunk_size
from minivlm.datasets.parallel import in_parallel, workers
from minivlm.datasets.source import Source, most_bytes
from minivlm.datasets.stamps import stamp_all
from minivlm.errors import UserError
from minivlm.files import cache_folder, is_own_file, locked, parse_json, read_bytes
from minivlm.sizes import free_bytes, in_words

SHARE = 0.5  # of the free disk is taken where --data.cache says nothing
LEFT = 2**30  # bytes of it that are left free in any case
SAMPLED = 1000  # headers by which the size of a cache is estimated

BYTES, MODIFIED, OFFSET, HEIGHT, WIDTH = range(5)  # columns of a row; the first two show whether the file changed
NOT_KEPT = -1  # the offset of an image that is decoded whenever it is wanted


def open_cache(
    source: str | os.PathLike, keys: Sequence[str], *, image_size: int, folder: str | os.PathLike | None = None
) -> ImageCache:
    """The training images of a folder, a quarter larger than the model's: room for a random crop."""
    source = Source.of(source)
    folder = Path(folder) if folder else cache_folder(source.path)
    return ImageCache(source.path, keys, folder, shorter_side=ceil(1.25 * image_size), limit=most_bytes(source.cache))


def decode(paths: Sequence[Path]) -> list[np.ndarray]:
    """The images of files in full size, side by side; copies, since torch wants memory that it may write to."""
    read = lambda path: np.array(read_image(path))
    return list(workers().map(read, paths)) if len(paths) > 1 else [read(path) for path in paths]


class ImageCache:
    """The decoded images of `keys` (paths relative to `root`), shorter side at most `shorter_side`.

    Opened for the first time it decodes every file behind a progress bar; later it reads the index alone, and decodes
    only what is new or has changed. `errors` (key → sentence) holds the files that cannot be read; `self[key]` gives
    the others as (H, W, 3) uint8, a view of the memory-mapped file.

    limit: bytes of pixels that are kept, see `most_bytes`; None: a share of the free disk. The other images are decoded when
    they are wanted, to the same pixels. `notes` says so, and why where the disk is full or may not be written.
    """

    def __init__(
        self,
        root: Path,
        keys: Sequence[str],
        folder: Path,
        *,
        shorter_side: int,
        name: str = "train",
        limit: int | None = None,
    ):
        self.root, self.folder, self.shorter_side, self.limit = root, folder, shorter_side, limit
        self.index = folder / f"{name}-{shorter_side}.json"
        self.notes: list[str] = []
        self.load()
        keys = list(dict.fromkeys(keys))
        stamps = stamp_all(root, keys)
        if not self.holds(keys, stamps):
            with self.alone():
                self.load()  # what another process has built meanwhile
                if not self.holds(keys, stamps):
                    self.build(keys, stamps)
        kept = int((self.rows[:, OFFSET] >= 0).sum())
        if others := len(self.rows) - kept - len(self.errors):
            self.notes.append(
                f"{others} of {len(self.rows)} training images are decoded anew in every epoch: the cache of decoded images "
                f"is {'off' if limit == 0 else 'limited to ' + in_words(self.made_for)} (--data.cache)."
            )

    def __getitem__(self, key: str) -> np.ndarray:
        _, _, offset, height, width = self.rows[self.position[key]].tolist()
        if offset == NOT_KEPT:
            return np.array(read_image(self.root / key, self.shorter_side))  # a copy: torch wants writable memory
        return self.pixels[offset : offset + height * width * 3].reshape(height, width, 3)

    def images(self, keys: Sequence[str]) -> list[np.ndarray]:
        """`self[key]` of each; those that are not kept are decoded side by side."""
        positions = [self.position[key] for key in keys]
        many = (self.rows[positions, OFFSET] == NOT_KEPT).sum() > 1
        return list(workers().map(self.__getitem__, keys)) if many else [self[key] for key in keys]

    def holds(self, keys: list[str], stamps: np.ndarray) -> bool:
        """Whether it is about these files, none has changed since, and there is no room now for many more of them."""
        if len(keys) != len(self.rows) or self.position.keys() != set(keys):
            return False
        mine = self.rows[[self.position[key] for key in keys]] if keys else self.rows
        if not np.array_equal(mine[:, :OFFSET], stamps):
            return False
        decoded = (mine[:, OFFSET] == NOT_KEPT).sum() - len(self.errors)
        return not decoded or self.room() <= self.made_for * (1.5 if self.limit is None else 1.05)

    def room(self) -> int:
        """Bytes that the pixels may take."""
        if self.limit == 0:
            return 0
        free = free_bytes(self.folder)
        return int(free * SHARE) if self.limit is None else min(self.limit, max(0, free - LEFT))

    def load(self) -> None:
        """What is on disk; nothing at all if there is no index, or one that is not of our making or does not fit its
        pixels: build() makes it anew."""
        self.take({}, np.zeros((0, 5), dtype=np.int64), {}, None, 0)
        try:
            index = parse_json(read_bytes(self.index), texts=False)
            size, name, errors = index["bytes"], index["pixels"], index["errors"]
            if index["version"] != VERSION or not self.names(name) or type(index["limit"]) is not int:
                return
            position = {key: i for i, key in enumerate(index["rows"])}
            rows = list(index["rows"].values())
            if {type(number) for row in rows for number in row} - {int}:  # True would count as one
                return
            rows = np.array(rows, dtype=np.int64).reshape(-1, 5)
            pixels = self.folder / name
            if is_own_file(pixels) and pixels.stat().st_size == size and fit(rows, position, errors, size):
                self.take(position, rows, errors, pixels, index["limit"])
        except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
            return

    def take(self, position: dict, rows: np.ndarray, errors: dict, pixels: Path | None, limit: int) -> None:
        self.position, self.rows, self.errors, self.made_for = position, rows, errors, limit
        self.pixels = np.zeros(0, dtype=np.uint8)
        if pixels is not None and pixels.stat().st_size:
            # Copy-on-write, since torch complains about arrays that are read-only; and a plain ndarray over the map, since
            # slicing an np.memmap costs ten times as much.
            self.pixels = np.asarray(np.memmap(pixels, dtype=np.uint8, mode="c"))

    def names(self, pixels: str) -> bool:
        """Whether a file of pixels may have this name."""
        return re.fullmatch(re.escape(self.index.stem) + r"-[0-9a-f]{8}\.bin", pixels) is not None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Two processes that want one cache build it one after the other. Where nothing may be written, none waits."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = locked(self.folder / "lock")
            lock.__enter__()
        except OSError as error:
            self.cannot_write(error)
            yield
            return
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

    def cannot_write(self, error: OSError) -> None:
        self.notes.append(
            f"The cache of decoded images in {self.folder} could not be written ({error.strerror or error}): free some "
            "space there, or choose --data.cache off."
        )

    def build(self, keys: list[str], stamps: np.ndarray) -> None:
        """Write pixels and index, under temporary names first: a build that is killed leaves the old cache. A disk that is
        full keeps what it has room for."""
        pixels, index = (self.folder / f".building-{os.getpid()}{suffix}" for suffix in (".bin", ".json"))
        room = self.room()
        rows = np.concatenate([stamps, np.full((len(keys), 1), NOT_KEPT), np.zeros((len(keys), 2), np.int64)], axis=1)
        errors: dict[str, str] = {}
        try:
            with Pixels(pixels, room) as file:
                for i, image in enumerate(self.decoded(keys, stamps, room)):
                    if isinstance(image, UserError):
                        errors[keys[i]] = str(image)
                    else:
                        rows[i, OFFSET:] = file.add(image), *image.shape[:2]
            if file.error is not None:
                self.cannot_write(file.error)
            final = self.put_in_place(pixels, index, keys, rows, errors, room)
        finally:
            for leftover in (pixels, index):
                with suppress(OSError):  # of a disk that may only be read
                    leftover.unlink(missing_ok=True)
        if final is None:  # nothing can be kept: what was found out serves this process
            rows[:, OFFSET] = NOT_KEPT
        self.take({key: i for i, key in enumerate(keys)}, rows, errors, final, room)

    def put_in_place(
        self, pixels: Path, index: Path, keys: list, rows: np.ndarray, errors: dict, room: int
    ) -> Path | None:
        """The file of pixels under its own name; None: it could not be written."""
        try:
            table = dict(zip(keys, rows.tolist(), strict=True))
            # The name identifies the content: a process that has mapped the earlier pixels still reads them.
            final = f"{self.index.stem}-{zlib.crc32(json.dumps(table).encode()):08x}.bin"
            about = {"version": VERSION, "pixels": final, "bytes": pixels.stat().st_size, "limit": room}
            about |= {"columns": ["bytes", "modified", "offset", "height", "width"], "rows": table, "errors": errors}
            index.write_text(json.dumps(about), encoding="utf-8")
            os.replace(pixels, self.folder / final)
            os.replace(index, self.index)
        except OSError as error:
            self.cannot_write(error)
            return None
        for old in self.folder.glob(f"{self.index.stem}-*.bin"):
            if self.names(old.name) and old.name != final:
                old.unlink(missing_ok=True)
        return self.folder / final

    def decoded(self, keys: list[str], stamps: np.ndarray, room: int) -> Iterator[np.ndarray | UserError]:
        """The pixels of every file, in order, or why it cannot be read. Shows a progress bar with the size of the cache."""

        def decode(i: int) -> np.ndarray | UserError:
            key, old = keys[i], self.position.get(keys[i])
            if old is not None and np.array_equal(self.rows[old, :OFFSET], stamps[i]):
                if key in self.errors:
                    return UserError(self.errors[key])
                if self.rows[old, OFFSET] != NOT_KEPT:
                    return self[key]
            try:
                return np.asarray(read_image(self.root / key, self.shorter_side))
            except UserError as error:
                return error

        size = self.estimate(keys)
        kept = in_words(min(size, room)) + (f" of about {in_words(size)}" if size > room else "")
        title = f"decoding images (cache: {kept if room else 'off'})"
        yield from in_parallel(decode, range(len(keys)), title)

    def estimate(self, keys: Sequence[str]) -> int:
        """Bytes that the pixels of all images take, by the headers of some."""

        def size(key: str) -> int:
            try:
                with opened(self.root / key) as image:
                    return 3 * int(np.prod(shrunk_size(image.size, self.shorter_side)))
            except UserError:
                return 0

        some = keys[:: -(-len(keys) // SAMPLED)] if keys else []
        return round(sum(workers().map(size, some)) / max(1, len(some)) * len(keys))


class Pixels:
    """A file that images are added to until it has `room` bytes, or the disk is full; `error` then says so."""

    def __init__(self, path: Path, room: int):
        self.path, self.room, self.total, self.error = path, room, 0, None

    def __enter__(self) -> Pixels:
        self.file = None
        try:
            self.path.unlink(missing_ok=True)
            self.file = self.path.open("xb", buffering=0)
        except OSError as error:
            self.error = error
        return self

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, image: np.ndarray) -> int:
        """Where its pixels begin, or NOT_KEPT."""
        if self.error is not None or self.total + image.nbytes > self.room:
            return NOT_KEPT
        try:
            content = memoryview(np.ascontiguousarray(image)).cast("B")
            while len(content):
                content = content[self.file.write(content) :]
        except OSError as error:
            self.error = error
            self.file.truncate(self.total)
            return NOT_KEPT
        self.total += image.nbytes
        return self.total - image.nbytes


def fit(rows: np.ndarray, position: dict, errors: dict, size: int) -> bool:
    """Whether a build writes such rows for a file of `size` bytes of pixels; indexes come with folders from anywhere."""
    if any(key not in position or not isinstance(why, str) or not why for key, why in errors.items()):
        return False
    whole = np.ones(len(rows), dtype=bool)
    whole[[position[key] for key in errors]] = False
    offset, height, width = rows[whole, OFFSET:].T
    inside = (offset == NOT_KEPT) | ((offset >= 0) & (offset <= size) & (height * width * 3 <= size - offset))
    sides = (height > 0) & (width > 0) & (height < 2**24) & (width < 2**24)
    return bool((inside & sides).all())
