"""The files of an image index: written row by row, and read only where they are whole.

    index/index.json       {"model": fingerprint, "features": "features-1.npy", "rows": [[name, bytes, modified], …]}
    index/features-1.npy  (n, D) float32; row i belongs to rows[i]

Rows are appended, and index.json is replaced whenever some are safe on disk: what it lists is there, whenever the
build is killed. Each build begins a new features file with the rows that still hold, so that images that vanished
leave no gaps.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from minivlm.atomic_writing import write_atomically
from minivlm.errors import UserError
from minivlm.files import is_own_file, parse_json, read_bytes

Stamp = tuple[int, int]  # a file's size in bytes and time of change in ns: where both are the same, so is the file
HEADER = 128  # bytes before the first row of our .npy files


@dataclass(frozen=True)
class ImageIndex:
    """What `build_image_index` leaves behind, opened for reading."""

    path: Path  # where the index lies
    directory: Path  # the folder it describes
    model: str  # fingerprint of the model that made it
    features: np.ndarray  # (n, D) or (n, Q · D) float32, memory-mapped
    rows: dict[str, Stamp]  # name below the directory → stamp, in the order of the rows
    skipped: dict[str, tuple[Stamp, str]]  # name → stamp, and why it cannot be read
    file: str | None = None  # the features' file

    def __len__(self) -> int:
        return len(self.rows)


class IndexWriter:
    """Writes a new features file, row by row; `commit` makes what was added so far the index, in one step."""

    def __init__(
        self, old: ImageIndex, kept: dict[str, int], skipped: dict, stamps: dict[str, Stamp], save_every: float
    ):
        self.old, self.kept, self.skipped, self.stamps, self.save_every = old, kept, skipped, stamps, save_every
        self.path, self.directory = old.path, old.directory
        self.names: list[str] = []
        self.width = old.features.shape[1]
        self.file_name = f"features-{time.time_ns():x}-{os.getpid()}.npy"

    def __enter__(self) -> IndexWriter:
        with disk_errors(self.path):
            self.file = open(self.path / self.file_name, "xb", buffering=0)
        try:
            self.start()
        except BaseException:  # the old index still stands; leave nothing beside it
            self.file.close()
            (self.path / self.file_name).unlink()
            raise
        if self.old.file:
            with suppress(PermissionError):  # Windows keeps a file that is mapped; it stays as a leftover
                (self.path / self.old.file).unlink(missing_ok=True)
        return self

    def start(self) -> None:
        """The header and the rows that still hold."""
        names, rows = list(self.kept), list(self.kept.values())
        with disk_errors(self.path):
            write_all(self.file, npy_header(0, 0))
        for start in range(0, len(rows), 65_536):
            some = slice(start, start + 65_536)
            self.write(names[some], self.old.features[rows[some]])
        self.commit()

    def __exit__(self, *exception) -> None:
        """Also after Ctrl-C and errors: what was encoded is kept."""
        try:
            self.commit()
        finally:
            self.file.close()

    def add(self, names: Iterable[str], features: np.ndarray) -> None:
        """features (B, D), a row for each name; safe on disk at the next commit, within `save_every` seconds."""
        self.write(names, features)
        if time.monotonic() - self.saved >= self.save_every:
            self.commit()

    def write(self, names: Iterable[str], features: np.ndarray) -> None:
        with disk_errors(self.path):
            write_all(self.file, np.ascontiguousarray(features, dtype="<f4").tobytes())
        self.names += names
        self.width = features.shape[1]

    def skip(self, reasons: dict[str, str]) -> None:
        self.skipped |= {name: (self.stamps[name], why) for name, why in reasons.items()}

    def commit(self) -> None:
        record = {
            "directory": str(self.directory),
            "model": self.old.model,
            "features": self.file_name,
            "width": self.width,
            "rows": [[name, *self.stamps[name]] for name in self.names],
            "skipped": [[name, *stamp, why] for name, (stamp, why) in self.skipped.items()],
        }
        with disk_errors(self.path):
            self.file.seek(0)
            write_all(self.file, npy_header(len(self.names), self.width))
            self.file.seek(0, os.SEEK_END)
            os.fsync(self.file.fileno())
        write_atomically(self.path / "index.json", lambda path: path.write_text(json.dumps(record), encoding="utf-8"))
        self.saved = time.monotonic()


def write_all(file: FileIO, data: bytes) -> None:
    """An unbuffered file may take less than it is given, and has nothing left to fail on when it is closed."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def npy_header(rows: int, width: int) -> bytes:
    """A .npy header of fixed length, so that it can be rewritten as rows arrive. numpy.lib.format, version 1.0."""
    shape = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + shape.ljust(HEADER - 11).encode() + b"\n"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the index in {path} could not be written ({error.strerror or error}); what was saved before is kept. "
            "Free some space there, or name another place for it."
        ) from error


def open_image_index(path: str | Path) -> ImageIndex:
    """The index that lies in `path`. UserError if there is none, or its files do not fit together."""
    index = open_if_valid(Path(path))
    if index is None:
        raise UserError(f"{path} holds no image index that can be read; make one with build_image_index.")
    return index


def open_if_valid(path: Path) -> ImageIndex | None:
    """None where there is none, or one that is cut short or not of our making: its content cannot be relied on."""
    try:
        record = parse_json(read_bytes(path / "index.json"), texts=False)
        rows = {inside(name): (whole(size), whole(modified)) for name, size, modified in record["rows"]}
        skipped = {
            inside(name): ((whole(size), whole(modified)), as_text(why))
            for name, size, modified, why in record["skipped"]
        }
        shape, file = (len(rows), whole(record["width"])), as_text(record["features"])
        place = path / file
        ours = re.fullmatch(r"features-[0-9a-f]+-\d+\.npy", file) and is_own_file(place)
        if not ours or len(rows) != len(record["rows"]) or shape[1] < bool(rows):
            return None
        features = np.memmap(place, "<f4", "r", HEADER, shape) if rows else np.empty(shape, np.float32)
        directory, model = Path(as_text(record["directory"])), as_text(record["model"])
    except (UserError, OSError, ValueError, LookupError, TypeError, OverflowError):
        return None
    return ImageIndex(path, directory, model, features, rows, skipped, file)


def whole(value: object) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        raise ValueError(f"{value!r} is no size or time")
    return value


def as_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def inside(name: object) -> str:
    """The name of an image below the folder."""
    parts = as_text(name).split("/")
    if not all(parts) or ".." in parts or "\0" in name:
        raise ValueError(f"{name!r} leads out of the folder")
    return name
